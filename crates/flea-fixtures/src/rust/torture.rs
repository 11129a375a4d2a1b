//! A program to be traced, stopped and signalled at random while it checks all that it does:
//! the Rust twin of `cpp/torture.cpp`, with the same lines on both streams.
//!
//! usage: torture [without-NAME]...    NAME: compute panic churn channel timeout text

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead as _, Write as _};
use std::panic::{catch_unwind, resume_unwind};
use std::process::exit;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{RecvTimeoutError, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

static RUNNING: AtomicBool = AtomicBool::new(false);
static N_ERRORS: AtomicU64 = AtomicU64::new(0);
static N_THREADS: AtomicU64 = AtomicU64::new(0);

fn running() -> bool {
    RUNNING.load(SeqCst)
}

#[track_caller]
fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) {
    if found != expected {
        N_ERRORS.fetch_add(1, SeqCst);
        eprintln!("torture: {what}: {found:?}, not {expected:?}");
    }
}

#[inline(always)]
fn mixed(mut x: u64) -> u64 {
    x ^= x >> 31;
    x = x.wrapping_mul(0x9fb2_1c65_1e98_df25);
    x ^= x >> 28;
    x.wrapping_add(0x9e37_79b9_7f4a_7c15)
}

#[inline(never)]
fn step(x: u64) -> u64 {
    std::hint::black_box(mixed(x))
}

#[inline(never)]
fn steps(x: u64, rounds: u32) -> u64 {
    (0..rounds).fold(x, |x, _| step(x))
}

fn steps_inline(x: u64, rounds: u32) -> u64 {
    (0..rounds).fold(x, |x, _| mixed(x))
}

/// Main calls it once per beat: its calls are known from outside.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pulse(n: u64) -> u64 {
    std::hint::black_box(n) + 1
}

type Progress = Arc<AtomicU64>;

fn compute(progress: &Progress) {
    let mut seed = 1;
    while running() {
        seed += 1;
        expect("steps", steps(seed, 60), steps_inline(seed, 60));
        progress.fetch_add(1, SeqCst);
    }
}

#[inline(never)]
fn text_of(seed: u64) -> Result<String, std::num::ParseIntError> {
    let words: Vec<String> = (0..6).map(|i| format!("{}:{i:03}", mixed(seed + i))).collect();
    let joined = words.join(" ");
    let mut sum: u64 = 0;
    for word in joined.split(' ') {
        let (number, _) = word.split_once(':').unwrap_or(("x", ""));
        sum = sum.wrapping_add(number.parse::<u64>()?);
    }
    Ok(sum.to_string())
}

fn text(progress: &Progress) {
    let mut seed = 1;
    while running() {
        seed += 1;
        let expected = (0..6).fold(0u64, |sum, i| sum.wrapping_add(mixed(seed + i)));
        expect("text_of", text_of(seed), Ok(expected.to_string()));
        let map: BTreeMap<u64, u64> = (0..16).map(|i| (mixed(seed + i), i)).collect();
        expect("map", map.values().sum::<u64>(), 120);
        progress.fetch_add(1, SeqCst);
    }
}

#[inline(never)]
fn may_panic(depth: u32, bad: bool) -> u32 {
    let kept = vec![depth; 3];
    if depth == 0 {
        if bad {
            // As `panic!`, without its message.
            resume_unwind(Box::new(17u32));
        }
        return 1;
    }
    may_panic(depth - 1, bad) + u32::from(kept[2] == depth)
}

fn panics(progress: &Progress) {
    let mut round = 0;
    while running() {
        round += 1;
        let (depth, bad) = (round % 12, round % 3 == 0);
        let found = catch_unwind(|| may_panic(depth, bad));
        let found = found.map_err(|what| what.downcast_ref::<u32>().copied());
        expect("may_panic", found, if bad { Err(Some(17)) } else { Ok(depth + 1) });
        progress.fetch_add(1, SeqCst);
    }
}

fn churn(progress: &Progress) {
    let mut seed = 1;
    while running() {
        let lives: Vec<_> = (0..4)
            .map(|i| {
                seed += 1;
                (seed, thread::spawn(move || if i == 3 { panic_quietly() } else { steps(seed, 3) }))
            })
            .collect();
        for (i, (seed, life)) in lives.into_iter().enumerate() {
            let expected = if i == 3 { None } else { Some(steps_inline(seed, 3)) };
            expect("a thread's result", life.join().ok(), expected);
            N_THREADS.fetch_add(1, SeqCst);
        }
        progress.fetch_add(1, SeqCst);
    }
}

