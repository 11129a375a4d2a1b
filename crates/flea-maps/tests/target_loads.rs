//! Loads through typed pointers, verified, compiled and run with the real runtime: in a thread
//! that blocks every signal, so that one fault would end the test process.
#![cfg(target_arch = "x86_64")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test; numbers are cut to size on purpose"
)]

#[path = "../../flea-verifier/tests/asm/mod.rs"]
mod asm;
#[path = "../../flea-verifier/tests/graph/mod.rs"]
mod graph;
mod in_process;

use flea_image::{PlainRequest, RelocTarget, compile_function};
use flea_layout::shared::RuntimeFn;
use flea_object::spec::{MapKind, Program, ProgramKind};
use flea_verifier::{Context, Target as Types, Verifier};
use graph::Graph;
use in_process::{Random, Target, spec};

const PAGE: usize = 4096;
/// Words of the array that programs write what they found to.
const N_WORDS: usize = 16;

/// Mapped memory of this process.
struct Memory {
    address: u64,
    size_bytes: usize,
}

impl Memory {
    fn new(size_bytes: usize, protection: i32) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size_bytes, protection, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self { address: at as u64, size_bytes }
    }

    fn with(bytes: &[u8]) -> Self {
        let memory = Self::new(bytes.len(), libc::PROT_READ | libc::PROT_WRITE);
        let at = memory.address as *mut u8;
        // SAFETY: as long as the mapping, which is new.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        memory
    }

    fn protect(&self, page: usize, protection: i32) {
        let at = (self.address + (page * PAGE) as u64) as *mut libc::c_void;
        // SAFETY: a page of our own mapping.
        assert_eq!(unsafe { libc::mprotect(at, PAGE, protection) }, 0);
    }

    /// Makes `page` one of a file that ends before it.
    fn behind_file(&self, page: usize) {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"empty".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        let at = (self.address + (page * PAGE) as u64) as *mut libc::c_void;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: in the place of a page of our own mapping, which nothing refers to.
        assert_eq!(unsafe { libc::mmap(at, PAGE, libc::PROT_READ, flags, fd, 0) }, at);
        // SAFETY: just opened.
        assert_eq!(unsafe { libc::close(fd) }, 0);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, or what is left of it.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.size_bytes) };
    }
}

/// A compiled program, and the arena that it writes to.
struct Compiled {
    target: Target,
    code: Memory,
}

impl Compiled {
    /// `lines`, between `r6 = the first context word; r9 = the array` and `r0 = 0; exit`.
    fn new(types: &[&str], slots: &str, lines: &[String]) -> Self {
        let mut graph = Graph::parse(types.iter().copied());
        let slots = graph.slots(slots);
        let start = ["r6 = *(u64 *)(r1 + 0)", "r9 = value 0 0"];
        let all: Vec<&str> = start
            .into_iter()
            .chain(lines.iter().map(String::as_str))
            .chain(["r0 = 0", "exit"])
            .collect();
        let program = Program {
            name: "p".into(),
            kind: ProgramKind::Fentry,
            insns: asm::assemble(&all),
            ..Program::default()
        };
        let maps = [spec(MapKind::Array, 4, 8 * N_WORDS as u32, 1)];
        let context = Context::Tracing { n_args: slots.len() as u8, n_results: 0, session: false };
        let verified = Verifier::new(&program, &maps, context)
            .target(Types { types: &graph.types, slots: &slots })
            .verify()
            .unwrap_or_else(|e| panic!("{}", e.log.join("\n")));
        let target = Target::new(&maps);
        let plan = target.arena.plan();
        let context_words = slots.len() as u32;
        let request = PlainRequest { verified: &verified, plan: Some(plan), context_words };
        let code = compile_function(&request).unwrap().resolve(|t| match t {
            RelocTarget::Arena { addend } => target.base.wrapping_add_signed(addend),
            RelocTarget::Runtime(function) => target.address_of(function),
            _ => 0,
        });
        let code = Memory::with(&code);
        for page in 0..code.size_bytes.div_ceil(PAGE) {
            code.protect(page, libc::PROT_READ | libc::PROT_EXEC);
        }
        Self { target, code }
    }

    /// What the program finds behind `pointer`, in the thread that calls.
    fn run(&self, pointer: u64) -> [u64; N_WORDS] {
        let context = [pointer];
        // SAFETY: the pages hold a function of this very type, made of a verified program.
        let function: extern "sysv64" fn(*const u64) -> u64 =
            unsafe { std::mem::transmute(self.code.address) };
        assert_eq!(function(context.as_ptr()), 0);
        let data = self.target.base + self.target.arena.plan().maps[0].data_offset;
        // SAFETY: the array's only element, in an arena that lives.
        unsafe { (data as *const [u64; N_WORDS]).read_volatile() }
    }
}

