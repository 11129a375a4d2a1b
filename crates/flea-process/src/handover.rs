//! Giving an open file of ours to the target: shared memory that other processes have already.
//!
//! The target could open `/proc/OURS/fd/N` only where it sees our process and may look into it,
//! which one of another user, or in a container, does not. So a socket pair is made in the target,
//! one end of it is taken from there (pidfd_getfd, which a tracer may), and the file is sent.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr;

use flea_symbols::addr::RemoteAddr;

use crate::proc::Pid;
use crate::remote::{Borrowed, RemoteError};
use crate::tracer::TraceError;

/// `CMSG_SPACE(sizeof(int))`: a header of 16 bytes, the number, padding.
const CONTROL_BYTES: usize = 24;
/// `struct msghdr`, `struct iovec`, a byte, `struct cmsghdr`, as the target lays them out.
const HEADER_AT: i64 = 8;
const VECTOR_AT: i64 = HEADER_AT + 56;
const BYTE_AT: i64 = VECTOR_AT + 16;
const CONTROL_AT: i64 = BYTE_AT + 8;
/// Memory that it needs in the target.
pub const HANDOVER_BYTES: usize = 112;

/// Why a file could not be handed over.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// The target's side.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// Our side.
    #[error(transparent)]
    Local(#[from] io::Error),
}

/// Gives `file` to the process of `thread`; its number there. `scratch` are bytes of its memory
/// that nobody uses, and that may be written to.
pub fn hand_over(
    thread: &mut Borrowed<'_>,
    scratch: RemoteAddr,
    file: BorrowedFd<'_>,
) -> Result<u64, HandOverError> {
    let domain = libc::AF_UNIX.cast_unsigned().into();
    let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC).cast_unsigned().into();
    thread.syscall(libc::SYS_socketpair, [domain, kind, 0, scratch.0, 0, 0])?;
    let pair =
        thread.memory().read_u64(scratch).map_err(|e| RemoteError::from(TraceError::from(e)));
    let pair = pair?;
    let (ours, theirs) = (pair & 0xffff_ffff, pair >> 32);
    let sent = take(thread.tid(), ours).and_then(|end| send(&end, file));
    let received = match sent {
        Ok(()) => receive(thread, scratch, theirs),
        Err(error) => Err(error.into()),
    };
    for end in [ours, theirs] {
        thread.syscall(libc::SYS_close, [end, 0, 0, 0, 0, 0])?;
    }
    received
}

/// A descriptor of a process, as one of ours.
fn take(pid: Pid, fd: u64) -> io::Result<OwnedFd> {
    let owned = |fd: i64| match i32::try_from(fd) {
        // SAFETY: the kernel has just made it for us, and nobody else knows of it.
        Ok(fd @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: pidfd_open takes numbers only.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: pidfd_getfd takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) })
}

/// Sends `file`, with one byte, for a message of none carries nothing.
fn send(end: &OwnedFd, file: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = [0u8];
    let mut vector = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
    let mut control = [0u64; CONTROL_BYTES / 8];
    control[0] = (CONTROL_BYTES - 4) as u64;
    control[1] = u64::from(libc::SOL_SOCKET.cast_unsigned())
        | u64::from(libc::SCM_RIGHTS.cast_unsigned()) << 32;
    control[2] = u64::from(file.as_raw_fd().cast_unsigned());
    let message = libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut vector,
        msg_iovlen: 1,
        msg_control: control.as_mut_ptr().cast(),
        msg_controllen: CONTROL_BYTES,
        msg_flags: 0,
    };
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: all pointers in the message are to live locals of the sizes that it states.
    let sent = unsafe { libc::sendmsg(end.as_raw_fd(), &raw const message, flags) };
    if sent == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn receive(thread: &mut Borrowed<'_>, scratch: RemoteAddr, end: u64) -> Result<u64, HandOverError> {
    let at = |offset| scratch.offset(offset).0;
    let header = [0, 0, at(VECTOR_AT), 1, at(CONTROL_AT), CONTROL_BYTES as u64, 0];
    let rest = [at(BYTE_AT), 1, 0, 0, 0, 0];
    let words = header.iter().chain(&rest).flat_map(|word: &u64| word.to_le_bytes());
    let bytes: Vec<u8> = words.collect();
    let trace = |error| RemoteError::from(TraceError::from(error));
    thread.memory().write(scratch.offset(HEADER_AT), &bytes).map_err(trace)?;
    let flags = (libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC).cast_unsigned().into();
    thread.syscall(libc::SYS_recvmsg, [end, at(HEADER_AT), flags, 0, 0, 0])?;
    let read = |offset| thread.memory().read_u64(scratch.offset(offset)).map_err(trace);
    if read(CONTROL_AT)? != (CONTROL_BYTES - 4) as u64 {
        // Its table of files is full.
        return Err(io::Error::from_raw_os_error(libc::EMFILE).into());
    }
    Ok(read(CONTROL_AT + 16)? & 0xffff_ffff)
}
