//! What arithmetic does to a [`Range`]: RFC 9669's operations at any width that is a power
//! of two (shift counts are masked).

use super::range::Range;
use super::tnum::{Tnum, low_bits};

impl<const BITS: u32> Range<BITS> {
    pub(crate) fn add(&self, b: &Self) -> Self {
        self.wrapped(
            self.bits.add(b.bits),
            (
                i128::from(self.umin) + i128::from(b.umin),
                i128::from(self.umax) + i128::from(b.umax),
            ),
            (
                i128::from(self.smin) + i128::from(b.smin),
                i128::from(self.smax) + i128::from(b.smax),
            ),
        )
    }

    pub(crate) fn sub(&self, b: &Self) -> Self {
        self.wrapped(
            self.bits.sub(b.bits),
            (
                i128::from(self.umin) - i128::from(b.umax),
                i128::from(self.umax) - i128::from(b.umin),
            ),
            (
                i128::from(self.smin) - i128::from(b.smax),
                i128::from(self.smax) - i128::from(b.smin),
            ),
        )
    }

    pub(crate) fn mul(&self, b: &Self) -> Self {
        let product = |x: u64, y: u64| i128::try_from(u128::from(x) * u128::from(y)).ok();
        let unsigned = match (product(self.umin, b.umin), product(self.umax, b.umax)) {
            (Some(lo), Some(hi)) => (lo, hi),
            _ => (0, i128::MAX),
        };
        let corners = [
            i128::from(self.smin) * i128::from(b.smin),
            i128::from(self.smin) * i128::from(b.smax),
            i128::from(self.smax) * i128::from(b.smin),
            i128::from(self.smax) * i128::from(b.smax),
        ];
        let lo = corners.into_iter().min().unwrap_or(i128::MIN);
        let hi = corners.into_iter().max().unwrap_or(i128::MAX);
        self.wrapped(self.bits.mul(b.bits), unsigned, (lo, hi))
    }

    pub(crate) fn neg(&self) -> Self {
        Self::constant(0).sub(self)
    }

    pub(crate) fn and(&self, b: &Self) -> Self {
        let bits = self.bits.and(b.bits).truncate(BITS);
        let (umax, smax) = (self.umax.min(b.umax), self.smax.max(b.smax));
        Self { bits, umax, smax, ..Self::UNKNOWN }.settled()
    }

    pub(crate) fn or(&self, b: &Self) -> Self {
        let bits = self.bits.or(b.bits).truncate(BITS);
        let (umin, smin) = (self.umin.max(b.umin), self.smin.min(b.smin));
        Self { bits, umin, smin, ..Self::UNKNOWN }.settled()
    }

    pub(crate) fn xor(&self, b: &Self) -> Self {
        Self::from_bits(self.bits.xor(b.bits))
    }

    pub(crate) fn shl(&self, count: &Self) -> Self {
        let count = count.shift_count();
        let Some(k) = count.as_const().map(shift) else {
            let lowest = shift(count.umin);
            let (lo, hi) =
                (u128::from(self.umin) << lowest, u128::from(self.umax) << shift(count.umax));
            let zeros = Tnum::new(0, !low_bits(lowest)).truncate(BITS);
            let mut r = Self { bits: zeros, ..Self::UNKNOWN };
            if let (Ok(lo), Ok(hi)) = (u64::try_from(lo), u64::try_from(hi))
                && hi <= Self::UMAX
            {
                (r.umin, r.umax) = (lo, hi);
            }
            return r.settled();
        };
        let unsigned = (u128::from(self.umin) << k, u128::from(self.umax) << k);
        self.wrapped(
            self.bits.shl(k),
            // At most 2^127: fits.
            (unsigned.0.cast_signed(), unsigned.1.cast_signed()),
            (i128::from(self.smin) << k, i128::from(self.smax) << k),
        )
    }

    pub(crate) fn lshr(&self, count: &Self) -> Self {
        let count = count.shift_count();
        let bits = match count.as_const() {
            Some(k) => self.bits.lshr(shift(k)),
            None => Tnum::UNKNOWN.truncate(BITS),
        };
        let (umin, umax) = (self.umin >> shift(count.umax), self.umax >> shift(count.umin));
        Self { bits, umin, umax, ..Self::UNKNOWN }.settled()
    }

    pub(crate) fn ashr(&self, count: &Self) -> Self {
        let count = count.shift_count();
        let bits = match count.as_const() {
            Some(k) => self.bits.sign_extend(BITS).ashr(shift(k)).truncate(BITS),
            None => Tnum::UNKNOWN.truncate(BITS),
        };
        let (few, many) = (shift(count.umin), shift(count.umax));
        // Negative numbers grow towards -1 with the count, others shrink towards 0.
        let smin = self.smin >> if self.smin < 0 { few } else { many };
        let smax = self.smax >> if self.smax < 0 { many } else { few };
        Self { bits, smin, smax, ..Self::UNKNOWN }.settled()
    }