/// Runs `test` in a thread in which every signal is blocked.
fn without_signals<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: any bits are a set of signals.
            let mut all = unsafe { std::mem::zeroed() };
            // SAFETY: a set of signals.
            assert_eq!(unsafe { libc::sigfillset(&raw mut all) }, 0);
            let old = std::ptr::null_mut();
            // SAFETY: the thread's own mask is changed.
            assert_eq!(unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, old) }, 0);
            test()
        });
        thread.join().unwrap()
    })
}

fn lines(text: &[&str]) -> Vec<String> {
    text.iter().map(|l| (*l).to_owned()).collect()
}

const NODE: &[&str] =
    &["struct node 40 n:u64@0 next:*node@8 name:*char@16 small:s16@24 tail:u32@36"];

#[test]
fn a_chain_of_pointers() {
    let program = Compiled::new(
        NODE,
        "*node",
        &lines(&[
            "r2 = *(u64 *)(r6 + 0)",
            "*(u64 *)(r9 + 0) = r2",
            "r3 = *(s16 *)(r6 + 24)",
            "*(u64 *)(r9 + 8) = r3",
            "r4 = *(u64 *)(r6 + 8)",
            "r5 = *(u64 *)(r4 + 16)",
            "r5 = *(u8 *)(r5 + 3)",
            "*(u64 *)(r9 + 16) = r5",
            "r4 = *(u32 *)(r4 + 36)",
            "*(u64 *)(r9 + 24) = r4",
        ]),
    );
    let text = *b"name of it";
    let second = [7u64, 0, text.as_ptr() as u64, 0, 0x1234_5678_0000_0000];
    let first = [0x1111_2222_3333_4444, (&raw const second) as u64, 5, 0x8001, 6];
    without_signals(|| {
        let seen = program.run((&raw const first) as u64);
        assert_eq!(seen[..4], [first[0], 0xffff_ffff_ffff_8001, u64::from(b'e'), 0x1234_5678]);
        // What is no address, has no page, may not be read, is behind a file's end or the kernel's:
        // all is 0.
        let nobody = Memory::new(PAGE, libc::PROT_NONE);
        let behind = Memory::new(PAGE, libc::PROT_READ);
        behind.behind_file(0);
        let bad = [0, 1, 8, nobody.address, behind.address, 1 << 47];
        for at in bad.into_iter().chain([(1 << 47) - 16, 1 << 63, !0, !0 - 39, 0xdead << 48]) {
            assert_eq!(program.run(at)[..4], [0; 4], "{at:#x}");
        }
        // A chain that breaks in its middle.
        let broken = [3, nobody.address, 5, 2, 6];
        assert_eq!(program.run((&raw const broken) as u64)[..4], [3, 2, 0, 0]);
    });
}

#[test]
fn the_bodys_own_page_of_the_stack() {
    let program = Compiled::new(
        NODE,
        "*node",
        &lines(&[
            "r2 = *(u64 *)(r6 + 0)",
            "*(u64 *)(r9 + 0) = r2",
            "r3 = *(u32 *)(r6 + 36)",
            "*(u64 *)(r9 + 8) = r3",
        ]),
    );
    /// Calls from further and further down, so that the words are in every part of a page, at
    /// its end, and behind it.
    fn deeper(program: &Compiled, words: &[u64; 512], depth: u32) {
        let padding = std::hint::black_box([depth; 9]);
        for at in 0..words.len() - 5 {
            let seen = program.run((&raw const words[at]) as u64);
            assert_eq!(seen[..2], [words[at], words[at + 4] >> 32], "{depth} {at}");
        }
        if depth > 0 {
            deeper(program, words, depth - 1);
        }
        std::hint::black_box(padding);
    }
    without_signals(|| {
        let words: [u64; 512] = std::array::from_fn(|i| (i as u64) << 33 | i as u64);
        deeper(&program, &words, 20);
    });
}

/// What a load of `size` bytes at `at` gives: 0 unless every page it touches can be read.
fn expected(bytes: &[u8], readable: &[bool], at: i64, size: usize) -> u64 {
    let Ok(at) = usize::try_from(at) else { return 0 };
    let pages = at / PAGE..=(at + size - 1) / PAGE;
    if !pages.clone().all(|p| readable.get(p) == Some(&true)) {
        return 0;
    }
    let mut word = [0; 8];
    word[..size].copy_from_slice(&bytes[at..at + size]);
    u64::from_le_bytes(word)
}

