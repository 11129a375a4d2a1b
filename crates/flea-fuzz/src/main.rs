//! The fuzzers' command; `cargo xtask fuzz` builds it optimised and runs it.

use std::process::{Command, ExitCode};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use flea_fuzz::against_interpreter::AgainstInterpreter;
use flea_fuzz::against_kernel::AgainstKernel;
use flea_fuzz::against_prevail::{self, AgainstPrevail};
use flea_fuzz::allocated::Counting;
use flea_fuzz::any_bytes::AnyBytes;
use flea_fuzz::campaign::{self, End, Fuzzer};
use flea_fuzz::objects::Objects;
use flea_fuzz::registry::Registry;
use flea_fuzz::shared::Shared;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const USAGE: &str = "\
usage: flea-fuzz [--minutes N] [--inputs N] [--only NAME] [--seed S]
       flea-fuzz --show S
NAME is kernel, interpreter, prevail, bytes, elf, shared or registry; N minutes or inputs are for each of them.
--show prints the program of a seed and what both verifiers say of it.";

/// The argument that makes this process a worker.
const WORKER: &str = "--worker";
/// And one that asks prevail.
const PREVAIL_WORKER: &str = "--prevail-worker";
const NAMES: [&str; 7] = ["kernel", "interpreter", "prevail", "bytes", "elf", "shared", "registry"];

struct Options {
    end: End,
    only: Option<String>,
    seed: u64,
}

fn options(args: &[String]) -> Result<Options> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut options =
        Options { end: End::Time(Duration::from_secs(60)), only: None, seed: now << 24 };
    for pair in args.chunks(2) {
        let [name, value] = pair else { bail!("{USAGE}") };
        match name.as_str() {
            "--minutes" => {
                let minutes: f64 = value.parse().context("--minutes")?;
                options.end = End::Time(Duration::try_from_secs_f64(minutes * 60.0)?);
            }
            "--inputs" => options.end = End::Inputs(value.parse().context("--inputs")?),
            "--seed" => options.seed = value.parse().context("--seed")?,
            "--only" if NAMES.contains(&value.as_str()) => options.only = Some(value.clone()),
            _ => bail!("{USAGE}"),
        }
    }
    Ok(options)
}

fn worker() -> Result<Command> {
    again(WORKER)
}

fn prevail_worker() -> Result<Command> {
    again(PREVAIL_WORKER)
}

fn again(argument: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(argument);
    Ok(command)
}

fn fuzzer(name: &str) -> Result<Box<dyn Fuzzer>> {
    Ok(match name {
        "kernel" => Box::new(AgainstKernel::new(worker)?),
        "interpreter" => Box::new(AgainstInterpreter::new(worker)),
        "prevail" => Box::new(AgainstPrevail::new(prevail_worker)),
        "bytes" => Box::new(AnyBytes::new()),
        "shared" => Box::new(Shared::new()),
        "registry" => Box::new(Registry::new()?),
        _ => Box::new(Objects::new()?),
    })
}

fn run(options: &Options) -> Result<ExitCode> {
    let mut reports = Vec::new();
    for name in NAMES {
        if options.only.as_deref().is_none_or(|only| only == name) {
            match fuzzer(name) {
                Ok(mut fuzzer) => {
                    reports.push(campaign::run(fuzzer.as_mut(), options.seed, options.end)?);
                }
                Err(e) if options.only.is_none() => println!("{name}: skipped: {e}"),
                Err(e) => return Err(e),
            }
        }
    }
    for report in &reports {
        print!("{}", report.text());
    }
    let failed = reports.iter().any(|report| !report.failures.is_empty());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn show(seed: u64) -> Result<ExitCode> {
    let generated = AgainstKernel::program(seed);
    println!("{}", AgainstKernel::new(worker)?.explain(&generated.insns, generated.comparable)?);
    Ok(ExitCode::SUCCESS)
}

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [WORKER] => flea_vectors::worker::serve().map(|()| ExitCode::SUCCESS),
        [PREVAIL_WORKER] => against_prevail::serve().map(|()| ExitCode::SUCCESS),
        ["--show", seed] => show(seed.parse().context("--show")?),
        ["--help" | "-h"] => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        _ => run(&options(&args)?),
    }
}
