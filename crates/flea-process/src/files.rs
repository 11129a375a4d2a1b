//! Opening files that a target chose, without being made to do what it may not do itself.
//!
//! Protected: who runs Flea with more rights than the target has. What is at a path below
//! `/proc/PID` is the target's choice, and may be another thing the next moment: a pipe, on which
//! opening waits for ever; a device, for which opening is a deed; somebody else's file that the
//! target can only read, opened anew for writing. By:
//! 1. a handle that opens nothing (O_PATH) is taken, which names one file for good;
//! 2. that is looked at;
//! 3. and then opened by the handle.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::proc::Tid;

/// Opens a regular file for reading. Fails at once where `path` is anything else.
///
/// # Errors
/// As [`File::open`], and where it is no regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let handle = handle_of(path)?;
    if !handle.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    File::open(by_handle(&handle))
}

/// Opens what thread `tid` has just made with memfd_create as its descriptor `fd`, if that is
/// what is there: empty, not sealed, and in the file system that only such memory is in.
///
/// # Errors
/// As [`File::open`], and where it is another file.
pub fn open_new_memfd(tid: Tid, fd: u64) -> io::Result<File> {
    let handle = handle_of(Path::new(&format!("/proc/{tid}/fd/{fd}")))?;
    let found = handle.metadata()?;
    let is_new = found.is_file() && found.len() == 0 && found.nlink() == 0;
    let own = own_memfd()?.metadata()?;
    if !is_new || found.dev() != own.dev() {
        return Err(changed());
    }
    let file = OpenOptions::new().read(true).write(true).open(by_handle(&handle))?;
    // SAFETY: fcntl takes numbers only here.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals == 0 { Ok(file) } else { Err(changed()) }
}

fn changed() -> io::Error {
    io::Error::other("the target has put another file in its place")
}

fn handle_of(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
}

fn by_handle(handle: &File) -> String {
    format!("/proc/self/fd/{}", handle.as_raw_fd())
}

fn own_memfd() -> io::Result<File> {
    // SAFETY: the name is a C string, and nothing else is asked for.
    let fd = unsafe { libc::memfd_create(c"flea-probe".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else knows of it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn memfd(flags: u32) -> File {
        // SAFETY: as above.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), flags | libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: as above.
        unsafe { File::from_raw_fd(fd) }
    }

    #[test]
    fn only_a_new_memfd_is_opened_for_writing() {
        let tid = nix::unistd::gettid().as_raw();
        let open = |file: &File| open_new_memfd(tid, u64::try_from(file.as_raw_fd()).unwrap());
        let mut new = memfd(libc::MFD_ALLOW_SEALING);
        open(&new).unwrap().set_len(4096).unwrap();
        assert_eq!(new.metadata().unwrap().len(), 4096);
        new.write_all(b"used").unwrap();
        assert!(open(&new).is_err(), "it is not empty");
        assert!(open(&memfd(0)).is_err(), "it is sealed");
        let path = std::env::temp_dir().join(format!("flea-files-{tid}"));
        let empty = File::create(&path).unwrap();
        assert!(open(&empty).is_err(), "it has a name");
        std::fs::remove_file(&path).unwrap();
        assert!(open(&empty).is_err(), "it is in another file system");
        assert!(open(&File::open("/dev/null").unwrap()).is_err(), "it is a device");
    }

    #[test]
    fn nobody_waits_for_a_pipe() {
        let path = std::env::temp_dir().join(format!("flea-pipe-{}", std::process::id()));
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        assert!(open_regular(&path).is_err());
        assert!(open_regular(Path::new("/dev/null")).is_err());
        assert!(open_regular(Path::new("/proc/self/exe")).is_ok());
        std::fs::remove_file(&path).unwrap();
    }
}
