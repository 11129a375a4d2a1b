//! uprobe and uretprobe programs made by clang, with libbpf's macros, on a function whose caller
//! knows every register: after Linux's uprobe_syscall test. Where the kernel lets us, it runs
//! the same object, and both have to have seen the same.
#![allow(clippy::unwrap_used, reason = "a test")]

mod kernel;

use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use flea::{Map, Object, ObjectSpec, Session};
use flea_fixtures::{Tool, require};

/// Registers by hardware number.
type Gprs = [u64; 16];

/// `struct pt_regs` by word.
const N_REGS: usize = 21;
const RSP: usize = 19;
/// Hardware numbers of its general registers.
const GENERAL: [(usize, usize); 15] = [
    (0, 15),
    (1, 14),
    (2, 13),
    (3, 12),
    (4, 5),
    (5, 3),
    (6, 11),
    (7, 10),
    (8, 9),
    (9, 8),
    (10, 0),
    (11, 1),
    (12, 2),
    (13, 6),
    (14, 7),
];

fn compile(compiler: &Path, args: &[&str], input: &str, output: &Path) -> Result<()> {
    let input = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/probes").join(input);
    let done = Command::new(compiler).args(args).arg(&input).arg("-o").arg(output).output()?;
    ensure!(done.status.success(), "{input:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

type CallFilled = extern "C" fn(*const u64, *mut u64, *mut c_void);

/// functions.c in this process, and the programs.
struct Bench {
    /// Its file, which goes with this value. The code stays loaded.
    library: PathBuf,
    probed: *mut c_void,
    call_filled: CallFilled,
    call_returns: u64,
    object: ObjectSpec,
    session: Session,
}

impl Bench {
    /// `None` where a tool is missing, which was printed.
    fn open() -> Result<Option<Self>> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (Some(gcc), Some(clang), Some(_)) =
            (require(Tool::Gcc), require(Tool::Clang), require(Tool::LibbpfHeaders))
        else {
            return Ok(None);
        };
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = |end: &str| directory.join(format!("probes-{}-{n}{end}", std::process::id()));
        let (library, object) = (file(".so"), file(".bpf.o"));
        compile(&gcc, &["-g", "-O2", "-fPIC", "-shared"], "functions.c", &library)?;
        let args = [
            "-target",
            "bpf",
            "-O2",
            "-g",
            "-mcpu=v3",
            "-D__TARGET_ARCH_x86",
            "-I",
            "/usr/include/x86_64-linux-gnu",
            "-c",
        ];
        compile(&clang, &args, "registers.bpf.c", &object)?;
        let name = CString::new(library.as_os_str().as_bytes())?;
        // SAFETY: the library has no constructors.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        ensure!(!handle.is_null(), "dlopen");
        let symbol = |name: &std::ffi::CStr| {
            // SAFETY: the handle is open, the name ends with a NUL.
            let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
            assert!(!address.is_null(), "{name:?}");
            address
        };
        let spec = flea::parse_object(&std::fs::read(&object)?)?;
        std::fs::remove_file(&object)?;
        Ok(Some(Self {
            probed: symbol(c"probed"),
            // SAFETY: that is its declaration.
            call_filled: unsafe {
                std::mem::transmute::<*mut c_void, CallFilled>(symbol(c"call_filled"))
            },
            call_returns: symbol(c"call_returns").addr() as u64,
            library,
            object: spec,
            session: Session::this_process()?,
        }))
    }

    fn call(&self, input: &Gprs) -> Gprs {
        let mut output = [0; 16];
        (self.call_filled)(input.as_ptr(), output.as_mut_ptr(), self.probed);
        output
    }

    /// Offset of `probed` in its file.
    fn file_offset(&self) -> Result<u64> {
        let address = self.probed.addr() as u64;
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        for line in maps.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (start, end) = fields[0].split_once('-').context("a range")?;
            let [start, end, offset] =
                [start, end, fields[2]].map(|hex| u64::from_str_radix(hex, 16).unwrap());
            if (start..end).contains(&address) {
                return Ok(address - start + offset);
            }
        }
        anyhow::bail!("no mapping of {address:#x}")
    }

    /// Attaches the programs with these names.
    fn load(&self, names: &[&str]) -> Result<(Object, flea::Link)> {
        let object = self.session.load(self.object.clone())?;
        let mut attachments = Vec::new();
        for name in names {
            let program = object.program(name).context("no such program")?;
            let target = program.target().context("no target")?;
            let functions = self.session.find(&format!("{}:{target}", self.library.display()))?;
            ensure!(functions.len() == 1, "{functions:?}");
            attachments.push(program.on(&functions[0], 0));
        }
        let link = object.attach(&attachments)?;
        Ok((object, link))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // It is in the way of nobody.
        let _ = std::fs::remove_file(&self.library);
    }
}

static TURN: Mutex<()> = Mutex::new(());

