//! Power-of-two histograms: how a program keeps one in a map value, and how it is read back.
//!
//! ```text
//!   word 0        count
//!        1        sum, wrapping
//!        2        largest value, in an order that makes zero the least (see `ordered`)
//!        3        smallest value, the same, complemented: so a zeroed value is an empty one
//!        4        the newest value's bucket, from 1: it is not counted there yet; 0: none
//!        5        values that are 0
//!        6 + k    values in  2^k ..= 2^(k+1)-1,  k = 0..64
//!       70 + k    values in  -(2^(k+1)-1) ..= -2^k,  k = 0..64
//! ```
//! The newest value waits because its bucket's address would depend on it: in `flea latency`
//! that is a chain of some 8 cycles, which the next reading of the clock waits for.
//!
//! A value is per thread; the reader adds them up. The program's half is in `programs`.

/// Words of one histogram.
pub(crate) const WORDS: usize = FIRST_BUCKET + N_BUCKETS;
/// The word of the value that waits.
pub(crate) const WAITING: usize = 4;
pub(crate) const FIRST_BUCKET: usize = 5;
/// Zero, 64 positive, 64 negative.
pub(crate) const N_BUCKETS: usize = 129;
/// Bucket of the values -1.
pub(crate) const FIRST_NEGATIVE: usize = 65;

/// How a value's 64 bits are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signedness {
    /// Two's complement.
    Signed,
    /// Plain.
    Unsigned,
}

/// A histogram, read back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// How many values.
    pub count: u64,
    /// Their sum. Each thread's is kept in 64 bits and wraps.
    pub sum: i128,
    /// The smallest, if there is any.
    pub min: Option<i128>,
    /// The largest.
    pub max: Option<i128>,
    /// Non-empty ones, lowest first.
    pub buckets: Vec<Bucket>,
}

/// Values between two bounds, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Smallest value that belongs here.
    pub min: i128,
    /// Largest.
    pub max: i128,
    /// How many there were.
    pub count: u64,
}

impl Histogram {
    /// Adds another one's values.
    pub fn merge(&mut self, other: &Self) {
        self.count = self.count.wrapping_add(other.count);
        self.sum += other.sum;
        self.min = self.min.into_iter().chain(other.min).min();
        self.max = self.max.into_iter().chain(other.max).max();
        for theirs in &other.buckets {
            match self.buckets.binary_search_by_key(&theirs.min, |bucket| bucket.min) {
                Ok(at) => {
                    self.buckets[at].count = self.buckets[at].count.wrapping_add(theirs.count)
                }
                Err(at) => self.buckets.insert(at, *theirs),
            }
        }
    }

    /// Adds up the per-thread values of one map element. Bytes that are no whole histogram
    /// are passed over: they come from the target's memory.
    pub(crate) fn read(per_thread: &[Vec<u8>], sign: Signedness) -> Self {
        let mut total = Self::default();
        let mut buckets = [0u64; N_BUCKETS];
        for value in per_thread.iter().filter(|v| v.len() == WORDS * 8) {
            let word =
                |i: usize| u64::from_le_bytes(value[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
            if word(0) == 0 {
                continue;
            }
            total.count = total.count.wrapping_add(word(0));
            total.sum += widen(word(1), sign);
            let max = widen(unordered(word(2), sign), sign);
            let min = widen(unordered(!word(3), sign), sign);
            total.max = Some(total.max.map_or(max, |m| m.max(max)));
            total.min = Some(total.min.map_or(min, |m| m.min(min)));
            for (i, n) in buckets.iter_mut().enumerate() {
                let waits = u64::from(word(WAITING) == i as u64 + 1);
                *n = n.wrapping_add(word(FIRST_BUCKET + i)).wrapping_add(waits);
            }
        }
        let negative = (FIRST_NEGATIVE..N_BUCKETS).rev();
        total.buckets = negative
            .chain(0..FIRST_NEGATIVE)
            .filter(|&i| buckets[i] > 0)
            .map(|i| {
                let (min, max) = bounds(i);
                Bucket { min, max, count: buckets[i] }
            })
            .collect();
        total
    }
}

fn bounds(bucket: usize) -> (i128, i128) {
    match bucket {
        0 => (0, 0),
        1..FIRST_NEGATIVE => (1 << (bucket - 1), (1 << bucket) - 1),
        _ => {
            let k = bucket - FIRST_NEGATIVE;
            (-((1 << (k + 1)) - 1), -(1 << k))
        }
    }
}

fn widen(bits: u64, sign: Signedness) -> i128 {
    match sign {
        Signedness::Signed => i128::from(bits.cast_signed()),
        Signedness::Unsigned => i128::from(bits),
    }
}

/// Undoes the program's mapping onto an unsigned order: signed values have their top bit
/// flipped.
fn unordered(bits: u64, sign: Signedness) -> u64 {
    match sign {
        Signedness::Signed => bits ^ (1 << 63),
        Signedness::Unsigned => bits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_meet_without_gap_or_overlap() {
        let order: Vec<_> =
            (FIRST_NEGATIVE..N_BUCKETS).rev().chain(0..FIRST_NEGATIVE).map(bounds).collect();
        for pair in order.windows(2) {
            assert_eq!(pair[0].1 + 1, pair[1].0, "{pair:?}");
        }
        assert_eq!(order.last().unwrap().1, i128::from(u64::MAX));
        assert!(order[0].0 <= i128::from(i64::MIN));
    }

    #[test]
    fn values_of_threads_add_up_and_rubbish_is_passed_over() {
        let mut a = vec![0u64; WORDS];
        a[..2].copy_from_slice(&[2, (-3i64).cast_unsigned()]);
        a[2] = (-1i64).cast_unsigned() ^ (1 << 63);
        a[3] = !((-2i64).cast_unsigned() ^ (1 << 63));
        a[FIRST_BUCKET + FIRST_NEGATIVE] = 1;
        // The other waits.
        a[WAITING] = FIRST_NEGATIVE as u64 + 2;
        let bytes = |w: &[u64]| w.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let h =
            Histogram::read(&[bytes(&a), vec![0; WORDS * 8], vec![1, 2, 3]], Signedness::Signed);
        assert_eq!((h.count, h.sum, h.min, h.max), (2, -3, Some(-2), Some(-1)));
        assert_eq!(
            h.buckets,
            [Bucket { min: -3, max: -2, count: 1 }, Bucket { min: -1, max: -1, count: 1 }]
        );
    }
}
