//! The text of both products, followed instruction by instruction as a warp would, against plain loops. Elements are
//! whole numbers of 16 bits: what is tested is which of them meet.

use std::{collections::HashMap, iter};

use bifocal_core::{Element, Problem};

use super::{across, down, scores_text, values_text};
use crate::{
    mma::{
        backward::{Blueprints, LARGE, blueprints as blueprints_of},
        blueprint,
    },
    rows::Sight,
    tensor_core::{Blueprint, PANEL, SWIZZLE, swizzled},
    visibility::Visibility,
};

const LANES: usize = 32;

/// A warp's registers by name, one value per lane, and the shared memory that it reads.
#[derive(Default)]
struct Warp {
    registers: HashMap<String, [u32; LANES]>,
    memory: Vec<u16>,
}

/// `a, {b, c}, [d+1]` as `[[a], [b, c], [d+1]]`.
fn operands(mut text: &str) -> Vec<Vec<&str>> {
    let mut found = Vec::new();
    loop {
        text = text.trim_start_matches([',', ' ']);
        let Some(first) = text.chars().next() else { return found };
        let (inside, rest) = match first {
            '{' => text[1..].split_once('}').expect("a closing brace"),
            '[' => text[1..].split_once(']').expect("a closing bracket"),
            _ => text.split_once(',').unwrap_or((text, "")),
        };
        found.push(inside.split(',').map(str::trim).collect());
        text = rest;
    }
}

/// Both halves of a register.
fn halves(register: u32) -> [f32; 2] {
    [f32::from(register as u16 as i16), f32::from((register >> 16) as u16 as i16)]
}

impl Warp {
    fn set(&mut self, name: &str, value: impl Fn(usize) -> u32) {
        self.registers.insert(name.to_string(), std::array::from_fn(value));
    }

    fn get(&self, name: &str) -> [u32; LANES] {
        match name.strip_prefix("0f") {
            Some(bits) => [u32::from_str_radix(bits, 16).expect("a number"); LANES],
            None => name.parse().map_or_else(|_| self.registers[name], |number| [number; LANES]),
        }
    }

    fn run(&mut self, text: &str) {
        let inside = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).expect("one block");
        let statements = inside.split(';').map(str::trim);
        for statement in
            statements.filter(|statement| !statement.is_empty() && !statement.starts_with(".reg"))
        {
            let (name, rest) = statement.split_once(' ').expect("an instruction with operands");
            let operands = operands(rest);
            match name.split('.').next() {
                Some("mov") => {
                    let value = self.get(operands[1][0]);
                    self.set(operands[0][0], |lane| value[lane]);
                }
                Some("xor") => {
                    let (a, b) = (self.get(operands[1][0]), self.get(operands[2][0]));
                    self.set(operands[0][0], |lane| a[lane] ^ b[lane]);
                }
                Some("ldmatrix") => self.ldmatrix(&operands, name.contains(".trans")),
                Some("mma") => self.mma(&operands),
                _ => panic!("{name} is not known here"),
            }
        }
    }

    fn ldmatrix(&mut self, operands: &[Vec<&str>], transposed: bool) {
        let (base, offset) = operands[1][0].split_once('+').expect("an address and an offset");
        let (base, offset) = (self.get(base), offset.parse::<u32>().expect("a number"));
        for (matrix, name) in operands[0].iter().enumerate() {
            let rows: [u32; 8] = std::array::from_fn(|row| base[matrix * 8 + row] + offset);
            let banks = rows.iter().fold(0, |banks, row| banks | (1u32 << (row / 16 % 8)));
            assert_eq!(banks, 0xff, "rows share a bank");
            let values: Vec<u32> = (0..LANES)
                .map(|lane| {
                    let at = |i: usize| {
                        let (row, column) = (lane / 4, lane % 4 * 2 + i);
                        let (row, column) = if transposed { (column, row) } else { (row, column) };
                        u32::from(self.memory[rows[row] as usize / 2 + column])
                    };
                    at(0) | (at(1) << 16)
                })
                .collect();
            self.set(name, |lane| values[lane]);
        }
    }

    fn mma(&mut self, operands: &[Vec<&str>]) {
        let (mut a, mut b, mut c) = ([[0.0; 16]; 16], [[0.0; 8]; 16], [[0.0; 8]; 16]);
        for lane in 0..LANES {
            for (i, name) in operands[1].iter().enumerate() {
                for (j, x) in halves(self.get(name)[lane]).into_iter().enumerate() {
                    a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + j] = x;
                }
            }
            for (i, name) in operands[2].iter().enumerate() {
                for (j, x) in halves(self.get(name)[lane]).into_iter().enumerate() {
                    b[lane % 4 * 2 + i * 8 + j][lane / 4] = x;
                }
            }
            for (i, name) in operands[3].iter().enumerate() {
                c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = f32::from_bits(self.get(name)[lane]);
            }
        }
        for (i, name) in operands[0].iter().enumerate() {
            self.set(name, |lane| {
                let (row, column) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
                let sum: f32 = (0..16).map(|k| a[row][k] * b[k][column]).sum();
                (c[row][column] + sum).to_bits()
            });
        }
    }
}

