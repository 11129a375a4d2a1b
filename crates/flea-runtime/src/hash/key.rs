//! The hash function: eight bytes at a time, mixed by a 64 x 64 -> 128 bit multiplication.

use crate::mem::{Bytes, low_half};

// Odd, with about as many ones as zeros; the fraction bits of sqrt(2), sqrt(3).
const FIRST: u64 = 0x6a09_e667_f3bc_c909;
const EACH: u64 = 0xbb67_ae85_84ca_a73b;

/// `key`'s hash under `seed`, the same on both sides.
#[must_use]
pub fn hash(seed: u64, key: Bytes<'_>) -> u32 {
    let mut state = mix(seed ^ FIRST, key.len() ^ EACH);
    let mut at = 0;
    while at < key.len() {
        state = mix(state ^ key.word(at), EACH).wrapping_add(seed);
        at += 8;
    }
    low_half(mix(state, FIRST) >> 16)
}

fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    #[allow(clippy::cast_possible_truncation, reason = "the low half is wanted")]
    let low = product as u64;
    #[allow(clippy::cast_possible_truncation, reason = "the high half fits")]
    let high = (product >> 64) as u64;
    low ^ high
}
