//! How a process that is not our child has ended. Start at [`Watch`].

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::proc::{Pid, read_to_string, stat_field};
use crate::spawn::Exit;

/// `PIDFD_GET_INFO`: `_IOWR(0xff, 11, struct pidfd_info)` with the first version's 64 bytes
/// (include/uapi/linux/pidfd.h).
const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b;
/// Bit of `mask`; Linux 6.15 and later.
const PIDFD_INFO_EXIT: u64 = 1 << 3;
/// `struct pidfd_info`: `mask` is its first word, `exit_code` the upper half of its last.
const INFO_WORDS: usize = 8;
/// Index of `exit_code` among the fields behind the command's name in `/proc/PID/stat`.
const STAT_EXIT_CODE: usize = 49;

/// A process of somebody's, held so that its number cannot come to mean another one.
#[derive(Debug)]
pub struct Watch {
    pid: Pid,
    pidfd: Option<OwnedFd>,
}

impl Watch {
    /// Begins to watch `pid`. Never fails: without a pidfd (before Linux 5.3), less is known.
    #[must_use]
    pub fn new(pid: Pid) -> Self {
        // SAFETY: pidfd_open takes numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let pidfd = i32::try_from(fd).ok().filter(|&fd| fd >= 0).map(|fd| {
            // SAFETY: the kernel has just made it for us, and nobody else knows of it.
            unsafe { OwnedFd::from_raw_fd(fd) }
        });
        Self { pid, pidfd }
    }

    /// How it has ended; `None` while it runs, and where the kernel does not tell: one that
    /// its parent has waited for is remembered since Linux 6.15.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        // Twice: it may be waited for between the two looks.
        self.remembered().or_else(|| self.of_zombie()).or_else(|| self.remembered())
    }

    fn remembered(&self) -> Option<Exit> {
        let mut info = [0u64; INFO_WORDS];
        info[0] = PIDFD_INFO_EXIT;
        let fd = self.pidfd.as_ref()?.as_raw_fd();
        // SAFETY: the request says that it reads and writes 64 bytes, and `info` has them.
        let answer = unsafe { libc::ioctl(fd, PIDFD_GET_INFO, info.as_mut_ptr()) };
        let told = answer == 0 && info[0] & PIDFD_INFO_EXIT != 0;
        told.then(|| decode(info[INFO_WORDS - 1] >> 32))
    }

    fn of_zombie(&self) -> Option<Exit> {
        let stat = read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        let is_zombie = matches!(stat_field(&stat, 0), Some('Z' | 'X'));
        let status = stat_field(&stat, STAT_EXIT_CODE)?;
        is_zombie.then(|| decode(status))
    }
}

/// A wait status (wait(2)).
fn decode(status: u64) -> Exit {
    let byte = |n: u64| i32::from(n.to_le_bytes()[0]);
    match byte(status) & 0x7f {
        0 => Exit::Code(byte(status >> 8)),
        signal => Exit::Signal(signal),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn how_a_process_has_ended() {
        for (script, expected) in
            [("read x; exit 0", Exit::Code(0)), ("read x; kill -9 $$", Exit::Signal(9))]
        {
            let mut command = Command::new("sh");
            command.args(["-c", script]).stdin(std::process::Stdio::piped());
            let mut child = command.spawn().expect("sh is everywhere");
            let watch = Watch::new(child.id().cast_signed());
            assert_eq!(watch.exit(), None, "it waits for a line");
            drop(child.stdin.take());
            let stat = format!("/proc/{}/stat", child.id());
            while !std::fs::read_to_string(&stat).expect("not waited for").contains(") Z ") {
                std::thread::yield_now();
            }
            assert_eq!(watch.exit(), Some(expected), "{script}: a zombie");
            child.wait().expect("it is ours");
            // Where the kernel is too old to remember, it says nothing.
            assert!(watch.exit().is_none_or(|exit| exit == expected), "{script}: waited for");
        }
    }
}
