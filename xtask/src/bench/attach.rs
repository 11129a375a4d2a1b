//! What attaching costs: time for one to ten thousand functions at once, and the longest
//! pause of a busy thread of the target meanwhile.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flea_fixtures::{Fixture, Running, try_build};

use super::controller::Flea;
use super::site::{Text, ensure_restored, sites_of};

/// How many functions are attached to at once.
const SIZES: [u32; 5] = [1, 10, 100, 1000, 10_000];
/// How often the pause is measured.
const N_PAUSES: u32 = 11;
/// Of how many functions stalls are measured, and by which pattern they are named.
const STALLS: [(u32, &str); 3] = [(1, "slot_0000"), (100, "slot_00*"), (10_000, "slot_*")];

/// Attaching to many functions at once.
pub struct Bulk {
    /// How many.
    pub n_functions: u32,
    /// The times, or why there are none.
    pub outcome: Result<BulkTimes>,
}

/// Times of the whole command, its own start and end included.
pub struct BulkTimes {
    /// From its start to the last function being patched.
    pub attach: Duration,
    /// From Ctrl-C to its exit, all functions as they were.
    pub detach: Duration,
}

/// The longest time between two steps of a busy thread.
pub struct Pause {
    /// While nothing happens: what the machine does by itself; median.
    pub idle_ns: u64,
    /// While flea attaches and detaches; median.
    pub attach_ns: u64,
}

/// Longest calls of threads that do nothing else than call functions that are attached to.
pub struct Stalls {
    /// How many functions.
    pub n_functions: u32,
    /// The times, or why there are none.
    pub outcome: Result<StallTimes>,
}

/// The longest call while flea attaches and detaches, and in as much time without.
pub struct StallTimes {
    /// While nothing happens, median: what the machine does by itself.
    pub idle: Stall,
    /// While flea attaches and detaches, median.
    pub attach: Stall,
    /// The longest of all rounds.
    pub longest: Stall,
}

/// How long a call took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stall {
    /// Without the time for which the thread was ready to run and had no CPU.
    pub stopped_ns: i64,
    /// With it.
    pub all_ns: i64,
}

/// Attaches to 1, 10, ... functions of a program each.
pub fn measure(flea: Option<&Flea>) -> Vec<Bulk> {
    let bulk = |n_functions| Bulk { n_functions, outcome: measure_one(flea, n_functions) };
    SIZES.into_iter().map(bulk).collect()
}

fn measure_one(flea: Option<&Flea>, n_functions: u32) -> Result<BulkTimes> {
    let flea = flea.context("no flea to run")?;
    let program = try_build(Fixture::Many(n_functions))?.context("no C compiler")?;
    let mut target = Running::start(Command::new(&program).args(["1", "wait"]))?;
    target.expect_line("ready")?;
    let names: Vec<String> = (0..n_functions).map(|i| format!("many_{i}")).collect();
    let sites = sites_of(target.pid(), &program, &names)?;
    let original: Vec<Text> = sites.iter().map(|site| site.text()).collect::<Result<_>>()?;
    let attached = flea.attach(&["count", "many_*"], target.pid(), &sites)?;
    let attach = attached.took;
    let report = target.run_counts()?;
    let detach = attached.finish()?.took;
    ensure_restored(&sites, &original)?;
    if report.errors > 0 {
        bail!("{} results of the target were wrong", report.errors);
    }
    target.finish_counts()?;
    Ok(BulkTimes { attach, detach })
}

/// The pause that attaching to a function of a busy thread causes.
pub fn pause(flea: Option<&Flea>) -> Result<Pause> {
    let flea = flea.context("no flea to run")?;
    let program = try_build(Fixture::Disturb)?.context("no C compiler")?;
    let mut target = Running::start(&mut Command::new(&program))?;
    target.expect_line("ready")?;
    let names = ["busy_step".to_owned(), "blocked_step".to_owned()];
    let sites = sites_of(target.pid(), &program, &names)?;
    let (mut idle, mut busy) = (Vec::new(), Vec::new());
    for _ in 0..N_PAUSES {
        gap(&mut target)?;
        thread::sleep(Duration::from_millis(100));
        idle.push(gap(&mut target)?);
        let attached = flea.attach(&["count", "*_step"], target.pid(), &sites)?;
        attached.finish()?;
        busy.push(gap(&mut target)?);
    }
    target.send("check")?;
    let lines = target.rest()?;
    if !target.wait()?.success() {
        bail!("the target was disturbed: {}", lines.join("; "));
    }
    idle.sort_unstable();
    busy.sort_unstable();
    Ok(Pause { idle_ns: idle[idle.len() / 2], attach_ns: busy[busy.len() / 2] })
}

