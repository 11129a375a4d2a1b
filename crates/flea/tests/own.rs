//! A process that traces itself: `Session::this_process` while its other threads run on.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread;

#[path = "../examples/parts/counter.rs"]
mod support;

use flea::builtin::{Count, Expr, Histograms};
use flea::{Function, Session, attached};

/// One test at a time: each changes the code of this very process.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn own_add(a: u64, b: u64) -> u64 {
    black_box(a).wrapping_mul(3).wrapping_add(black_box(b))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn own_loop(n: u64) -> u64 {
    (0..n).fold(0, |sum, i| black_box(sum + i))
}

/// One session for all tests: reading this program's own symbols takes a while.
fn session() -> &'static Session {
    static SESSION: OnceLock<Session> = OnceLock::new();
    SESSION.get_or_init(|| Session::this_process().unwrap())
}

fn function(session: &Session, name: &str) -> Function {
    let mut found = session.find(name).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Calls both functions `n` times in each of four threads.
fn call(n: u64) {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || {
                for i in 0..n {
                    assert_eq!(own_add(i, 1), 3 * i + 1);
                    assert_eq!(own_loop(i % 8), (i % 8) * (i % 8).saturating_sub(1) / 2);
                }
            });
        }
    });
}

#[test]
fn counts_are_exact_in_every_round() {
    let _turn = turn();
    let session = session();
    let functions = ["own_add", "own_loop"].map(|name| function(session, name));
    for round in 1..=12 {
        let mut count = Count::start(session, &functions).unwrap();
        assert_eq!(count.refused().len(), 0);
        call(1000 + round);
        count.detach().unwrap();
        call(7);
        assert_eq!(count.read(), [4 * (1000 + round); 2], "round {round}");
        assert_eq!((count.missed(), count.lost()), (0, 0));
    }
}

#[test]
fn a_histogram_sees_arguments_and_results() {
    let _turn = turn();
    let session = session();
    let add = function(session, "own_add");
    let mut arguments = Histograms::of(session, &add, &Expr::Arg(0)).unwrap();
    let mut results = Histograms::of(session, &add, &Expr::Retval).unwrap();
    let mut times = Histograms::of_duration(session, &[function(session, "own_loop")]).unwrap();
    call(100);
    for histogram in [&mut arguments, &mut results, &mut times] {
        histogram.detach().unwrap();
    }
    let (arguments, results) = (&arguments.read()[0], &results.read()[0]);
    assert_eq!((arguments.count, arguments.min, arguments.max), (400, Some(0), Some(99)));
    assert_eq!((results.count, results.min, results.max), (400, Some(1), Some(298)));
    assert_eq!(times.read()[0].count, 400);
}

/// Lets the threads of a test end, also when it fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Threads are in the functions at every moment while the sites are swapped under them.
#[test]
fn busy_threads_run_on_while_sites_come_and_go() {
    let _turn = turn();
    let stop = AtomicBool::new(false);
    let n_calls = AtomicU64::new(0);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(own_add(5, 6), 21);
                    assert_eq!(own_loop(5), 10);
                    n_calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let session = session();
        let functions = ["own_add", "own_loop"].map(|name| function(session, name));
        for _ in 0..5 {
            let mut times = Histograms::of_duration(session, &functions).unwrap();
            let before = n_calls.load(Ordering::Relaxed);
            while n_calls.load(Ordering::Relaxed) < before + 1000 {
                thread::yield_now();
            }
            times.detach().unwrap();
            // Three threads may each have been between the two functions.
            let counts: Vec<u64> = times.read().iter().map(|h| h.count).collect();
            assert!(counts.iter().all(|n| n + 4 >= 1000), "{counts:?}");
        }
    });
}

/// The helper is a copy of this process at a moment at which other threads may be starting or
/// ending; whatever lock one of them held then is held in the copy for ever.
#[test]
fn threads_come_and_go_while_sites_do() {
    let _turn = turn();
    let session = session();
    let add = function(session, "own_add");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    thread::spawn(|| ()).join().unwrap();
                }
            });
        }
        for _ in 0..40 {
            let mut count = Count::start(session, std::slice::from_ref(&add)).unwrap();
            call(1);
            count.detach().unwrap();
            assert_eq!(count.read(), [4]);
        }
    });
}

/// Who attached is the program, not the child that did the work and has ended since; else
/// the next controller would take its memory away.
#[test]
fn the_owner_is_this_process() {
    let _turn = turn();
    let session = session();
    let count = Count::start(session, &[function(session, "own_add")]).unwrap();
    let bodies = attached::in_process(session.pid()).unwrap();
    let owners: Vec<_> = bodies.iter().map(|b| (b.controller, b.controller_alive)).collect();
    assert_eq!(owners, [(session.pid(), true)]);
    assert_eq!(bodies[0].function, "own_add");
    drop(count);
    assert_eq!(attached::in_process(session.pid()).unwrap(), []);
}

/// An object that has been loaded and not attached yet survives what others do meanwhile.
#[test]
fn a_loaded_object_keeps_its_memory() {
    let _turn = turn();
    let session = session();
    let add = function(session, "own_add");
    let early = session.load(support::counter()).unwrap();
    let mut other = Count::start(session, std::slice::from_ref(&add)).unwrap();
    other.detach().unwrap();
    drop(other);
    let link = early.programs().next().unwrap().attach(&add).unwrap();
    call(10);
    link.detach().unwrap();
    assert_eq!(support::total(&early), 40);
    drop(early);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("/memfd:flea"), "memory of ours is left:\n{maps}");
}

/// A closed library takes its sites with it; what was attached together with them comes off.
#[test]
fn a_closed_library_does_not_hold_up_the_others() {
    let _turn = turn();
    // A session of its own: its modules change.
    let session = Session::this_process().unwrap();
    // SAFETY: the C library's own library, whose constructors do nothing to others.
    let library = unsafe { libc::dlopen(c"libresolv.so.2".as_ptr(), libc::RTLD_NOW) };
    assert!(!library.is_null());
    session.refresh().unwrap();
    let resolver = session.find("libresolv.so.2:ns_*").unwrap();
    assert!(resolver.len() > 5, "{resolver:?}");
    let mut functions = vec![function(&session, "own_add")];
    functions.extend(resolver);
    let mut count = Count::start(&session, &functions).unwrap();
    assert!(count.functions().len() > 5);
    call(5);
    // SAFETY: nothing of it is called or referred to from here on.
    assert_eq!(unsafe { libc::dlclose(library) }, 0);
    // The session itself has the file mapped, to read its symbols.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.lines().any(|l| l.contains("libresolv") && l.contains(" r-x")), "{maps}");
    call(5);
    count.detach().unwrap();
    assert_eq!(count.read()[0], 40);
    assert_eq!(attached::in_process(session.pid()).unwrap(), []);
}
