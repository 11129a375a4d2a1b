//! The Rust shapes: generics, `&str`, `Option`, `Result`, trait objects, and panics that pass
//! through a frame and are caught. Compiled by rustc directly; usage and output are those of
//! `c/harness.h`.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::{BufRead, Write};
use std::panic::catch_unwind;
use std::sync::Barrier;

#[inline(never)]
fn add(a: i32, b: i32) -> i32 {
    black_box(a).wrapping_add(black_box(b))
}

mod shapes {
    use std::hint::black_box;

    #[inline(never)]
    pub fn area(w: u64, h: u64) -> u64 {
        black_box(w) * black_box(h)
    }

    pub trait Sides {
        fn sides(&self, extra: u64) -> u64;
    }
    pub struct Square;
    pub struct Triangle(pub u64);
    impl Sides for Square {
        #[inline(never)]
        fn sides(&self, extra: u64) -> u64 {
            4 + black_box(extra)
        }
    }
    impl Sides for Triangle {
        #[inline(never)]
        fn sides(&self, extra: u64) -> u64 {
            self.0 + black_box(extra) * 2
        }
    }
}

struct Account {
    total: u64,
}

impl Account {
    #[inline(never)]
    fn deposit(&mut self, amount: u64) -> u64 {
        self.total += black_box(amount);
        self.total
    }
}

#[inline(never)]
fn text_len(s: &str) -> usize {
    black_box(s).len()
}

#[inline(never)]
fn largest<T: Copy + PartialOrd>(items: &[T]) -> T {
    let mut best = items[0];
    for item in black_box(items) {
        if *item > best {
            best = *item;
        }
    }
    best
}

#[inline(never)]
fn maybe(n: u32) -> Option<u32> {
    (black_box(n) % 2 == 0).then_some(n + 1)
}

#[inline(never)]
fn checked(n: u64) -> Result<u64, String> {
    if black_box(n) % 16 == 0 {
        Err(format!("{n}"))
    } else {
        Ok(n * 2)
    }
}

struct Guard<'a>(&'a mut u64);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        *self.0 += 1;
    }
}

#[inline(never)]
fn panics(n: u32) -> u32 {
    assert!(black_box(n) % 8 != 0, "every eighth");
    n * 3
}

#[inline(never)]
fn passes(n: u32, dropped: &mut u64) -> u32 {
    let _guard = Guard(dropped);
    panics(n) + 1
}

#[derive(Default, Clone, Copy)]
struct Tally {
    count: u64,
    arg0_sum: u64,
    retval_sum: u64,
}

#[derive(Default)]
struct Work {
    errors: u64,
    tallies: BTreeMap<&'static str, Tally>,
}

impl Work {
    fn counted(&mut self, name: &'static str, arg0: u64, retval: u64) {
        let tally = self.tallies.entry(name).or_default();
        tally.count += 1;
        tally.arg0_sum = tally.arg0_sum.wrapping_add(arg0);
        tally.retval_sum = tally.retval_sum.wrapping_add(retval);
    }

    fn check(&mut self, holds: bool) {
        self.errors += u64::from(!holds);
    }

    fn merge(&mut self, other: &Work) {
        self.errors += other.errors;
        for (name, from) in &other.tallies {
            let to = self.tallies.entry(name).or_default();
            to.count += from.count;
            to.arg0_sum = to.arg0_sum.wrapping_add(from.arg0_sum);
            to.retval_sum = to.retval_sum.wrapping_add(from.retval_sum);
        }
    }

    fn json(&self, threads: u64, calls: u64) -> String {
        let functions: Vec<String> = self
            .tallies
            .iter()
            .map(|(name, t)| {
                format!(
                    "\"{name}\":{{\"count\":{},\"arg0_sum\":{},\"retval_sum\":{}}}",
                    t.count, t.arg0_sum as i64, t.retval_sum as i64
                )
            })
            .collect();
        format!(
            "{{\"threads\":{threads},\"calls\":{calls},\"errors\":{},\"functions\":{{{}}}}}",
            self.errors,
            functions.join(",")
        )
    }
}

