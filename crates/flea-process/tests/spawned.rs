//! Programs that wait before their first instruction.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::Command;
use std::time::{Duration, Instant};

use flea_process::{Exit, SpawnError, Status, auxv, comm, maps, seize, spawn, status};

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

#[test]
fn ends_with_its_own_code() {
    let mut child = spawn(shell("exit 7")).unwrap();
    assert_eq!(status(child.pid()).unwrap().state, 'T');
    assert_eq!(comm(child.pid()).unwrap(), "sh");
    assert_eq!(child.wait().unwrap(), Exit::Code(7));
    let mut child = spawn(shell("kill -TERM $$")).unwrap();
    assert_eq!(child.wait().unwrap(), Exit::Signal(libc::SIGTERM));
}

#[test]
fn stops_at_the_entry_point_with_libraries_mapped() {
    let mut child = spawn(shell("exit 3")).unwrap();
    let pid = child.pid();
    let has_libc = || maps(pid).unwrap().iter().any(|m| m.path.contains("libc.so"));
    assert!(!has_libc(), "the loader has not run");
    let entry = auxv(pid).unwrap().entry.unwrap();
    let text = seize(pid, |t| t.memory().read_vec(entry, 8).unwrap()).unwrap();
    child.run_until(entry, |_| true).unwrap();
    assert!(has_libc());
    let after = seize(pid, |tracer| {
        let pid_seen = tracer.remote_syscall(libc::SYS_getpid, [0; 6]).unwrap();
        assert_eq!(pid_seen, u64::try_from(pid).unwrap());
        tracer.memory().read_vec(entry, 8).unwrap()
    })
    .unwrap();
    assert_eq!(after, text, "the breakpoint is gone");
    // Let go of, it wakes for a moment to go from the tracer's stop into its own.
    let stopped = |status: Status| (status.state, status.tracer_tid) == ('T', 0);
    let until = Instant::now() + Duration::from_secs(10);
    while !stopped(status(pid).unwrap()) {
        if Instant::now() > until {
            child.child_mut().kill().unwrap();
            panic!("not stopped any more, after a system call was made in it");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(child.wait().unwrap(), Exit::Code(3));
}

#[test]
fn what_cannot_be_started() {
    let missing = spawn(Command::new("/nonexistent/program")).unwrap_err();
    assert!(matches!(missing, SpawnError::NotFound { .. }), "{missing}");
    let text = spawn(Command::new("/etc/passwd")).unwrap_err();
    assert!(matches!(text, SpawnError::NotExecutable { .. }), "{text}");
    let mut short = spawn(shell("exit 0")).unwrap();
    let never = maps(short.pid()).unwrap().iter().find(|m| m.perms.execute).unwrap().start;
    let ended = short.run_until(never, |_| false);
    assert!(matches!(ended, Err(SpawnError::Ended { .. })), "{ended:?}");
}
