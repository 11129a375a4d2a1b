//! What `/proc/PID` says of a process and its threads: read and parsed, never changed.

use std::cell::Cell;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use flea_symbols::addr::RemoteAddr;

use crate::maps::{Mapping, parse_maps};
use crate::seccomp::SeccompMode;

/// A process's number, in our pid namespace.
pub type Pid = i32;
/// A thread's number, in our pid namespace.
pub type Tid = i32;

/// Why a process cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ProcError {
    /// No such process.
    #[error("there is no process {pid}")]
    NotFound {
        /// Its number.
        pid: Pid,
    },
    /// It has ended; its parent has not asked for its exit code yet.
    #[error("process {pid} has ended already (a zombie that its parent has not waited for)")]
    Zombie {
        /// Its number.
        pid: Pid,
    },
    /// A thread of the kernel: there is no program to trace.
    #[error("{pid} is a kernel thread ({comm}), not a program")]
    KernelThread {
        /// Its number.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// A thread, not a process, was named.
    #[error("{tid} is a thread of process {pid}; give {pid}")]
    NotLeader {
        /// What was given.
        tid: Tid,
        /// The process.
        pid: Pid,
    },
    /// A 32-bit program.
    #[error("process {pid} runs a 32-bit program; only 64-bit x86 programs can be traced")]
    ThirtyTwoBit {
        /// Its number.
        pid: Pid,
    },
    /// A 64-bit program for another machine (run by an emulator).
    #[error("process {pid} runs a program for another machine (ELF machine {machine})")]
    OtherMachine {
        /// Its number.
        pid: Pid,
        /// `e_machine`.
        machine: u16,
    },
    /// The system refused.
    #[error("reading {path}: {reason}; run as the user of process {pid} or as root")]
    Denied {
        /// The process.
        pid: Pid,
        /// The file.
        path: String,
        /// The system's word for it.
        reason: io::Error,
    },
    /// It has our user, and the system refused all the same.
    #[error(
        "process {pid} has made itself undumpable (it changed its user, has file capabilities, or asked for it by prctl): {path} is for root alone; run as root"
    )]
    NotDumpable {
        /// The process.
        pid: Pid,
        /// The file.
        path: String,
    },
    /// Reading failed otherwise.
    #[error("reading {path}: {reason}")]
    Read {
        /// The file.
        path: String,
        /// The system's word for it.
        reason: io::Error,
    },
    /// The file does not have the form we know.
    #[error("{path} has no usable {field}")]
    Malformed {
        /// The file.
        path: String,
        /// What was looked for.
        field: &'static str,
    },
}

/// A set of signals; bit `n - 1` is signal `n`, as the kernel has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalSet(pub u64);

impl SignalSet {
    /// Every signal; the kernel ignores the two that cannot be blocked.
    pub const ALL: Self = Self(u64::MAX);

    /// Whether `signal` is in it.
    #[must_use]
    pub const fn contains(self, signal: i32) -> bool {
        signal >= 1 && signal <= 64 && self.0 & (1 << (signal - 1)) != 0
    }

    /// With `signal` as well.
    #[must_use]
    pub const fn with(self, signal: i32) -> Self {
        Self(self.0 | 1 << (signal - 1))
    }

    /// Without `signal`.
    #[must_use]
    pub const fn without(self, signal: i32) -> Self {
        Self(self.0 & !(1 << (signal - 1)))
    }
}

