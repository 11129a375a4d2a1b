//! What Flea cannot do it says in words, with exit code 1 (or 2 for what was typed wrongly),
//! and the target is as it was.
#![allow(clippy::unwrap_used, reason = "a test")]

mod commands;
mod objects;
mod processes;
mod refusal;
#[path = "../real/scratch.rs"]
mod scratch;
#[path = "../real/text.rs"]
mod text;
