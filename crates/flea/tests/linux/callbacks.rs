//! Programs with callbacks in a process that goes on calling what they are attached to.

use std::ffi::c_int;

use anyhow::Result;

use super::{Bench, words};

/// Where the C file's `state` has what.
#[derive(Debug, PartialEq, Eq)]
struct State {
    rounds: u64,
    sum: u64,
    elements: u64,
    total: u64,
    own_elements: u64,
    own_total: u64,
    at_entry: u64,
    at_return: u64,
}

impl State {
    fn of(words: &[u64]) -> Self {
        let &[rounds, sum, elements, total, own_elements, own_total, at_entry, at_return] = words
        else {
            panic!("eight words expected: {words:?}")
        };
        Self { rounds, sum, elements, total, own_elements, own_total, at_entry, at_return }
    }
}

#[test]
fn loops_and_walks_run_in_the_target() -> Result<()> {
    let Some(bench) = Bench::new()? else { return Ok(()) };
    let object = bench.load("callbacks.bpf.c")?;
    let link = bench.attach_all(&object)?;
    for a in 0..200 {
        assert_eq!(call!(bench.library, two(a, 3): (c_int, u64) -> c_int), a + 3);
    }
    assert_eq!(call!(bench.library, one(1): (c_int) -> c_int), 2);
    assert_eq!(call!(bench.library, three(4, 5, 6): (i8, c_int, u64) -> c_int), 15);
    // The table is empty now.
    assert_eq!(call!(bench.library, one(1): (c_int) -> c_int), 2);
    let below = |n: u64| n * n.saturating_sub(1) / 2;
    let sum = (0..200).map(|a| 3 * below(a)).sum();
    let expected = State {
        rounds: below(200),
        sum,
        elements: 200,
        total: sum,
        own_elements: 8,
        own_total: 200,
        at_entry: 3,
        at_return: 5,
    };
    assert_eq!(State::of(&words(&object)), expected);
    link.detach()?;
    assert_eq!(call!(bench.library, two(5, 3): (c_int, u64) -> c_int), 8);
    assert_eq!(State::of(&words(&object)), expected);
    Ok(())
}
