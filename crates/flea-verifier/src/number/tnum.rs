//! Tristate numbers: for each bit 0, 1 or unknown.
//!
//! The operations are those of "Sound, Precise, and Fast Abstract Interpretation with
//! Tristate Numbers" (CGO 2022). All of them work on 64 bits; narrower users truncate.

/// A set of 64-bit numbers: all that agree with `value` outside `mask`.
///
/// `value & mask == 0` always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tnum {
    /// The known bits.
    pub(crate) value: u64,
    /// Set where a bit is unknown.
    pub(crate) mask: u64,
}

impl Tnum {
    pub(crate) const UNKNOWN: Self = Self { value: 0, mask: u64::MAX };

    pub(crate) const fn constant(value: u64) -> Self {
        Self { value, mask: 0 }
    }

    pub(crate) const fn new(value: u64, mask: u64) -> Self {
        Self { value: value & !mask, mask }
    }

    /// The smallest tristate number that holds `min..=max`.
    pub(crate) const fn range(min: u64, max: u64) -> Self {
        let differing = 64 - (min ^ max).leading_zeros();
        if differing == 64 {
            return Self::UNKNOWN;
        }
        Self::new(min, (1 << differing) - 1)
    }

    pub(crate) const fn is_const(self) -> bool {
        self.mask == 0
    }

    /// The largest member.
    pub(crate) const fn max(self) -> u64 {
        self.value | self.mask
    }

    pub(crate) const fn contains(self, x: u64) -> bool {
        x & !self.mask == self.value
    }

    /// Every member of `other` is a member.
    pub(crate) const fn includes(self, other: Self) -> bool {
        other.mask & !self.mask == 0 && other.value & !self.mask == self.value
    }

    /// Members of both, or `None` where there is none.
    pub(crate) const fn intersect(self, other: Self) -> Option<Self> {
        if (self.value ^ other.value) & !self.mask & !other.mask != 0 {
            return None;
        }
        Some(Self::new(self.value | other.value, self.mask & other.mask))
    }

    /// The smallest tristate number with the members of both.
    pub(crate) const fn union(self, other: Self) -> Self {
        Self::new(self.value, self.mask | other.mask | (self.value ^ other.value))
    }

    /// Keeps the lowest `bits` bits; the others become 0.
    pub(crate) const fn truncate(self, bits: u32) -> Self {
        let keep = low_bits(bits);
        Self { value: self.value & keep, mask: self.mask & keep }
    }

    /// Copies bit `bits - 1` to all bits above it.
    pub(crate) const fn sign_extend(self, bits: u32) -> Self {
        let up = 64 - bits;
        Self {
            value: (((self.value << up) as i64) >> up) as u64,
            mask: (((self.mask << up) as i64) >> up) as u64,
        }
    }

    pub(crate) const fn add(self, other: Self) -> Self {
        let low = self.value.wrapping_add(other.value);
        let high = low.wrapping_add(self.mask.wrapping_add(other.mask));
        // Carries out of unknown bits are where the smallest and the largest sum differ.
        Self::new(low, (low ^ high) | self.mask | other.mask)
    }

    pub(crate) const fn sub(self, other: Self) -> Self {
        let difference = self.value.wrapping_sub(other.value);
        let high = difference.wrapping_add(self.mask);
        let low = difference.wrapping_sub(other.mask);
        Self::new(difference, (low ^ high) | self.mask | other.mask)
    }

    pub(crate) const fn mul(self, other: Self) -> Self {
        // Certain bits are multiplied as numbers; what uncertain bits may add is summed up
        // apart, bit by bit of `self`.
        let certain = Self::constant(self.value.wrapping_mul(other.value));
        let mut uncertain = Self::constant(0);
        let (mut a, mut b) = (self, other);
        while a.value != 0 || a.mask != 0 {
            if a.value & 1 != 0 {
                uncertain = uncertain.add(Self { value: 0, mask: b.mask });
            } else if a.mask & 1 != 0 {
                uncertain = uncertain.add(Self { value: 0, mask: b.value | b.mask });
            }
            a = a.lshr(1);
            b = b.shl(1);
        }
        certain.add(uncertain)
    }

    pub(crate) const fn and(self, other: Self) -> Self {
        let value = self.value & other.value;
        Self::new(value, self.max() & other.max() & !value)
    }

    pub(crate) const fn or(self, other: Self) -> Self {
        let value = self.value | other.value;
        Self { value, mask: (self.mask | other.mask) & !value }
    }

    pub(crate) const fn xor(self, other: Self) -> Self {
        Self::new(self.value ^ other.value, self.mask | other.mask)
    }

    /// `bits` must be below 64.
    pub(crate) const fn shl(self, bits: u32) -> Self {
        Self { value: self.value << bits, mask: self.mask << bits }
    }

    /// `bits` must be below 64.
    pub(crate) const fn lshr(self, bits: u32) -> Self {
        Self { value: self.value >> bits, mask: self.mask >> bits }
    }

    /// `bits` must be below 64.
    pub(crate) const fn ashr(self, bits: u32) -> Self {
        Self {
            value: ((self.value as i64) >> bits) as u64,
            mask: ((self.mask as i64) >> bits) as u64,
        }
    }

    /// Reverses the order of the lowest `bytes` bytes; those above become 0.
    pub(crate) const fn swap_bytes(self, bytes: u32) -> Self {
        let down = 64 - 8 * bytes;
        Self { value: self.value.swap_bytes() >> down, mask: self.mask.swap_bytes() >> down }
    }
}

/// A number with the lowest `bits` bits set; `bits` is at most 64.
pub(crate) const fn low_bits(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}