/// The pauses of threads that run through 1, 100 and 10 000 functions.
pub fn stalls(flea: Option<&Flea>) -> Vec<Stalls> {
    let stalls = |(n_functions, pattern)| Stalls {
        n_functions,
        outcome: stalls_of(flea, n_functions, pattern),
    };
    STALLS.into_iter().map(stalls).collect()
}

fn stalls_of(flea: Option<&Flea>, n_functions: u32, pattern: &str) -> Result<StallTimes> {
    let flea = flea.context("no flea to run")?;
    let program = try_build(Fixture::Stalls)?.context("no C compiler")?;
    let mut target = Running::start(Command::new(&program).arg(n_functions.to_string()))?;
    target.expect_line("ready")?;
    let names: Vec<String> = (0..n_functions).map(|i| format!("slot_{i:04}")).collect();
    let sites = sites_of(target.pid(), &program, &names)?;
    let original: Vec<Text> = sites.iter().map(|site| site.text()).collect::<Result<_>>()?;
    let (mut idle, mut busy) = (Vec::new(), Vec::new());
    for _ in 0..N_PAUSES {
        stall(&mut target)?;
        let began = Instant::now();
        flea.attach(&["count", pattern], target.pid(), &sites)?.finish()?;
        busy.push(stall(&mut target)?);
        thread::sleep(began.elapsed());
        idle.push(stall(&mut target)?);
    }
    ensure_restored(&sites, &original)?;
    let longest = busy.iter().copied().max().context("there was a round")?;
    Ok(StallTimes { idle: median(&mut idle), attach: median(&mut busy), longest })
}

/// Of a list that is not empty.
fn median(stalls: &mut [Stall]) -> Stall {
    stalls.sort_unstable();
    stalls[stalls.len() / 2]
}

/// The longest call since it was asked last.
fn stall(target: &mut Running) -> Result<Stall> {
    target.send("stall")?;
    let line = target.line()?;
    let words = line.strip_prefix("stall ").and_then(|words| words.split_once(' '));
    let (stopped, all) = words.with_context(|| format!("a stall, not {line:?}"))?;
    Ok(Stall {
        stopped_ns: stopped.parse().context("nanoseconds stopped")?,
        all_ns: all.parse().context("nanoseconds in all")?,
    })
}

/// The longest gap since it was asked last.
fn gap(target: &mut Running) -> Result<u64> {
    target.send("gap")?;
    let line = target.line()?;
    let ns = line.strip_prefix("gap ").with_context(|| format!("a gap, not {line:?}"))?;
    ns.parse().with_context(|| format!("nanoseconds, not {ns:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The target alone: its words are understood, and it ends when its input does.
    #[test]
    fn stalls_are_told() {
        let Some(program) = flea_fixtures::build(Fixture::Stalls) else { return };
        let mut target = Running::start(Command::new(&program).arg("10000")).unwrap();
        target.expect_line("ready").unwrap();
        let told = stall(&mut target).unwrap();
        assert!(told.stopped_ns <= told.all_ns, "{told:?}");
        let names = ["slot_0000".to_owned(), "slot_9999".to_owned()];
        let sites = sites_of(target.pid(), &program, &names).unwrap();
        assert_ne!(sites[0].text().unwrap(), Text::default());
        assert_ne!(sites[0].address(), sites[1].address());
    }

    #[test]
    fn medians() {
        let stall = |ns| Stall { stopped_ns: ns, all_ns: 2 * ns };
        assert_eq!(median(&mut [5, 1, 4, 2, 3].map(stall)), stall(3));
    }
}
