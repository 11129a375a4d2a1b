//! What Linux's own tests of BPF trampolines expect (FACTS: fentry_test, fexit_test, many_args,
//! get_func_args, get_func_ip, bpf_cookie, tracing_struct, fsession_test, recursion,
//! trampoline_count, fexit_stress), on functions of a library in this very process, with
//! programs made by clang. What each program looks for is in its C file.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::ffi::{CString, c_int, c_long, c_short, c_uint, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use anyhow::{Context as _, Result, ensure};
use flea::{AttachError, Attachment, Function, Link, Map, Object, ObjectSpec, Session};
use flea_fixtures::{Tool, require};

/// A directory that is gone with the value.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("flea-linux-{}-{n}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // It is in the way of nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/linux").join(name)
}

fn compile(compiler: &Path, args: &[&str], input: &str, output: &Path) -> Result<()> {
    let done =
        Command::new(compiler).args(args).arg(source(input)).arg("-o").arg(output).output()?;
    ensure!(done.status.success(), "{input}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

/// functions.c in this process.
struct Library(*mut c_void);

// SAFETY: a handle of dlopen can be used by every thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    fn open() -> Result<Self> {
        let gcc = require(Tool::Gcc).context("gcc")?;
        let directory = Directory::new()?;
        let path = directory.0.join("libtraced.so");
        compile(&gcc, &["-g", "-O2", "-fPIC", "-shared"], "functions.c", &path)?;
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the library has no constructors.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        ensure!(!handle.is_null(), "dlopen");
        // Its file is read when it is traced: it stays for as long as this process.
        std::mem::forget(directory);
        Ok(Self(handle))
    }

    fn address(&self, name: &str) -> *mut c_void {
        let name = CString::new(name).unwrap();
        // SAFETY: the handle is open, the name ends with a NUL.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        assert!(!address.is_null(), "{name:?}");
        address
    }
}

/// `call!(library, two(2, 3): (c_int, u64) -> c_int)`
macro_rules! call {
    ($library:expr, $name:ident($($value:expr),*): ($($ty:ty),*) -> $ret:ty) => {{
        let address = $library.address(stringify!($name));
        // SAFETY: that is its declaration in functions.c.
        let function: extern "C" fn($($ty),*) -> $ret = unsafe { std::mem::transmute(address) };
        function($($value),*)
    }};
}

mod callbacks;
mod hundred;

