//! Controllers that die after they announced a change and before they made it.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::*;
use crate::Session;
use crate::builtin::{Expr, Histograms};

/// A `cat` that sleeps in `read` but when it is given a line. Ended with its guard.
struct Cat {
    child: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Cat {
    fn start() -> (Self, Session) {
        let pipes = || (Stdio::piped(), Stdio::piped());
        let (stdin, stdout) = pipes();
        let mut child = Command::new("cat").stdin(stdin).stdout(stdout).spawn().unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut cat = Self { child, stdin, stdout };
        cat.works();
        let session = Session::attach(cat.child.id().cast_signed()).unwrap();
        (cat, session)
    }

    fn works(&mut self) {
        writeln!(self.stdin, "still there").unwrap();
        assert_eq!(self.stdout.next().unwrap().unwrap(), "still there");
    }

    fn has(&self, mapping: &str) -> bool {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap();
        maps.contains(mapping)
    }
}

impl Drop for Cat {
    fn drop(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn results(session: &Session, function: &str) -> Histograms {
    Histograms::of(session, &session.find(function).unwrap()[0], &Expr::Retval).unwrap()
}

/// Announces the change that `edit` makes, as a controller does whose memory is then given up.
fn announce_and_die(
    pid: Pid,
    edit: impl FnOnce(&mut Change) -> Result<(), AttachError> + Send,
) -> Result<(), AttachError> {
    seized(pid, |tracer| {
        let mut ground = Ground::find(tracer)?.expect("something is attached");
        let known = KnownCode::read(&ground.registry, &ground)?;
        let mut change = Change::new(ground.registry.clone(), known);
        edit(&mut change)?;
        assert!(change.switch_off(usize::MAX));
        change.registry.data.iter_mut().for_each(|arena| arena.released = true);
        announce(&mut ground, change).map(drop)
    })
}

/// What it wanted to take off is still entered, and a thread is inside; the next who comes
/// must not give away what that runs on.
#[test]
fn one_that_was_about_to_take_off() {
    let (mut cat, session) = Cat::start();
    let programs = results(&session, "libc.so.6:read");
    cat.works();
    announce_and_die(session.pid(), |change| change.remove(|_| true).map(drop)).unwrap();
    assert_eq!(peek(session.pid()).unwrap().functions[0].bodies, [], "so it was announced");
    cat.works();
    let before = programs.read()[0].count;
    assert!(before > 0, "it still runs");

    detach_from(session.pid(), &[]).unwrap();
    assert!(!cat.has("/memfd:flea-maps"), "it has been taken off, and nobody runs in it");
    cat.works();
    assert_eq!(programs.read()[0].count, before, "not even for the call that was inside");
    detach_from(session.pid(), &[]).unwrap();
    assert!(!cat.has("/memfd:flea"));
    cat.works();
}

/// Its sites still enter what was there before: the other controller's skeleton.
#[test]
fn one_that_was_about_to_change_the_skeleton() {
    let (mut cat, session) = Cat::start();
    let mut stays = results(&session, "libc.so.6:read");
    cat.works();
    announce_and_die(session.pid(), |change| {
        let site = change.registry.functions[0].site;
        change.relink_site(site)
    })
    .unwrap();
    let n_retired = peek(session.pid()).unwrap().retired.len();
    assert_eq!(n_retired, 1, "so it was announced");
    // Whoever comes finishes it, also when there is nothing to do at that function.
    let other = results(&session, "libc.so.6:write");
    for _ in 0..3 {
        cat.works();
    }
    // The last line may be here before its `write` has returned.
    assert!(stays.read()[0].count >= 2 && (2..=3).contains(&other.read()[0].count));
    stays.detach().unwrap();
    drop((stays, other));
    cat.works();
    detach_from(session.pid(), &[]).unwrap();
    assert!(!cat.has("/memfd:flea"));
    cat.works();
}
