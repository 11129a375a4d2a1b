//! What attaching costs: time for one to ten thousand functions at once, and the longest
//! pause of a busy thread of the target meanwhile.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use flea_fixtures::{Fixture, Running, try_build};

use super::controller::Flea;
use super::site::{Text, ensure_restored, sites_of};

/// How many functions are attached to at once.
const SIZES: [u32; 5] = [1, 10, 100, 1000, 10_000];
/// How often the pause is measured.
const N_PAUSES: u32 = 11;

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

/// The longest gap since it was asked last.
fn gap(target: &mut Running) -> Result<u64> {
    target.send("gap")?;
    let line = target.line()?;
    let ns = line.strip_prefix("gap ").with_context(|| format!("a gap, not {line:?}"))?;
    ns.parse().with_context(|| format!("nanoseconds, not {ns:?}"))
}