/// What all tests share. They change the code of one process, so they take turns.
struct Bench {
    library: &'static Library,
    session: &'static Session,
    clang: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Bench {
    /// `None` where clang or libbpf's headers are missing, which was printed.
    fn new() -> Result<Option<Self>> {
        static TURN: Mutex<()> = Mutex::new(());
        static SHARED: OnceLock<(Library, Session)> = OnceLock::new();
        let (Some(clang), Some(_)) = (require(Tool::Clang), require(Tool::LibbpfHeaders)) else {
            return Ok(None);
        };
        let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (library, session) = SHARED.get_or_init(|| {
            let library = Library::open().unwrap();
            (library, Session::this_process().unwrap())
        });
        Ok(Some(Self { library, session, clang, _turn: turn }))
    }

    fn load(&self, file: &str) -> Result<Object> {
        Ok(self.session.load(self.parse(file)?)?)
    }

    fn parse(&self, file: &str) -> Result<ObjectSpec> {
        let directory = Directory::new()?;
        let path = directory.0.join("object.o");
        let include = ["-I", "/usr/include/x86_64-linux-gnu", "-D__TARGET_ARCH_x86"];
        let args = [&["-target", "bpf", "-O2", "-g", "-mcpu=v3", "-c"], &include[..]].concat();
        compile(&self.clang, &args, file, &path)?;
        Ok(flea::parse_object(&std::fs::read(path)?)?)
    }

    fn function(&self, name: &str) -> Result<Function> {
        let mut found = self.session.find(&format!("libtraced.so:{name}"))?;
        ensure!(found.len() == 1, "{name}: {found:?}");
        Ok(found.remove(0))
    }

    /// Every program with a function in its section name, on it.
    fn attachments(&self, object: &Object) -> Result<Vec<Attachment>> {
        let mut attachments = Vec::new();
        for program in object.programs() {
            if let Some(name) = program.target() {
                attachments.push(program.on(&self.function(name)?, 0));
            }
        }
        Ok(attachments)
    }

    fn attach_all(&self, object: &Object) -> Result<Link> {
        Ok(object.attach(&self.attachments(object)?)?)
    }

    fn attach(&self, object: &Object, programs: &[(&str, &str)]) -> Result<Link> {
        let mut attachments = Vec::new();
        for (program, function) in programs {
            let program = object.program(program).context("no such program")?;
            attachments.push(program.on(&self.function(function)?, 0));
        }
        Ok(object.attach(&attachments)?)
    }
}

/// The words of the object's one global variable.
fn words(object: &Object) -> Vec<u64> {
    let Some(Map::Array(bss)) = object.map(".bss") else { panic!("no .bss") };
    let bytes = bss.get(0).unwrap();
    bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect()
}

fn set_word(object: &Object, index: usize, value: u64) {
    let Some(Map::Array(bss)) = object.map(".bss") else { panic!("no .bss") };
    let mut bytes = bss.get(0).unwrap();
    bytes[8 * index..][..8].copy_from_slice(&value.to_le_bytes());
    bss.set(0, &bytes).unwrap();
}

fn pointer(value: usize) -> *mut c_void {
    std::ptr::without_provenance_mut(value)
}

fn call_with_arguments(library: &Library) {
    let (p12, p17, p20) = (pointer(12), pointer(17), pointer(20));
    assert_eq!(call!(library, one(1): (c_int) -> c_int), 2);
    assert_eq!(call!(library, two(2, 3): (c_int, u64) -> c_int), 5);
    assert_eq!(call!(library, three(4, 5, 6): (i8, c_int, u64) -> c_int), 15);
    let four = call!(library, four(pointer(7), 8, 9, 10): (*mut c_void, i8, c_int, u64) -> c_int);
    assert_eq!(four, 34);
    let five = call!(library, five(11, p12, 13, 14, 15):
        (u64, *mut c_void, c_short, c_int, u64) -> c_int);
    assert_eq!(five, 65);
    let six = call!(library, six(16, p17, 18, 19, p20, 21):
        (u64, *mut c_void, c_short, c_int, *mut c_void, u64) -> c_int);
    assert_eq!(six, 111);
    assert_eq!(call!(library, null_pointer(pointer(0)): (*mut c_void) -> c_int), 0);
    let mut node = pointer(0);
    let node = (&raw mut node).cast();
    assert_eq!(call!(library, null_member(node): (*mut c_void) -> c_int), 0);
    let seven = call!(library, seven(16, p17, 18, 19, p20, 21, 22):
        (u64, *mut c_void, c_short, c_int, *mut c_void, i8, c_int) -> c_int);
    assert_eq!(seven, 133);
    let eleven = call!(library, eleven(16, p17, 18, 19, p20, 21, 22, 23, 24, 25, 26):
        (u64, *mut c_void, c_short, c_int, *mut c_void, i8, c_int, c_uint, c_long, u64, u64)
        -> c_int);
    assert_eq!(eleven, 231);
}

/// fentry_test, fexit_test, fentry_many_args, fexit_many_args: attached, taken off and attached
/// again, twice at a time only by another object.
#[test]
fn arguments_of_every_width() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let object = bench.load("arguments.bpf.c")?;
    for round in 1..=3 {
        let attachments = bench.attachments(&object)?;
        let link = object.attach(&attachments)?;
        for again in &attachments {
            let refused = object.attach(std::slice::from_ref(again));
            assert!(matches!(refused, Err(AttachError::Twice { .. })));
        }
        call_with_arguments(bench.library);
        link.detach()?;
        call_with_arguments(bench.library);
        let words = words(&object);
        assert_eq!(words[..20], [round; 20], "round {round}");
        assert_eq!(words[20..], [0; 12]);
    }
    Ok(())
}

