//! The code that runs inside the target: slow paths, `no_std`, no allocation, no panic.
//!
//! The same files are compiled twice: as this crate, for the controller's side of maps and
//! for tests, and by `build.rs` as the position-independent [`BLOB`] that is placed in the
//! target ([`offset_of`] says where its functions are). Start with `map.rs`; `mem.rs` is
//! what makes the rest safe Rust.
//!
//! **Invariant**: no vector register, no writable static, no relocation: `build.rs` and
//! `tests/blob.rs` hold that. A signal handler may interrupt any instruction here and call
//! any function again: nothing waits for its own thread.
#![no_std]

pub mod errno;
pub mod hash;
pub mod lock;
pub mod map;
pub mod mem;
pub mod printk;
pub mod probe;
pub mod ringbuf;
pub mod spin;
#[path = "x86_64/mod.rs"]
pub mod sys;
pub mod task;
pub mod thread;

use flea_layout::shared;
use flea_layout::shared::RuntimeFn;

/// The machine code for x86-64 Linux targets: copy it anywhere 64-byte aligned, readable and
/// executable.
pub static BLOB: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/blob.bin"));

/// Alignment that [`BLOB`] needs.
pub const BLOB_ALIGN: usize = 64;

include!(concat!(env!("OUT_DIR"), "/blob_offsets.rs"));

/// How much of [`BLOB`] is code; constants follow.
pub const BLOB_CODE_BYTES: usize = CODE_BYTES;

/// Where in [`BLOB`] a function's entry is.
#[must_use]
pub fn offset_of(function: RuntimeFn) -> u32 {
    OFFSETS[function as usize]
}