#[test]
fn fields_around_pages_that_are_not_there() {
    const N_PAGES: usize = 5;
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut below = |n: u64| (random.next() >> 16) % n;
    let mut n_nonzero = 0;
    for round in 0..60 {
        let bytes: Vec<u8> = (0..N_PAGES * PAGE).map(|_| below(255) as u8 + 1).collect();
        let memory = Memory::with(&bytes);
        // The first and the last page are never there, so that nobody else's is beside ours.
        let mut readable = [true; N_PAGES];
        for (page, is_readable) in readable.iter_mut().enumerate() {
            let is_end = page == 0 || page == N_PAGES - 1;
            match below(4) {
                0 => memory.behind_file(page),
                _ if is_end => memory.protect(page, libc::PROT_NONE),
                1 => memory.protect(page, libc::PROT_NONE),
                2 => {
                    memory.protect(page, libc::PROT_READ);
                    continue;
                }
                _ => continue,
            }
            *is_readable = false;
        }
        let fields: Vec<(i64, usize)> = (0..1 + below(N_WORDS as u64))
            .map(|_| (below(340) as i64, [1, 2, 4, 8][below(4) as usize]))
            .collect();
        let mut program = vec![];
        for (i, (off, size)) in fields.iter().enumerate() {
            program.push(format!("r2 = *(u{} *)(r6 + {off})", 8 * size));
            program.push(format!("*(u64 *)(r9 + {}) = r2", 8 * i));
            // Some runs go on behind a jump, and some registers change.
            match below(6) {
                0 => program.push(format!("if r2 == 256 goto out{i}")),
                1 => program.push("r2 += r6".into()),
                _ => continue,
            }
            if program.last().unwrap().starts_with("if") {
                program.push("r3 = 1".into());
                program.push(format!("out{i}:"));
            }
        }
        let program = Compiled::new(&[], "*char", &program);
        without_signals(|| {
            for _ in 0..40 {
                let page = 1 + below(N_PAGES as u64 - 1) as i64;
                let start = page * PAGE as i64 - below(360) as i64;
                let seen = program.run(memory.address.wrapping_add_signed(start));
                for (i, (off, size)) in fields.iter().enumerate() {
                    let known = expected(&bytes, &readable, start + off, *size);
                    assert_eq!(seen[i], known, "round {round}: {start} + {off}, {size} bytes");
                    n_nonzero += u64::from(known != 0);
                }
            }
        });
    }
    assert!(n_nonzero > 1000, "only {n_nonzero} loads found something");
}

#[test]
fn memory_that_comes_and_goes() {
    let program = Compiled::new(
        NODE,
        "*node",
        &lines(&[
            "r2 = *(u64 *)(r6 + 0)",
            "*(u64 *)(r9 + 0) = r2",
            "r3 = *(u64 *)(r6 + 16)",
            "*(u64 *)(r9 + 8) = r3",
        ]),
    );
    let word = [7u8; 2 * PAGE];
    let memory = Memory::with(&word);
    let seven = 0x0707_0707_0707_0707;
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                memory.protect(1, libc::PROT_NONE);
                memory.protect(1, libc::PROT_READ);
            }
        });
        // Ends the other thread also where a load is wrong.
        let found = without_signals(|| {
            (0..20_000).all(|_| {
                let seen = program.run(memory.address + PAGE as u64 - 16);
                seen[0] == seven && [0, seven].contains(&seen[1])
            })
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(found);
    });
}

/// `bpf_probe_write_user`: what the target may not write to stays as it is.
#[test]
fn writes_go_where_the_target_may_write() {
    let target = Target::new(&[spec(MapKind::Array, 4, 8, 1)]);
    let memory = Memory::with(&[1; 2 * PAGE]);
    let new = [2u8; 16];
    let write = |to: u64| {
        let args = [to, new.as_ptr() as u64, new.len() as u64];
        target.call(RuntimeFn::ProbeWriteUser, &args).cast_signed()
    };
    let words = |at: usize| {
        // SAFETY: two words of a mapping that can be read.
        unsafe { ((memory.address + at as u64) as *const [u64; 2]).read_volatile() }
    };
    let (old, done) = (0x0101_0101_0101_0101, 0x0202_0202_0202_0202);
    without_signals(|| {
        assert_eq!(write(memory.address + 16), 0);
        assert_eq!((words(0), words(16), words(32)), ([old; 2], [done; 2], [old; 2]));
        memory.protect(1, libc::PROT_READ);
        assert_eq!(write(memory.address + PAGE as u64), -14);
        assert_eq!(words(PAGE), [old; 2]);
        // Across the border: what may be written is.
        assert_eq!(write(memory.address + PAGE as u64 - 8), -14);
        assert_eq!((words(PAGE - 8), words(PAGE)), ([done, old], [old; 2]));
        for nowhere in [0, 8, 1 << 47, !0] {
            assert_eq!(write(nowhere), -14, "{nowhere:#x}");
        }
        // Code.
        assert_eq!(write(target.address_of(RuntimeFn::ProbeWriteUser)), -14);
    });
}