/// The lines of `/proc/PID/status` that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// `Name`, as the kernel escapes it.
    pub name: String,
    /// `State`: R, S, D, T, t, Z, X, I.
    pub state: char,
    /// The process.
    pub tgid: Pid,
    /// Number of the tracer's *thread*, 0 for none.
    pub tracer_tid: Tid,
    /// Real, effective, saved, file-system user.
    pub uids: [u32; 4],
    /// Numbers in each pid namespace, outermost first.
    pub ns_pids: Vec<i32>,
    /// Pending for this thread.
    pub pending: SignalSet,
    /// Pending for the process.
    pub shared_pending: SignalSet,
    /// Blocked by this thread.
    pub blocked: SignalSet,
    /// Ignored by the process.
    pub ignored: SignalSet,
    /// With a handler.
    pub caught: SignalSet,
    /// What judges the thread's system calls.
    pub seccomp: SeccompMode,
    /// The process has memory of its own (kernel threads and zombies have none).
    pub has_memory: bool,
    /// Some of its memory may not be swapped out; and perhaps all that it maps from now on.
    pub locks_memory: bool,
    /// The thread has a shadow stack: it may return only to where it was called from.
    pub shadow_stack: bool,
    /// Threads of the process, those that have ended and were not waited for included.
    pub n_threads: usize,
    /// How often the thread has left the CPU: it has run in between when this changed.
    pub switches: u64,
}

impl Status {
    /// A signal that will be delivered as soon as the thread next looks.
    #[must_use]
    pub fn deliverable(&self) -> SignalSet {
        SignalSet((self.pending.0 | self.shared_pending.0) & !self.blocked.0)
    }
}

/// Where a thread is, from `/proc/PID/task/TID/syscall`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// On a CPU or waiting for one; in user code or in the kernel.
    Running,
    /// Asleep in a system call.
    Syscall {
        /// Its number.
        number: u64,
        /// First argument.
        first_arg: u64,
        /// User stack pointer.
        sp: RemoteAddr,
        /// User instruction pointer.
        pc: RemoteAddr,
    },
    /// Asleep in the kernel, not in a system call: a page fault, or stopped.
    Elsewhere {
        /// User stack pointer.
        sp: RemoteAddr,
        /// User instruction pointer.
        pc: RemoteAddr,
    },
    /// Ended.
    Gone,
}

/// When a thread was last on a CPU, from `/proc/PID/task/TID/sched`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LastRun {
    /// By the clock of its CPU.
    pub(crate) at_ns: u64,
    /// How often it has left a CPU.
    pub(crate) n_switches: u64,
    /// How often it has gone to another one.
    pub(crate) n_migrations: u64,
}

/// What the kernel told the program when it started it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AuxVector {
    /// Entry point of the executable.
    pub entry: Option<RemoteAddr>,
    /// Base of the interpreter (ld.so); none in a static program.
    pub base: Option<RemoteAddr>,
    /// The vdso's ELF header.
    pub vdso: Option<RemoteAddr>,
    /// The executable's program headers.
    pub phdr: Option<RemoteAddr>,
}

/// Reads the status of process `pid`.
pub fn status(pid: Pid) -> Result<Status, ProcError> {
    parse_status(&read_text(pid, "status")?)
        .ok_or(ProcError::Malformed { path: format!("/proc/{pid}/status"), field: "status" })
}

/// Reads the status of one thread.
pub fn thread_status(pid: Pid, tid: Tid) -> Result<Status, ProcError> {
    let file = format!("task/{tid}/status");
    parse_status(&read_text(pid, &file)?).ok_or_else(|| ProcError::Malformed {
        path: format!("/proc/{pid}/{file}"),
        field: "status",
    })
}

/// The threads of process `pid` at one instant: the first one, then the others ascending.
pub fn threads(pid: Pid) -> Result<Vec<Tid>, ProcError> {
    let path = format!("/proc/{pid}/task");
    let entries = fs::read_dir(&path).map_err(|e| explain(pid, &path, e))?;
    let mut tids: Vec<Tid> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    // Numbers wrap around: a thread's can be lower than that of the first one.
    tids.sort_unstable_by_key(|&tid| (tid != pid, tid));
    Ok(tids)
}

/// The thread by whose directory in /proc process `pid` can be looked at: the first one, or, where
/// that has ended before the others and has no memory and no files any more, another one.
#[must_use]
pub fn stand_in(pid: Pid) -> Tid {
    let has_none = |tid: Tid| {
        let link = fs::read_link(format!("/proc/{tid}/exe"));
        link.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    };
    if !has_none(pid) {
        return pid;
    }
    let others = threads(pid).unwrap_or_default();
    others.into_iter().find(|&tid| tid != pid && !has_none(tid)).unwrap_or(pid)
}

