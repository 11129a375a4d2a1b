//! No byte is lost or doubled where a transfer is interrupted half way, and none of its calls fails.
//! A call that had done a part of what it was asked returns with that, as for a signal: counted and
//! shown, not refused.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use flea_process::{Tid, seize};
use support::Target;

const KIB: u64 = 8192;

#[test]
fn transfers_go_on() {
    let target = Target::start("transfers", &[&KIB.to_string()]);
    let words = target.first_line.split_whitespace();
    let tids: Vec<Tid> = words.map(|word| word.parse().unwrap()).collect();
    let mut n_loans = 0;
    loop {
        let seized = seize(target.pid(), |tracer| {
            let alive = tracer.threads();
            for &tid in tids.iter().filter(|tid| alive.contains(tid)) {
                // It may have ended by now.
                let lent = tracer.with_this_thread(tid, |t| t.syscall(libc::SYS_gettid, [0; 6]));
                n_loans += u64::from(lent.is_ok());
            }
            tids.iter().any(|tid| tracer.threads().contains(tid))
        });
        if !seized.unwrap_or(false) {
            break;
        }
    }
    let text = target.finish();
    println!("{n_loans} loans\n{text}");
    assert!(n_loans > 5, "{n_loans} loans");
    assert_eq!(text.lines().count(), 6, "{text}");
    for line in text.lines() {
        assert_eq!(line.split_whitespace().nth(1), Some("ok"), "{line}");
    }
}