fn run_plain(w: &mut Work, thread: u64, i: u64, account: &mut Account) {
    let (a, t) = (i as i32, thread as i32);
    let sum = add(a, t);
    w.counted("counts::add", i, sum as u64);
    w.check(sum == a + t);

    let area = shapes::area(i, thread + 1);
    w.counted("counts::shapes::area", i, area);
    w.check(area == i * (thread + 1));

    let before = account.total;
    let total = account.deposit(i);
    w.counted("<counts::Account>::deposit", 0, total);
    w.check(total == before + i);

    let words = ["", "a", "four", "ein längerer Text"];
    let word = words[(i & 3) as usize];
    let length = text_len(word);
    w.counted("counts::text_len", word.as_ptr() as u64, length as u64);
    w.check(length == word.len());

    let best = largest::<u64>(&[i, 7, thread]);
    w.counted("counts::largest::<u64>", 0, best);
    w.check(best == i.max(7).max(thread));
    let best = largest::<f64>(&[i as f64, 7.0]);
    w.counted("counts::largest::<f64>", 0, best as u64);
    w.check(best == (i as f64).max(7.0));
}

fn run_enums(w: &mut Work, i: u64) {
    let n = (i & 1023) as u32;
    let some = maybe(n);
    w.counted("counts::maybe", u64::from(n), 0);
    w.check(some == (n % 2 == 0).then_some(n + 1));

    let result = checked(i);
    w.counted("counts::checked", 0, 0);
    w.check(result == if i % 16 == 0 { Err(i.to_string()) } else { Ok(i * 2) });

    let shape: Box<dyn shapes::Sides> =
        if i & 1 == 0 { Box::new(shapes::Square) } else { Box::new(shapes::Triangle(3)) };
    let sides = black_box(shape).sides(i);
    let (name, expected) = if i & 1 == 0 {
        ("<counts::shapes::Square as counts::shapes::Sides>::sides", 4 + i)
    } else {
        ("<counts::shapes::Triangle as counts::shapes::Sides>::sides", 3 + i * 2)
    };
    w.counted(name, 0, sides);
    w.check(sides == expected);
}

/// A function left by a panic is counted, with no return value.
fn run_panics(w: &mut Work, i: u64) {
    let n = (i & 1023) as u32;
    let mut dropped = 0;
    let dropped_ref = std::panic::AssertUnwindSafe(&mut dropped);
    let result = catch_unwind(move || {
        let std::panic::AssertUnwindSafe(dropped) = { dropped_ref };
        passes(n, dropped)
    });
    let fine = n % 8 != 0;
    w.counted("counts::passes", u64::from(n), if fine { u64::from(n) * 3 + 1 } else { 0 });
    w.counted("counts::panics", u64::from(n), if fine { u64::from(n) * 3 } else { 0 });
    w.check(result.ok() == fine.then_some(n * 3 + 1));
    w.check(dropped == 1);
}

fn run(thread: u64, calls: u64) -> Work {
    let mut w = Work::default();
    let mut account = Account { total: 0 };
    for i in 0..calls {
        run_plain(&mut w, thread, i, &mut account);
        run_enums(&mut w, i);
        run_panics(&mut w, i);
    }
    w
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

fn wait_line() {
    let mut line = String::new();
    match std::io::stdin().lock().read_line(&mut line) {
        Ok(n) if n > 0 => {}
        _ => std::process::exit(9),
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let number = |i: usize| args.get(i).and_then(|a| a.parse::<u64>().ok());
    let (Some(threads @ 1..=1024), Some(calls)) = (number(1), number(2)) else {
        eprintln!("usage: {} THREADS CALLS [wait]", args[0]);
        std::process::exit(2);
    };
    let waits = args.get(3).is_some_and(|a| a == "wait");
    // The expected panics are part of the program, not news.
    std::panic::set_hook(Box::new(|_| {}));
    if waits {
        say("ready");
        wait_line();
    }
    let barrier = Barrier::new(threads as usize);
    let mut sum = Work::default();
    std::thread::scope(|scope| {
        let barrier = &barrier;
        let handles: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    barrier.wait();
                    run(thread, calls)
                })
            })
            .collect();
        for handle in handles {
            match handle.join() {
                Ok(work) => sum.merge(&work),
                Err(_) => sum.errors += 1,
            }
        }
    });
    say(&sum.json(threads, calls));
    if waits {
        say("done");
        wait_line();
    }
    std::process::exit(if sum.errors > 0 { 3 } else if waits { 7 } else { 0 });
}
