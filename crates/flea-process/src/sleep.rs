//! How long a thread had slept when it was interrupted.
//!
//! The scheduler says it: the thread's last instant on a CPU, before the interrupt and at the stop.
//! That is exact, and holds whoever traced the process before. It is believed only where the thread
//! has been on a CPU once in between, to stop: one that slept twice has made another call.
//!
//! Each CPU has a clock of its own for that, which stands still while the CPU serves interrupts. A
//! thread that stopped on another CPU than it had gone to sleep on (on an idle machine most do, since
//! we are busy on the one that they were last on) is measured with the clock of the first: we go
//! there ourselves and read it, once for all threads that sleep by then.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid as NixPid;

use crate::proc::{self, LastRun, Tid, Whereabouts};
use crate::restart::has_timeout;
use crate::tracer::Tracer;

/// This thread.
const SELF: NixPid = NixPid::from_raw(0);

/// What a thread had last done before it was interrupted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asleep {
    run: LastRun,
    cpu: usize,
}

/// What clocks of CPUs said when they were read last.
#[derive(Debug, Default)]
pub(crate) struct CpuClocks(BTreeMap<usize, Reading>);

#[derive(Clone, Copy, Debug)]
struct Reading {
    at_ns: u64,
    /// Not before the clock was at that.
    when: Instant,
}

impl Tracer {
    /// To be called before a thread is interrupted.
    pub(crate) fn note_sleep(&mut self, tid: Tid) {
        let asleep = match self.whereabouts(tid) {
            Whereabouts::Syscall { number, .. } if has_timeout(number) => {
                let pid = self.process_of(tid);
                // In this order: where it goes to another CPU in between, it has run twice at the
                // stop.
                proc::last_run(pid, tid)
                    .and_then(|run| Some(Asleep { run, cpu: proc::last_cpu(pid, tid)? }))
            }
            _ => None,
        };
        if let Some(task) = self.tasks.get_mut(&tid) {
            task.asleep = asleep;
            task.asleep_since = None;
        }
    }

    /// To be called when its registers have been read at the stop: it is off its CPU then.
    pub(crate) fn measure_sleep(&mut self, tid: Tid) {
        let Some(before) = self.tasks.get_mut(&tid).and_then(|task| task.asleep.take()) else {
            return;
        };
        let now = Instant::now();
        let slept = proc::last_run(self.process_of(tid), tid)
            .filter(|after| has_only_stopped(&before.run, after))
            .and_then(|after| {
                if after.n_migrations == before.run.n_migrations {
                    after.at_ns.checked_sub(before.run.at_ns).map(Duration::from_nanos)
                } else {
                    self.clocks.since(&before, now)
                }
            });
        if let Some(task) = self.tasks.get_mut(&tid) {
            task.asleep_since = slept.and_then(|slept| now.checked_sub(slept));
        }
    }
}

/// Whether a thread has run once only since, if that is certain.
fn has_only_stopped(before: &LastRun, after: &LastRun) -> bool {
    before.at_ns > 0 && after.n_switches == before.n_switches + 1
}

impl CpuClocks {
    /// The time from when `asleep` went to sleep to `now`; never more than that.
    fn since(&mut self, asleep: &Asleep, now: Instant) -> Option<Duration> {
        let known = self.0.get(&asleep.cpu).copied();
        // Only a later reading does: the clock stands still at times, and so an earlier one would
        // put the beginning too early.
        let reading = match known.filter(|reading| reading.at_ns >= asleep.run.at_ns) {
            Some(reading) => reading,
            None => *self.0.entry(asleep.cpu).insert_entry(read_clock(asleep.cpu)?).get(),
        };
        slept_until(asleep.run.at_ns, &reading, now)
    }
}

fn slept_until(since_ns: u64, reading: &Reading, now: Instant) -> Option<Duration> {
    let until_read = Duration::from_nanos(reading.at_ns.checked_sub(since_ns)?);
    Some(match reading.when.checked_duration_since(now) {
        // It has been read since.
        Some(later) => until_read.saturating_sub(later),
        None => until_read + now.duration_since(reading.when),
    })
}

/// Reads a CPU's clock on that CPU; `None` where we may not run there.
fn read_clock(cpu: usize) -> Option<Reading> {
    let allowed = sched_getaffinity(SELF).ok()?;
    let mut only = CpuSet::new();
    only.set(cpu).ok()?;
    sched_setaffinity(SELF, &only).ok()?;
    // The kernel brings the thread's account up to date for this, and with it what we read then.
    let is_current = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).is_ok();
    let (pid, tid) = (nix::unistd::getpid().as_raw(), nix::unistd::gettid().as_raw());
    let reading =
        proc::last_run(pid, tid).map(|run| Reading { at_ns: run.at_ns, when: Instant::now() });
    // It fails only where none of them is left, and the kernel has chosen others by then.
    let _ = sched_setaffinity(SELF, &allowed);
    reading.filter(|_| is_current)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_sleep_is_believed_only_where_nothing_else_happened() {
        let before = LastRun { at_ns: 5 * MS, n_switches: 7, n_migrations: 2 };
        let after = LastRun { at_ns: 9 * MS, n_switches: 8, n_migrations: 2 };
        assert!(has_only_stopped(&before, &after));
        assert!(!has_only_stopped(&before, &LastRun { n_switches: 9, ..after }));
        assert!(!has_only_stopped(&before, &LastRun { n_switches: 7, ..after }));
        assert!(!has_only_stopped(&LastRun { at_ns: 0, ..before }, &after));
    }

    #[test]
    fn by_a_reading_before_or_after() {
        let when = Instant::now();
        let reading = Reading { at_ns: 20 * MS, when };
        let slept = |now| slept_until(5 * MS, &reading, now);
        assert_eq!(slept(when), Some(Duration::from_millis(15)));
        assert_eq!(slept(when + Duration::from_millis(3)), Some(Duration::from_millis(18)));
        assert_eq!(slept(when - Duration::from_millis(3)), Some(Duration::from_millis(12)));
        assert_eq!(slept_until(21 * MS, &reading, when), None);
    }

    /// Clocks of two CPUs may differ by much, and each goes as fast as time at most.
    #[test]
    fn clocks_of_all_cpus() {
        let allowed = sched_getaffinity(SELF).expect("it is this thread");
        let cpus = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
        for cpu in cpus {
            let Some(first) = read_clock(cpu) else { continue };
            std::thread::sleep(Duration::from_millis(20));
            let second = read_clock(cpu).expect("it was there");
            let passed = Duration::from_nanos(second.at_ns - first.at_ns);
            // The second may be read as late as it likes after its instant.
            assert!(passed <= second.when - first.when + Duration::from_millis(1), "{cpu}");
            assert!(passed > Duration::ZERO, "{cpu}");
        }
        let after = sched_getaffinity(SELF).expect("it is this thread");
        assert_eq!(after, allowed);
    }
}
