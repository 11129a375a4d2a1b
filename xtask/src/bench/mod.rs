//! What a hit costs: bare call, hand-written counter, Flea, the kernel's probes, all on
//! functions of *one* process, in rounds that take turns, so that a slow moment of the
//! machine hits all of them. Then what attaching and detaching costs, and the target's
//! longest pause; then what verifying costs. A row that cannot be measured prints why and does not stop the others.
//!
//! `rows.rs` says what is measured, `goals.rs` what is wanted of it, `harness.rs` talks to `bench_loop.c`, `controller.rs`
//! runs the command `flea` beside it, `programs.rs` attaches what no command does, `multi.rs` ten thousand functions beside the kernel's link, `steps.rs` counts instructions, `verify.rs` verifies, `table.rs` prints.

mod attach;
mod controller;
mod goals;
mod harness;
mod multi;
pub mod programs;
mod rows;
mod site;
mod steps;
mod table;
mod verify;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use serde_json::json;

use controller::Flea;

/// At least this many rounds, so that a quartile means something.
const MIN_ROUNDS: usize = 61;

struct Options {
    n_rounds: usize,
    flea: Option<PathBuf>,
    json: bool,
}

fn parse(args: &[&str]) -> Result<Options> {
    let mut options = Options { n_rounds: MIN_ROUNDS, flea: None, json: false };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match *arg {
            "--json" => options.json = true,
            "--flea" => options.flea = Some(args.next().context("--flea PATH")?.into()),
            "--rounds" => {
                let n: usize = args.next().context("--rounds N")?.parse().context("--rounds N")?;
                options.n_rounds = n.max(MIN_ROUNDS);
            }
            other => bail!("bench does not know {other}: --rounds N, --flea PATH, --json"),
        }
    }
    Ok(options)
}

/// Runs the whole bench and prints it.
pub fn run(args: &[&str]) -> Result<ExitCode> {
    if let [verify::ONE, number, n_insns] = args {
        verify::measure_one(number, n_insns)?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = parse(args)?;
    let flea = find_flea(options.flea);
    let rows::Measured { hits, goals } = rows::measure(flea.as_ref().ok(), options.n_rounds)?;
    let attaches = attach::measure(flea.as_ref().ok());
    let multi = multi::measure();
    let pause = attach::pause(flea.as_ref().ok());
    let stalls = attach::stalls(flea.as_ref().ok());
    let verifications = verify::measure();
    if options.json {
        println!(
            "{}",
            json!({
                "hits": hits.iter().map(table::hit_json).collect::<Vec<_>>(),
                "goals": goals.iter().map(table::goal_json).collect::<Vec<_>>(),
                "attach": attaches.iter().map(table::attach_json).collect::<Vec<_>>(),
                "bulk": table::multi_json(&multi),
                "pause": table::pause_json(&pause),
                "stalls": stalls.iter().map(table::stalls_json).collect::<Vec<_>>(),
                "verify": verifications.iter().map(table::verification_json).collect::<Vec<_>>(),
            })
        );
        return Ok(ExitCode::SUCCESS);
    }
    if let Err(e) = &flea {
        println!("flea: {e:#}\n");
    }
    println!("{}", table::hits(&hits, options.n_rounds));
    println!("{}", table::goals(&goals));
    println!("{}", table::attaches(&attaches));
    println!("{}", table::multi(&multi));
    println!("{}\n", table::pause(&pause));
    println!("{}", table::stalls(&stalls));
    println!("{}", table::verifications(&verifications));
    Ok(ExitCode::SUCCESS)
}

/// The binary that was named, else the release build beside us.
fn find_flea(named: Option<PathBuf>) -> Result<Flea> {
    let path = match named {
        Some(path) => path,
        None => {
            let xtask = std::env::current_exe().context("finding this program")?;
            let target = xtask.ancestors().nth(2).context("finding target/")?;
            target.join("release/flea")
        }
    };
    if !path.is_file() {
        bail!("{} is missing: cargo build --release -p flea-cli", path.display());
    }
    // A binary that cannot even print its help attaches nowhere: say so once, not per row.
    let help = Command::new(&path).arg("--help").output().context("running flea --help")?;
    if !help.status.success() || help.stdout.is_empty() {
        bail!("{} --help says nothing ({})", path.display(), help.status);
    }
    Ok(Flea::new(path))
}
