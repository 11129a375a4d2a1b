//! One bout: one target, traced and disturbed at random for some seconds. What all that takes
//! part in it shares: the end, the first failure, the numbers.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::machine::{Excuses, Machine};

/// What a target's answers may take more, for what the control does not see.
const MARGIN: Duration = Duration::from_millis(100);

/// What is kept of what was done.
const MAX_EVENTS: usize = 200;

/// What a bout did.
#[derive(Default, Debug)]
pub struct Numbers {
    /// Attachments, replacements and detachments that were begun.
    pub n_rounds: AtomicU64,
    /// Sites swapped, on and off, as far as controllers lived to tell.
    pub n_swaps: AtomicU64,
    /// Controllers killed.
    pub n_killed: AtomicU64,
    /// Those that were killed with something attached.
    pub n_killed_attached: AtomicU64,
    /// Answers of the target that were checked.
    pub n_checks: AtomicU64,
    /// Threads and processes that the target made.
    pub n_born: AtomicU64,
    /// Signals sent to the target.
    pub n_signals: AtomicU64,
    /// Counts that were compared with what the target did.
    pub n_counts: AtomicU64,
    /// Longest wait of the checking client in microseconds, without excuses.
    pub longest_us: AtomicU64,
}

impl Numbers {
    /// Adds to one of them.
    pub fn add(number: &AtomicU64, n: u64) {
        number.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds another bout's.
    pub fn join(&self, other: &Self) {
        for (to, from) in self.sums().into_iter().zip(other.sums()) {
            Self::add(to, from.load(Ordering::Relaxed));
        }
        self.longest_us.fetch_max(other.longest_us.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    fn sums(&self) -> [&AtomicU64; 8] {
        [
            &self.n_rounds,
            &self.n_swaps,
            &self.n_killed,
            &self.n_killed_attached,
            &self.n_checks,
            &self.n_born,
            &self.n_signals,
            &self.n_counts,
        ]
    }
}

impl std::fmt::Display for Numbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [rounds, swaps, killed, attached, checks, born, signals, counts] =
            self.sums().map(|n| n.load(Ordering::Relaxed));
        let longest = Duration::from_micros(self.longest_us.load(Ordering::Relaxed));
        write!(
            f,
            "rounds {rounds}, sites swapped {swaps}, controllers killed {killed} ({attached} attached), \
             answers checked {checks}, counts compared {counts}, threads and processes born {born}, \
             signals {signals}, longest wait {longest:.0?}"
        )
    }
}

/// The state of one.
pub struct Bout<'a> {
    /// All choices follow from it.
    pub seed: u64,
    /// The command `flea`.
    pub flea: PathBuf,
    /// What was done.
    pub numbers: Numbers,
    /// How often somebody began, and ended, to take off what others attached.
    n_begun: AtomicU64,
    n_done: AtomicU64,
    /// Ctrl-C was pressed.
    interrupted: &'a Arc<AtomicBool>,
    machine: &'a Machine,
    /// A target that does not answer for so long hangs.
    pub hang: Duration,
    stops: Excuses,
    deadline: Instant,
    /// What was done last, and when.
    events: Mutex<VecDeque<(Instant, Instant, String)>>,
    stop: AtomicBool,
    failure: Mutex<Option<String>>,
}

impl<'a> Bout<'a> {
    /// One that ends after `length`, and in which nobody may wait for longer than `hang`.
    pub fn new(
        seed: u64,
        flea: PathBuf,
        (length, hang): (Duration, Duration),
        machine: &'a Machine,
        interrupted: &'a Arc<AtomicBool>,
    ) -> Self {
        Self {
            seed,
            flea,
            numbers: Numbers::default(),
            n_begun: AtomicU64::new(0),
            n_done: AtomicU64::new(0),
            interrupted,
            machine,
            hang,
            stops: Excuses::default(),
            deadline: Instant::now() + length,
            events: Mutex::default(),
            stop: AtomicBool::new(false),
            failure: Mutex::default(),
        }
    }

    /// Whether it goes on.
    pub fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
            && !self.interrupted.load(Ordering::Relaxed)
            && Instant::now() < self.deadline
    }

    /// Sleeps, but not past the end.
    pub fn sleep(&self, time: Duration) {
        let until = Instant::now() + time;
        while self.goes_on() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    /// Ends it; the first failure is kept.
    pub fn fail(&self, what: String) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(what);
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The first failure.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes off what others attached, by `work`: their counts end earlier than they think.
    pub fn take_off<R>(&self, work: impl FnOnce() -> R) -> R {
        self.n_begun.fetch_add(1, Ordering::SeqCst);
        let result = work();
        self.n_done.fetch_add(1, Ordering::SeqCst);
        result
    }

    /// How often that was (begun, done).
    pub fn n_taken_off(&self) -> (u64, u64) {
        (self.n_begun.load(Ordering::SeqCst), self.n_done.load(Ordering::SeqCst))
    }

    /// Runs a part of the bout; its error is the bout's.
    pub fn guard(&self, who: &str, part: impl FnOnce() -> anyhow::Result<()>) {
        if let Err(error) = part() {
            self.fail(format!("{who}: {error:#}"));
        }
    }

    /// Does something that a failure's description may have to name.
    pub fn event<R>(&self, what: impl FnOnce() -> String, work: impl FnOnce() -> R) -> R {
        let from = Instant::now();
        let result = work();
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        events.push_back((from, Instant::now(), what()));
        result
    }

    /// What was done last, with the time since its end.
    pub fn last_events(&self) -> Vec<String> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = |(a, b, what): &(Instant, Instant, String)| {
            format!("{what} ({:.0?}, {:.0?} ago)", *b - *a, b.elapsed())
        };
        let mut last: Vec<_> = events.iter().rev().take(12).map(shown).collect();
        last.reverse();
        last
    }

    fn events_within(&self, from: Instant, to: Instant) -> Vec<String> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = events.iter().filter(|event| event.0 < to && event.1 > from);
        inside.map(|(a, b, what)| format!("{what} ({:.0?})", *b - *a)).collect()
    }

    /// The target was stopped by us, and is excused.
    pub fn was_stopped(&self, from: Instant, to: Instant) {
        self.stops.add(from, to);
    }

    /// An answer came that had been waited for since `asked`.
    pub fn answered(&self, what: &str, asked: Instant) {
        Numbers::add(&self.numbers.n_checks, 1);
        self.waited(what, asked, Instant::now());
    }

    /// The target did nothing from `from` to `to`: fails where that is a hang.
    pub fn waited(&self, what: &str, from: Instant, to: Instant) {
        let took = to - from;
        if took < self.hang / 4 {
            let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            self.numbers.longest_us.fetch_max(took_us, Ordering::Relaxed);
            return;
        }
        let (machine, stopped) = (self.machine.stalled(from, to), self.stops.within(from, to));
        let own = took.saturating_sub(machine).saturating_sub(stopped);
        let own_us = u64::try_from(own.as_micros()).unwrap_or(u64::MAX);
        self.numbers.longest_us.fetch_max(own_us, Ordering::Relaxed);
        if own > self.hang + MARGIN {
            self.fail(format!(
                "{what} took {took:.1?}, of which the machine was not there for {machine:.1?} and the \
                 target was stopped for {stopped:.1?}: more than {:.0?} is a hang. Meanwhile: {}",
                self.hang,
                self.events_within(from, to).join("; ")
            ));
        }
    }
}
