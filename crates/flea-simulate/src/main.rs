//! The simulator's command; `cargo xtask simulate` builds it optimised and runs it.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use flea_simulate::campaign::{self, Campaign};
use flea_simulate::fault::{self, FAULTS};
use flea_simulate::machine::Size;

const USAGE: &str = "\
usage: flea-simulate [--seeds N] [--from S] [--fault NAME|all] [--jobs N]
       flea-simulate --seed S [--fault NAME] [--functions N] [--threads N] [--sessions N]
--seed prints all that happens with one seed. --fault all looks for each fault in turn.";

/// Lines of a trace that a failing seed is shown with.
const LAST_LINES: usize = 120;

struct Options {
    campaign: Campaign,
    all_faults: bool,
    shown: Option<u64>,
    size: Size,
}

fn options(args: &[String]) -> Result<Options> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let campaign = Campaign { from: 1, seeds: 100_000, fault: None, jobs };
    let mut options = Options { campaign, all_faults: false, shown: None, size: Size::FULL };
    for pair in args.chunks(2) {
        let [name, value] = pair else { bail!("{USAGE}") };
        let number = || value.parse::<u64>().with_context(|| format!("{name} {value}"));
        let count = || value.parse::<usize>().with_context(|| format!("{name} {value}"));
        match name.as_str() {
            "--seeds" => options.campaign.seeds = number()?,
            "--from" => options.campaign.from = number()?,
            "--jobs" => options.campaign.jobs = count()?.max(1),
            "--fault" if value == "all" => options.all_faults = true,
            "--fault" => match fault::named(value) {
                Some(fault) => options.campaign.fault = Some(fault),
                None => {
                    bail!("{value}: the faults are {}", FAULTS.map(|(name, _)| name).join(", "))
                }
            },
            "--seed" => options.shown = Some(number()?),
            "--functions" => options.size.functions = count()?.max(1),
            "--threads" => options.size.threads = count()?.max(1),
            "--sessions" => options.size.sessions = count()?,
            _ => bail!("{USAGE}"),
        }
    }
    Ok(options)
}

/// Prints one seed's life.
fn show(seed: u64, options: &Options) -> ExitCode {
    let outcome = campaign::live(seed, options.campaign.fault, options.size, true);
    for line in &outcome.trace {
        println!("{line}");
    }
    match outcome.violation {
        Some(violation) => {
            println!("seed {seed}: {violation}");
            ExitCode::FAILURE
        }
        None => {
            println!("seed {seed}: nothing wrong");
            ExitCode::SUCCESS
        }
    }
}

/// Whether each fault is found.
fn look_for_all(campaign: &Campaign) -> ExitCode {
    let mut all_found = true;
    for (name, fault) in FAULTS {
        let found = campaign::run(&Campaign { fault: Some(fault), ..*campaign });
        match found.failed {
            Some(failed) => println!("{name:18} seed {:6}: {}", failed.seed, failed.violation),
            None => {
                all_found = false;
                println!("{name:18} not found in {} seeds", found.n_seeds);
            }
        }
    }
    if all_found { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn search(campaign: &Campaign) -> ExitCode {
    let begun = Instant::now();
    let done = campaign::run(campaign);
    let seconds = begun.elapsed().as_secs_f64();
    let per_second = done.n_seeds as f64 / seconds;
    println!(
        "{} seeds, {} controllers, {} steps of threads in {seconds:.1} s ({per_second:.0} seeds/s)",
        done.n_seeds, done.n_sessions, done.n_steps
    );
    let Some(failed) = done.failed else { return ExitCode::SUCCESS };
    let (seed, size) = (failed.seed, campaign::shrink(failed.seed, campaign.fault));
    let outcome = campaign::live(seed, campaign.fault, size, true);
    let skipped = outcome.trace.len().saturating_sub(LAST_LINES);
    for line in &outcome.trace[skipped..] {
        println!("{line}");
    }
    let Size { functions, threads, sessions } = size;
    println!("seed {seed}: {}", outcome.violation.unwrap_or(failed.violation));
    println!(
        "all of it: --seed {seed} --functions {functions} --threads {threads} --sessions {sessions}"
    );
    ExitCode::FAILURE
}

fn run() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let options = options(&args)?;
    Ok(match options.shown {
        Some(seed) => show(seed, &options),
        None if options.all_faults => look_for_all(&options.campaign),
        None => search(&options.campaign),
    })
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::from(2)
    })
}
