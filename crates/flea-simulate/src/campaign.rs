//! Many seeds, on all CPUs, until one fails.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::case::{self, Outcome};
use crate::fault::Fault;
use crate::machine::Size;

/// Seeds that a worker takes at a time.
const CHUNK: u64 = 64;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Campaign {
    /// The first seed.
    pub from: u64,
    /// How many.
    pub seeds: u64,
    /// What is planted.
    pub fault: Option<Fault>,
    /// Threads.
    pub jobs: usize,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// Seeds that were lived through.
    pub n_seeds: u64,
    /// Controllers that came.
    pub n_sessions: u64,
    /// Steps that threads made.
    pub n_steps: u64,
    /// The lowest seed that failed.
    pub failed: Option<Failed>,
}

/// A seed that failed.
#[derive(Clone, Debug)]
pub struct Failed {
    /// The seed.
    pub seed: u64,
    /// What happened that must not.
    pub violation: String,
}

/// One seed; a panic is a failure as well.
#[must_use]
pub fn live(seed: u64, fault: Option<Fault>, size: Size, traced: bool) -> Outcome {
    let lived = catch_unwind(AssertUnwindSafe(|| case::run(seed, fault, size, traced)));
    lived.unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().cloned();
        let said = said.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let violation = Some(format!("panic: {}", said.unwrap_or_default()));
        Outcome { violation, trace: Vec::new(), n_steps: 0, n_sessions: 0 }
    })
}

/// Lives through all seeds of a campaign, up to the first that fails.
#[must_use]
pub fn run(campaign: &Campaign) -> Done {
    let next = AtomicU64::new(0);
    let total = Mutex::new(Done::default());
    std::thread::scope(|scope| {
        for _ in 0..campaign.jobs {
            scope.spawn(|| work(campaign, &next, &total));
        }
    });
    total.into_inner().expect("workers do not panic")
}

fn work(campaign: &Campaign, next: &AtomicU64, total: &Mutex<Done>) {
    loop {
        let begin = next.fetch_add(CHUNK, Ordering::Relaxed);
        if begin >= campaign.seeds {
            return;
        }
        let mut done = Done::default();
        for seed in begin..(begin + CHUNK).min(campaign.seeds) {
            let seed = campaign.from.wrapping_add(seed);
            let outcome = live(seed, campaign.fault, Size::FULL, false);
            done.n_seeds += 1;
            done.n_sessions += outcome.n_sessions;
            done.n_steps += outcome.n_steps;
            if let Some(violation) = outcome.violation {
                done.failed = Some(Failed { seed, violation });
                break;
            }
        }
        let mut total = total.lock().expect("workers do not panic");
        total.n_seeds += done.n_seeds;
        total.n_sessions += done.n_sessions;
        total.n_steps += done.n_steps;
        if let Some(failed) = done.failed {
            next.store(campaign.seeds, Ordering::Relaxed);
            if total.failed.as_ref().is_none_or(|lowest| failed.seed < lowest.seed) {
                total.failed = Some(failed);
            }
        }
    }
}

/// The smallest process in which the seed fails as well.
#[must_use]
pub fn shrink(seed: u64, fault: Option<Fault>) -> Size {
    for sessions in 1..=Size::FULL.sessions {
        for functions in 1..=Size::FULL.functions {
            for threads in 1..=Size::FULL.threads {
                let size = Size { functions, threads, sessions };
                if live(seed, fault, size, false).violation.is_some() {
                    return size;
                }
            }
        }
    }
    Size::FULL
}
