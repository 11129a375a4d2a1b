//! Panics that pass through functions that may be traced, and are caught: on the main thread,
//! on another, and at the end of one.
//!
//! usage: panics ROUNDS [wait]; as `cpp/throws.cpp`.

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::panic::{catch_unwind, resume_unwind};

#[inline(never)]
fn panics(x: u64) -> u64 {
    assert!(!black_box(x).is_multiple_of(3), "three");
    x
}

/// Has something to drop.
#[inline(never)]
fn middle(x: u64) -> u64 {
    let text = black_box(format!("{x}"));
    panics(x) + text.len() as u64
}

#[inline(never)]
fn again(x: u64) -> u64 {
    match catch_unwind(|| middle(x)) {
        Ok(sum) => sum,
        Err(panic) if x.is_multiple_of(2) => resume_unwind(panic),
        Err(_) => 1000,
    }
}

#[inline(never)]
fn catches(x: u64) -> u64 {
    black_box(catch_unwind(|| again(x)).unwrap_or(x + 100_000))
}

#[inline(never)]
fn start(rounds: u64) -> u64 {
    black_box((1..=rounds).map(catches).sum())
}

/// As in `cpp/throws.cpp`.
#[inline(never)]
fn wipe() {
    black_box([0u8; 65536]);
}

fn wait_line() {
    std::io::stdout().flush().unwrap();
    std::io::stdin().lock().read_line(&mut String::new()).unwrap();
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let rounds: u64 = args[1].parse().unwrap();
    let waits = args.get(2).is_some_and(|arg| arg == "wait");
    std::panic::set_hook(Box::new(|_| ()));
    if waits {
        println!("ready");
        wait_line();
    }
    let other = std::thread::spawn(move || start(rounds));
    let dies = std::thread::spawn(|| middle(3));
    let sums = [start(rounds), other.join().unwrap(), u64::from(dies.join().is_err())];
    println!("{} {} {}", sums[0], sums[1], sums[2]);
    wipe();
    if waits {
        println!("done");
        wait_line();
    }
    std::process::exit(7);
}
