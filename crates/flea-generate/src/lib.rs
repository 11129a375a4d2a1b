//! Random programs that know how helpers, maps, branches, loops and functions are used, most of
//! the time: what the fuzzers and the verifier's soundness tests feed on. In development only.
//!
//! A program is made of pieces (`pieces`), each of which leaves the machine as the next one
//! expects it (`builder`); a careless one breaks a rule now and then. Programs are for the maps
//! of [`maps`] and for a context of words, of which [`CONTEXT_WORDS`] are read. What is different
//! each time (a clock, a process id) never reaches `r0` or a map, so that two machines can be
//! compared by what a program returns.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "random numbers are cut to size on purpose"
)]

mod builder;
mod pieces;
mod random;

use flea_object::insn::Insn;
use flea_object::spec::{MapKind, MapSpec};

pub use random::Random;

/// Words of the context that programs read, from its start.
pub const CONTEXT_WORDS: u64 = 4;

/// Indices into [`maps`].
pub mod map {
    /// One value that programs reach without a look-up.
    pub const DATA: u32 = 0;
    /// A hash table.
    pub const HASH: u32 = 1;
    /// A ring buffer.
    pub const RING: u32 = 2;
    /// Constants.
    pub const CONSTANTS: u32 = 3;
    /// An array that is looked up.
    pub const ARRAY: u32 = 4;
    /// An array with values per CPU.
    pub const PER_CPU_ARRAY: u32 = 5;
    /// A hash table with values per CPU.
    pub const PER_CPU_HASH: u32 = 6;
    /// Where a program leaves all 64 bits of `r0`.
    pub const RESULT: u32 = 7;
    /// A program array. Where programs are compared it is empty.
    pub const JUMPS: u32 = 8;
}

/// The maps that programs name by index.
#[must_use]
pub fn maps() -> Vec<MapSpec> {
    let map = |name: &str, kind, key, value, max_entries| MapSpec {
        name: name.into(),
        kind,
        key_size_bytes: key,
        value_size_bytes: value,
        max_entries,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    };
    let init: Vec<u8> = (1..=16u8).map(|n| n.wrapping_mul(37)).collect();
    let constants = map(".rodata", MapKind::Array, 4, 16, 1);
    vec![
        map(".data", MapKind::Array, 4, 64, 1),
        map("hash", MapKind::Hash, 8, 32, 4),
        map("ring", MapKind::RingBuf, 0, 0, 4096),
        MapSpec { init: Some(init), read_only: true, ..constants },
        map("array", MapKind::Array, 4, 32, 8),
        map("percpu_array", MapKind::PerCpuArray, 4, 16, 2),
        map("percpu_hash", MapKind::PerCpuHash, 8, 16, 4),
        map("result", MapKind::Array, 4, 8, 1),
        map("jumps", MapKind::ProgArray, 4, 4, 8),
    ]
}

/// How often a rule is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Never, as far as the generator knows the rules.
    Careful,
    /// Sometimes.
    Careless,
}

/// A program, and what may be asked of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The instructions.
    pub insns: Vec<Insn>,
    /// Its result says nothing of addresses: two machines must agree on it.
    pub comparable: bool,
}

/// The next program of `random`, with helpers that call its functions in rounds. The kernel
/// takes those only with type information, so that such programs are not for comparing with it.
pub fn program_with_callbacks(random: &mut Random, style: Style) -> Generated {
    builder::Builder::new(random, style).with_callbacks().program()
}

/// The next program of `random`.
pub fn program(random: &mut Random, style: Style) -> Generated {
    builder::Builder::new(random, style).program()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use flea_object::helper::Helper;
    use flea_object::opcode as op;
    use flea_object::validate::validate;

    use super::*;

    #[test]
    fn careful_programs_are_well_formed_and_come_again() {
        for seed in 0..500 {
            let first = program(&mut Random::new(seed), Style::Careful);
            assert_eq!(first, program(&mut Random::new(seed), Style::Careful), "seed {seed}");
            assert_eq!(validate(&first.insns), Ok(()), "seed {seed}");
            assert!(first.comparable, "seed {seed}");
        }
    }

    #[test]
    fn every_kind_of_instruction_is_used() {
        let (mut opcodes, mut helpers) = (BTreeSet::new(), BTreeSet::new());
        for seed in 0..500 {
            for insn in program(&mut Random::new(seed), Style::Careful).insns {
                opcodes.insert(insn.opcode);
                if insn.opcode == op::CALL_OP && insn.src == 0 {
                    helpers.extend(Helper::from_id(insn.imm).map(Helper::name));
                }
            }
        }
        // Arithmetic 54, jumps 45 and calls, loads 8, stores 8, atomics 2, lddw and its half.
        assert!(opcodes.len() >= 110, "only {} opcodes: {opcodes:02x?}", opcodes.len());
        assert_eq!(helpers.len(), 16, "{helpers:?}");
    }
}
