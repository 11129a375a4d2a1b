//! `cargo xtask torture`: real programs at work, which are traced, disturbed, and left by dying
//! controllers, all at random, for as long as wanted. What must not happen: a crash, a wrong
//! output, a hang over a second, a wrong count, a lost byte of text.
//!
//! A run is a row of bouts (`bout.rs`), each with one target (`target.rs`; `program.rs`,
//! `redis.rs`, `postgres.rs`) and a seed of its own, from which all choices follow: controllers
//! as commands (`commands.rs`) and in this process (`library.rs`), signals (`disturbance.rs`).
//! Then all is taken off, and `clean.rs` looks at what is left. `machine.rs` tells hangs from a
//! machine that is busy. `cycles.rs` is another run: on and off, a million times.

mod bout;
mod calls;
mod clean;
mod commands;
mod cycles;
mod disturbance;
mod library;
mod machine;
mod pgwire;
mod postgres;
mod program;
mod random;
mod redis;
mod refusals;
mod resp;
mod target;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use flea_fixtures::Fixture;

pub use cycles::run as cycles;

use self::bout::{Bout, Numbers};
use self::commands::Commands;
use self::library::Library;
use self::machine::Machine;
use self::postgres::Postgres;
use self::program::Program;
use self::redis::Redis;
use self::refusals::Refusals;
use self::target::Target;

/// How long a bout lasts, unless the whole run is shorter.
const BOUT: Duration = Duration::from_secs(30);
/// A target that does not answer for so long hangs, unless it is said otherwise.
const HANG: Duration = Duration::from_secs(1);
/// Controllers that are commands.
const N_COMMANDS: u64 = 3;
/// All targets, in their order.
const TARGETS: &[&str] = &["redis", "cpp", "postgres", "rust"];

struct Options {
    length: Duration,
    bout: Duration,
    hang: Duration,
    seed: u64,
    only: Option<String>,
    without: Vec<String>,
    flea: PathBuf,
}

fn parse(args: &[&str]) -> Result<Options> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let mut options = Options {
        length: BOUT * 4,
        bout: BOUT,
        hang: HANG,
        seed: now.as_secs(),
        only: None,
        without: Vec::new(),
        flea: beside_us()?,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} takes a value"));
        match *arg {
            "--minutes" => options.length = seconds(value()?)? * 60,
            "--seconds" => options.length = seconds(value()?)?,
            "--bout" => options.bout = seconds(value()?)?,
            "--hang" => options.hang = seconds(value()?)?,
            "--seed" => options.seed = value()?.parse()?,
            "--only" => options.only = Some((*value()?).to_owned()),
            "--without" => options.without.push((*value()?).to_owned()),
            "--flea" => options.flea = value()?.into(),
            other => bail!("torture does not know {other}"),
        }
    }
    if let Some(only) = &options.only
        && !TARGETS.contains(&only.as_str())
    {
        bail!("no target `{only}`; there are {}", TARGETS.join(", "));
    }
    if !options.flea.is_file() {
        bail!("{} is missing: cargo build -p flea-cli, or --flea PATH", options.flea.display());
    }
    options.flea = options.flea.canonicalize()?;
    Ok(options)
}

fn seconds(text: &str) -> Result<Duration> {
    let seconds: f64 = text.parse().with_context(|| format!("a number, not {text:?}"))?;
    Ok(Duration::try_from_secs_f64(seconds)?)
}

/// The command of the same build.
fn beside_us() -> Result<PathBuf> {
    Ok(std::env::current_exe().context("finding this program")?.with_file_name("flea"))
}

/// Set by Ctrl-C: the bout ends as always, and nothing that was started stays behind.
fn interrupted() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&flag))?;
    }
    Ok(flag)
}

fn start(name: &str, without: &[String]) -> Result<Option<Box<dyn Target>>> {
    fn boxed<T: Target + 'static>(target: T) -> Box<dyn Target> {
        Box::new(target)
    }
    Ok(match name {
        "redis" => Redis::start()?.map(boxed),
        "postgres" => Postgres::start()?.map(boxed),
        "cpp" => Program::start(Fixture::TortureCpp, without)?.map(boxed),
        _ => Program::start(Fixture::TortureRust, without)?.map(boxed),
    })
}

