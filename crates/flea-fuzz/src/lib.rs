//! Fuzzers of the verifier, the compiler and the object reader. In development only; `cargo xtask
//! fuzz` is their command, and the tests of this crate run a moment of each.
//!
//! A [`campaign::Fuzzer`] makes one input per seed and judges what came of it; [`campaign::run`]
//! gives it seeds for some time and adds up. A failure is made smaller ([`minimise`]) and printed
//! as text that the verifier's case files understand ([`text`]): the corpus of what was found is
//! `crates/flea-verifier/tests/cases/found.txt` and this crate's tests.
//!
//! | fuzzer | module | is wrong |
//! |---|---|---|
//! | `kernel` | [`against_kernel`] | accepted and Linux refuses it as unsafe; another r0 than Linux's |
//! | `interpreter` | [`against_interpreter`] | a running program does what was excluded; another r0 |
//! | `prevail` | [`against_prevail`] | nothing by itself: differences are counted |
//! | `bytes` | [`any_bytes`] | a panic, no end |
//! | `elf` | [`objects`] | a panic, no end, memory out of proportion |
//! | `shared` | [`shared`] | a panic, no end, more elements than a map has |
//! | `registry` | [`registry`] | a panic, no end |

pub mod against_interpreter;
pub mod against_kernel;
pub mod against_prevail;
pub mod allocated;
pub mod any_bytes;
pub mod campaign;
pub mod compiled;
pub mod cpu;
pub mod differences;
pub mod kernel;
pub mod machines;
pub mod minimise;
pub mod objects;
pub mod registry;
pub mod shared;
pub mod tally;
pub mod text;
pub mod watchdog;
