//! Measures attaching to ten thousand functions at once, and taking it off again, beside the
//! kernel's `uprobe_multi` link on the same functions of the same process, in rounds that take
//! turns. `cargo xtask bench` runs it, optimised; by hand:
//!
//! ```text
//! cargo run --release -p flea --example bulk [-- N_FUNCTIONS [N_ROUNDS]]
//! ```
//!
//! Both run the same program, which counts calls per function by its attach cookie. Reading
//! symbols is in neither time: `uprobe_multi` is given the functions' offsets in the file, and
//! Flea has proved each site, read each signature and verified the program before the clock
//! starts (`Program::check`). Compiling and linking images, making the registry, and swapping
//! the sites are in it, and so is giving all memory back.
#![allow(clippy::print_stdout, reason = "its output is what it is for")]

mod kernel;

use std::{
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flea::{
    Function, Helper, Map, MapIdx, MapKind, MapSpec, Object, ObjectSpec, ProgramKind, ProgramSpec,
    Session,
    asm::{Asm, JmpOp, Reg, Size},
};
use flea_fixtures::{Fixture, Running, try_build};

use kernel::Multi;

const MAP_NAME: &str = "calls";

/// Times of one way in one round.
struct Times {
    on: Duration,
    off: Duration,
}

fn main() -> ExitCode {
    let mut numbers = std::env::args().skip(1).map(|arg| arg.parse::<u32>().ok());
    let n_functions = numbers.next().flatten().unwrap_or(10_000);
    let n_rounds = numbers.next().flatten().unwrap_or(5).max(1);
    match run(n_functions, n_rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulk: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(n_functions: u32, n_rounds: u32) -> Result<()> {
    let program = try_build(Fixture::Many(n_functions))?.context("no C compiler")?;
    let mut target = Running::start(Command::new(&program).args(["1", "wait"]))?;
    target.expect_line("ready")?;
    let session = Session::attach(target.pid().cast_signed())?;
    let functions = session.find("many_*")?;
    let sites: Vec<u64> =
        functions.iter().map(|f| Ok(f.site()?.address.0)).collect::<Result<_>>()?;
    for (label, kind) in [("entry", ProgramKind::Fentry), ("exit", ProgramKind::Fexit)] {
        let spec = counter(kind, n_functions)?;
        let (mut flea, mut kernel) = (Vec::new(), Vec::new());
        let mut no_kernel = None;
        for _ in 0..n_rounds {
            flea.push(attach_once(&session, &spec, &functions)?);
            match Multi::once(&spec, &program, &sites) {
                Ok(times) => kernel.push(times),
                Err(error) => no_kernel = Some(error),
            }
        }
        tell(&format!("flea {label}"), flea);
        match no_kernel {
            Some(error) => println!("uprobe_multi {label}: not measured: {error:#}"),
            None => tell(&format!("uprobe_multi {label}"), kernel),
        }
    }
    // Last, as the target calls its functions once: what was measured also counts.
    let spec = counter(ProgramKind::Fentry, n_functions)?;
    let object = session.load(spec)?;
    let link = attach(&object, &functions)?;
    let report = target.run_counts()?;
    ensure!(report.errors == 0, "{} results of the target were wrong", report.errors);
    link.detach()?;
    ensure_each_counted_once(&object, n_functions)?;
    target.finish_counts()
}

/// The program that counts by its cookie, with its map.
fn counter(kind: ProgramKind, n_functions: u32) -> Result<ObjectSpec> {
    let mut asm = Asm::new();
    let out = asm.new_label();
    asm.call(Helper::GetAttachCookie)
        .store(Size::W, Reg::R10, -4, Reg::R0)
        .map_ref(Reg::R1, MapIdx(0))
        .mov64_reg(Reg::R2, Reg::R10)
        .add64_imm(Reg::R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(JmpOp::Eq, Reg::R0, 0, out)
        .load(Size::DW, Reg::R1, Reg::R0, 0)
        .add64_imm(Reg::R1, 1)
        .store(Size::DW, Reg::R0, 0, Reg::R1)
        .bind(out)
        .mov64_imm(Reg::R0, 0)
        .exit();
    let map = MapSpec {
        name: MAP_NAME.into(),
        kind: MapKind::PerCpuArray,
        key_size_bytes: 4,
        value_size_bytes: 8,
        max_entries: n_functions,
        ..MapSpec::default()
    };
    let program = ProgramSpec {
        name: "count".into(),
        section: "bulk".into(),
        kind,
        insns: asm.finish().context("the counter")?,
        ..ProgramSpec::default()
    };
    Ok(ObjectSpec { maps: vec![map], programs: vec![program], ..ObjectSpec::default() })
}

fn attach(object: &Object, functions: &[Function]) -> Result<flea::Link> {
    let program = object.program("count").context("the counter")?;
    Ok(program.attach_multi(functions.iter().zip(0..))?)
}

fn attach_once(session: &Session, spec: &ObjectSpec, functions: &[Function]) -> Result<Times> {
    let object = session.load(spec.clone())?;
    let program = object.program("count").context("the counter")?;
    for function in functions {
        program.check(function)?;
    }
    let begun = Instant::now();
    let link = attach(&object, functions)?;
    let on = begun.elapsed();
    let begun = Instant::now();
    link.detach()?;
    Ok(Times { on, off: begun.elapsed() })
}

fn ensure_each_counted_once(object: &Object, n_functions: u32) -> Result<()> {
    let Some(Map::PerCpuArray(calls)) = object.map(MAP_NAME) else {
        anyhow::bail!("the object has no map of counters");
    };
    for i in 0..n_functions {
        let cells = calls.get(i)?;
        let words = cells.iter().filter_map(|v| Some(u64::from_le_bytes(*v.first_chunk()?)));
        let n_calls: u64 = words.sum();
        ensure!(n_calls == 1, "function {i} was called once and counted {n_calls} times");
    }
    Ok(())
}

/// Prints the medians, in the words that `cargo xtask bench` reads.
fn tell(what: &str, times: Vec<Times>) {
    let median = |of: fn(&Times) -> Duration| {
        let mut all: Vec<Duration> = times.iter().map(of).collect();
        all.sort_unstable();
        all[all.len() / 2].as_secs_f64() * 1e3
    };
    println!("{what}: on {:.2} ms, off {:.2} ms", median(|t| t.on), median(|t| t.off));
}
