//! Threads that are born as fast as can be while the process is seized.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::time::Duration;

use flea_process::{Trap, seize};
use flea_symbols::addr::RemoteAddr;
use support::Target;

/// Sets and removes a breakpoint again and again; how often somebody ran into it.
fn trap_again_and_again(target: &Target) -> u64 {
    let site = target.first_line.strip_prefix("0x").unwrap();
    let site = RemoteAddr(u64::from_str_radix(site, 16).unwrap());
    let trap = Trap { site, goes_to: site.offset(1), starts_behind: false };
    let mut n_traps = 0;
    for _ in 0..60 {
        seize(target.pid(), |tracer| {
            let nop = tracer.memory().read_vec(site, 1).unwrap();
            tracer.arm(&[trap]).unwrap();
            tracer.write_text(site, &[0xcc]).unwrap();
            tracer.sync_core().unwrap();
            tracer.wait_a_moment(Duration::from_millis(1)).unwrap();
            tracer.write_text(site, &nop).unwrap();
            tracer.sync_core().unwrap();
            tracer.drain().unwrap();
            tracer.disarm().unwrap();
            n_traps += tracer.counts().traps;
        })
        .unwrap();
    }
    n_traps
}

/// All of them are found, however many come meanwhile; one that was not would be killed by the first
/// breakpoint.
#[test]
fn no_newborn_meets_a_breakpoint_unseized() {
    for args in [["3", "0"], ["20", "500"]] {
        let target = Target::start("storm", &args);
        assert!(trap_again_and_again(&target) > 0, "newborns call it all the time");
        target.finish();
    }
}