fn words(object: &Object) -> Vec<u64> {
    let Some(Map::Array(seen)) = object.map("seen") else { panic!("no map") };
    let bytes = seen.get(0).unwrap();
    bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect()
}

fn pattern(seed: u64) -> Gprs {
    let mut word = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::array::from_fn(|_| {
        word = word.rotate_left(7).wrapping_mul(0xff51_afd7_ed55_8ccd);
        word
    })
}

/// What a probe must have seen.
fn check(seen: &[u64], gprs: &Gprs, stack: u64, code: u64) {
    for (word, register) in GENERAL {
        assert_eq!(seen[word], gprs[register], "word {word}");
    }
    assert_eq!(seen[15..18], [u64::MAX, code, 0x33], "orig_rax, rip, cs");
    assert_eq!(seen[RSP..], [stack, 0x2b], "rsp, ss");
    assert_eq!(seen[18], 0x202, "eflags");
}

#[test]
fn all_registers_at_both_ends() -> Result<()> {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(bench) = Bench::open()? else { return Ok(()) };
    let untraced = bench.call(&pattern(0));
    for names in [&["all_at_entry", "all_at_exit"][..], &["all_at_entry"], &["all_at_exit"]] {
        let (object, link) = bench.load(names)?;
        for seed in 0..20 {
            let input = pattern(seed);
            let output = bench.call(&input);
            let seen = words(&object);
            let stack = output[4];
            if names.contains(&"all_at_entry") {
                check(&seen[..N_REGS], &input, stack - 8, bench.probed.addr() as u64);
            }
            if names.contains(&"all_at_exit") {
                check(&seen[N_REGS..2 * N_REGS], &output, stack, bench.call_returns);
            }
            if seed == 0 {
                assert_eq!((&output[..4], &output[5..]), (&untraced[..4], &untraced[5..]));
            }
            // What a call may not change.
            for register in [3, 5, 12, 13, 14, 15] {
                assert_eq!(output[register], input[register], "register {register}");
            }
        }
        link.detach()?;
        drop(object);
    }
    Ok(())
}

/// Each of three controllers has its own words in the frame, wherever it was attached.
#[test]
fn several_controllers_see_the_same() -> Result<()> {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(bench) = Bench::open()? else { return Ok(()) };
    let names = [&["all_at_entry", "all_at_exit"][..], &["all_at_exit"], &["all_at_entry"]];
    let mut loaded = Vec::new();
    for names in names {
        loaded.push((names, bench.load(names)?));
    }
    for seed in 0..3 {
        let input = pattern(seed);
        let output = bench.call(&input);
        let (stack, code) = (output[4], bench.probed.addr() as u64);
        for (names, (object, _)) in &loaded {
            let seen = words(object);
            if names.contains(&"all_at_entry") {
                check(&seen[..N_REGS], &input, stack - 8, code);
            }
            if names.contains(&"all_at_exit") {
                check(&seen[N_REGS..2 * N_REGS], &output, stack, bench.call_returns);
            }
        }
        // The second, then the first: what stays keeps its words.
        let (_, (object, link)) = loaded.remove(loaded.len().saturating_sub(2));
        link.detach()?;
        drop(object);
    }
    Ok(())
}

/// Everything that the programs keep, after the same calls.
fn calls(bench: &Bench) {
    for seed in 0..200 {
        bench.call(&pattern(seed));
    }
}

#[test]
fn the_kernel_sees_the_same() -> Result<()> {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(bench) = Bench::open()? else { return Ok(()) };
    let mut kernel = None;
    let mut flea = Vec::new();
    // One place calls, so that the stack is the same both times.
    for who in ["kernel", "flea"] {
        let mut probes = None;
        let mut attached = None;
        if who == "kernel" {
            match kernel::Probes::attach(&bench.object, &bench.library, bench.file_offset()?) {
                Ok(attached) => probes = Some(attached),
                Err(error) => {
                    eprintln!("skipped: the kernel does not run the object: {error}");
                    continue;
                }
            }
        } else {
            attached = Some(bench.load(&["all_at_entry", "all_at_exit", "params", "result"])?);
        }
        calls(&bench);
        if let Some(probes) = &probes {
            kernel = Some(probes.words()?);
        }
        if let Some((object, link)) = attached {
            flea = words(&object);
            link.detach()?;
            assert_eq!(object.missed(), 0);
        }
    }
    assert_eq!(flea[2 * N_REGS..][..2], [200, 200], "runs at entry and at exit");
    assert_eq!(flea[2 * N_REGS + 5], 0, "rip is the function's address");
    let Some(mut kernel) = kernel else { return Ok(()) };
    // Flags are no part of a calling convention: Flea has a constant there.
    for end in [0, N_REGS] {
        assert_eq!(kernel[end + 18] & 0x200, 0x200);
        kernel[end + 18] = 0x202;
    }
    assert_eq!(flea, kernel);
    Ok(())
}
