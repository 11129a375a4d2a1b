//! Real programs under Flea: each does what it does without, and its text is as it was.
#![allow(clippy::unwrap_used, reason = "a test")]

mod flea;
mod redis;
mod scratch;
mod server;
mod text;
mod whole_programs;