/// Small numbers, none like its neighbours.
fn number(seed: usize, row: usize, column: usize) -> i16 {
    ((seed + row * 31 + column * 17 + row * column * 7) % 13) as i16 - 6
}

/// Rows of a matrix as the copies lay them down: panels of the 128-byte swizzle.
fn store(memory: &mut Vec<u16>, seed: usize, rows: usize, dim: usize) {
    let start = memory.len();
    memory.resize(start + rows * dim.next_multiple_of(PANEL), 0x7fff);
    for row in 0..rows {
        for column in 0..dim {
            let panel = column / PANEL * rows * SWIZZLE;
            let at = panel + row * SWIZZLE + swizzled(row as u32, column as u32 / 8) as usize;
            memory[start + at / 2 + column % 8] = number(seed, row, column) as u16;
        }
    }
}

/// The row and the column of a thread's `i`-th score or output of 16 rows.
fn place(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2)
}

fn blueprints() -> impl Iterator<Item = Blueprint> {
    [64, 96, 128, 256].into_iter().flat_map(|dim| {
        let problem = Problem::new([1, 1, 1, dim], [1, 1, 1, dim], Element::F16).expect("a possible problem");
        let sight = |visibility| Sight { visibility, routed: false, ragged: false };
        let forward =
            blueprint(&problem, sight(Visibility::All), false, false).expect("a head dim with a kernel");
        let backward = [Visibility::All, Visibility::Window].into_iter().flat_map(move |visibility| {
            let Blueprints { key, query } =
                blueprints_of(&problem, sight(visibility), LARGE).expect("a head dim with kernels");
            [key, query]
        });
        iter::once(forward).chain(backward)
    })
}

#[test]
fn scores_are_queries_times_keys() {
    for blueprint in blueprints() {
        let (shape, blocks) = (blueprint.shape, blueprint.blocks());
        let (count, dim) = (shape.keys / 2, shape.dim);
        let mut warp = Warp::default();
        store(&mut warp.memory, 1, shape.rows, dim);
        let key_room = warp.memory.len() * 2;
        store(&mut warp.memory, 2, shape.keys, dim);
        // The last warp's rows.
        let first = shape.rows - blueprint.warp_rows;
        warp.set(&format!("%{}", blocks * count), |lane| (first * SWIZZLE) as u32 + across(lane as u32));
        warp.set(&format!("%{}", blocks * count + 1), |lane| key_room as u32 + down(lane as u32));
        warp.run(&scores_text(blueprint));
        for i in 0..blocks * count {
            let found = warp.get(&format!("%{i}"));
            for (lane, found) in found.into_iter().enumerate() {
                let (row, key) = place(lane, i % count);
                let row = first + i / count * 16 + row;
                let exact: i32 =
                    (0..dim).map(|d| i32::from(number(1, row, d)) * i32::from(number(2, key, d))).sum();
                assert_eq!(f32::from_bits(found), exact as f32, "{blueprint:?}: row {row}, key {key}");
            }
        }
    }
}

#[test]
fn outputs_are_weights_times_values() {
    for blueprint in blueprints() {
        let (shape, blocks) = (blueprint.shape, blueprint.blocks());
        let per_block = shape.columns() / 2;
        let (outputs, weights) = (blocks * per_block, blocks * shape.keys / 4);
        let mut warp = Warp::default();
        store(&mut warp.memory, 3, shape.keys, shape.dim);
        for i in 0..outputs {
            warp.set(&format!("%{}", outputs + i), |lane| ((i + lane) as f32).to_bits());
        }
        for i in 0..weights {
            // Two neighbouring weights of a row to a register, in the order of scores.
            let (block, i_in_block) = (i / (shape.keys / 4), i % (shape.keys / 4) * 2);
            let half = |lane: usize, j: usize| {
                let (row, key) = place(lane, i_in_block + j);
                u32::from(number(4, block * 16 + row, key) as u16)
            };
            warp.set(&format!("%{}", 2 * outputs + i), |lane| half(lane, 0) | (half(lane, 1) << 16));
        }
        warp.set(&format!("%{}", 2 * outputs + weights), |lane| across(lane as u32));
        warp.run(&values_text(blueprint));
        for i in (0..outputs).filter(|i| i % per_block < shape.dim / 2) {
            let found = warp.get(&format!("%{i}"));
            for (lane, found) in found.into_iter().enumerate() {
                let (row, column) = place(lane, i % per_block);
                let row = i / per_block * 16 + row;
                let sum: i32 = (0..shape.keys)
                    .map(|key| i32::from(number(4, row, key)) * i32::from(number(3, key, column)))
                    .sum();
                let exact = (i + lane) as f32 + sum as f32;
                assert_eq!(f32::from_bits(found), exact, "{blueprint:?}: row {row}, column {column}");
            }
        }
    }
}
