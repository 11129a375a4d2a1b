//! What verifying costs: time and memory for programs of a thousand and of a hundred thousand
//! instructions, or visits where there is a loop. Each in a process of its own, whose memory
//! nothing else has used before.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use flea_object::asm::{AluOp, Asm, JmpOp, Reg::*, Size};
use flea_object::insn::Insn;
use flea_object::spec::{MapIdx, MapKind, MapSpec, Program, ProgramKind};
use flea_verifier::{Context, verify};

/// Instructions, and how long they may take.
const SIZES: [(usize, Duration); 2] =
    [(1000, Duration::from_millis(5)), (100_000, Duration::from_secs(3))];
/// Each time is the median of so many.
const N_TIMES: usize = 5;

/// Verifying one program.
pub struct Verification {
    /// What kind of program.
    pub shape: &'static str,
    /// Instructions, or visits of a loop's.
    pub n_insns: usize,
    /// At most so long.
    pub wanted: Duration,
    /// What it took, or why there is nothing to tell.
    pub outcome: Result<Cost>,
}

/// What verifying took.
pub struct Cost {
    /// The median.
    pub time: Duration,
    /// The most memory beyond what the process had before.
    pub peak_bytes: u64,
}

type Make = fn(usize) -> Result<Vec<Insn>>;

const SHAPES: [(&str, Make); 4] = [
    ("straight on", straight),
    ("both ways each time", branchy),
    ("a loop over an array", loopy),
    ("a loop with a branch", branchy_loop),
];

/// The option of `xtask bench` that measures one of them: its index and the number of
/// instructions follow.
pub const ONE: &str = "--verify-one";

/// Every shape in every size.
pub fn measure() -> Vec<Verification> {
    let all = SIZES.iter().flat_map(|size| SHAPES.iter().enumerate().map(move |s| (s, *size)));
    all.map(|((number, (shape, _)), (n_insns, wanted))| {
        let outcome = in_child(number, n_insns);
        Verification { shape, n_insns, wanted, outcome }
    })
    .collect()
}

fn in_child(number: usize, n_insns: usize) -> Result<Cost> {
    let output = Command::new(std::env::current_exe()?)
        .args(["bench", ONE, &number.to_string(), &n_insns.to_string()])
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let (ns, bytes) = text.trim().split_once(' ').context("two numbers")?;
    Ok(Cost { time: Duration::from_nanos(ns.parse()?), peak_bytes: bytes.parse()? })
}

/// What the child does: prints nanoseconds and bytes.
pub fn measure_one(number: &str, n_insns: &str) -> Result<()> {
    let (_, make) = SHAPES.get(number.parse::<usize>()?).context("no such shape")?;
    let Cost { time, peak_bytes } = cost(make(n_insns.parse()?)?)?;
    println!("{} {peak_bytes}", time.as_nanos());
    Ok(())
}

const CONTEXT: Context = Context::Tracing { n_args: 2, n_results: 0, session: false };

fn program(insns: Vec<Insn>) -> Program {
    Program {
        name: "bench".into(),
        section: "fentry/bench".into(),
        kind: ProgramKind::Fentry,
        insns,
        ..Program::default()
    }
}

