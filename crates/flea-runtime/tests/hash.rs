//! The hash function spreads what people use as keys.
#![allow(missing_docs, reason = "a test")]

use flea_runtime::hash::key;
use flea_runtime::mem::Bytes;

fn longest_chain(keys: impl Iterator<Item = Vec<u8>>) -> usize {
    let mut buckets = [0; 1024];
    for bytes in keys {
        buckets[key::hash(0x1234_5678_9abc_def0, Bytes::from(&*bytes)) as usize % 1024] += 1;
    }
    buckets.into_iter().max().expect("there are 1024")
}

#[test]
fn chains_are_short_for_numbers_addresses_and_names() {
    let n = 1024u64;
    assert!(longest_chain((0..n).map(|i| i.to_le_bytes().to_vec())) < 9);
    assert!(longest_chain((0..n).map(|i| (i << 32).to_le_bytes().to_vec())) < 9);
    assert!(
        longest_chain((0..n).map(|i| (0x7f00_0000_0000 + i * 4096).to_le_bytes().to_vec())) < 9
    );
    assert!(longest_chain((0..n).map(|i| format!("worker-{i:09}").into_bytes())) < 9);
    assert!(longest_chain((1..=1024).map(|i| vec![0; i])) < 9);
    let pairs = (0..n).map(|i| [(i % 32).to_le_bytes(), (i / 32).to_le_bytes()].concat());
    assert!(longest_chain(pairs) < 9);
}

#[test]
fn the_seed_and_every_byte_count() {
    let one = [1u8; 19];
    let hash = |seed, bytes: &[u8]| key::hash(seed, Bytes::from(bytes));
    assert_ne!(hash(1, &one), hash(2, &one));
    for i in 0..19 {
        let mut other = one;
        other[i] ^= 0x80;
        assert_ne!(hash(1, &one), hash(1, &other));
    }
}