/// Whether threads of process `pid` have a shadow stack, or may get one: glibc turns it on
/// where it was asked to by `GLIBC_TUNABLES`, behind the place where a started command is held.
pub fn may_use_shadow_stack(pid: Pid) -> Result<bool, ProcError> {
    for tid in threads(pid)? {
        // A first thread that has ended says nothing; the others have what it had.
        if let Ok(status) = thread_status(pid, tid)
            && status.has_memory
        {
            return Ok(status.shadow_stack || asks_for_shadow_stack(&read_text(tid, "environ")?));
        }
    }
    Err(ProcError::NotFound { pid })
}

fn asks_for_shadow_stack(environment: &str) -> bool {
    let mut variables = environment.split('\0');
    variables.any(|variable| {
        variable
            .strip_prefix("GLIBC_TUNABLES=")
            .is_some_and(|tunables| tunables.to_ascii_lowercase().contains("shstk"))
    })
}

/// The mappings of process `pid`.
pub fn maps(pid: Pid) -> Result<Vec<Mapping>, ProcError> {
    let of_first = read_text(pid, "maps");
    let text = match of_first {
        Ok(text) if !text.is_empty() => text,
        // It has ended before the others, perhaps, and has no memory any more.
        of_first => match stand_in(pid) {
            tid if tid == pid => of_first?,
            tid => read_text(tid, "maps")?,
        },
    };
    Ok(parse_maps(&text))
}

/// The path of the executable as the target sees it, without ` (deleted)`.
pub fn exe(pid: Pid) -> Result<PathBuf, ProcError> {
    let path = format!("/proc/{}/exe", stand_in(pid));
    let link = fs::read_link(&path).map_err(|e| explain(pid, &path, e))?;
    let text = link.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map_or_else(|| link.clone(), PathBuf::from))
}

/// The name of a process or thread.
pub fn comm(tid: Tid) -> Result<String, ProcError> {
    Ok(read_text(tid, "comm")?.trim_end().to_owned())
}

/// The process that started this one, or who has taken it over since.
pub(crate) fn parent(pid: Pid) -> Option<Pid> {
    let stat = read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat_field(&stat, 1)
}

/// A number in `/proc/PID/stat`; the first field behind the name has index 0.
pub(crate) fn stat_field<T: FromStr>(stat: &str, index: usize) -> Option<T> {
    // The name is in parentheses and may itself hold any of ") (".
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(index)?.parse().ok()
}

/// Where thread `tid` of process `pid` is right now.
#[must_use]
pub fn whereabouts(pid: Pid, tid: Tid) -> Whereabouts {
    match read_to_string(format!("/proc/{pid}/task/{tid}/syscall")) {
        Ok(text) => parse_whereabouts(&text).unwrap_or(Whereabouts::Running),
        Err(_) => Whereabouts::Gone,
    }
}

/// How often a thread has been given a CPU, where the kernel counts that. One that has the same
/// number later has not run in between.
pub fn n_runs(pid: Pid, tid: Tid) -> Option<u64> {
    let text = read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
    // Time on a CPU, time waited for one, and the number. All are 0 where nothing is counted.
    text.split_whitespace().nth(2)?.parse().ok().filter(|&n| n > 0)
}

/// When a thread that is off its CPU was last on it. Kernels before 6.15 may not tell.
pub(crate) fn last_run(pid: Pid, tid: Tid) -> Option<LastRun> {
    parse_last_run(&read_to_string(format!("/proc/{pid}/task/{tid}/sched")).ok()?)
}

/// The CPU that a thread is on, or was on last.
pub(crate) fn last_cpu(pid: Pid, tid: Tid) -> Option<usize> {
    const LAST_CPU_INDEX: usize = 36;
    stat_field(&read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?, LAST_CPU_INDEX)
}

