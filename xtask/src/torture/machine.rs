//! What the machine does by itself. A target that does not answer for a second hangs only if a
//! process that nobody traces and stops was answered meanwhile: a busy machine stops them all.

use std::collections::VecDeque;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use flea_fixtures::Running;

/// Between two questions to the control.
const PERIOD: Duration = Duration::from_millis(20);
/// Shorter waits are of no interest.
const SHORTEST: Duration = Duration::from_millis(50);
/// Stalls that are kept: of minutes.
const MAX_KEPT: usize = 10_000;

/// Times that excuse a target, by their ends.
#[derive(Default)]
pub struct Excuses(Mutex<VecDeque<(Instant, Instant)>>);

impl Excuses {
    /// Adds one.
    pub fn add(&self, from: Instant, to: Instant) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() == MAX_KEPT {
            all.pop_front();
        }
        all.push_back((from, to));
    }

    /// How much of the time from `from` to `to` they cover.
    pub fn within(&self, from: Instant, to: Instant) -> Duration {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let overlap = |&(a, b): &(Instant, Instant)| {
            b.min(to).checked_duration_since(a.max(from)).unwrap_or_default()
        };
        all.iter().map(overlap).sum()
    }
}

/// Asks a process of its own something all the time, for as long as it lives.
pub struct Machine {
    stalls: Arc<Excuses>,
    stop: Arc<AtomicBool>,
    asking: Option<JoinHandle<()>>,
}

impl Machine {
    /// Starts the control.
    pub fn watch() -> Result<Self> {
        let mut echo = Running::start(&mut Command::new("cat")).context("starting the control")?;
        let (stalls, stop) = (Arc::new(Excuses::default()), Arc::new(AtomicBool::new(false)));
        let (its_stalls, its_stop) = (Arc::clone(&stalls), Arc::clone(&stop));
        let asking = thread::spawn(move || {
            let mut before = Instant::now();
            while !its_stop.load(Ordering::Relaxed) {
                let answered = echo.send("?").and_then(|()| echo.line());
                let now = Instant::now();
                // What it slept is part of the time in which nothing happened.
                if now - before > SHORTEST + PERIOD {
                    its_stalls.add(before, now);
                }
                if answered.is_err() {
                    return;
                }
                thread::sleep(PERIOD);
                before = now;
            }
        });
        Ok(Self { stalls, stop, asking: Some(asking) })
    }

    /// How much of that time the machine stalled.
    pub fn stalled(&self, from: Instant, to: Instant) -> Duration {
        self.stalls.within(from, to)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(asking) = self.asking.take() {
            let _ = asking.join();
        }
    }
}
