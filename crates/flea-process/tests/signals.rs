//! A signal that comes while we interrupt the thread it is for does what it would have done.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::time::{Duration, Instant};

use flea_process::{Tid, seize};
use support::Target;

const ROUNDS: u64 = 800;
/// By then a thread sleeps that should have been woken.
const PATIENCE: Duration = Duration::from_secs(60);

/// Each signal ends its thread's call with `EINTR`, though we interrupt and rewind the same calls
/// all the time. One that was hidden would leave its thread asleep, and the target would not end.
#[test]
fn a_signal_ends_the_call_that_we_interrupt() {
    let target = Target::start("signalled", &[&ROUNDS.to_string()]);
    let words = target.first_line.split_whitespace();
    let tids: Vec<Tid> = words.map(|word| word.parse().unwrap()).collect();
    let (mut n_loans, mut n_rewound) = (0, 0);
    let since = Instant::now();
    loop {
        assert!(since.elapsed() < PATIENCE, "a signal has not ended its call");
        let seized = seize(target.pid(), |tracer| {
            for _ in 0..20 {
                let alive = tracer.threads();
                for &tid in tids.iter().filter(|tid| alive.contains(tid)) {
                    // Refused while a signal is about to be delivered, and when it has ended.
                    let lent =
                        tracer.with_this_thread(tid, |t| t.syscall(libc::SYS_gettid, [0; 6]));
                    n_loans += u64::from(lent.is_ok());
                }
                if tracer.pump().is_err() {
                    break;
                }
            }
            n_rewound += tracer.counts().rewound;
            tids.iter().any(|tid| tracer.threads().contains(tid))
        });
        if !seized.unwrap_or(false) {
            break;
        }
    }
    println!("{n_loans} loans, {n_rewound} calls rewound");
    assert!(
        n_loans > ROUNDS / 20 && n_rewound > ROUNDS / 100,
        "{n_loans} loans, {n_rewound} rewound"
    );
    for line in target.finish().lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let rounds = ROUNDS.to_string();
        assert_eq!(words[1..], [rounds.as_str(), rounds.as_str()], "{line}");
    }
}
