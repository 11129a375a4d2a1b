//! Random choices that a seed repeats (SplitMix64, by Sebastiano Vigna, public domain).

use std::time::Duration;

/// A stream of choices.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of `seed`; `part` gives another one for each part of a bout.
    pub fn new(seed: u64, part: u64) -> Self {
        let mut random = Self(seed ^ part.wrapping_mul(0xd6e8_feb8_6659_fd93));
        random.next();
        random
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        assert!(bound > 0, "there is no number below 0");
        let bound = bound as u64;
        usize::try_from(self.next() % bound).expect("less than a usize")
    }

    /// Whether something of this probability happens.
    pub fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    /// One of `all`, which is not empty.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// A time below `bound`.
    pub fn time(&mut self, bound: Duration) -> Duration {
        bound.mul_f64((self.next() >> 40) as f64 / (1u64 << 24) as f64)
    }

    /// Brings `n` random elements to the front.
    pub fn shuffle_front<T>(&mut self, all: &mut [T], n: usize) {
        for i in 0..n.min(all.len()) {
            let other = i + self.below(all.len() - i);
            all.swap(i, other);
        }
    }
}
