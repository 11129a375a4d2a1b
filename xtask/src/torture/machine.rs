//! What the machine does by itself. A target that does not answer for a second hangs only if a
//! process that nobody traces and stops was answered meanwhile, and if who works got the machine:
//! of a CPU that ten share, a tenth of a second of work takes a second.

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

/// What one piece of work takes a thread that has a CPU to itself.
const WORK: Duration = Duration::from_millis(15);
/// Between two pieces.
const WORK_PERIOD: Duration = Duration::from_millis(150);

/// Asks a process of its own something, and works a little, for as long as it lives.
pub struct Machine {
    /// Nobody answered.
    stalls: Arc<Excuses>,
    /// What working took longer than on a machine of its own.
    lost: Arc<Mutex<VecDeque<Share>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// The part of a time in which a thread that wanted to work could.
struct Share {
    from: Instant,
    to: Instant,
    share: f64,
}

impl Machine {
    /// Starts the control.
    pub fn watch() -> Result<Self> {
        let echo =
            Running::start_group(&mut Command::new("cat")).context("starting the control")?;
        let mut machine = Self {
            stalls: Arc::default(),
            lost: Arc::default(),
            stop: Arc::default(),
            threads: Vec::new(),
        };
        let (stalls, stop) = (Arc::clone(&machine.stalls), Arc::clone(&machine.stop));
        machine.threads.push(thread::spawn(move || ask(echo, &stalls, &stop)));
        let (lost, stop) = (Arc::clone(&machine.lost), Arc::clone(&machine.stop));
        machine.threads.push(thread::spawn(move || work(&lost, &stop)));
        Ok(machine)
    }

    /// How much of that time the machine was not there: stalled, or for others.
    pub fn stalled(&self, from: Instant, to: Instant) -> Duration {
        // The piece of work that tells of its end may not be done.
        if (to - from) > Duration::from_millis(500) {
            self.wait_for(to);
        }
        let all = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = all.iter().map(|one| {
            let both = one.to.min(to).checked_duration_since(one.from.max(from));
            both.unwrap_or_default().mul_f64(1.0 - one.share)
        });
        self.stalls.within(from, to).max(lost.sum())
    }

    fn wait_for(&self, time: Instant) {
        let is_known = || {
            let all = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
            all.back().is_some_and(|last| last.to >= time)
        };
        let begun = Instant::now();
        while !is_known() && begun.elapsed() < Duration::from_secs(10) {
            thread::sleep(PERIOD);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Asks, and notes when no answer came for a while.
fn ask(mut echo: Running, stalls: &Excuses, stop: &AtomicBool) {
    let mut before = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let answered = echo.send("?").and_then(|()| echo.line());
        let now = Instant::now();
        // What it slept is part of the time in which nothing happened.
        if now - before > SHORTEST + PERIOD {
            stalls.add(before, now);
        }
        if answered.is_err() {
            return;
        }
        thread::sleep(PERIOD);
        before = now;
    }
}

/// Works a little, and notes how much longer it took than it should.
fn work(lost: &Mutex<VecDeque<Share>>, stop: &AtomicBool) {
    let n_steps = calibrated();
    let mut from = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        steps(n_steps);
        let to = Instant::now();
        let share = (WORK.as_secs_f64() / (to - begun).as_secs_f64()).min(1.0);
        let mut all = lost.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() == MAX_KEPT {
            all.pop_front();
        }
        all.push_back(Share { from, to, share });
        drop(all);
        from = to;
        thread::sleep(WORK_PERIOD);
    }
}

/// Steps that take `WORK` where nobody else wants the CPU: the best of many short tries.
fn calibrated() -> u64 {
    const TRY: u64 = 20_000;
    let best = (0..200).map(|_| {
        let begun = Instant::now();
        steps(TRY);
        begun.elapsed()
    });
    let best = best.min().unwrap_or(WORK).max(Duration::from_nanos(1));
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of some millions"
    )]
    let n = (TRY as f64 * WORK.as_secs_f64() / best.as_secs_f64()) as u64;
    n.max(1)
}

fn steps(n: u64) {
    (0..n).fold(1_u64, |x, i| std::hint::black_box(x.wrapping_mul(31) ^ i));
}
