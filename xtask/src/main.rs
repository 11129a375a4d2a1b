//! The repository's own chores, run as `cargo xtask NAME`. Each is a module; start there.
#![forbid(unsafe_code)]

mod bench;
mod ci;
mod fixtures;
mod fuzz;
mod simulate;
mod torture;
mod vectors;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
usage: cargo xtask ci                         format, lints, tests, documentation
       cargo xtask fixtures [NAME]            builds the programs that tests trace
       cargo xtask bench [--rounds N] [--flea PATH] [--json]
                                              what a hit costs, side by side
       cargo xtask fuzz [--minutes N] [--only kernel|interpreter|prevail|bytes|elf|shared|registry] [--seed S]
                                              random input, with the kernel and others as judges
       cargo xtask simulate [--seeds N] [--from S] [--fault NAME|all] [--seed S]
                                              the patch engine in a made-up process
       cargo xtask torture [--minutes N] [--seed S] [--only redis|cpp|postgres|rust] [--flea PATH]
                           [--seconds N] [--bout SECONDS] [--hang SECONDS] [--without PART]
                                              real programs, traced and disturbed at random
       cargo xtask cycles [--count N] [--threads N]
                                              on and off, with both sides' memory flat
       cargo xtask vectors [--seconds N] FILE.jsonl
                                              a suite of eBPF programs: verdict and result of each";

fn run(args: &[&str]) -> Result<ExitCode> {
    match args {
        ["ci"] => ci::run(),
        ["fixtures", filter @ ..] if filter.len() <= 1 => fixtures::run(filter.first().copied()),
        ["bench", options @ ..] => bench::run(options),
        ["fuzz", options @ ..] => fuzz::run(options),
        ["simulate", options @ ..] => simulate::run(options),
        ["torture", options @ ..] => torture::run(options),
        ["cycles", options @ ..] => torture::cycles(options),
        ["vectors", "--worker"] => vectors::work(),
        ["vectors", options @ ..] => vectors::run(options),
        ["--help" | "-h" | "help"] => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("{USAGE}"),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::from(2)
        }
    }
}
