//! Every signature: functions with random parameter lists and results over everything that C
//! and C++ pass by value, from gcc and clang at every optimisation level, with and without AVX,
//! each traced with every kind of program at once. What programs saw is what the function
//! received and returned, by its own account, and after a call no register differs from what it
//! is after the same call untraced.
//!
//! `FLEA_MATRIX_SEED` (a number) makes other signatures, `FLEA_MATRIX_COUNT` more functions per
//! build. What a failure prints is enough to have it again; the sources and programs stay in
//! `target/tmp/matrix`.
#![allow(clippy::unwrap_used, reason = "a test")]
#![cfg(target_arch = "x86_64")]

mod builds;
mod emit;
mod generate;
mod kept;
mod programs;
mod rng;
mod seen;
mod target;
mod trace;
mod types;

use std::collections::HashSet;

use builds::{Build, Compiler, builds};
use generate::{Language, Source};
use rng::Rng;
use trace::{Outcome, trace};

/// What `FLEA_MATRIX_SEED` changes.
const SEED: u64 = 0x1f1e_a001;
/// Functions in each of the 32 builds.
const FUNCTIONS_PER_BUILD: usize = 16;
/// Distinct signatures at least.
const MIN_SIGNATURES: usize = 500;
/// Failures that are printed in full.
const MAX_SHOWN: usize = 30;

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let digits = text.strip_prefix("0x");
    let number = digits.map_or_else(|| text.parse(), |digits| u64::from_str_radix(digits, 16));
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

fn seed() -> u64 {
    setting("FLEA_MATRIX_SEED").unwrap_or(SEED)
}

/// All of the matrix: the same in every test of a run. No signature comes twice.
fn matrix() -> Vec<(Build, Source)> {
    let per_build =
        setting("FLEA_MATRIX_COUNT").map_or(FUNCTIONS_PER_BUILD, |n| usize::try_from(n).unwrap());
    let mut seen = HashSet::new();
    let mut matrix = Vec::new();
    for compiler in [Compiler::Gcc, Compiler::Clang] {
        for language in [Language::C, Language::Cpp] {
            for build in builds(compiler, language) {
                let mut rng = Rng::new(seed(), matrix.len() as u64);
                let source = generate::source(&mut rng, build.dialect(), per_build, &mut seen);
                matrix.push((build, source));
            }
        }
    }
    matrix
}

#[test]
fn signatures_are_many_and_distinct() {
    let matrix = matrix();
    let functions: Vec<String> = matrix
        .iter()
        .flat_map(|(_, source)| &source.functions)
        .map(generate::Function::identity)
        .collect();
    let distinct: HashSet<&String> = functions.iter().collect();
    assert_eq!(distinct.len(), functions.len());
    assert!(distinct.len() >= MIN_SIGNATURES, "{}", distinct.len());
}

/// Traces every build of one compiler and language.
fn check(compiler: Compiler, language: Language) {
    let mut total = Outcome::default();
    let matrix = matrix();
    for (number, (build, source)) in matrix.iter().enumerate() {
        if build.compiler != compiler || build.language != language {
            continue;
        }
        if !build.isa.is_here() {
            eprintln!("skipped: {} needs {:?}", build.slug(), build.isa);
            continue;
        }
        match trace(*build, source, seed(), number as u64) {
            Ok(Some(outcome)) => total.add(outcome),
            Ok(None) => return,
            Err(error) => panic!("seed {:#x}, {}: {error:#}", seed(), build.slug()),
        }
    }
    println!(
        "{compiler:?} {language:?}: {} programs on {} functions, {} not known in full",
        total.n_programs, total.n_functions, total.n_unknown
    );
    for (reason, n) in &total.refused {
        println!("  {n} times: {reason}");
    }
    let failures = &total.failures;
    let first = failures.iter().take(MAX_SHOWN).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} failures, of which these:\n{first}", failures.len());
    assert!(total.n_unknown * 20 <= total.n_functions, "too little is known of the signatures");
}

#[test]
fn gcc_c() {
    check(Compiler::Gcc, Language::C);
}

#[test]
fn gcc_cpp() {
    check(Compiler::Gcc, Language::Cpp);
}

#[test]
fn clang_c() {
    check(Compiler::Clang, Language::C);
}

#[test]
fn clang_cpp() {
    check(Compiler::Clang, Language::Cpp);
}