#[inline(never)]
fn panic_quietly() -> u64 {
    resume_unwind(Box::new("a thread's end"))
}

fn channels(progress: &Progress) {
    while running() {
        let (to, from) = sync_channel::<Box<u64>>(4);
        let (back, sums) = channel();
        let adder = thread::spawn(move || {
            let sum = from.iter().fold(0u64, |sum, x| sum.wrapping_add(*x));
            back.send(sum).is_ok()
        });
        for i in 0..50 {
            expect("send", to.send(Box::new(i)).is_ok(), true);
        }
        drop(to);
        expect("sum", sums.recv(), Ok(1225));
        expect("adder", adder.join().ok(), Some(true));
        N_THREADS.fetch_add(1, SeqCst);
        progress.fetch_add(1, SeqCst);
    }
}

fn timeouts(progress: &Progress) {
    let pair = Arc::new((Mutex::new(VecDeque::new()), Condvar::new()));
    let (_never, silence) = channel::<u64>();
    while running() {
        let other = Arc::clone(&pair);
        let giver = thread::spawn(move || {
            let (queue, ready) = &*other;
            queue.lock().unwrap().extend(0..10u64);
            ready.notify_all();
        });
        let (queue, ready) = &*pair;
        let mut taken = Vec::new();
        while taken.len() < 10 {
            let queue = queue.lock().unwrap();
            let mut queue = ready.wait_timeout(queue, Duration::from_millis(3)).unwrap().0;
            taken.extend(queue.drain(..));
        }
        expect("queue", taken, (0..10).collect());
        expect("giver", giver.join().is_ok(), true);
        let none = silence.recv_timeout(Duration::from_millis(1));
        expect("silence", none, Err(RecvTimeoutError::Timeout));
        N_THREADS.fetch_add(1, SeqCst);
        progress.fetch_add(1, SeqCst);
    }
}

struct Part {
    progress: Progress,
    seen: u64,
    since: Instant,
    thread: JoinHandle<()>,
}

fn go() -> Vec<Part> {
    let without: Vec<String> = std::env::args().skip(1).collect();
    RUNNING.store(true, SeqCst);
    let all: [(&str, fn(&Progress)); 6] = [
        ("compute", compute),
        ("text", text),
        ("panic", panics),
        ("churn", churn),
        ("channel", channels),
        ("timeout", timeouts),
    ];
    let wanted = all.iter().filter(|(name, _)| !without.contains(&format!("without-{name}")));
    wanted
        .map(|&(_, run)| {
            let progress = Progress::default();
            let given = Arc::clone(&progress);
            let thread = thread::spawn(move || run(&given));
            Part { progress, seen: 0, since: Instant::now(), thread }
        })
        .collect()
}

fn quiet(parts: &mut Vec<Part>) {
    RUNNING.store(false, SeqCst);
    for part in parts.drain(..) {
        expect("a part's end", part.thread.join().is_ok(), true);
    }
}

/// The longest that a thread has been where it was.
fn stall(parts: &mut [Part]) -> Duration {
    let mut longest = Duration::ZERO;
    for part in parts {
        let n = part.progress.load(SeqCst);
        longest = longest.max(part.since.elapsed());
        if n != part.seen {
            part.seen = n;
            part.since = Instant::now();
        }
    }
    longest
}

fn say(line: &str) {
    if writeln!(std::io::stdout(), "{line}").is_err() {
        exit(9);
    }
}

fn main() {
    let (to_main, lines) = channel();
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if to_main.send(line).is_err() {
                break;
            }
        }
        // Whoever started us has gone: `end` comes as a line.
        let _ = to_main.send("gone".to_owned());
    });
    let mut parts = go();
    say("ready");
    let mut n = 0;
    loop {
        match lines.recv_timeout(Duration::from_millis(10)).as_deref() {
            Ok("end") => break,
            Ok("gone") => exit(9),
            Ok("go") => parts = go(),
            Ok("quiet") => {
                quiet(&mut parts);
                say("quiet");
            }
            _ => {}
        }
        n = pulse(n);
        let time_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos());
        let (errors, threads) = (N_ERRORS.load(SeqCst), N_THREADS.load(SeqCst));
        let stall_ms = stall(&mut parts).as_millis();
        say(&format!("beat {n} {time_ns} {errors} {stall_ms} {threads}"));
    }
    quiet(&mut parts);
    exit(if N_ERRORS.load(SeqCst) > 0 { 3 } else { 7 });
}
