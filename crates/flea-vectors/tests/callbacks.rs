//! Programs with callbacks in C, by the clang of this machine: verified, interpreted and
//! compiled, and each way with the result that the C says. And calls through a register.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;
use std::process::Command;

use flea_fixtures::{Tool, require};
use flea_object::asm::{Asm, JmpOp, Reg::*};
use flea_object::insn::Insn;
use flea_object::spec::{MapSpec, Object};
use flea_vectors::{Answer, Vector, VectorMap, Verdict, answer};
use serde_json::Value;

fn compile(version: &str) -> Option<Object> {
    let clang = require(Tool::Clang)?;
    let directory: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "c"].iter().collect();
    let output = Command::new(clang)
        .current_dir(directory)
        .args(["-target", "bpf", "-O2", "-g", "-Wall", "-Wno-unused", version])
        .args(["-c", "callbacks.bpf.c", "-o", "-"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(flea_object::parse(&output.stdout).unwrap())
}

fn hex(bytes: impl IntoIterator<Item = u8>) -> String {
    bytes.into_iter().map(|byte| format!("{byte:02x}")).collect()
}

fn map(spec: &MapSpec) -> VectorMap {
    VectorMap {
        kind: spec.kind as u32,
        key: spec.key_size_bytes,
        value: spec.value_size_bytes,
        max: spec.max_entries,
        flags: spec.flags,
        init: spec.init.as_ref().map(|init| hex(init.iter().copied())),
    }
}

fn run(insns: &[Insn], maps: &[MapSpec]) -> Answer {
    answer(&Vector {
        id: Value::Null,
        insns: hex(insns.iter().flat_map(|insn| insn.encode())),
        maps: maps.iter().map(map).collect(),
        mem: None,
        check: true,
    })
}

fn check(what: &str, insns: &[Insn], maps: &[MapSpec], expected: u64) {
    let answer = run(insns, maps);
    let r0 = Some(format!("{expected:#x}"));
    assert_eq!(answer.verdict, Verdict::Accept, "{what}: {}", answer.message);
    assert_eq!(answer.message, "", "{what}");
    assert_eq!((&answer.r0_interpreted, &answer.r0_compiled), (&r0, &r0), "{what}");
}

/// What each program of the C file returns.
fn expected(program: &str) -> u64 {
    let squares = |n: u64| (0..n).map(|i| i * i + i * 1000).sum::<u64>();
    match program {
        "sum_of_all" => 100 * 100_000 + (0..100).sum::<u64>(),
        "sum_of_some" => 11 * 100_000 + (0..10).sum::<u64>(),
        "unknown_rounds" => 6 * 100_000 + (0..6).sum::<u64>(),
        "too_many" => (-7i64).cast_unsigned(),
        "wrong_flags" => (-22i64).cast_unsigned(),
        "no_rounds" => 0,
        "hash_elements" => {
            // Odd keys are left; each value goes up by one between the two walks.
            let odd = (0..5).flat_map(|row| [1, 3].map(|column| (row * 8 + column, row)));
            let total: u64 = odd.map(|(key, row)| 2 * (key * 1000 + row) + 1).sum();
            20 * 100_000_000 + 10 * 1_000_000 + total
        }
        "percpu_hash_elements" => 7 * 1_000_000 + squares(7),
        "array_elements" => 10 * 1_000_000 + squares(10),
        "some_of_percpu_array" => 4 * 1_000_000 + squares(4),
        "nested_calls" => (0..8).map(|x| x + 2 * (x + 3)).sum(),
        other => panic!("no result known of {other}"),
    }
}

#[test]
fn c_programs_with_callbacks() {
    for version in ["-mcpu=v1", "-mcpu=v2", "-mcpu=v3"] {
        let Some(object) = compile(version) else { return };
        assert_eq!(object.programs.len(), 11);
        for program in &object.programs {
            let what = format!("{version} {}", program.name);
            check(&what, &program.insns, &object.maps, expected(&program.name));
        }
    }
}

/// `main` picks one of two functions by the lowest bit of `ctx[SLOT]` and calls it.
fn one_of_two(slot: i16) -> Vec<Insn> {
    let mut asm = Asm::new();
    let (call, f, g) = (asm.new_label(), asm.new_label(), asm.new_label());
    asm.load(flea_object::asm::Size::DW, R6, R1, 8 * slot).mov64_imm(R1, 5).function_ref(R2, f);
    asm.jump_if(JmpOp::Set, R6, 1, call).function_ref(R2, g);
    asm.bind(call).call_register(R2).add64_imm(R0, 1).exit();
    asm.bind(f).mov64_reg(R0, R1).exit();
    asm.bind(g).mov64_reg(R0, R1).add64_reg(R0, R0).exit();
    asm.finish().unwrap()
}

#[test]
fn calls_through_a_register() {
    check("odd", &one_of_two(0), &[], 6);
    check("even", &one_of_two(1), &[], 11);
}

/// clang before 19 has the register of a `callx` in `imm`.
#[test]
fn calls_through_a_register_as_older_compilers_write_them() {
    let mut insns = one_of_two(0);
    for insn in &mut insns {
        if let Some(register) = insn.callx() {
            (insn.dst, insn.imm) = (0, i32::from(register));
        }
    }
    check("imm", &insns, &[], 6);
}

/// The callback of a `bpf_loop` is one of two.
#[test]
fn a_callback_that_is_known_when_it_runs() {
    for (slot, expected) in [(0, 9), (1, 4)] {
        let mut asm = Asm::new();
        let (call, f, g) = (asm.new_label(), asm.new_label(), asm.new_label());
        asm.load(flea_object::asm::Size::DW, R6, R1, 8 * slot).function_ref(R2, f);
        asm.jump_if(JmpOp::Set, R6, 1, call).function_ref(R2, g);
        asm.bind(call).mov64_imm(R1, 9).mov64_imm(R3, 0).mov64_imm(R4, 0);
        asm.call(flea_object::helper::Helper::Loop).exit();
        asm.bind(f).mov64_imm(R0, 0).exit();
        let stop = asm.new_label();
        asm.bind(g).mov64_imm(R0, 1).jump_if(JmpOp::Eq, R1, 3, stop).mov64_imm(R0, 0);
        asm.bind(stop).exit();
        check("callback", &asm.finish().unwrap(), &[], expected);
    }
}
