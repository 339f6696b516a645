//! The kernels as CUDA C++, written on the host: whether they can be is known without a GPU.

use bifocal_core::Element;
use bifocal_tensor_core::source::{Gpu, ONE_CUBE, buffer, target};

use super::*;
use crate::{
    step::rows::{NumbersLaunch, StridesLaunch},
    view::PlacesLaunch,
};

fn source(problem: &Problem, routed: bool) -> String {
    let blueprint = Blueprint::new(problem, Cut::Even, routed);
    let element: ElemType = problem.element.into();
    let kernel = attend_kernel::create_dummy_kernel(
        Gpu::A100.properties(),
        target(),
        ONE_CUBE,
        CubeDim::new_1d(PLANE * PLANES as u32),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        buffer(),
        StridesLaunch::new(1, 1, 1),
        PlacesLaunch::new(1, 1, 1, 1, 1),
        NumbersLaunch::new(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1.0, 1.0, 0.0, 0.0),
        blueprint,
        element,
        blueprint.width,
    );
    Gpu::A100.compile(&kernel).expect("a kernel that CUDA C++ has words for")
}

#[test]
fn tiles_can_be_written_as_cuda() {
    for (element, head_dim, group, routed) in [
        (Element::Bf16, 128, 1, true),
        (Element::Bf16, 80, 3, true),
        (Element::Bf16, 128, 4, false),
        (Element::F16, 64, 16, true),
        (Element::F32, 128, 2, false),
    ] {
        let problem =
            Problem::new([1, group, 1, head_dim], [1, 1, 64, head_dim], element).expect("a possible problem");
        let text = source(&problem, routed);
        assert!(text.contains("__shfl"), "{element} {head_dim} {group}");
        // For who wants to compile them.
        if let Ok(folder) = std::env::var("DECODE_SOURCES") {
            let file = format!("{folder}/{element}-{head_dim}-{group}.sm_90a.cu");
            std::fs::write(file, text).expect("a folder to write to");
        }
    }
}

#[test]
fn scores_are_dealt_to_lanes_without_a_rest() {
    for element in [Element::Bf16, Element::F32] {
        for head_dim in (8..=256).step_by(8) {
            for (group, query_len) in [(1, 1), (3, 1), (4, 2), (8, 16)] {
                let problem = Problem::new([1, group, query_len, head_dim], [1, 1, 64, head_dim], element)
                    .expect("a possible problem");
                let Blueprint { rows, width, lanes, loads, .. } = Blueprint::new(&problem, Cut::Even, false);
                if head_dim / width < 2 || head_dim / width > 32 {
                    continue;
                }
                assert!(rows <= lanes && rows * width <= 64 && lanes <= 32, "{element} {head_dim}");
                // A lane's scores are of one row.
                assert!(rows * loads < lanes || loads.is_multiple_of(rows * loads / lanes));
                assert!(tile_rows(&problem) <= rows);
            }
        }
    }
}
