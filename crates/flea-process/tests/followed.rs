//! Processes that are followed: none of their children is missed, whatever the parent does next.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::{Duration, Instant};

use flea_process::{Followed, Follower, Pid, TraceError, Trap, auxv, seize, status};
use flea_symbols::addr::RemoteAddr;
use support::Target;

const PATIENCE: Duration = Duration::from_secs(30);

fn command(target: &mut Target, line: &str) {
    target.child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
}

/// Everything that happens until nobody but the first process is left.
struct Heard {
    born: Vec<(Pid, Pid)>,
    executed: Vec<Pid>,
}

impl Heard {
    /// Those who `n_born` and `n_executed` come of; each is let run as soon as it is told of.
    fn from(follower: &Follower, first: Pid, n_born: usize, n_executed: usize) -> Self {
        let mut heard = Self { born: vec![], executed: vec![] };
        // Who is known, and has the memory that its children are copies of.
        let mut as_born = BTreeSet::from([first]);
        let until = Instant::now() + PATIENCE;
        while heard.born.len() < n_born
            || heard.executed.len() < n_executed
            || follower.held() != [first]
        {
            assert!(
                Instant::now() < until,
                "{} of {n_born} born, {} of {n_executed} executed, {:?} are left",
                heard.born.len(),
                heard.executed.len(),
                follower.held(),
            );
            match follower.next_within(Duration::from_millis(10)) {
                Some(Followed::Born { pid, parent }) => {
                    assert!(as_born.contains(&parent), "{pid} has nothing of {parent}'s");
                    assert!(as_born.insert(pid), "{pid} was born twice");
                    heard.born.push((pid, parent));
                }
                Some(Followed::Executed { pid, .. }) => {
                    as_born.remove(&pid);
                    heard.executed.push(pid);
                    follower.release(pid);
                }
                Some(Followed::Ended { pid }) => {
                    as_born.remove(&pid);
                }
                None => {}
            }
        }
        assert_eq!((heard.born.len(), heard.executed.len()), (n_born, n_executed));
        heard
    }
}

/// Each way is tried one at a time, where the child comes late, and many at once, where its parent
/// does.
#[test]
fn children_of_those_who_go_on_at_once() {
    let mut target = Target::start("births", &[]);
    let pid = target.pid();
    let follower = Follower::start(pid).unwrap();
    for (way, n_born, n_executed) in
        [("exec", 2, 1), ("end", 2, 0), ("thread", 2, 1), ("vfork", 2, 1), ("sibling", 2, 1)]
    {
        for n_at_once in [1, 1, 1, 1, 1, 20, 20] {
            command(&mut target, &format!("{way} {n_at_once}\n"));
            Heard::from(&follower, pid, n_at_once * n_born, n_at_once * n_executed);
            assert_eq!(target.line(), "done", "{way} {n_at_once}");
        }
    }
    drop(follower);
    assert_eq!(status(pid).unwrap().tracer_tid, 0);
    target.finish();
}

/// A process that waits after an exec may have to act on a signal as soon as it goes on (its child
/// has ended, mostly). It can be worked on nevertheless, and gets the signal in the end.
#[test]
fn one_with_a_signal_pending_can_be_worked_on() {
    let mut target = Target::start("births", &[]);
    let pid = target.pid();
    let follower = Follower::start(pid).unwrap();
    command(&mut target, "exec 1\n");
    let executed = loop {
        match follower.next_within(PATIENCE).expect("one executes a program") {
            Followed::Executed { pid, .. } => break pid,
            Followed::Born { .. } | Followed::Ended { .. } => {}
        }
    };
    let entry = auxv(executed).unwrap().entry.unwrap();
    follower.run_until(executed, entry, |_| true).unwrap();
    let nix_pid = nix::unistd::Pid::from_raw(executed);
    nix::sys::signal::kill(nix_pid, nix::sys::signal::Signal::SIGCHLD).unwrap();
    let pending = || status(executed).unwrap().deliverable().contains(libc::SIGCHLD);
    assert!(pending());
    let number = seize(executed, |tracer| tracer.remote_syscall(libc::SYS_getpid, [0; 6]));
    assert_eq!(number.unwrap().unwrap(), u64::try_from(executed).unwrap());
    assert!(pending());
    follower.release(executed);
    assert_eq!(target.line(), "done");
    drop(follower);
    target.finish();
}

/// Breakpoints are in the copy of its parent's text that a child has, and the parent is no more what
/// the child could get other bytes from.
#[test]
fn a_child_of_one_that_executes_a_program_in_the_window() {
    for _ in 0..5 {
        let mut target = Target::start("births", &[]);
        let site = target.first_line.strip_prefix("0x").unwrap();
        let site = RemoteAddr(u64::from_str_radix(site, 16).unwrap());
        let nowhere = RemoteAddr(0x1000);
        seize(target.pid(), |tracer| {
            tracer.arm(&[Trap { site, goes_to: nowhere, starts_behind: false }]).unwrap();
            tracer.write_text(site, &[0xcc]).unwrap();
            tracer.sync_core().unwrap();
            command(&mut target, "trap\n");
            let ended = tracer.wait_a_moment(PATIENCE);
            assert!(matches!(ended, Err(TraceError::Execed { .. })), "{ended:?}");
        })
        .unwrap();
        assert_eq!(target.line(), "done");
        target.finish();
    }
}