/// tracing_struct and tracing_struct_many_args, and beyond Linux structs of over 16 bytes.
#[test]
fn structs_by_value() -> Result<()> {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Pair(c_long, c_long);
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Small(c_int, c_int);
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Mixed(i8, c_short, c_int, c_long);
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Large([c_long; 5]);

    let Some(bench) = Bench::new()? else { return Ok(()) };
    let object = bench.load("structs.bpf.c")?;
    let link = bench.attach_all(&object)?;
    let l = bench.library;
    let first = call!(l, struct_first(Pair(2, 3), 1, 4): (Pair, c_int, c_int) -> c_int);
    let middle = call!(l, struct_middle(1, Pair(2, 3), 4): (c_int, Pair, c_int) -> c_int);
    let last = call!(l, struct_last(1, 4, Pair(2, 3)): (c_int, c_int, Pair) -> c_int);
    let small = call!(l, struct_small(Small(5, 6)): (Small) -> c_int);
    let no_room = call!(l, struct_no_room(1, 2, 3, Pair(4, 5), Pair(6, 7), 8, Small(9, 10)):
        (c_long, c_long, c_long, Pair, Pair, c_int, Small) -> c_int);
    let mixed = call!(l, struct_mixed(16, pointer(17), 18, 19, pointer(20), Mixed(21, 22, 23, 24), 25):
        (u64, *mut c_void, c_short, c_int, *mut c_void, Mixed, c_int) -> c_int);
    let large =
        call!(l, struct_large(1, Large([2, 3, 4, 5, 6]), 7): (c_int, Large, c_int) -> c_int);
    link.detach()?;
    assert_eq!([first, middle, last, small, no_room, mixed, large], [10, 10, 10, 11, 55, 205, 16]);

    let packed = 21 | 22 << 16 | 23 << 32;
    let rows: [(&[u64], c_int); 7] = [
        (&[2, 3, 1, 4], first),
        (&[1, 2, 3, 4], middle),
        (&[1, 4, 2, 3], last),
        (&[5 | 6 << 32], small),
        (&[1, 2, 3, 4, 5, 6, 7, 8, 9 | 10 << 32], no_room),
        (&[16, 17, 18, 19, 20, packed, 24, 25], mixed),
        (&[1, 2, 3, 4, 5, 6, 7], large),
    ];
    let words = words(&object);
    let (at_entry, at_exit) = words.split_at(words.len() / 2);
    for ((row, (args, result)), (entry, exit)) in
        rows.iter().enumerate().zip(at_entry.chunks(16).zip(at_exit.chunks(16)))
    {
        let n = args.len();
        assert_eq!([entry[15], exit[15]], [n as u64; 2], "row {row}: count of arguments");
        // The mixed struct has a byte of padding, and registers of `int`s their upper halves.
        let mask = |i: usize, word: u64| match (row, i) {
            (5, 5) => word & !0xff00,
            (4, 8) | (3, 0) | (6, 1..=5) => word,
            _ => word & 0xffff_ffff,
        };
        for (i, &expected) in args.iter().enumerate() {
            assert_eq!(mask(i, entry[i]), expected, "row {row}, word {i} at entry");
            assert_eq!(mask(i, exit[i]), expected, "row {row}, word {i} at exit");
        }
        assert_eq!(mask(n, exit[n]), u64::from(result.cast_unsigned()), "row {row}: result");
    }
    Ok(())
}

const COOKIES: usize = 16;
const RUNS: usize = 18;
const ADDRESS: usize = 21;

/// get_func_args_test and get_func_ip_test.
#[test]
fn arguments_results_and_address_by_helper() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let object = bench.load("helpers.bpf.c")?;
    set_word(&object, ADDRESS, bench.function("two")?.address().0);
    let link = bench.attach(&object, &[("get_args", "two"), ("get_args_at_exit", "two")])?;
    assert_eq!(call!(bench.library, two(2, 3): (c_int, u64) -> c_int), 5);
    link.detach()?;
    assert_eq!(words(&object)[..10], [1; 10]);
    Ok(())
}

/// bpf_cookie: one program on several functions, each attachment with its own cookie.
#[test]
fn cookies_are_the_attachments() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let object = bench.load("helpers.bpf.c")?;
    let cookies = [("one", 0x1000_0000_0000_0001), ("nothing", 0x20), ("again", 0x300)];
    let mut attachments = Vec::new();
    for program in ["cookie_entry", "cookie_exit"] {
        let program = object.program(program).context("it is in the object")?;
        for (function, cookie) in cookies {
            attachments.push(program.on(&bench.function(function)?, cookie));
        }
    }
    let link = object.attach(&attachments)?;
    let seen = |object: &Object| <[u64; 2]>::try_from(&words(object)[COOKIES..RUNS]).unwrap();
    call!(bench.library, one(1): (c_int) -> c_int);
    assert_eq!(seen(&object), [0x1000_0000_0000_0001; 2]);
    call!(bench.library, nothing(): () -> c_int);
    assert_eq!(seen(&object), [0x1000_0000_0000_0021; 2]);
    // Three calls of a recursive function.
    call!(bench.library, again(2): (c_int) -> c_int);
    assert_eq!(seen(&object), [0x1000_0000_0000_0921; 2]);
    link.detach()?;
    Ok(())
}