/// Reads the auxiliary vector.
pub fn auxv(pid: Pid) -> Result<AuxVector, ProcError> {
    let path = format!("/proc/{pid}/auxv");
    let bytes = match read_whole(&path) {
        Ok(bytes) if !bytes.is_empty() => bytes,
        _ => {
            let path = format!("/proc/{}/auxv", stand_in(pid));
            read_whole(&path).map_err(|e| explain(pid, &path, e))?
        }
    };
    let mut found = AuxVector::default();
    for pair in bytes.chunks_exact(16) {
        let (key, value) = pair.split_at(8);
        let word = |b: &[u8]| b.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        let addr = Some(RemoteAddr(word(value))).filter(|a| a.0 != 0);
        match word(key) {
            libc::AT_ENTRY => found.entry = addr,
            libc::AT_BASE => found.base = addr,
            libc::AT_SYSINFO_EHDR => found.vdso = addr,
            libc::AT_PHDR => found.phdr = addr,
            _ => {}
        }
    }
    Ok(found)
}

/// A path under which *we* can open the file behind `mapping`, whatever the target's mount
/// namespace or root, and also when the file has been deleted or replaced since. The mapping's
/// own link is exact but needs CAP_CHECKPOINT_RESTORE or root; the path inside the target's
/// root is believed only where device and inode agree.
pub fn module_file_path(pid: Pid, mapping: &Mapping) -> Result<PathBuf, ProcError> {
    let pid = stand_in(pid);
    let exact = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start.0, mapping.end.0);
    // Following the link is what takes the right.
    let reason = match fs::metadata(&exact) {
        Ok(_) => return Ok(exact.into()),
        Err(reason) => reason,
    };
    if !mapping.deleted && mapping.path.starts_with('/') {
        let seen = PathBuf::from(format!("/proc/{pid}/root{}", mapping.path));
        if fs::metadata(&seen).is_ok_and(|m| m.ino() == mapping.inode) {
            return Ok(seen);
        }
    }
    let program = PathBuf::from(format!("/proc/{pid}/exe"));
    if fs::metadata(&program).is_ok_and(|m| m.ino() == mapping.inode) {
        return Ok(program);
    }
    Err(explain(pid, &exact, reason))
}

/// Whether `/proc/PID/stat` is about a thread of the kernel: field 9 has the flags, of which
/// `PF_KTHREAD` is one (include/linux/sched.h).
fn is_kernel_thread(stat: &str) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    stat_field(stat, 6).is_some_and(|flags: u64| flags & PF_KTHREAD != 0)
}

/// Whether `pid` is a live 64-bit program of this machine.
pub fn check_traceable(pid: Pid) -> Result<Status, ProcError> {
    let status = status(pid)?;
    if status.tgid != pid {
        return Err(ProcError::NotLeader { tid: pid, pid: status.tgid });
    }
    if status.state == 'Z' || status.state == 'X' {
        // The first thread may end before the others: then the process lives on.
        let alive = threads(pid)?
            .into_iter()
            .any(|tid| thread_status(pid, tid).is_ok_and(|s| !matches!(s.state, 'Z' | 'X')));
        return if alive { Ok(status) } else { Err(ProcError::Zombie { pid }) };
    }
    if !status.has_memory {
        // A process that is ending gives its memory back before it becomes a zombie.
        let is_thread = read_text(pid, "stat").is_ok_and(|stat| is_kernel_thread(&stat));
        return Err(match is_thread {
            true => ProcError::KernelThread { pid, comm: status.name },
            false => ProcError::Zombie { pid },
        });
    }
    let path = format!("/proc/{}/exe", stand_in(pid));
    let mut header = [0u8; 20];
    fs::File::open(&path)
        .and_then(|mut file| file.read_exact(&mut header))
        .map_err(|e| explain(pid, &path, e))?;
    let machine = u16::from_le_bytes([header[18], header[19]]);
    match (header[4], machine) {
        (2, 62) => Ok(status),
        (1, _) => Err(ProcError::ThirtyTwoBit { pid }),
        _ => Err(ProcError::OtherMachine { pid, machine }),
    }
}

