//! The engine as it is lives through its seeds, and each planted fault is found: the silence of
//! the first test means something because of the second. A failing seed is printed; the command
//! (`cargo xtask simulate --seed S`) shows its life.

use flea_simulate::campaign::{self, Campaign};
use flea_simulate::fault::FAULTS;

/// By the command, a million.
const N_SEEDS: u64 = 1500;
/// Within which a fault has to be found. Most are within a hundred.
const SEEDS_PER_FAULT: u64 = 10_000;

fn campaign() -> Campaign {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    Campaign { from: 1, seeds: N_SEEDS, fault: None, jobs }
}

#[test]
fn nothing_goes_wrong() {
    let done = campaign::run(&campaign());
    if let Some(failed) = done.failed {
        panic!("seed {}: {}", failed.seed, failed.violation);
    }
    assert_eq!(done.n_seeds, N_SEEDS);
    assert!(done.n_sessions > 3 * N_SEEDS && done.n_steps > 500 * N_SEEDS, "{done:?}");
}

#[test]
fn each_fault_is_found() {
    let mut missed = Vec::new();
    for (name, fault) in FAULTS {
        let searched = Campaign { fault: Some(fault), seeds: SEEDS_PER_FAULT, ..campaign() };
        match campaign::run(&searched).failed {
            Some(failed) => println!("{name}: seed {}: {}", failed.seed, failed.violation),
            None => missed.push(name),
        }
    }
    assert!(missed.is_empty(), "not found within {SEEDS_PER_FAULT} seeds: {missed:?}");
}
