//! Ways out of Rust functions, some of them through C++: the protocol of `c/ways.h`.

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::panic::{catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// In the order of the numbers that functions are counted by; the first three are C++'s.
const NAMES: [&str; 9] = [
    "w_between_rust",
    "w_cpp_throws",
    "w_cpp_catches",
    "w_rust_panics",
    "w_rust_passes",
    "w_rust_catches",
    "w_rust_resumes",
    "w_rust_drops",
    "w_rust_thread",
];
static ENTERED: [AtomicI64; 9] = [const { AtomicI64::new(0) }; 9];
static RETURNED: [AtomicI64; 9] = [const { AtomicI64::new(0) }; 9];
static DROPPED: AtomicI64 = AtomicI64::new(0);

unsafe extern "C-unwind" {
    safe fn w_between_rust(x: i64) -> i64;
    safe fn w_cpp_throws(x: i64) -> i64;
    safe fn w_cpp_catches(x: i64) -> i64;
    safe fn n_destroyed() -> i64;
}

#[unsafe(no_mangle)]
extern "C" fn entered(which: usize) {
    ENTERED[which].fetch_add(1, Relaxed);
}

#[unsafe(no_mangle)]
extern "C" fn returned(which: usize) {
    RETURNED[which].fetch_add(1, Relaxed);
}

struct Dropped;

impl Drop for Dropped {
    fn drop(&mut self) {
        DROPPED.fetch_add(1, Relaxed);
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C-unwind" fn w_rust_panics(x: i64) -> i64 {
    entered(3);
    assert!(black_box(x) % 3 != 0, "three");
    returned(3);
    x
}

/// Between two C++ functions, with something to drop.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C-unwind" fn w_rust_passes(x: i64) -> i64 {
    entered(4);
    let dropped = black_box(Dropped);
    let result = w_cpp_throws(x) + 1;
    drop(dropped);
    returned(4);
    result
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C-unwind" fn w_rust_drops(x: i64) -> i64 {
    entered(7);
    let dropped = black_box(Dropped);
    let result = w_between_rust(x) + 1;
    drop(dropped);
    returned(7);
    result
}

/// Caught inside, above traced functions.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C-unwind" fn w_rust_catches(x: i64) -> i64 {
    entered(5);
    let result = catch_unwind(|| w_rust_drops(x)).unwrap_or(-x);
    returned(5);
    black_box(result)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C-unwind" fn w_rust_resumes(x: i64) -> i64 {
    entered(6);
    match catch_unwind(|| w_rust_drops(x)) {
        Ok(result) => {
            returned(6);
            result
        }
        Err(panic) => resume_unwind(panic),
    }
}

/// A panic ends the thread.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C-unwind" fn w_rust_thread(x: i64) -> i64 {
    entered(8);
    let result = w_rust_resumes(x) + 1;
    returned(8);
    black_box(result)
}

fn panics() {
    let (mut inside, mut above, mut threads) = (0, 0, 0);
    for x in 1..=300 {
        inside += w_rust_catches(x);
        above += match catch_unwind(|| w_rust_resumes(x)) {
            Ok(result) => result,
            Err(panic) => panic.downcast_ref::<&str>().map_or(-1, |text| text.len() as i64),
        };
    }
    for x in 1..=30 {
        let thread = std::thread::spawn(move || w_rust_thread(x));
        threads += thread.join().unwrap_or(1000);
    }
    println!("panics {inside} {above} {threads}");
}

fn foreign() {
    let sum: i64 = (1..=300).map(|x| w_cpp_catches(x)).sum();
    println!("foreign {sum}");
}

/// As in `c/ways.h`.
#[inline(never)]
fn wipe() {
    black_box([0u8; 131_072]);
}

fn wait_line() {
    std::io::stdout().flush().unwrap();
    std::io::stdin().lock().read_line(&mut String::new()).unwrap();
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let waits = args.get(2).is_some_and(|arg| arg == "wait");
    std::panic::set_hook(Box::new(|_| ()));
    if waits {
        println!("ready");
        wait_line();
    }
    match args.get(1).map(String::as_str) {
        Some("panics") => panics(),
        Some("foreign") => foreign(),
        _ => std::process::exit(2),
    }
    println!("{} dropped, {} destroyed", DROPPED.load(Relaxed), n_destroyed());
    wipe();
    if waits {
        println!("done");
        wait_line();
    }
    for (i, name) in NAMES.iter().enumerate() {
        eprintln!("tally {name} {} {}", ENTERED[i].load(Relaxed), RETURNED[i].load(Relaxed));
    }
    std::process::exit(7);
}
