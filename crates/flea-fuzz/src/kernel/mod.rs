//! The running kernel's verifier as an oracle: is a program accepted, what does the log say, what
//! does it return?
//!
//! Programs are loaded as RAW_TRACEPOINT ones: their context is a read-only `u64[12]` of plain
//! numbers, which is an fentry program's for a function of twelve integers, and they can be run
//! by hand (BPF_PROG_TEST_RUN). They are attached to nothing.
//!
//! What a root user's programs are allowed beyond ours: pointers may leak into maps and be
//! compared, and unwritten stack may be read (CAP_PERFMON: `allow_ptr_leaks`,
//! `allow_uninit_stack`).
//!
//! ```no_run
//! use flea_fuzz::kernel::{Kernel, KernelMaps, LogLevel};
//! use flea_object::asm::{Asm, Reg::*};
//!
//! let mut asm = Asm::new();
//! asm.mov64_imm(R0, 7).exit();
//! let kernel = Kernel::open()?;
//! let maps = KernelMaps::create(&[])?;
//! match kernel.load(&asm.finish()?, &maps, LogLevel::Branches)? {
//!     Ok(loaded) => assert_eq!(loaded.run(&[0; 12])?, 7),
//!     Err(refusal) => println!("{}\n{}", refusal.reason(), refusal.log),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod sys;

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use flea_object::insn::{Insn, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use flea_object::spec::{MapIdx, MapKind, MapSpec};

/// Words of a RAW_TRACEPOINT program's context.
pub const CONTEXT_WORDS: usize = 12;
/// `BPF_F_RDONLY_PROG`
const RDONLY_PROG: u32 = 1 << 7;
/// Where a log starts out, and how far it may grow.
const LOG_BYTES: usize = 1 << 16;
const MAX_LOG_BYTES: usize = 1 << 26;

/// Why the kernel cannot be asked here.
#[derive(Debug, thiserror::Error)]
#[error("the kernel loads no BPF programs for us: {0}; run as root, on a kernel with bpf(2)")]
pub struct Unavailable(io::Error);

/// A command that failed for another reason than the program.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A map could not be made or filled.
    #[error("map {map}: {error}")]
    Map {
        /// Its index.
        map: usize,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The program names a map that is not there.
    #[error("insn {insn_idx}: there is no map {map}")]
    NoSuchMap {
        /// The `lddw`.
        insn_idx: usize,
        /// Index of the map.
        map: u32,
    },
    /// The log does not end.
    #[error("the verifier's log is longer than {MAX_LOG_BYTES} bytes")]
    LogTooLong,
    /// The accepted program could not be run.
    #[error("BPF_PROG_TEST_RUN: {0}")]
    Run(io::Error),
}

/// How much the verifier is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Nothing: the fastest.
    Silent,
    /// The path to the fault (level 1).
    Branches,
    /// Every instruction with the state behind it (level 2).
    Steps,
}

/// A refused program.
#[derive(Debug)]
pub struct Refusal {
    /// EINVAL, EACCES, E2BIG, ...
    pub error: io::Error,
    /// The verifier's log; empty with [`LogLevel::Silent`].
    pub log: String,
}

impl Refusal {
    /// The log's last words before its statistics: what was wrong.
    #[must_use]
    pub fn reason(&self) -> String {
        let statistics = |line: &str| {
            ["processed ", "verification time", "stack depth", "max_states"]
                .iter()
                .any(|start| line.starts_with(start))
        };
        let mut lines = self.log.lines().map(str::trim).rev();
        let line = lines.find(|line| !line.is_empty() && !statistics(line));
        line.map_or_else(|| self.error.to_string(), str::to_owned)
    }
}

/// Maps in the kernel, with the numbers that programs have for them.
#[derive(Debug)]
pub struct KernelMaps {
    maps: Vec<(MapSpec, OwnedFd)>,
}

impl KernelMaps {
    /// Makes all of them, with their initial values.
    ///
    /// # Errors
    /// [`KernelError::Map`]
    pub fn create(specs: &[MapSpec]) -> Result<Self, KernelError> {
        let one = |(map, spec)| {
            create(spec)
                .map(|fd| (spec.clone(), fd))
                .map_err(|error| KernelError::Map { map, error })
        };
        Ok(Self { maps: specs.iter().enumerate().map(one).collect::<Result<_, _>>()? })
    }

    /// Makes one of them anew, as it was at first.
    ///
    /// # Errors
    /// [`KernelError::Map`]
    pub fn renew(&mut self, map: MapIdx) -> Result<(), KernelError> {
        let index = map.0 as usize;
        if let Some((spec, fd)) = self.maps.get_mut(index) {
            *fd = create(spec).map_err(|error| KernelError::Map { map: index, error })?;
        }
        Ok(())
    }

    /// The value of element 0 of an array.
    ///
    /// # Errors
    /// [`KernelError::Map`]
    pub fn first_value(&self, map: MapIdx) -> Result<Vec<u8>, KernelError> {
        let index = map.0 as usize;
        let no_array = || KernelError::Map { map: index, error: io::ErrorKind::NotFound.into() };
        let (spec, fd) = self.maps.get(index).ok_or_else(no_array)?;
        if spec.kind != MapKind::Array {
            return Err(no_array());
        }
        let mut value = vec![0; value_bytes(spec)];
        sys::lookup(fd.as_fd(), &[0; 4], &mut value)
            .map_err(|error| KernelError::Map { map: index, error })?;
        Ok(value)
    }