/// fsession_test: two sessions on one function, each with a cookie that starts at zero in each
/// call; what the entry side returns does not keep the exit side from running.
#[test]
fn a_session_carries_its_cookie_from_entry_to_exit() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let object = bench.load("helpers.bpf.c")?;
    let link = bench.attach(&object, &[("session", "one"), ("session_too", "one")])?;
    for _ in 0..5 {
        assert_eq!(call!(bench.library, one(1): (c_int) -> c_int), 2);
    }
    link.detach()?;
    assert_eq!(words(&object)[10..14], [5; 4]);
    Ok(())
}

/// A traced function that calls itself is no recursion of the *program*: nothing is missed.
#[test]
fn a_recursive_function_is_seen_at_every_depth() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let object = bench.load("helpers.bpf.c")?;
    let programs = [("in_recursion", "again"), ("out_of_recursion", "again")];
    let link = bench.attach(&object, &programs)?;
    assert_eq!(call!(bench.library, again(10_000): (c_int) -> c_int), 10_000);
    link.detach()?;
    assert_eq!(words(&object)[RUNS..RUNS + 2], [10_001; 2]);
    assert_eq!(object.missed(), 0);
    Ok(())
}

static NOTHING: AtomicU64 = AtomicU64::new(0);
static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn call_nothing(_signal: c_int) {
    let address = std::ptr::with_exposed_provenance::<c_void>(
        usize::try_from(NOTHING.load(Ordering::Relaxed)).unwrap_or(0),
    );
    // SAFETY: the test has put the address of `int nothing(void)` there.
    let nothing: extern "C" fn() -> c_int = unsafe { std::mem::transmute(address) };
    nothing();
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// recursion: a program that is entered again while it runs on the same thread (here from a
/// signal handler) is skipped, and that is counted.
#[test]
fn a_program_entered_again_is_skipped_and_counted() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let object = bench.load("helpers.bpf.c")?;
    let link = bench.attach(&object, &[("slow", "nothing")])?;
    NOTHING.store(bench.library.address("nothing").expose_provenance() as u64, Ordering::Relaxed);
    HANDLED.store(0, Ordering::Relaxed);
    // SAFETY: an action without flags and with an empty mask is all zeros.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = call_nothing as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler calls nothing that is not safe in a handler.
    let set = unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
    assert_eq!(set, 0);

    // SAFETY: it has no preconditions.
    let this = unsafe { libc::pthread_self() } as u64;
    let done = AtomicU64::new(0);
    let mut calls = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while done.load(Ordering::Relaxed) == 0 {
                // SAFETY: the thread runs for as long as this scope.
                unsafe { libc::pthread_kill(this as libc::pthread_t, libc::SIGUSR1) };
                std::thread::yield_now();
            }
        });
        while object.missed() < 3 && calls < 50_000_000 {
            call!(bench.library, nothing(): () -> c_int);
            calls += 1;
        }
        done.store(1, Ordering::Relaxed);
    });
    // A signal that was sent last may be handled now.
    std::thread::yield_now();
    link.detach()?;
    let (missed, ran) = (object.missed(), words(&object)[RUNS + 2]);
    assert!(missed >= 3, "never entered again in {calls} calls");
    assert_eq!(missed + ran, calls + HANDLED.load(Ordering::Relaxed));
    Ok(())
}

/// trampoline_count and fexit_stress: more programs on one function than the 38 that Linux
/// has room for, attached one by one and taken off in another order; none is lost.
#[test]
fn many_links_on_one_function() -> Result<()> {
    const LINKS: usize = 60;
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let helpers = bench.parse("helpers.bpf.c")?;
    let mut links = Vec::new();
    for i in 0..LINKS {
        let object = bench.session.load(helpers.clone())?;
        let program = if i % 2 == 0 { "in_recursion" } else { "out_of_recursion" };
        links.push((bench.attach(&object, &[(program, "again")])?, object, i));
    }
    let mut calls = 0;
    while !links.is_empty() {
        assert_eq!(call!(bench.library, again(4): (c_int) -> c_int), 4);
        calls += 5;
        let middle = links.len() / 3;
        let (link, object, i) = links.swap_remove(middle);
        link.detach()?;
        assert_eq!(words(&object)[RUNS + i % 2], calls, "link {i}");
        assert_eq!(words(&object)[RUNS + (i + 1) % 2], 0);
    }
    assert_eq!(call!(bench.library, again(4): (c_int) -> c_int), 4);
    assert!(flea::attached::in_process(bench.session.pid())?.is_empty());
    Ok(())
}
