//! Targets that are restricted, strange or hostile: Flea works there, or refuses before anything
//! is changed and says what to do. `docs/HAZARDS.md` names the test of each hazard.
#![allow(clippy::unwrap_used, reason = "a test")]

mod confined;
mod engines;
mod limits;
mod permission;
mod places;
#[path = "../real/scratch.rs"]
mod scratch;
mod seccomp;
mod states;
#[path = "../support/mod.rs"]
mod support;
