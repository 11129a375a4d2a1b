//! The kernel's link for many probes at once: just enough of bpf(2) to put the program of an
//! object on functions of a file.

use std::{
    ffi::{CString, c_int, c_long},
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use flea::{ObjectSpec, ProgramKind};
use object::{Object as _, ObjectSegment as _};

use super::Times;

const BPF_MAP_CREATE: c_long = 0;
const BPF_PROG_LOAD: c_long = 5;
const BPF_LINK_CREATE: c_long = 28;
const BPF_PROG_TYPE_KPROBE: u32 = 2;
const BPF_TRACE_UPROBE_MULTI: u32 = 48;
const BPF_F_UPROBE_MULTI_RETURN: u32 = 1;
/// `lddw`, and its `src` where it refers to a map.
const LDDW: u8 = 0x18;
const PSEUDO_MAP: u8 = 1;

/// A program that is on all of its functions until it is dropped.
pub struct Multi {
    _link: OwnedFd,
}

impl Multi {
    /// Puts the program of `spec` on all `addresses` (as the file has them) of the program at
    /// `path`, in whichever process runs it, and takes it off again.
    pub fn once(spec: &ObjectSpec, path: &Path, addresses: &[u64]) -> Result<Times> {
        let [map] = spec.maps.as_slice() else { anyhow::bail!("not one map") };
        let mut attr = [
            pair(map.kind as u32, map.key_size_bytes),
            pair(map.value_size_bytes, map.max_entries),
        ];
        let map_fd = fd(bpf(BPF_MAP_CREATE, &mut attr)).context("making the map")?;
        let program = load(spec, &map_fd).context("loading the program")?;
        let is_exit = spec.programs[0].kind == ProgramKind::Fexit;
        let offsets = file_offsets(path, addresses)?;
        let cookies: Vec<u64> = (0..offsets.len() as u64).collect();
        let begun = Instant::now();
        let link = Self::attach(&program, path, (&offsets, &cookies), is_exit)?;
        let on = begun.elapsed();
        let begun = Instant::now();
        drop(link);
        Ok(Times { on, off: begun.elapsed() })
    }

    fn attach(
        program: &OwnedFd,
        path: &Path,
        (offsets, cookies): (&[u64], &[u64]),
        is_exit: bool,
    ) -> Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let flags = if is_exit { BPF_F_UPROBE_MULTI_RETURN } else { 0 };
        // prog_fd and target, attach type and flags, then uprobe_multi: path, offsets, reference
        // counters, cookies, count and flags, pid.
        let mut attr = [
            pair(raw(program), 0),
            pair(BPF_TRACE_UPROBE_MULTI, 0),
            path.as_ptr().expose_provenance() as u64,
            offsets.as_ptr().expose_provenance() as u64,
            0,
            cookies.as_ptr().expose_provenance() as u64,
            pair(u32::try_from(offsets.len())?, flags),
            0,
        ];
        Ok(Self { _link: fd(bpf(BPF_LINK_CREATE, &mut attr)).context("making the link")? })
    }
}

fn fd(result: c_long) -> io::Result<OwnedFd> {
    match c_int::try_from(result) {
        // SAFETY: the system call has just returned it, and nobody else knows of it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn bpf(command: c_long, attr: &mut [u64]) -> c_long {
    // SAFETY: addresses in `attr` are of memory that outlives the call and is as large as the
    // command has it: see the callers.
    unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) }
}

/// Two 32-bit fields of an attribute.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn raw(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn load(spec: &ObjectSpec, map: &OwnedFd) -> Result<OwnedFd> {
    let insns = &spec.programs[0].insns;
    let mut code = Vec::new();
    for insn in insns {
        let mut insn = *insn;
        if insn.opcode == LDDW && insn.src == PSEUDO_MAP {
            insn.imm = map.as_raw_fd();
        }
        code.extend(insn.encode());
    }
    let license = c"GPL";
    // Type and length, code, license, no log; kernel version and flags, name, interface and
    // attach type.
    let mut attr = [
        pair(BPF_PROG_TYPE_KPROBE, u32::try_from(insns.len())?),
        code.as_ptr().expose_provenance() as u64,
        license.as_ptr().expose_provenance() as u64,
        0,
        0,
        0,
        0,
        0,
        pair(0, BPF_TRACE_UPROBE_MULTI),
    ];
    Ok(fd(bpf(BPF_PROG_LOAD, &mut attr))?)
}

/// Where in the file the code at each of these addresses is.
fn file_offsets(path: &Path, addresses: &[u64]) -> Result<Vec<u64>> {
    let bytes = std::fs::read(path)?;
    let file = object::File::parse(&*bytes)?;
    let segments: Vec<_> =
        file.segments().map(|s| (s.address(), s.size(), s.file_range().0)).collect();
    let offset = |address: u64| {
        let holds = |(start, size, _): &&(u64, u64, u64)| (*start..start + size).contains(&address);
        segments.iter().find(holds).map(|(start, _, offset)| offset + (address - start))
    };
    let offsets: Vec<u64> = addresses.iter().filter_map(|a| offset(*a)).collect();
    ensure!(offsets.len() == addresses.len(), "a function that is in no segment of the file");
    Ok(offsets)
}
