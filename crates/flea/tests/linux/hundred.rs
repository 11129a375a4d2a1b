//! A hundred programs of mixed kinds on one function: all run, in order, and the function's result
//! is right.

use anyhow::{Context as _, Result};
use flea::asm::{AluOp, Asm, Reg, Size};
use flea::{Map, MapIdx, MapKind, MapSpec, Object, ObjectSpec, ProgramKind, ProgramSpec};

use super::{Bench, c_int};

const PROGRAMS: u64 = 100;
/// Words of the log; word 0 says how many of the others are written.
const LOG_WORDS: u32 = 256;
const KINDS: [ProgramKind; 6] = [
    ProgramKind::Fentry,
    ProgramKind::Fexit,
    ProgramKind::Fsession,
    ProgramKind::FmodRet,
    ProgramKind::Uprobe,
    ProgramKind::Uretprobe,
];

fn kind(number: u64) -> ProgramKind {
    KINDS[usize::try_from(number).unwrap() % KINDS.len()]
}

/// Appends its number to the log, and lets the function run.
fn program(number: u64) -> ProgramSpec {
    let mut asm = Asm::new();
    asm.map_value(Reg::R1, MapIdx(0), 0)
        .load(Size::DW, Reg::R2, Reg::R1, 0)
        .add64_imm(Reg::R2, 1)
        .alu64(AluOp::And, Reg::R2, i32::try_from(LOG_WORDS - 1).unwrap())
        .store(Size::DW, Reg::R1, 0, Reg::R2)
        .alu64(AluOp::Lsh, Reg::R2, 3)
        .add64_reg(Reg::R1, Reg::R2)
        .store_imm(Size::DW, Reg::R1, 0, i32::try_from(number).unwrap())
        .mov64_imm(Reg::R0, 0)
        .exit();
    ProgramSpec {
        name: format!("program{number}"),
        kind: kind(number),
        insns: asm.finish().unwrap(),
        ..ProgramSpec::default()
    }
}

fn object() -> ObjectSpec {
    let log = MapSpec {
        name: "log".into(),
        kind: MapKind::Array,
        key_size_bytes: 4,
        value_size_bytes: 8 * LOG_WORDS,
        max_entries: 1,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    };
    let programs = (0..PROGRAMS).map(program).collect();
    ObjectSpec { maps: vec![log], programs, ..ObjectSpec::default() }
}

/// What was written since the last call.
fn log(object: &Object) -> Vec<u64> {
    let Some(Map::Array(log)) = object.map("log") else { panic!("no log") };
    let bytes = log.get(0).unwrap();
    let words: Vec<u64> =
        bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect();
    log.set(0, &vec![0; bytes.len()]).unwrap();
    words[1..=usize::try_from(words[0]).unwrap()].to_vec()
}

/// Kind after kind, and within a kind the newest first; the exit sides of fexit and fsession
/// programs are of one kind, as in Linux.
fn expected(attached: &[u64]) -> Vec<u64> {
    use ProgramKind::{Fentry, Fexit, FmodRet, Fsession, Uprobe, Uretprobe};
    let order: [&[ProgramKind]; 6] =
        [&[Fentry], &[Uprobe], &[Fsession], &[FmodRet], &[Fexit, Fsession], &[Uretprobe]];
    let newest_first = attached.iter().rev().copied();
    order
        .iter()
        .flat_map(|kinds| newest_first.clone().filter(|n| kinds.contains(&kind(*n))))
        .collect()
}

#[test]
fn a_hundred_programs_run_in_order() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let object = bench.session.load(object())?;
    let function = bench.function("two")?;
    let on = |number: &u64| -> Result<_> {
        let program = object.program(&format!("program{number}")).context("no such program")?;
        Ok(program.on(&function, 0))
    };
    let all: Vec<u64> = (0..PROGRAMS).collect();
    let link = object.attach(&all.iter().map(on).collect::<Result<Vec<_>>>()?)?;
    for _ in 0..3 {
        assert_eq!(call!(bench.library, two(2, 3): (c_int, u64) -> c_int), 5);
        assert_eq!(log(&object), expected(&all));
    }
    link.detach()?;
    assert_eq!(call!(bench.library, two(2, 3): (c_int, u64) -> c_int), 5);
    assert!(log(&object).is_empty());

    // In the order of attaching, whatever their numbers are.
    let shuffled: Vec<u64> = all.iter().map(|n| n * 37 % PROGRAMS).collect();
    let link = object.attach(&shuffled.iter().map(on).collect::<Result<Vec<_>>>()?)?;
    assert_eq!(call!(bench.library, two(2, 3): (c_int, u64) -> c_int), 5);
    assert_eq!(log(&object), expected(&shuffled));
    link.detach()?;
    Ok(())
}
