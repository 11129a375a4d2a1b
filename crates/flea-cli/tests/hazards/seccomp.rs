//! Targets that forbid themselves system calls.

use anyhow::Result;

use crate::{
    confined::{Confined, is_root},
    permission::Nobody,
    support::flea,
};

/// What an attach asks of the kernel in the target: mmap, munmap, mprotect, madvise,
/// memfd_create, membarrier, ftruncate, open, openat, close, rt_sigaction.
const OURS: &str = "9,11,10,28,319,324,77,2,257,3,13";
/// read, write, exit, sigreturn, exit_group: what is left of a strict sandbox.
const BARE: &str = "only=0,1,60,15,231";
/// What every program needs as well: getpid, gettid, clock_gettime, kill, tgkill.
const ENOUGH: &str = "only=0,1,60,15,231,39,186,228,62,234";

#[test]
fn calls_of_ours_are_not_judged() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    for (action, more) in [("deny", "hot"), ("kill", "hot"), ("kill", "handlers")] {
        let filter = format!("{action}={OURS}");
        let Some(mut target) = Confined::start(&[more, &filter])? else { return Ok(()) };
        target.counts()?;
        let tracing = target.attach("latency", "confined_step")?;
        target.go(20)?;
        let records = tracing.stop()?;
        assert_eq!(records[0]["count"], 20, "{records:?}");
        target.end()?;
    }
    Ok(())
}

/// The first call of each thread would end the process.
#[test]
fn programs_are_refused_that_a_filter_would_kill_for() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let parts = ["seccomp would kill it", "getpid", "clock_gettime", "nothing was attached"];
    for restriction in [BARE, "strict", "kill=39,228"] {
        let Some(mut target) = Confined::start(&[restriction])? else { return Ok(()) };
        for verb in ["count", "latency", "trace"] {
            target.refuses_by(flea(), verb, &parts)?;
        }
        target.end()?;
    }
    // One of its threads is enough, and an error where there has to be a number.
    let Some(mut target) = Confined::start(&["hot", "deny=186"])? else { return Ok(()) };
    target.refuses(&["seccomp forbids", "gettid", "nothing was attached"])?;
    target.end()
}

#[test]
fn what_a_filter_allows_is_attached() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let Some(mut target) = Confined::start(&[ENOUGH])? else { return Ok(()) };
    target.counts()?;
    target.end()
}

/// Who may neither read a filter nor suspend it cannot know what it does.
#[test]
fn without_the_right_to_read_filters() -> Result<()> {
    let parts = ["has a seccomp filter", "SYS_ADMIN", "nothing was attached"];
    let nobody = if nix::unistd::geteuid().is_root() { Some(Nobody::new()?) } else { None };
    let Some(mut target) = Nobody::confined(nobody.as_ref(), "deny=9")? else { return Ok(()) };
    target.refuses_by(nobody.as_ref().map_or_else(flea, Nobody::flea), "count", &parts)?;
    target.end()
}

/// A handler of its own would be asked about calls of ours.
#[test]
fn system_calls_that_are_dispatched() -> Result<()> {
    let Some(mut target) = Confined::start(&["dispatch"])? else { return Ok(()) };
    target.refuses(&[
        "PR_SET_SYSCALL_USER_DISPATCH",
        "cannot be traced",
        "nothing was attached",
    ])?;
    target.end()
}

/// Our code is mapped executable, and never becomes so.
#[test]
fn memory_that_may_not_become_executable() -> Result<()> {
    let mut target = match Confined::start(&["mdwe", "hot"]) {
        Ok(Some(target)) => target,
        Ok(None) => return Ok(()),
        Err(error) if format!("{error:#}").contains("PR_SET_MDWE") => {
            eprintln!("skipped: this kernel has no PR_SET_MDWE: {error:#}");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    target.counts()?;
    target.attach("latency", "hot_step")?.stop()?;
    target.end()
}