/// All of a file that the kernel makes up as it is read. It says no size beforehand, and a buffer
/// that grows from a few bytes takes ten system calls where three do.
fn read_whole(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    /// More than most of them have.
    const FIRST_BYTES: usize = 8 << 10;
    let mut file = fs::File::open(path)?;
    let mut bytes = vec![0; FIRST_BYTES];
    let mut len = 0;
    loop {
        match file.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if len == bytes.len() {
            bytes.resize(2 * len, 0);
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

/// The same, of a file that is text.
pub(crate) fn read_to_string(path: impl AsRef<Path>) -> io::Result<String> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    String::from_utf8(read_whole(path)?).map_err(invalid)
}

fn read_text(pid: Pid, file: &str) -> Result<String, ProcError> {
    let path = format!("/proc/{pid}/{file}");
    let bytes = read_whole(&path).map_err(|e| explain(pid, &path, e))?;
    Ok(String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

/// Whether the kernel keeps process `pid` from its own user: files in its directory, though not
/// the directory, belong to root then.
pub(crate) fn is_undumpable(pid: Pid) -> bool {
    let owner = fs::metadata(format!("/proc/{pid}/environ")).map(|file| file.uid());
    owner.is_ok_and(|owner| owner == 0) && status(pid).is_ok_and(|now| now.uids[0] != 0)
}

fn explain(pid: Pid, path: &str, reason: io::Error) -> ProcError {
    match reason.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) if !fs::exists(format!("/proc/{pid}")).unwrap_or(true) => {
            ProcError::NotFound { pid }
        }
        Some(libc::EACCES | libc::EPERM) => {
            let path = path.to_owned();
            let us = nix::unistd::geteuid().as_raw();
            let is_ours = us != 0 && status(pid).is_ok_and(|now| now.uids[0] == us);
            match is_ours && is_undumpable(pid) {
                true => ProcError::NotDumpable { pid, path },
                false => ProcError::Denied { pid, path, reason },
            }
        }
        _ => ProcError::Read { path: path.to_owned(), reason },
    }
}

fn parse_status(text: &str) -> Option<Status> {
    // Looked for in the order of the lines, most of which are not wanted: each search goes on
    // behind the last one, and begins anew where the kernel has another order.
    let at = Cell::new(0);
    let field = |name: &str| {
        let from = |start: usize| {
            let mut end = start;
            text[start..].split_inclusive('\n').find_map(|line| {
                end += line.len();
                let value = line.strip_prefix(name)?.strip_prefix(':')?;
                at.set(end);
                Some(value.trim())
            })
        };
        from(at.get()).or_else(|| from(0))
    };
    let set = |name| u64::from_str_radix(field(name)?, 16).ok().map(SignalSet);
    let count = |name| field(name).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    let numbers = |line: &str| -> Option<[u32; 4]> {
        let mut uids = [0; 4];
        for (uid, word) in uids.iter_mut().zip(line.split_whitespace()) {
            *uid = word.parse().ok()?;
        }
        Some(uids)
    };
    Some(Status {
        name: field("Name")?.to_owned(),
        state: field("State")?.chars().next()?,
        tgid: field("Tgid")?.parse().ok()?,
        tracer_tid: field("TracerPid")?.parse().ok()?,
        uids: numbers(field("Uid")?)?,
        ns_pids: field("NSpid")
            .map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect())
            .unwrap_or_default(),
        has_memory: field("VmSize").is_some(),
        locks_memory: field("VmLck").is_some_and(|size| size != "0 kB"),
        n_threads: field("Threads")?.parse().ok()?,
        pending: set("SigPnd")?,
        shared_pending: set("ShdPnd")?,
        blocked: set("SigBlk")?,
        ignored: set("SigIgn")?,
        caught: set("SigCgt")?,
        seccomp: match count("Seccomp") {
            0 => SeccompMode::Off,
            1 => SeccompMode::Strict,
            _ => SeccompMode::Filter,
        },
        shadow_stack: field("x86_Thread_features")
            .is_some_and(|features| features.split_whitespace().any(|f| f == "shstk")),
        switches: count("voluntary_ctxt_switches") + count("nonvoluntary_ctxt_switches"),
    })
}

fn parse_last_run(text: &str) -> Option<LastRun> {
    let field = |name: &str| {
        let line = text.lines().find(|line| line.split_whitespace().next() == Some(name))?;
        line.rsplit_once(':').map(|(_, value)| value.trim())
    };
    let (millis, nanos) = field("se.exec_start")?.split_once('.')?;
    let at_ns = millis.parse::<u64>().ok()?.checked_mul(1_000_000)?;
    Some(LastRun {
        at_ns: at_ns.checked_add(nanos.parse().ok().filter(|_| nanos.len() == 6)?)?,
        n_switches: field("nr_switches")?.parse().ok()?,
        n_migrations: field("se.nr_migrations")?.parse().ok()?,
    })
}

fn parse_whereabouts(text: &str) -> Option<Whereabouts> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    match words.as_slice() {
        // It has no stack any more: it has ended, and waits to be collected.
        ["-1", "0x0", "0x0"] => Some(Whereabouts::Gone),
        ["-1", sp, pc] => {
            Some(Whereabouts::Elsewhere { sp: RemoteAddr(hex(sp)?), pc: RemoteAddr(hex(pc)?) })
        }
        [number, first, .., sp, pc] => Some(Whereabouts::Syscall {
            number: number.parse().ok()?,
            first_arg: hex(first)?,
            sp: RemoteAddr(hex(sp)?),
            pc: RemoteAddr(hex(pc)?),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process() {
        let pid = i32::try_from(std::process::id()).expect("a pid is an i32");
        let status = check_traceable(pid).expect("we are a 64-bit program");
        assert_eq!(status.tgid, pid);
        assert!(threads(pid).expect("we have threads").contains(&pid));
        let aux = auxv(pid).expect("we have one");
        let maps = maps(pid).expect("we have mappings");
        let entry = aux.entry.expect("every program has one");
        let text = maps.iter().find(|m| m.contains(entry)).expect("the entry is mapped");
        assert!(text.perms.execute);
        assert_eq!(text.path, exe(pid).expect("we have one").to_string_lossy());
        let file = module_file_path(pid, text).expect("our own file");
        assert_eq!(&fs::read(file).expect("readable")[..4], b"\x7fELF");
        let vdso = aux.vdso.expect("x86-64 has one");
        assert!(maps.iter().any(|m| m.start == vdso && m.path == "[vdso]"));
    }

    #[test]
    fn shadow_stacks() {
        let pid = i32::try_from(std::process::id()).expect("a pid is an i32");
        let text = read_text(pid, "status").expect("we have one");
        let with = |features: &str| {
            let others = text.lines().filter(|line| !line.starts_with("x86_Thread_features"));
            let lines: Vec<&str> = others.chain([features]).collect();
            parse_status(&lines.join("\n")).expect("it is a status").shadow_stack
        };
        assert!(with("x86_Thread_features:\tshstk wrss "));
        assert!(!with("x86_Thread_features:\t"));
        assert!(!with("x86_Thread_features_locked:\tshstk"));
        assert!(asks_for_shadow_stack("A=b\0GLIBC_TUNABLES=glibc.cpu.x86_shstk=on\0"));
        assert!(asks_for_shadow_stack("GLIBC_TUNABLES=a=1:glibc.cpu.hwcaps=SHSTK"));
        assert!(!asks_for_shadow_stack("GLIBC_TUNABLES=glibc.malloc.check=3\0B=shstk"));
        let status = status(pid).expect("we have one");
        let expected = status.shadow_stack
            || std::env::var("GLIBC_TUNABLES").is_ok_and(|t| t.contains("shstk"));
        assert_eq!(may_use_shadow_stack(pid).expect("we live"), expected);
    }

    /// Kernels have not always had this order.
    #[test]
    fn a_status_may_have_any_order() {
        let pid = i32::try_from(std::process::id()).expect("a pid is an i32");
        let text = read_text(pid, "status").expect("we have one");
        let backwards: Vec<&str> = text.lines().rev().collect();
        let status = parse_status(&text).expect("it is a status");
        assert_eq!(parse_status(&backwards.join("\n")), Some(status));
        assert_eq!(parse_status(&text.replace("\nTracerPid:", "\nTracer:")), None);
    }

    #[test]
    fn files_are_read_to_their_end() {
        let path = std::env::current_exe().expect("we have one");
        let expected = fs::read(&path).expect("readable");
        assert!(read_whole(&path).expect("readable") == expected, "a file of many buffers");
        assert_eq!(read_whole("/dev/null").expect("readable"), b"");
        let missing = read_whole("/proc/self/none").expect_err("there is none");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_no_process() {
        let missing = check_traceable(0x3fff_fff0).expect_err("beyond pid_max");
        assert!(matches!(missing, ProcError::NotFound { .. }), "{missing}");
        if let Ok(kthreadd) = status(2)
            && kthreadd.name == "kthreadd"
        {
            let refused = check_traceable(2).expect_err("a kernel thread");
            assert!(matches!(refused, ProcError::KernelThread { .. }), "{refused}");
        }
    }

    /// One that ends has no memory either, for a moment.
    #[test]
    fn kernel_threads_are_known_by_their_flag() {
        assert!(is_kernel_thread("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0"));
        assert!(!is_kernel_thread("77 (a) b) R 1 77 77 0 -1 4194308 0 0"));
        let own = read_text(std::process::id().cast_signed(), "stat").expect("it is there");
        assert!(!is_kernel_thread(&own));
    }

    #[test]
    fn last_cpus() {
        let text = "9 (a) b) S 7 1 1 0 -1 4194304 100 0 1 0 2 3 4 5 20 0 1 0 9 8192 512 \
            18446744073709551615 1 2 3 4 5 0 0 4096 0 1 0 0 17 6 0 0 0 0 0 1 2 3 4 5 6 7 0\n";
        assert_eq!(stat_field(text, 36), Some(6));
        assert_eq!(stat_field::<usize>("9 (a) b) S 7", 36), None);
    }

    #[test]
    fn last_runs() {
        let text = "sleep (8818, #threads: 1)\n\
            ---------------------------------------\n\
            se.exec_start                                :      35074951.410553\n\
            se.nr_migrations                             :                    1\n\
            nr_switches                                  :                    3\n\
            nr_voluntary_switches                        :                    2\n";
        let expected = LastRun { at_ns: 35_074_951_410_553, n_switches: 3, n_migrations: 1 };
        assert_eq!(parse_last_run(text), Some(expected));
        assert_eq!(parse_last_run("se.exec_start : 1.5"), None);
    }

    #[test]
    fn places() {
        assert_eq!(parse_whereabouts("running\n"), None);
        assert_eq!(
            parse_whereabouts("232 0x5 0x7f 0x1 0xffffffffffffffff 0x0 0x8 0x7ffe10 0x7f20\n"),
            Some(Whereabouts::Syscall {
                number: 232,
                first_arg: 5,
                sp: RemoteAddr(0x7ffe10),
                pc: RemoteAddr(0x7f20)
            })
        );
        assert_eq!(
            parse_whereabouts("-1 0x7ffe10 0x7f20\n"),
            Some(Whereabouts::Elsewhere { sp: RemoteAddr(0x7ffe10), pc: RemoteAddr(0x7f20) })
        );
        assert_eq!(parse_whereabouts("-1 0x0 0x0\n"), Some(Whereabouts::Gone));
    }
}
