//! An end for what has none: where the code under test loops for ever, there is nobody left to
//! count it as a failure, so the whole process ends, with the seed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

/// Wall-clock time for one input, on the slowest machine.
const PATIENCE_S: u64 = 300;
/// No input is being judged.
const IDLE: u64 = u64::MAX;

/// Watches one fuzzer.
#[derive(Debug)]
pub struct Watchdog {
    seed: Arc<AtomicU64>,
}

impl Watchdog {
    /// For the fuzzer of this name.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        let seed = Arc::new(AtomicU64::new(IDLE));
        let watched = Arc::downgrade(&seed);
        thread::spawn(move || {
            let (mut last, mut seconds) = (IDLE, 0);
            // Ends with the fuzzer.
            while let Some(seed) = watched.upgrade().map(|seed| seed.load(Relaxed)) {
                seconds = if seed == last && seed != IDLE { seconds + 1 } else { 0 };
                last = seed;
                if seconds > PATIENCE_S {
                    eprintln!("{name} seed {seed}: no end after {PATIENCE_S} s");
                    std::process::abort();
                }
                thread::sleep(Duration::from_secs(1));
            }
        });
        Self { seed }
    }

    /// Runs `work`, which is to end.
    pub fn watch<R>(&self, seed: u64, work: impl FnOnce() -> R) -> R {
        self.seed.store(seed, Relaxed);
        let result = work();
        self.seed.store(IDLE, Relaxed);
        result
    }
}
