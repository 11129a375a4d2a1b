//! A moment of each fuzzer that looks at programs, with fixed seeds.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::Command;

use anyhow::Result;
use flea_fuzz::against_interpreter::AgainstInterpreter;
use flea_fuzz::against_kernel::AgainstKernel;
use flea_fuzz::against_prevail::AgainstPrevail;
use flea_fuzz::any_bytes::AnyBytes;
use flea_fuzz::campaign::{End, Fuzzer, Report, run};
use flea_fuzz::kernel::Kernel;

/// Below this the generator is too dull.
const MIN_ACCEPTED_PERCENT: f64 = 20.0;

fn worker() -> Result<Command> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flea-fuzz"));
    command.arg("--worker");
    Ok(command)
}

fn prevail_worker() -> Result<Command> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flea-fuzz"));
    command.arg("--prevail-worker");
    Ok(command)
}

fn moment(fuzzer: &mut dyn Fuzzer, inputs: u64) -> Report {
    let report = run(fuzzer, 1, End::Inputs(inputs)).unwrap();
    println!("{}", report.text());
    assert_eq!(report.failures, []);
    assert_eq!(report.tried, inputs);
    report
}

#[test]
fn the_kernel_agrees() {
    if let Err(e) = Kernel::open() {
        println!("skipped: {e}");
        return;
    }
    let report = moment(&mut AgainstKernel::new(worker).unwrap(), 400);
    assert!(report.accepted_percent() > MIN_ACCEPTED_PERCENT);
}

#[test]
fn the_interpreter_agrees() {
    let report = moment(&mut AgainstInterpreter::new(worker), 400);
    assert!(report.accepted_percent() > MIN_ACCEPTED_PERCENT);
}

#[test]
fn prevail_is_asked() {
    let report = moment(&mut AgainstPrevail::new(prevail_worker), 12);
    assert!(report.accepted_percent() > MIN_ACCEPTED_PERCENT);
    assert!(report.summary.contains("both accept"), "{}", report.summary);
}

#[test]
fn any_bytes_get_a_verdict() {
    let report = moment(&mut AnyBytes::new(), 2000);
    assert!(report.accepted > 20, "nothing gets past the first checks");
}
