//! The kernel's own probes: just enough of bpf(2) and perf_event_open(2) to run the programs of
//! an object on a function of this process.

use std::ffi::{CString, c_int, c_long};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use flea::{ObjectSpec, ProgramKind, ProgramSpec};

const BPF_MAP_CREATE: c_long = 0;
const BPF_MAP_LOOKUP_ELEM: c_long = 1;
const BPF_PROG_LOAD: c_long = 5;
const BPF_PROG_TYPE_KPROBE: u32 = 2;
const PERF_EVENT_IOC_SET_BPF: u64 = 0x4004_2408;
const PERF_EVENT_IOC_ENABLE: u64 = 0x2400;
const PERF_FLAG_FD_CLOEXEC: c_long = 8;
/// `src` of a `lddw` that refers to a map.
const PSEUDO_MAP: u8 = 1;

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

/// An object's only map, and its programs on a function.
pub struct Probes {
    map: OwnedFd,
    value_bytes: usize,
    _events: Vec<OwnedFd>,
}

impl Probes {
    /// Attaches all programs to the code at `offset` of the file at `path`, as far as this
    /// process runs it.
    pub fn attach(object: &ObjectSpec, path: &Path, offset: u64) -> io::Result<Self> {
        let [map] = object.maps.as_slice() else { panic!("one map, not {:?}", object.maps) };
        let mut attr = [
            pair(map.kind as u32, map.key_size_bytes),
            pair(map.value_size_bytes, map.max_entries),
        ];
        let map_fd = fd(bpf(BPF_MAP_CREATE, &mut attr))?;
        let mut events = Vec::new();
        for program in &object.programs {
            let program_fd = load(program, &map_fd)?;
            events.push(probe(program.kind, path, offset, &program_fd)?);
        }
        let value_bytes = map.value_size_bytes as usize;
        Ok(Self { map: map_fd, value_bytes, _events: events })
    }

    /// The map's element 0.
    pub fn words(&self) -> io::Result<Vec<u64>> {
        let key = 0u32;
        let mut words = vec![0u64; self.value_bytes / 8];
        let key_at = (&raw const key).expose_provenance() as u64;
        let mut attr =
            [pair(raw(&self.map), 0), key_at, words.as_mut_ptr().expose_provenance() as u64, 0];
        match bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) {
            0 => Ok(words),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn load(program: &ProgramSpec, map: &OwnedFd) -> io::Result<OwnedFd> {
    let mut code = Vec::new();
    for insn in &program.insns {
        let mut insn = *insn;
        if insn.opcode == 0x18 && insn.src == PSEUDO_MAP {
            insn.imm = map.as_raw_fd();
        }
        code.extend(insn.encode());
    }
    let n_insns = u32::try_from(program.insns.len()).expect("a small program");
    let license = c"GPL";
    let mut log = vec![0u8; 1 << 16];
    let mut attr = [
        pair(BPF_PROG_TYPE_KPROBE, n_insns),
        code.as_ptr().expose_provenance() as u64,
        license.as_ptr().expose_provenance() as u64,
        pair(1, u32::try_from(log.len()).expect("64 KiB")),
        log.as_mut_ptr().expose_provenance() as u64,
        0,
    ];
    fd(bpf(BPF_PROG_LOAD, &mut attr)).map_err(|error| {
        let log = String::from_utf8_lossy(&log);
        let log = log.trim_end_matches('\0');
        io::Error::new(error.kind(), format!("{}: {error}\n{log}", program.name))
    })
}

fn probe(kind: ProgramKind, path: &Path, offset: u64, program: &OwnedFd) -> io::Result<OwnedFd> {
    let number = |file: &str| -> io::Result<u64> {
        let text = std::fs::read_to_string(format!("/sys/bus/event_source/devices/uprobe/{file}"))?;
        let digits = text.trim().trim_start_matches("config:");
        digits.parse().map_err(|e| io::Error::other(format!("{file}: {e}")))
    };
    let kind_of_event = u32::try_from(number("type")?).map_err(io::Error::other)?;
    let config = match kind {
        ProgramKind::Uretprobe => 1 << number("format/retprobe")?,
        _ => 0,
    };
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    // struct perf_event_attr up to config2: type and size, config, period, sample type, read
    // format, flags, wakeup and breakpoint type, uprobe_path, probe_offset.
    let mut attr = [0u64; 9];
    attr[0] = pair(kind_of_event, 72);
    attr[1] = config;
    attr[7] = path.as_ptr().expose_provenance() as u64;
    attr[8] = offset;
    // SAFETY: the attribute is as long as it says, and its path ends with a NUL.
    let opened = unsafe {
        libc::syscall(libc::SYS_perf_event_open, attr.as_mut_ptr(), 0, -1, -1, PERF_FLAG_FD_CLOEXEC)
    };
    let event = fd(opened)?;
    for (request, argument) in
        [(PERF_EVENT_IOC_SET_BPF, program.as_raw_fd()), (PERF_EVENT_IOC_ENABLE, 0)]
    {
        // SAFETY: neither request takes an address.
        if unsafe { libc::ioctl(event.as_raw_fd(), request, argument) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(event)
}
