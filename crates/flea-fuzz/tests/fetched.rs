//! Found by the kernel fuzzer (seed 1500023969): Linux 6.18 follows one path less than there is
//! where a branch hangs on what an atomic operation fetches from the stack, and returns another r0.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test's assembler: a wrong number or a mistake in a case fails the test"
)]

#[path = "../../flea-verifier/tests/asm/mod.rs"]
mod asm;

use std::process::Command;

use anyhow::Result;
use flea_fuzz::against_kernel::{AgainstKernel, Judged, Results};
use flea_fuzz::compiled::{Ran, Runner};
use flea_fuzz::differences::veiled;
use flea_fuzz::kernel::Kernel;
use flea_object::insn::Insn;

/// The third argument is `3 << 36 | 3`, which is put on the stack and fetched from there: it is not
/// below 34, so the branch is not taken.
const RIGHT: u64 = 7;
/// The low half of what was fetched: returned where the branch is taken.
const LINUX: u32 = 3;

/// All operations that leave in r0 what was there.
const FETCHES: [&str; 6] = [
    "cmpxchg *(u64 *)(r10 - 8) r4",
    "xchg *(u64 *)(r10 - 8) r0",
    "fetch *(u64 *)(r10 - 8) += r0",
    "fetch *(u64 *)(r10 - 8) |= r0",
    "fetch *(u64 *)(r10 - 8) &= r0",
    "fetch *(u64 *)(r10 - 8) ^= r0",
];

/// As small as it gets: the kernel keeps a state to compare with once it has seen eight
/// instructions and two jumps.
fn program(fetch: &str) -> Vec<Insn> {
    asm::assemble(&[
        "r5 = 0",
        "r5 = 0",
        "r4 = *(u64 *)(r1 + 16)",
        "*(u64 *)(r10 - 8) = r4",
        "r0 = 0",
        "if r4 > 12 goto both",
        "goto both",
        "both:",
        fetch,
        "if r0 s< 34 goto out",
        "r0 = 7",
        "out:",
        "exit",
    ])
}

fn worker() -> Result<Command> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flea-fuzz"));
    command.arg("--worker");
    Ok(command)
}

#[test]
fn both_paths_are_followed() {
    let mut runner = Runner::new(worker, &[]);
    for fetch in FETCHES {
        let ran = runner.run(&program(fetch)).unwrap();
        assert_eq!(ran, Ran::Both { interpreted: RIGHT, compiled: RIGHT }, "{fetch}");
    }
}

#[test]
fn the_kernel_is_right_where_it_knows_nothing_of_the_number() {
    if let Err(e) = Kernel::open() {
        println!("skipped: {e}");
        return;
    }
    let mut fuzzer = AgainstKernel::new(worker).unwrap();
    for fetch in FETCHES {
        let insns = program(fetch);
        match fuzzer.compare(&insns, true).unwrap() {
            Judged::Agree => println!("{fetch}: this kernel is mended"),
            Judged::Differ(results) => {
                let (interpreted, compiled) = (results.interpreted, results.compiled);
                assert_eq!((interpreted, compiled), (RIGHT, RIGHT), "{fetch}");
                assert_eq!(results.kernel_low, LINUX, "{fetch}");
                assert!(fuzzer.is_kernels_fault(&insns, results).unwrap(), "{fetch}");
            }
            other => panic!("{fetch}: {other:?}"),
        }
        let veiled = veiled(&insns).unwrap();
        assert_eq!(fuzzer.compare(&veiled, true).unwrap(), Judged::Agree, "{fetch}");
    }
}

#[test]
fn a_wrong_result_of_ours_is_not_the_kernels_fault() {
    if let Err(e) = Kernel::open() {
        println!("skipped: {e}");
        return;
    }
    let mut fuzzer = AgainstKernel::new(worker).unwrap();
    let results =
        |interpreted, compiled| Results { kernel_low: LINUX, kernel: None, interpreted, compiled };
    let insns = program(FETCHES[0]);
    assert!(fuzzer.is_kernels_fault(&insns, results(RIGHT, RIGHT)).unwrap());
    for (interpreted, compiled) in [(8, 8), (RIGHT, 8), (8, RIGHT)] {
        assert!(!fuzzer.is_kernels_fault(&insns, results(interpreted, compiled)).unwrap());
    }
    // Nothing is fetched: there is no other program to ask the kernel for.
    let insns = program("lock *(u64 *)(r10 - 8) += r0");
    assert!(!fuzzer.is_kernels_fault(&insns, results(RIGHT, RIGHT)).unwrap());
}
