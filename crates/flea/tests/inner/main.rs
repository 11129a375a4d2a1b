//! Maps of maps and locks in values, with programs made by clang, in this very process: its
//! threads call the functions, and its signal handlers.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::hint::black_box;
use std::os::unix::thread::JoinHandleExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use flea::{ArrayMap, Link, Map, MapError, MapKind, Object, Session};
use flea_fixtures::{Tool, require};

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn inner_route(class: u32, to: u32, bytes: u64) -> u64 {
    black_box(u64::from(class) + u64::from(to) + bytes)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn inner_deposit(n: u64) -> u64 {
    black_box(n) + 1
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn inner_handler(n: u64) -> u64 {
    black_box(n) + 2
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn inner_reset(n: u64) -> u64 {
    black_box(n) + 3
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn inner_note(n: u64) -> u64 {
    black_box(n) + 4
}

/// The object in this process. Tests take turns, as each changes its code.
struct Bench {
    object: Object,
    session: &'static Session,
    _turn: MutexGuard<'static, ()>,
}

impl Bench {
    /// `None` where clang or libbpf's headers are missing, which was printed.
    fn new() -> Result<Option<Self>> {
        static TURN: Mutex<()> = Mutex::new(());
        static SHARED: OnceLock<(Session, Vec<u8>)> = OnceLock::new();
        let (Some(clang), Some(_)) = (require(Tool::Clang), require(Tool::LibbpfHeaders)) else {
            return Ok(None);
        };
        let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (session, bytes) =
            SHARED.get_or_init(|| (Session::this_process().unwrap(), compile(&clang).unwrap()));
        let object = session.load(flea::parse_object(bytes)?)?;
        Ok(Some(Self { object, session, _turn: turn }))
    }

    fn attach(&self, programs: &[&str]) -> Result<Link> {
        let mut attachments = Vec::new();
        for name in programs {
            let program = self.object.program(name).context("no such program")?;
            let target = program.target().context("no target")?;
            attachments.push(program.on(&self.session.find(target)?[0], 0));
        }
        Ok(self.object.attach(&attachments)?)
    }

    /// Bytes by destination, and calls, in one of the tables.
    fn traffic(&self, table: &str) -> Vec<(u32, u64, u64)> {
        let Some(Map::Hash(table)) = self.object.map(table) else { panic!("no {table}") };
        let mut rows: Vec<_> = table
            .iter()
            .map(|(key, value)| {
                let to = u32::from_le_bytes(key.try_into().unwrap());
                (to, word(&value, 0), word(&value, 8))
            })
            .collect();
        rows.sort_unstable();
        rows
    }

    /// Both sides of the account, read under its lock.
    fn account(&self) -> (u64, u64) {
        let Some(Map::Array(accounts)) = self.object.map("accounts") else { panic!("no accounts") };
        let value = patiently(|| accounts.get_locked(0));
        assert_eq!(value[12..16], [0; 4], "the lock is nobody's business");
        (word(&value, 0), word(&value, 16))
    }
}

/// On a machine that is busy with something else an owner may be kept waiting for longer than
/// those who wait for it do.
fn patiently<T>(mut read: impl FnMut() -> Result<T, MapError>) -> T {
    for _ in 0..1000 {
        match read() {
            Err(MapError::Busy) => thread::yield_now(),
            result => return result.unwrap(),
        }
    }
    panic!("the lock is never free");
}

fn word(value: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(value[at..at + 8].try_into().unwrap())
}

fn compile(clang: &std::path::Path) -> Result<Vec<u8>> {
    let source: PathBuf =
        [env!("CARGO_MANIFEST_DIR"), "tests", "inner", "inner.bpf.c"].iter().collect();
    let include = ["-I", "/usr/include/x86_64-linux-gnu"];
    let done = Command::new(clang)
        .args(["-target", "bpf", "-O2", "-g", "-mcpu=v3", "-c"])
        .args(include)
        .arg(source)
        .args(["-o", "-"])
        .output()?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Ok(done.stdout)
}

/// Lets the threads of a test end, also when it fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn a_routing_table_that_changes_while_it_is_used() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let index = |name: &str| bench.object.map_index(name).unwrap();
    let Some(Map::ArrayOfMaps(classes)) = bench.object.map("classes") else { panic!("classes") };
    let Some(Map::HashOfMaps(names)) = bench.object.map("names") else { panic!("names") };
    assert_eq!((classes.get(0)?, classes.get(1)?), (Some(index("north")), None));
    assert!(bench.object.map("classes.inner").is_none(), "a template is no map");
    assert_eq!(bench.object.maps()[index("classes.inner").0 as usize].kind, MapKind::Hash);
    names.update(&1002u32.to_le_bytes(), index("sent"), flea::Update::Any)?;

    let link = bench.attach(&["route", "count_by_name"])?;
    let call = |class, to, bytes| {
        assert_eq!(inner_route(class, to, bytes), u64::from(class) + u64::from(to) + bytes);
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for i in 0..1000u32 {
                    call(i % 4, i % 5, 10);
                    call(77, 0, 1);
                }
            });
        }
    });
    let each = |calls, bytes| (0..5).map(|to| (to, calls, bytes)).collect::<Vec<_>>();
    assert_eq!(bench.traffic("north"), each(4 * 50, 4 * 500));
    assert_eq!(bench.traffic("south"), each(4 * 50, 4 * 500));
    assert_eq!(bench.traffic("spare"), []);
    let Some(Map::Array(bss)) = bench.object.map(".bss") else { panic!("no .bss") };
    assert_eq!(word(&bss.get(0)?, 0), 4 * (2 * 250 + 1000), "classes without a table");
    let Some(Map::PerCpuArray(sent)) = bench.object.map("sent") else { panic!("no sent") };
    for to in 0..8 {
        let sum: u64 = sent.get(to)?.iter().map(|v| word(v, 0)).sum();
        assert_eq!(sum, if to < 5 { 4 * 500 } else { 0 }, "to {to}");
    }

    // From here on class 0 goes elsewhere, and class 2 nowhere.
    classes.set(0, index("spare"))?;
    classes.clear(2)?;
    names.delete(&1002u32.to_le_bytes())?;
    call(0, 9, 5);
    call(2, 9, 5);
    assert_eq!(bench.traffic("spare"), [(9, 1, 5)]);
    assert_eq!(bench.traffic("south"), each(4 * 50, 4 * 500));
    assert!(matches!(classes.set(1, index("sent")), Err(MapError::WrongShape { .. })));
    assert_eq!(bench.object.missed(), 0);
    link.detach()?;
    Ok(())
}

