//! A moment of each fuzzer that plays a hostile target, with fixed seeds.
#![allow(clippy::unwrap_used, reason = "a test")]

use flea_fuzz::campaign::{End, run};
use flea_fuzz::registry::Registry;
use flea_fuzz::shared::Shared;

#[test]
fn scribbled_memory_harms_nobody() {
    let report = run(&mut Shared::new(), 1, End::Inputs(200)).unwrap();
    println!("{}", report.text());
    assert_eq!(report.failures, []);
    assert!(!report.summary.contains(" 0 rings"), "{}", report.summary);
}

#[test]
fn lies_in_the_registry_harm_nobody() {
    let mut registry = match Registry::new() {
        Ok(registry) => registry,
        Err(e) => return println!("skipped: {e}"),
    };
    let report = run(&mut registry, 1, End::Inputs(40)).unwrap();
    println!("{}", report.text());
    assert_eq!(report.failures, []);
}