    /// `x / 0 == 0`.
    pub(crate) fn udiv(&self, b: &Self) -> Self {
        if b.umax == 0 {
            return Self::constant(0);
        }
        let (umin, umax) = match self.umax.checked_div(b.umin) {
            Some(umax) => (self.umin / b.umax, umax),
            None => (0, self.umax),
        };
        Self { umin, umax, ..Self::UNKNOWN }.settled()
    }

    /// `x % 0 == x`.
    pub(crate) fn umod(&self, b: &Self) -> Self {
        if b.umax == 0 || self.umax < b.umin {
            return *self;
        }
        if let (Some(x), Some(y)) = (self.as_const(), b.as_const()) {
            return Self::constant(x % y);
        }
        let umax = if b.umin > 0 { self.umax.min(b.umax - 1) } else { self.umax };
        Self { umax, ..Self::UNKNOWN }.settled()
    }

    /// `x / 0 == 0`, `MIN / -1 == MIN`.
    pub(crate) fn sdiv(&self, b: &Self) -> Self {
        match b.as_const().map(Self::signed) {
            Some(0) => Self::constant(0),
            Some(-1) => self.neg(),
            Some(c) => {
                let (x, y) = (self.smin / c, self.smax / c);
                Self { smin: x.min(y), smax: x.max(y), ..Self::UNKNOWN }.settled()
            }
            // Nothing gets further from 0 by a division; only MIN / -1 does not fit.
            None if self.smin > Self::SMIN => {
                let far = self.smin.abs().max(self.smax.abs());
                let (smin, smax) =
                    if b.smin >= 0 { (self.smin.min(0), self.smax.max(0)) } else { (-far, far) };
                Self { smin, smax, ..Self::UNKNOWN }.settled()
            }
            None => Self::UNKNOWN,
        }
    }

    /// `x % 0 == x`, `MIN % -1 == 0`; the sign is the dividend's.
    pub(crate) fn smod(&self, b: &Self) -> Self {
        let (mut smin, mut smax) = (self.smin.min(0), self.smax.max(0));
        match b.as_const().map(Self::signed) {
            Some(0) => return *self,
            Some(c) if self.smin == self.smax => {
                return Self::constant(self.smin.wrapping_rem(c).cast_unsigned());
            }
            Some(c) => {
                // As i128, for |MIN|.
                let below = i128::from(c).abs() - 1;
                let below = i64::try_from(below).unwrap_or(i64::MAX);
                smin = smin.max(-below);
                smax = smax.min(below);
            }
            None => {}
        }
        Self { smin, smax, ..Self::UNKNOWN }.settled()
    }

    /// The lowest `n` bits, zero-extended; `n <= BITS`.
    pub(crate) fn zero_extend(&self, n: u32) -> Self {
        let bits = self.bits.truncate(n);
        let keep = low_bits(n);
        let same_above = (self.umin & !keep) == (self.umax & !keep);
        let (umin, umax) =
            if same_above { (self.umin & keep, self.umax & keep) } else { (0, keep) };
        Self { bits, umin, umax, ..Self::UNKNOWN }.settled()
    }

    /// The lowest `n` bits, sign-extended; `n <= BITS`.
    pub(crate) fn sign_extend(&self, n: u32) -> Self {
        let far = low_bits(n - 1).cast_signed();
        if self.smin >= -far - 1 && self.smax <= far {
            return *self;
        }
        let bits = self.bits.sign_extend(n).truncate(BITS);
        Self { bits, smin: -far - 1, smax: far, ..Self::UNKNOWN }.settled()
    }

    /// The lowest `bytes` bytes in reverse order, zero-extended.
    pub(crate) fn swap_bytes(&self, bytes: u32) -> Self {
        Self::from_bits(self.bits.swap_bytes(bytes))
    }

    fn shift_count(&self) -> Self {
        self.and(&Self::constant(u64::from(BITS - 1)))
    }

    /// A result whose exact bounds are known before it wraps around.
    fn wrapped(&self, bits: Tnum, unsigned: (i128, i128), signed: (i128, i128)) -> Self {
        let mut r = Self { bits: bits.truncate(BITS), ..Self::UNKNOWN };
        // The members are consecutive on the circle of 2^BITS numbers. They are an interval
        // in an order unless they go all the way round or over that order's break.
        let fits = |(lo, hi): (i128, i128)| hi.wrapping_sub(lo) >= 0 && hi - lo < 1 << BITS;
        if fits(unsigned) {
            let (lo, hi) = (low64(unsigned.0) & Self::UMAX, low64(unsigned.1) & Self::UMAX);
            if lo <= hi {
                (r.umin, r.umax) = (lo, hi);
            }
        }
        if fits(signed) {
            let (lo, hi) = (Self::signed(low64(signed.0)), Self::signed(low64(signed.1)));
            if lo <= hi {
                (r.smin, r.smax) = (lo, hi);
            }
        }
        r.settled()
    }
}

#[allow(clippy::cast_possible_truncation, reason = "the lower half is what is asked for")]
fn low64(x: i128) -> u64 {
    x as u64
}

#[allow(clippy::cast_possible_truncation, reason = "counts are below 64 here")]
fn shift(count: u64) -> u32 {
    count as u32
}
