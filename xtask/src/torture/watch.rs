//! Looks whether answers come at all. Who waits for one cannot tell of a hang before its end, and
//! then nothing shows any more why it was.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use flea::Pid;

use super::bout::Bout;
use super::target::Target;

/// Between two looks.
const PERIOD: Duration = Duration::from_millis(200);

/// Looks until the bout ends.
pub fn run(bout: &Bout<'_>, target: &dyn Target) -> Result<()> {
    let (mut n_seen, mut since) = (0, Instant::now());
    while bout.goes_on() {
        let n = bout.numbers.n_checks.load(Ordering::Relaxed);
        let now = Instant::now();
        if n != n_seen {
            (n_seen, since) = (n, now);
        } else if now - since > bout.hang {
            bout.event(|| format!("no answer comes: {}", snapshot(target)), || ());
            bout.waited("an answer of any client", since, now);
        }
        bout.sleep(PERIOD);
    }
    Ok(())
}

/// What all threads do now.
fn snapshot(target: &dyn Target) -> String {
    let threads = target.pids().into_iter().flat_map(|pid| {
        let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        entries.map(|entry| thread(pid, &entry.path().display().to_string())).collect::<Vec<_>>()
    });
    threads.collect::<Vec<_>>().join(", ")
}

fn thread(pid: Pid, task: &str) -> String {
    let read = |name: &str| fs::read_to_string(format!("{task}/{name}")).unwrap_or_default();
    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    let tracer = field("TracerPid:");
    let comm = fs::read_to_string(format!("/proc/{tracer}/stat")).unwrap_or_default();
    let comm: String = comm.split(' ').skip(1).take(3).collect::<Vec<_>>().join(" ");
    format!(
        "[{pid}/{} {} in {} ({}), signals {}/{} blocked {}, tracer {tracer} {comm}]",
        field("Pid:"),
        field("State:"),
        read("wchan").trim(),
        read("syscall").split(' ').next().unwrap_or_default().trim(),
        field("SigPnd:").trim_start_matches('0'),
        field("ShdPnd:").trim_start_matches('0'),
        field("SigBlk:").trim_start_matches('0'),
    )
}
