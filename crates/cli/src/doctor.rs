//! `bifocal doctor`: what is here, and what can run on it.

use std::path::PathBuf;

use anyhow::Result;
use bifocal::{AttentionOperator, DeviceProfile, Element, Far, Full, Problem, Routine, Window, Windowed};
use clap::Args;
use serde::Serialize;

use crate::{
    DeviceName,
    cache::{self, Kept},
    output,
};

#[derive(Args)]
pub(crate) struct Options {
    /// Look at this device alone.
    #[arg(long)]
    device: Option<DeviceName>,
    /// Write what is found as JSON to this file (`-` for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Serialize)]
struct Findings {
    /// None where compiled kernels are not kept.
    kernel_cache: Option<Kept>,
    devices: Vec<Finding>,
}

#[derive(Serialize)]
struct Finding {
    device: &'static str,
    /// The device's name, or why there is none.
    found: std::result::Result<Found, String>,
}

#[derive(Serialize)]
struct Found {
    name: String,
    runtime: String,
    elements: Vec<String>,
    cores: Option<u32>,
    plane_size: (u32, u32),
    max_units_per_cube: u32,
    shared_memory: usize,
    /// Whether the runtime has compiled kernels to keep for later runs.
    keeps_kernels: bool,
    support: Vec<Support>,
}

/// Whether one routine of one operator can run one kind of problem.
#[derive(Serialize)]
struct Support {
    operator: &'static str,
    routine: String,
    element: String,
    head_dim: usize,
    /// Why not, if not.
    refusal: Option<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let devices = DeviceName::ALL
        .into_iter()
        .filter(|device| options.device.is_none_or(|wanted| wanted == *device))
        .map(|device| Finding {
            device: device.as_str(),
            found: bifocal::open(device.as_str())
                .map(|client| found(&DeviceProfile::of(&client)))
                .map_err(|error| error.to_string()),
        })
        .collect();
    let findings = Findings { kernel_cache: Kept::now(), devices };
    if let Some(path) = &options.json {
        output::write_json(path, &findings)?;
    }
    if options.json.as_deref() != Some(std::path::Path::new("-")) {
        print(&findings);
    }
    match options.device.and_then(|_| findings.devices.first()?.found.as_ref().err()) {
        Some(reason) => anyhow::bail!("{reason}"),
        None => Ok(()),
    }
}

fn found(profile: &DeviceProfile) -> Found {
    Found {
        name: profile.name.clone(),
        runtime: profile.runtime.clone(),
        elements: profile.elements.iter().map(ToString::to_string).collect(),
        cores: profile.cpu_cores,
        plane_size: profile.plane_size,
        max_units_per_cube: profile.max_units_per_cube,
        shared_memory: profile.shared_memory,
        keeps_kernels: bifocal::keeps_kernels(profile),
        support: support(profile),
    }
}

fn support(profile: &DeviceProfile) -> Vec<Support> {
    let Ok(window) = Window::new(256) else { return Vec::new() };
    let operators: [&dyn AttentionOperator; 3] = [&Windowed::new(window), &Full, &Far::beyond(window)];
    let mut support = Vec::new();
    for operator in operators {
        for routine in Routine::ALL {
            for element in Element::FLOATS {
                for head_dim in [64, 128, 256, 1024] {
                    let shape = [1, 8, 4096, head_dim];
                    let Ok(problem) = Problem::new(shape, shape, element) else { continue };
                    let refusal = operator.supports(routine, &problem, profile).err();
                    support.push(Support {
                        operator: operator.name(),
                        routine: routine.to_string(),
                        element: element.to_string(),
                        head_dim,
                        refusal: refusal.map(|refusal| refusal.to_string()),
                    });
                }
            }
        }
    }
    support
}

fn print(findings: &Findings) {
    let mut devices = output::table([
        "device",
        "name",
        "types",
        "units per cube",
        "plane",
        "shared memory",
        "keeps kernels",
    ]);
    for finding in &findings.devices {
        devices.add_row(match &finding.found {
            Ok(found) => vec![
                finding.device.to_string(),
                found.name.clone(),
                found.elements.join(" "),
                found.max_units_per_cube.to_string(),
                format!("{} to {}", found.plane_size.0, found.plane_size.1),
                format!("{} KiB", found.shared_memory / 1024),
                if found.keeps_kernels { "yes" } else { "no" }.to_string(),
            ],
            Err(reason) => vec![finding.device.to_string(), format!("not here: {reason}")],
        });
    }
    println!("{devices}\n{}", cache::describe(findings.kernel_cache.as_ref()));
    for finding in &findings.devices {
        let Ok(found) = &finding.found else { continue };
        let mut table = output::table(["operator", "routine", "type", "head dim", "can run"]);
        for row in &found.support {
            let can_run = row.refusal.as_ref().map_or("yes".to_string(), |why| format!("no: {why}"));
            table.add_row([
                row.operator.to_string(),
                row.routine.clone(),
                row.element.clone(),
                row.head_dim.to_string(),
                can_run,
            ]);
        }
        println!("\n{} ({}):\n{table}", finding.device, found.name);
    }
}
