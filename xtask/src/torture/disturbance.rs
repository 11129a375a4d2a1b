//! What else happens to a process: signals, one by one and in bursts, and being stopped.

use std::time::{Duration, Instant};

use anyhow::Result;
use flea::Pid;
use nix::sys::signal::{Signal, kill};

use super::bout::{Bout, Numbers};
use super::random::Random;
use super::target::Target;

/// The longest that it is stopped.
const LONGEST_STOP: Duration = Duration::from_millis(60);

/// Sends signals until the bout ends.
pub fn run(bout: &Bout<'_>, target: &dyn Target) -> Result<()> {
    let mut random = Random::new(bout.seed, 60);
    while bout.goes_on() {
        let pid = *random.pick(&target.pids());
        if random.percent(25) {
            stop(bout, &mut random, pid);
        } else {
            let signal = *random.pick(target.signals());
            for _ in 0..=random.below(5) {
                send(bout, pid, signal);
            }
        }
        let pause = random.time(Duration::from_millis(40));
        bout.sleep(pause);
    }
    Ok(())
}

/// SIGSTOP, and SIGCONT after a while.
fn stop(bout: &Bout<'_>, random: &mut Random, pid: Pid) {
    let from = Instant::now();
    send(bout, pid, Signal::SIGSTOP);
    std::thread::sleep(random.time(LONGEST_STOP));
    send(bout, pid, Signal::SIGCONT);
    bout.was_stopped(from, Instant::now());
}

fn send(bout: &Bout<'_>, pid: Pid, signal: Signal) {
    // A process of a server may have ended; the number of one that the server has not reaped
    // is still its own, and it is asked for right before.
    if kill(nix::unistd::Pid::from_raw(pid), signal).is_ok() {
        Numbers::add(&bout.numbers.n_signals, 1);
    }
}
