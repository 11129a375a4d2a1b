//! A set of `BITS`-wide numbers: known bits, an unsigned interval and a signed one.
//!
//! One implementation serves 64 bits, 32 bits and, in tests, 4 bits, where every set can be
//! tried with every other. Unsigned members are zero-extended in `u64`, signed ones
//! sign-extended in `i64`.

use super::tnum::{Tnum, low_bits};

/// The set of numbers that satisfy all three descriptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range<const BITS: u32> {
    pub(crate) bits: Tnum,
    pub(crate) umin: u64,
    pub(crate) umax: u64,
    pub(crate) smin: i64,
    pub(crate) smax: i64,
}

impl<const BITS: u32> Range<BITS> {
    /// The largest unsigned number.
    pub(crate) const UMAX: u64 = low_bits(BITS);
    /// The largest signed number.
    pub(crate) const SMAX: i64 = low_bits(BITS - 1) as i64;
    /// The smallest signed number.
    pub(crate) const SMIN: i64 = -Self::SMAX - 1;

    /// All numbers.
    pub(crate) const UNKNOWN: Self = Self {
        bits: Tnum { value: 0, mask: Self::UMAX },
        umin: 0,
        umax: Self::UMAX,
        smin: Self::SMIN,
        smax: Self::SMAX,
    };

    /// Just `x`, of which the lowest `BITS` bits count.
    pub(crate) const fn constant(x: u64) -> Self {
        let u = x & Self::UMAX;
        let s = Self::signed(x);
        Self { bits: Tnum::constant(u), umin: u, umax: u, smin: s, smax: s }
    }

    /// `min..=max`, unsigned. Unknown where that is no interval.
    #[cfg(test)]
    pub(crate) fn unsigned(min: u64, max: u64) -> Self {
        Self { umin: min, umax: max.min(Self::UMAX), ..Self::UNKNOWN }.settled()
    }

    /// The known bits alone.
    pub(crate) fn from_bits(bits: Tnum) -> Self {
        Self { bits: bits.truncate(BITS), ..Self::UNKNOWN }.settled()
    }

    /// The lowest `BITS` bits as a signed number.
    pub(crate) const fn signed(x: u64) -> i64 {
        ((x << (64 - BITS)) as i64) >> (64 - BITS)
    }

    /// The only member, if there is only one.
    pub(crate) const fn as_const(&self) -> Option<u64> {
        if self.bits.is_const() { Some(self.bits.value) } else { None }
    }

    /// `x`, zero-extended, is a member.
    pub(crate) const fn contains(&self, x: u64) -> bool {
        let s = Self::signed(x);
        self.bits.contains(x)
            && self.umin <= x
            && x <= self.umax
            && self.smin <= s
            && s <= self.smax
    }

    /// Every member of `other` is a member (may say no where it is so).
    pub(crate) const fn includes(&self, other: &Self) -> bool {
        self.bits.includes(other.bits)
            && self.umin <= other.umin
            && self.umax >= other.umax
            && self.smin <= other.smin
            && self.smax >= other.smax
    }

    /// A set with every member of `self` and `other`: bounds that `other` moves are given up, and
    /// so is every bit that it changes.
    pub(crate) fn widened(&self, other: &Self) -> Self {
        Self {
            bits: self.bits.union(other.bits),
            umin: if other.umin < self.umin { 0 } else { self.umin },
            umax: if other.umax > self.umax { Self::UMAX } else { self.umax },
            smin: if other.smin < self.smin { Self::SMIN } else { self.smin },
            smax: if other.smax > self.smax { Self::SMAX } else { self.smax },
        }
    }

    /// At least the members of both; `None` where there certainly is none.
    pub(crate) fn intersect(&self, other: &Self) -> Option<Self> {
        Self {
            bits: self.bits.intersect(other.bits)?,
            umin: self.umin.max(other.umin),
            umax: self.umax.min(other.umax),
            smin: self.smin.max(other.smin),
            smax: self.smax.min(other.smax),
        }
        .settle()
    }

    /// Lets each of the three descriptions narrow the others. `None` where they contradict
    /// each other, that is where the set is empty.
    pub(crate) fn settle(mut self) -> Option<Self> {
        if self.umin == self.umax && self.bits.is_const() && self.umin == self.bits.value {
            // The commonest case: one number, if the signed bounds agree.
            let s = Self::signed(self.umin);
            let agrees = self.smin <= s && s <= self.smax;
            return agrees.then(|| Self::constant(self.umin));
        }
        // Twice: what the intervals teach the bits may teach the other interval again.
        for _ in 0..2 {
            self.umin = self.umin.max(self.bits.value);
            self.umax = self.umax.min(self.bits.max());
            let sign = 1 << (BITS - 1);
            self.smin = self.smin.max(Self::signed(self.bits.value | (self.bits.mask & sign)));
            self.smax = self.smax.min(Self::signed(self.bits.value | (self.bits.mask & !sign)));
            // An interval that does not cross the point where the other order breaks is an
            // interval there too.
            if self.smin >= 0 || self.smax < 0 {
                self.umin = self.umin.max(self.smin as u64 & Self::UMAX);
                self.umax = self.umax.min(self.smax as u64 & Self::UMAX);
            }
            if (self.umin ^ self.umax) & sign == 0 {
                self.smin = self.smin.max(Self::signed(self.umin));
                self.smax = self.smax.min(Self::signed(self.umax));
            }
            if self.umin > self.umax || self.smin > self.smax {
                return None;
            }
            self.bits = self.bits.intersect(Tnum::range(self.umin, self.umax))?;
        }
        Some(self)
    }

    /// [`Self::settle`] where the set is known not to be empty: results of operations.
    /// Should it look empty all the same, nothing is claimed of it.
    pub(crate) fn settled(self) -> Self {
        self.settle().unwrap_or(Self::UNKNOWN)
    }
}
