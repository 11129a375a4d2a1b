//! bpf(2): the few commands that a verdict and a result need. All unsafe code of the kernel's
//! oracle is here; the layouts are those of `union bpf_attr` (include/uapi/linux/bpf.h, 6.18).

use std::ffi::{c_int, c_long};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

const BPF_MAP_CREATE: c_long = 0;
const BPF_MAP_LOOKUP_ELEM: c_long = 1;
const BPF_MAP_UPDATE_ELEM: c_long = 2;
const BPF_PROG_LOAD: c_long = 5;
const BPF_PROG_TEST_RUN: c_long = 10;
const BPF_MAP_FREEZE: c_long = 22;

const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
/// The program says that it may be linked with everything: some helpers insist.
const LICENSE: &[u8] = b"Dual MIT/GPL\0";

/// `BPF_MAP_CREATE`'s fields.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct MapCreate {
    pub(super) map_type: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) map_flags: u32,
}

#[repr(C)]
struct MapElement {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
}

/// One command. Fields that `T` does not have are 0 for the kernel.
///
/// # Safety
/// Addresses in `attr` are of memory as large as the command has it, which outlives the call.
unsafe fn bpf<T>(command: c_long, attr: &mut T) -> io::Result<c_long> {
    let at: *mut T = attr;
    // SAFETY: `attr` is live and of this size; what it points to is the caller's part.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, at, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: c_long) -> io::Result<OwnedFd> {
    let fd = c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

pub(super) fn create_map(mut attr: MapCreate) -> io::Result<OwnedFd> {
    // SAFETY: no addresses in it.
    owned(unsafe { bpf(BPF_MAP_CREATE, &mut attr) }?)
}

/// The caller's `value` is as large as the map's.
pub(super) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let (key, value) = (key.as_ptr() as u64, value.as_ptr() as u64);
    let mut attr = MapElement { map_fd: number(map), padding: 0, key, value, flags: 0 };
    // SAFETY: both slices outlive the call and have the sizes of the map: `KernelMaps` sees to it.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(|_| ())
}

/// Fills `value`, which is as large as the map's.
pub(super) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<()> {
    let (key, value) = (key.as_ptr() as u64, value.as_mut_ptr() as u64);
    let mut attr = MapElement { map_fd: number(map), padding: 0, key, value, flags: 0 };
    // SAFETY: both slices outlive the call and have the sizes of the map: `KernelMaps` sees to it.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) }.map(|_| ())
}

/// No system call may write it any more: the verifier then knows what is in it.
pub(super) fn freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = number(map);
    // SAFETY: no addresses in it.
    unsafe { bpf(BPF_MAP_FREEZE, &mut attr) }.map(|_| ())
}

/// `insns` is a whole number of instructions; an empty `log` asks for none.
pub(super) fn load(insns: &[[u8; 8]], log_level: u32, log: &mut [u8]) -> io::Result<OwnedFd> {
    let level = if log.is_empty() { 0 } else { log_level };
    let size = |n: usize| u32::try_from(n).map_err(io::Error::other);
    let mut attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_RAW_TRACEPOINT,
        insn_cnt: size(insns.len())?,
        insns: insns.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        log_level: level,
        log_size: size(log.len())?,
        log_buf: if level == 0 { 0 } else { log.as_mut_ptr() as u64 },
    };
    // SAFETY: instructions, license and log outlive the call, with the sizes that stand beside
    // them; the license ends with a 0.
    owned(unsafe { bpf(BPF_PROG_LOAD, &mut attr) }?)
}

/// What the program returned, cut to 32 bits.
pub(super) fn test_run(program: BorrowedFd<'_>, context: &[u64]) -> io::Result<u32> {
    let mut attr = TestRun {
        prog_fd: number(program),
        ctx_size_in: u32::try_from(size_of_val(context)).map_err(io::Error::other)?,
        ctx_in: context.as_ptr() as u64,
        ..TestRun::default()
    };
    // SAFETY: the context outlives the call, with the size that stands beside it.
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr) }?;
    Ok(attr.retval)
}