#[test]
fn four_threads_change_an_account_under_its_lock() -> Result<()> {
    const ROUNDS: u64 = 2000;
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let link = bench.attach(&["deposit", "total", "reset"])?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let reader = scope.spawn(|| {
            let mut n_reads = 0u64;
            while !stop.load(Relaxed) || n_reads == 0 {
                let (left, right) = bench.account();
                assert_eq!(left, right, "half a change");
                n_reads += 1;
            }
        });
        let callers = [0, 1, 2, 3]
            .map(|_| scope.spawn(|| (0..ROUNDS).for_each(|n| assert_eq!(inner_deposit(n), n + 1))));
        callers.into_iter().for_each(|c| c.join().unwrap());
        stop.store(true, Relaxed);
        reader.join().unwrap();
    });
    let (left, right) = bench.account();
    assert_eq!(left, right);
    let Some(Map::Array(total)) = bench.object.map(".data.total") else { panic!("no total") };
    let value = patiently(|| total.get_locked(0));
    let totals: Vec<u64> = value.chunks_exact(8).map(|bytes| word(bytes, 0)).collect();
    let total = *totals.iter().max().unwrap();
    assert_eq!(totals.iter().filter(|n| **n == total).count(), 2, "{totals:?}");
    // Who waited too long for a lock is counted.
    assert_eq!(left + total + bench.object.missed(), 2 * 4 * ROUNDS);
    assert!(left > 0 && total > 0);

    // By BPF_F_LOCK the other program's update waits for its turn.
    thread::scope(|scope| {
        scope.spawn(|| (0..ROUNDS).for_each(|n| assert_eq!(inner_deposit(n), n + 1)));
        for n in 0..ROUNDS / 10 {
            assert_eq!(inner_reset(n), n + 3);
            let (left, right) = bench.account();
            assert_eq!(left, right, "half a change");
        }
    });
    link.detach()?;
    Ok(())
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn handle(_: libc::c_int) {
    HANDLED.fetch_add(1, Relaxed);
    inner_handler(1);
}

