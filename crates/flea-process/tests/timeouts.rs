//! A system call with a timeout that is interrupted by us again and again ends as it would have,
//! and does not begin to wait anew each time.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::time::{Duration, Instant};

use flea_process::{Tid, seize};
use support::Target;

/// How long each call is to wait.
const TIMEOUT_MS: u64 = 600;
/// How long they are interrupted: a timeout that begins anew outlives it.
const HAMMERED_MS: u64 = 4 * TIMEOUT_MS;

struct Ended {
    name: String,
    is_right: bool,
    took_ms: u64,
}

/// Interrupts all of them for as long as any lives, each time as another tracer would.
fn hammer(pid: i32, tids: &[Tid]) -> u64 {
    let since = Instant::now();
    let mut n_calls = 0;
    let mut living = true;
    while living && since.elapsed() < Duration::from_millis(HAMMERED_MS) {
        let loans = seize(pid, |tracer| {
            let alive = tracer.threads();
            let mut n_loans = 0;
            for &tid in tids.iter().filter(|tid| alive.contains(tid)) {
                // It may have ended by now, or be about to.
                let lent = tracer.with_this_thread(tid, |t| t.syscall(libc::SYS_gettid, [0; 6]));
                n_loans += u64::from(lent.is_ok());
            }
            n_loans
        });
        let Ok(loans) = loans else { break };
        living = loans > 0;
        n_calls += loans;
        std::thread::sleep(Duration::from_millis(5));
    }
    n_calls
}

fn run() -> (u64, Vec<Ended>) {
    let target = Target::start("timed", &[&TIMEOUT_MS.to_string()]);
    let words: Vec<&str> = target.first_line.split_whitespace().collect();
    let tids: Vec<Tid> = words.chunks(2).map(|pair| pair[1].parse().unwrap()).collect();
    let n_calls = hammer(target.pid(), &tids);
    let text = target.finish();
    let ended = text.lines().map(|line| {
        println!("{line}");
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, verdict, took_ms, ..] = words[..] else { panic!("{line}") };
        let took_ms = took_ms.parse().unwrap();
        Ended { name: name.to_owned(), is_right: verdict == "ok", took_ms }
    });
    (n_calls, ended.collect())
}

#[test]
fn timeouts_do_not_begin_anew() {
    let (n_calls, ended) = run();
    println!("{n_calls} loans");
    assert!(n_calls > 10 * ended.len() as u64, "{n_calls} loans");
    for Ended { name, is_right, took_ms } in ended {
        assert!(is_right, "{name}");
        // A timeout of a socket is nowhere in the call: see `restart`.
        let most_ms = if name.starts_with("socket") { u64::MAX } else { HAMMERED_MS };
        assert!(took_ms < most_ms, "{name} took {took_ms} ms");
    }
}