    fn fd_number(&self, map: u32) -> Option<i32> {
        self.maps.get(map as usize).map(|(_, fd)| fd.as_raw_fd())
    }
}

/// As the kernel copies it: array values are padded to 8 bytes inside, not here.
fn value_bytes(spec: &MapSpec) -> usize {
    spec.value_size_bytes as usize
}

fn create(spec: &MapSpec) -> io::Result<OwnedFd> {
    let read_only = if spec.read_only { RDONLY_PROG } else { 0 };
    let fd = sys::create_map(sys::MapCreate {
        map_type: spec.kind as u32,
        key_size: spec.key_size_bytes,
        value_size: spec.value_size_bytes,
        max_entries: spec.max_entries,
        map_flags: spec.flags | read_only,
    })?;
    if spec.kind == MapKind::Array
        && let Some(init) = &spec.init
    {
        let mut value = vec![0; value_bytes(spec)];
        let n = init.len().min(value.len());
        value[..n].copy_from_slice(&init[..n]);
        sys::update(fd.as_fd(), &[0; 4], &value)?;
    }
    if spec.read_only {
        sys::freeze(fd.as_fd())?;
    }
    Ok(fd)
}

/// A program that the kernel has accepted.
#[derive(Debug)]
pub struct Loaded {
    fd: OwnedFd,
}

impl Loaded {
    /// Runs it once. The result is cut to 32 bits: a program that stores `r0` into a map before
    /// it ends tells all 64 ([`KernelMaps::first_value`]).
    ///
    /// # Errors
    /// [`KernelError::Run`]
    pub fn run(&self, context: &[u64; CONTEXT_WORDS]) -> Result<u32, KernelError> {
        sys::test_run(self.fd.as_fd(), context).map_err(KernelError::Run)
    }
}

/// The running kernel's verifier. There is no other way to it than [`Kernel::open`], so whoever
/// has one may ask.
#[derive(Debug)]
pub struct Kernel(());

impl Kernel {
    /// Finds out whether programs can be loaded.
    ///
    /// # Errors
    /// [`Unavailable`]: a test says so and is skipped.
    pub fn open() -> Result<Self, Unavailable> {
        let insns = [[0xb7, 0, 0, 0, 0, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
        sys::load(&insns, 0, &mut []).map_err(Unavailable)?;
        Ok(Self(()))
    }

    /// The kernel's verdict. Maps are named by index, as in [`flea_object::spec::Program`].
    ///
    /// # Errors
    /// [`KernelError`]; a refusal is an answer.
    pub fn load(
        &self,
        insns: &[Insn],
        maps: &KernelMaps,
        level: LogLevel,
    ) -> Result<Result<Loaded, Refusal>, KernelError> {
        let (result, log) = ask(insns, maps, level)?;
        Ok(result.map(|fd| Loaded { fd }).map_err(|error| Refusal { error, log }))
    }

    /// The verifier's log of a program, accepted or not.
    ///
    /// # Errors
    /// [`KernelError`]
    pub fn log(
        &self,
        insns: &[Insn],
        maps: &KernelMaps,
        level: LogLevel,
    ) -> Result<String, KernelError> {
        ask(insns, maps, level).map(|(_, log)| log)
    }
}

/// The kernel's answer and the whole of its log.
fn ask(
    insns: &[Insn],
    maps: &KernelMaps,
    level: LogLevel,
) -> Result<(io::Result<OwnedFd>, String), KernelError> {
    let encoded = with_descriptors(insns, maps)?;
    let (number, mut log) = match level {
        LogLevel::Silent => (0, Vec::new()),
        LogLevel::Branches => (1, vec![0; LOG_BYTES]),
        LogLevel::Steps => (2, vec![0; LOG_BYTES]),
    };
    loop {
        let result = sys::load(&encoded, number, &mut log);
        let too_short = |error: &io::Error| error.raw_os_error() == Some(libc::ENOSPC);
        if !result.as_ref().is_err_and(too_short) {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
            return Ok((result, String::from_utf8_lossy(&log[..end]).into_owned()));
        }
        if log.len() >= MAX_LOG_BYTES {
            return Err(KernelError::LogTooLong);
        }
        log = vec![0; (log.len() * 8).max(LOG_BYTES)];
    }
}

/// The same instructions with file descriptors for indices of maps.
fn with_descriptors(insns: &[Insn], maps: &KernelMaps) -> Result<Vec<[u8; 8]>, KernelError> {
    let mut encoded = Vec::with_capacity(insns.len());
    let mut second_half = false;
    for (insn_idx, insn) in insns.iter().enumerate() {
        let names_map = insn.is_lddw() && matches!(insn.src, PSEUDO_MAP | PSEUDO_MAP_VALUE);
        let mut insn = *insn;
        if names_map && !second_half {
            let map = insn.imm.cast_unsigned();
            insn.imm = maps.fd_number(map).ok_or(KernelError::NoSuchMap { insn_idx, map })?;
        }
        second_half = insn.is_lddw() && !second_half;
        encoded.push(insn.encode());
    }
    Ok(encoded)
}