/// Runs it all; 1 where something failed.
pub fn run(args: &[&str]) -> Result<ExitCode> {
    let options = parse(args)?;
    let interrupted = interrupted()?;
    let targets: Vec<&str> = match &options.only {
        Some(only) => vec![only],
        None => TARGETS.to_vec(),
    };
    let totals: Vec<Numbers> = targets.iter().map(|_| Numbers::default()).collect();
    let refusals = Refusals::default();
    let begun = Instant::now();
    println!("torture: seed {}", options.seed);
    let failure = bouts(&options, &targets, &totals, &refusals, &interrupted)?;
    println!("in {:.0?}:", begun.elapsed());
    for (name, total) in targets.iter().zip(&totals) {
        println!("{name:9} {total}");
    }
    println!("what controllers said:\n{refusals}");
    let Some(failure) = failure else { return Ok(ExitCode::SUCCESS) };
    println!("FAILED: {failure}");
    Ok(ExitCode::FAILURE)
}

/// Bouts of all targets in turns, until the time is over; the first failure.
fn bouts(
    options: &Options,
    targets: &[&str],
    totals: &[Numbers],
    refusals: &Refusals,
    interrupted: &Arc<AtomicBool>,
) -> Result<Option<String>> {
    let machine = Machine::watch()?;
    // Each target gets its turn, however short the run.
    let turns = u32::try_from(targets.len())?;
    let length = options.bout.min(options.length / turns).max(Duration::from_secs(1));
    let (begun, mut seed) = (Instant::now(), options.seed);
    while begun.elapsed() < options.length {
        let mut n_started = 0;
        for (name, total) in targets.iter().zip(totals) {
            let Some(target) = start(name, &options.without).transpose() else { continue };
            // Its time begins here: compiling the target may take longer.
            let times = (length, options.hang);
            let bout = Bout::new(seed, options.flea.clone(), times, &machine, interrupted);
            let outcome = match target {
                Ok(target) => one(&bout, name, target, refusals),
                Err(error) => Err(format!("starting it: {error:#}")),
            };
            total.join(&bout.numbers);
            if let Err(failure) = outcome {
                let without = options.without.iter().map(|part| format!(" --without {part}"));
                return Ok(Some(format!(
                    "{name}: {failure}\n  again: cargo xtask torture --only {name} --seed {seed} \
                     --seconds {}{}",
                    length.as_secs(),
                    without.collect::<String>(),
                )));
            }
            if interrupted.load(Ordering::Relaxed) {
                return Ok(None);
            }
            seed = seed.wrapping_add(1);
            n_started += 1;
        }
        // Where nothing could be started, nothing ever will.
        if n_started == 0 {
            break;
        }
    }
    Ok(None)
}

/// One bout.
fn one(
    bout: &Bout<'_>,
    name: &str,
    mut target: Box<dyn Target>,
    refusals: &Refusals,
) -> Result<(), String> {
    let begun = Instant::now();
    thread::scope(|scope| all_at_once(scope, bout, &*target, refusals));
    let kept = finish(bout, &mut *target);
    let seed = bout.seed;
    if let Some(failure) = bout.failure() {
        let last = bout.last_events().join("\n    ");
        let words = target.last_words();
        return Err(format!("{failure}\n  done last:\n    {last}\n  the target: {words}"));
    }
    let kept = kept.unwrap_or_default();
    println!("{name} (seed {seed}, {:.0?}): {}, {kept} keep memory", begun.elapsed(), bout.numbers);
    Ok(())
}

/// Clients, controllers and signals, each in a thread of its own.
fn all_at_once<'scope, 'env>(
    scope: &'scope thread::Scope<'scope, 'env>,
    bout: &'scope Bout<'_>,
    target: &'scope dyn Target,
    refusals: &'scope Refusals,
) {
    for client in 0..target.n_clients() {
        scope.spawn(move || bout.guard("a client", || target.work(client, bout)));
    }
    for number in 0..N_COMMANDS {
        scope.spawn(move || {
            bout.guard("a controller", || Commands::new(bout, target, refusals, number).run());
        });
    }
    scope.spawn(move || bout.guard("the library", || Library::new(bout, target, refusals).run()));
    scope.spawn(move || bout.guard("looking", || watch::run(bout, target)));
    scope.spawn(move || bout.guard("signals", || disturbance::run(bout, target)));
}

/// The end of a bout, also of one that has failed: then only its first failure counts.
fn finish(bout: &Bout<'_>, target: &mut dyn Target) -> Option<usize> {
    if bout.failure().is_some() {
        return None;
    }
    let mut kept = None;
    bout.guard("its end", || {
        target.quiet(bout)?;
        kept = Some(clean::check(bout, target)?);
        target.end(bout)
    });
    kept
}