fn cost(insns: Vec<Insn>) -> Result<Cost> {
    let (program, maps) = (program(insns), [data()]);
    let before = resident_bytes("VmRSS:")?;
    verify(&program, &maps, CONTEXT)?;
    let peak_bytes = resident_bytes("VmHWM:")?.saturating_sub(before);
    let mut times = Vec::new();
    for _ in 0..N_TIMES {
        let start = Instant::now();
        verify(&program, &maps, CONTEXT)?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    Ok(Cost { time: times[N_TIMES / 2], peak_bytes })
}

fn resident_bytes(field: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no such field")?;
    Ok(kib.trim().parse::<u64>()? * 1024)
}

fn data() -> MapSpec {
    MapSpec {
        name: ".data".into(),
        kind: MapKind::Array,
        key_size_bytes: 4,
        value_size_bytes: 4096,
        max_entries: 1,
        flags: 0,
        init: None,
        read_only: false,
        inner: None,
        lock_offset: None,
        template: false,
    }
}

/// r6 points to the data, r7 is a number from there.
fn begin() -> Asm {
    let mut asm = Asm::new();
    asm.map_value(R6, MapIdx(0), 0).load(Size::DW, R7, R6, 0).mov64_imm(R8, 0);
    asm
}

fn end(mut asm: Asm) -> Result<Vec<Insn>> {
    asm.store(Size::DW, R6, 8, R8).mov64_imm(R0, 0).exit();
    Ok(asm.finish()?)
}

/// Masked indices, accesses through them, sums on the stack.
fn straight(n_insns: usize) -> Result<Vec<Insn>> {
    let mut asm = begin();
    for i in (0..=60i16).cycle() {
        if asm.n_insns() + 12 > n_insns {
            break;
        }
        asm.mov64_reg(R2, R7).alu64(AluOp::Rsh, R2, i32::from(i)).alu64(AluOp::And, R2, 1023);
        asm.mov64_reg(R3, R6).add64_reg(R3, R2).load(Size::B, R4, R3, i).add64_reg(R8, R4);
        asm.store(Size::DW, R10, -8 * (i + 1), R8).load(Size::W, R5, R10, -8 * (i + 1));
    }
    end(asm)
}

/// Each test of the data parts the path, and both ways come together again.
fn branchy(n_insns: usize) -> Result<Vec<Insn>> {
    let mut asm = begin();
    for i in (0..500i16).cycle() {
        if asm.n_insns() + 24 > n_insns {
            break;
        }
        let skip = asm.new_label();
        asm.load(Size::DW, R4, R6, 8 * i).jump_if(JmpOp::Set, R4, 1 << (i % 30), skip);
        asm.add64_imm(R8, i32::from(i)).alu64(AluOp::Mul, R8, 3).bind(skip);
        // No more than 8192 branches may wait, here as in Linux.
        for k in 1..6 {
            asm.load(Size::W, R5, R6, 8 * i + 4).alu64(AluOp::Rsh, R5, k).add64_reg(R8, R5);
        }
    }
    end(asm)
}

fn loopy(n_visits: usize) -> Result<Vec<Insn>> {
    array_loop(n_visits, 8, |_| {})
}

fn branchy_loop(n_visits: usize) -> Result<Vec<Insn>> {
    array_loop(n_visits, 15, |asm| {
        let skip = asm.new_label();
        asm.jump_if(JmpOp::Gt, R4, 100, skip);
        for _ in 0..3 {
            asm.add64_reg(R8, R4).alu64(AluOp::Mul, R8, 3);
        }
        asm.bind(skip);
    })
}

/// As many rounds over the data as make `n_visits` of instructions.
fn array_loop(n_visits: usize, n_round: usize, body: fn(&mut Asm)) -> Result<Vec<Insn>> {
    let rounds = i32::try_from(n_visits / n_round)?;
    let mut asm = begin();
    let start = asm.new_label();
    asm.mov64_imm(R9, 0).bind(start);
    asm.mov64_reg(R2, R9).alu64(AluOp::And, R2, 4095).mov64_reg(R3, R6).add64_reg(R3, R2);
    asm.load(Size::B, R4, R3, 0).add64_reg(R8, R4);
    body(&mut asm);
    asm.add64_imm(R9, 1).jump_if(JmpOp::Lt, R9, rounds, start);
    end(asm)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;

    #[test]
    fn all_shapes_are_accepted_and_as_long_as_said() {
        for (shape, make) in SHAPES {
            let insns = make(1000).unwrap();
            if !shape.contains("loop") {
                assert!((950..=1000).contains(&insns.len()), "{shape}: {}", insns.len());
            }
            verify(&program(insns), &[data()], CONTEXT).unwrap();
        }
    }
}