/// On a thread that holds the lock a signal handler calls a function whose program wants it: that
/// run is skipped and counted, and nobody waits for himself.
#[test]
fn a_signal_handler_above_a_held_lock() -> Result<()> {
    const ENOUGH_MISSES: u64 = 20;
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let link = bench.attach(&["deposit", "deposit_in_handler"])?;
    // SAFETY: the handler calls nothing but traced functions of this file.
    unsafe { libc::signal(libc::SIGUSR1, handle as *const () as libc::sighandler_t) };
    let stop = AtomicBool::new(false);
    let deposits = AtomicU64::new(0);
    HANDLED.store(0, Relaxed);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        // This one has no signals: it keeps the lock busy.
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                inner_deposit(deposits.fetch_add(1, Relaxed));
            }
        });
        let interrupted = thread::spawn({
            let (stop, deposits) = (as_static(&stop), as_static(&deposits));
            move || {
                while !stop.load(Relaxed) {
                    inner_deposit(deposits.fetch_add(1, Relaxed));
                }
            }
        });
        let target = interrupted.as_pthread_t();
        let mut n_sent = 0u64;
        while bench.object.missed() < ENOUGH_MISSES {
            // SAFETY: the thread is joined below.
            unsafe { libc::pthread_kill(target, libc::SIGUSR1) };
            n_sent += 1;
            assert!(n_sent < 5_000_000, "no signal ever came while the lock was held");
            if n_sent.is_multiple_of(64) {
                thread::yield_now();
            }
        }
        stop.store(true, Relaxed);
        interrupted.join().unwrap();
    });
    link.detach()?;
    let calls = deposits.load(Relaxed) + HANDLED.load(Relaxed);
    let changes = calls - bench.object.missed();
    assert_eq!(bench.account(), (changes, changes));
    assert!(changes > 0);
    // SAFETY: back to what it was.
    unsafe { libc::signal(libc::SIGUSR1, libc::SIG_DFL) };
    Ok(())
}

/// What the handler below looks at, and whether it has found the lock held and waits.
static ACCOUNTS: OnceLock<ArrayMap> = OnceLock::new();
static WAITING: AtomicBool = AtomicBool::new(false);
static GO_ON: AtomicBool = AtomicBool::new(false);

/// In the middle of a change, stays there for a while. No other thread changes the account.
extern "C" fn stay_in_a_change(_: libc::c_int) {
    let Some(value) = ACCOUNTS.get().and_then(|accounts| accounts.get(0).ok()) else { return };
    if word(&value, 0) != word(&value, 16) {
        WAITING.store(true, Relaxed);
        while !GO_ON.load(Relaxed) {
            thread::yield_now();
        }
    }
}

/// The owner of a lock is held up: who wants it waits a bounded time, ends there, is counted, and
/// has given its record back.
#[test]
fn a_lock_that_is_not_given_back_for_long() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let Some(Map::Array(accounts)) = bench.object.map("accounts") else { panic!("no accounts") };
    let Some(Map::RingBuf(mut notes)) = bench.object.map("notes") else { panic!("no notes") };
    let accounts = ACCOUNTS.get_or_init(|| accounts);
    let link = bench.attach(&["deposit", "note"])?;
    // SAFETY: the handler allocates, but what it interrupts does not: no signal is sent before the
    // thread is in its loop.
    unsafe { libc::signal(libc::SIGUSR2, stay_in_a_change as *const () as libc::sighandler_t) };
    let stop = AtomicBool::new(false);
    let n_deposits = AtomicU64::new(0);
    let owner = thread::spawn({
        let (stop, n_deposits) = (as_static(&stop), as_static(&n_deposits));
        move || {
            while !stop.load(Relaxed) {
                inner_deposit(n_deposits.fetch_add(1, Relaxed));
            }
        }
    });
    while n_deposits.load(Relaxed) == 0 {
        thread::yield_now();
    }
    let mut n_sent = 0u64;
    while !WAITING.load(Relaxed) {
        // SAFETY: the thread is joined below.
        unsafe { libc::pthread_kill(owner.as_pthread_t(), libc::SIGUSR2) };
        n_sent += 1;
        assert!(n_sent < 5_000_000, "no signal ever came in the middle of a change");
        thread::yield_now();
    }
    for n in 1..=100 {
        inner_note(n);
        assert_eq!(bench.object.missed(), n);
    }
    let missed = bench.object.missed();
    assert_eq!((notes.poll(|_| ()), notes.is_blocked(), notes.lost()), (0, false, 0));
    assert_eq!(accounts.get_locked(0), Err(MapError::Busy));
    stop.store(true, Relaxed);
    GO_ON.store(true, Relaxed);
    owner.join().unwrap();

    let (left, right) = bench.account();
    assert_eq!(left, right);
    inner_note(1);
    let mut seen = Vec::new();
    notes.poll(|record| seen.push(word(record, 0)));
    assert_eq!((seen, bench.object.missed()), (vec![left], missed));
    link.detach()?;
    // SAFETY: back to what it was.
    unsafe { libc::signal(libc::SIGUSR2, libc::SIG_DFL) };
    Ok(())
}

/// For a thread that is joined before what it borrows is gone, but whose handle is needed in
/// between.
fn as_static<T>(value: &T) -> &'static T {
    // SAFETY: the caller joins the thread.
    unsafe { &*std::ptr::from_ref(value) }
}
