//! What a register that holds a number may hold: a [`Range`] of its 64 bits and one of its
//! lower 32, each narrowing the other.

use super::compare::Cond;
use super::range::Range;
use super::tnum::Tnum;

/// A set of 64-bit numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scalar {
    /// All 64 bits.
    pub(crate) wide: Range<64>,
    /// The lower 32.
    pub(crate) low: Range<32>,
}

/// How many bits an operation works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    W32,
    W64,
}

/// A two-operand operation; `Mov` is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AluOp {
    Add,
    Sub,
    Mul,
    Div,
    Sdiv,
    Mod,
    Smod,
    Or,
    And,
    Xor,
    Lsh,
    Rsh,
    Arsh,
}

const UPPER: u64 = !0xffff_ffff;

impl Scalar {
    /// Any number.
    pub(crate) const UNKNOWN: Self = Self { wide: Range::UNKNOWN, low: Range::UNKNOWN };

    pub(crate) const fn constant(x: u64) -> Self {
        Self { wide: Range::constant(x), low: Range::constant(x) }
    }

    /// An immediate, sign-extended.
    pub(crate) const fn imm(x: i32) -> Self {
        Self::constant((x as i64).cast_unsigned())
    }

    /// `min..=max`, signed.
    pub(crate) fn signed(smin: i64, smax: i64) -> Self {
        let wide = Range { smin, smax, ..Range::UNKNOWN }.settled();
        Self { wide, low: Range::UNKNOWN }.settled()
    }

    pub(crate) const fn as_const(&self) -> Option<u64> {
        self.wide.as_const()
    }

    /// Every member is in `min..=max`, signed.
    pub(crate) const fn is_within(&self, min: i64, max: i64) -> bool {
        min <= self.wide.smin && self.wide.smax <= max
    }

    /// All numbers with the lower half of a member.
    pub(crate) fn lower_half(&self) -> Self {
        Self { wide: Range::UNKNOWN, low: self.low }.settled()
    }

    /// `x` is a member.
    #[cfg(any(test, feature = "beliefs"))]
    pub(crate) const fn contains(&self, x: u64) -> bool {
        self.wide.contains(x) && self.low.contains(x & !UPPER)
    }

    /// Every member of `other` is a member (may say no where it is so).
    pub(crate) const fn includes(&self, other: &Self) -> bool {
        self.wide.includes(&other.wide) && self.low.includes(&other.low)
    }

    /// A set with every member of `self` and `other`, such that a chain of them, each widened by
    /// the next, ends soon: a bound that `other` moves is given up.
    pub(crate) fn widened(&self, other: &Self) -> Self {
        let (wide, low) = (self.wide.widened(&other.wide), self.low.widened(&other.low));
        Self { wide, low }
    }

    /// At least the members of both; `None` where there certainly is none.
    pub(crate) fn intersect(&self, other: &Self) -> Option<Self> {
        let (wide, low) = (self.wide.intersect(&other.wide)?, self.low.intersect(&other.low)?);
        Self { wide, low }.settle()
    }

    /// `self op b`, in `width` bits; a 32-bit result is zero-extended.
    pub(crate) fn alu(op: AluOp, width: Width, a: &Self, b: &Self) -> Self {
        if width == Width::W32 {
            return Self::from_low(apply(op, &a.low, &b.low));
        }
        let wide = match op {
            AluOp::Lsh => a.shl(b),
            _ => apply(op, &a.wide, &b.wide),
        };
        // The lower half of these depends on the lower halves alone.
        let low = match op {
            AluOp::Add | AluOp::Sub | AluOp::Mul | AluOp::Or | AluOp::And | AluOp::Xor => {
                apply(op, &a.low, &b.low)
            }
            _ => Range::UNKNOWN,
        };
        Self { wide, low }.settled()
    }

    /// A 64-bit shift. By 32 or more, nothing is left of the upper half, so that it is as if the
    /// lower had been extended either way: `r <<= 32; r s>>= 32` is how an `int` is made wide.
    fn shl(&self, count: &Self) -> Range<64> {
        let plain = self.wide.shl(&count.wide);
        if count.as_const().is_none_or(|k| k & 63 < 32) {
            return plain;
        }
        let extended = [self.sign_extend(32, Width::W64), self.zero_extend(32)];
        extended.iter().fold(plain, |known, s| {
            let more = s.wide.shl(&count.wide);
            known.intersect(&more).unwrap_or(more)
        })
    }

    pub(crate) fn neg(&self, width: Width) -> Self {
        match width {
            Width::W32 => Self::from_low(self.low.neg()),
            Width::W64 => Self { wide: self.wide.neg(), low: self.low.neg() }.settled(),
        }
    }

    /// The lowest `bits` bits (8, 16, 32 or 64), zero-extended.
    pub(crate) fn zero_extend(&self, bits: u32) -> Self {
        match bits {
            64.. => *self,
            32 => Self::from_low(self.low),
            _ => Self::from_low(self.low.zero_extend(bits)),
        }
    }

    /// The lowest `from` bits (8, 16 or 32), sign-extended to `width`, then zero-extended.
    pub(crate) fn sign_extend(&self, from: u32, width: Width) -> Self {
        let low = if from < 32 { self.low.sign_extend(from) } else { self.low };
        if width == Width::W32 {
            return Self::from_low(low);
        }
        // A number of 32 bits, sign-extended: its signed interval is the 64-bit one.
        let bits = low.bits.sign_extend(32);
        let wide = Range { bits, smin: low.smin, smax: low.smax, ..Range::UNKNOWN };
        Self { wide: wide.settled(), low }.settled()
    }

    /// The lowest `bits` bits (16, 32 or 64), bytes in reverse order, zero-extended.
    pub(crate) fn swap_bytes(&self, bits: u32) -> Self {
        let wide = self.wide.swap_bytes(bits / 8);
        Self { wide, low: Range::UNKNOWN }.settled()
    }

    /// Narrows `a` and `b` by `a cond b`, compared in `width` bits; `None` where that cannot
    /// be, so that the branch is dead.
    pub(crate) fn refine(cond: Cond, width: Width, a: &Self, b: &Self) -> Option<(Self, Self)> {
        match width {
            Width::W64 => {
                let (x, y) = Range::refine(cond, &a.wide, &b.wide)?;
                Some((Self { wide: x, ..*a }.settle()?, Self { wide: y, ..*b }.settle()?))
            }
            Width::W32 => {
                let (x, y) = Range::refine(cond, &a.low, &b.low)?;
                Some((Self { low: x, ..*a }.settle()?, Self { low: y, ..*b }.settle()?))
            }
        }
    }

    /// A 32-bit result: the upper half is 0.
    fn from_low(low: Range<32>) -> Self {
        let wide = Range { bits: low.bits, umin: low.umin, umax: low.umax, ..Range::UNKNOWN };
        Self { wide: wide.settled(), low }
    }

    /// Lets each half narrow the other. `None` where the set is empty.
    fn settle(mut self) -> Option<Self> {
        if let (Some(x), true) = (self.wide.as_const(), self.wide.umin == self.wide.umax) {
            // The commonest case: one number, if the lower half agrees.
            return self.low.contains(x & !UPPER).then(|| Self::constant(x));
        }
        // Twice, as in `Range::settle`.
        for _ in 0..2 {
            self.low = self.low.intersect(&lower_half(&self.wide))?;
            self.wide = with_lower_half(&self.wide, &self.low)?;
        }
        Some(self)
    }

    fn settled(self) -> Self {
        self.settle().unwrap_or(Self::UNKNOWN)
    }
}

fn apply<const BITS: u32>(op: AluOp, a: &Range<BITS>, b: &Range<BITS>) -> Range<BITS> {
    match op {
        AluOp::Add => a.add(b),
        AluOp::Sub => a.sub(b),
        AluOp::Mul => a.mul(b),
        AluOp::Div => a.udiv(b),
        AluOp::Sdiv => a.sdiv(b),
        AluOp::Mod => a.umod(b),
        AluOp::Smod => a.smod(b),
        AluOp::Or => a.or(b),
        AluOp::And => a.and(b),
        AluOp::Xor => a.xor(b),
        AluOp::Lsh => a.shl(b),
        AluOp::Rsh => a.lshr(b),
        AluOp::Arsh => a.ashr(b),
    }
}

/// What the 64-bit range says of the lower 32 bits.
fn lower_half(wide: &Range<64>) -> Range<32> {
    let mut low = Range { bits: wide.bits.truncate(32), ..Range::UNKNOWN };
    // Only an interval within one block of 2^32 is an interval of lower halves: taking the
    // ends' lower halves otherwise is CVE-2020-8835.
    if (wide.umin ^ wide.umax) & UPPER == 0 {
        (low.umin, low.umax) = (wide.umin & !UPPER, wide.umax & !UPPER);
    } else if (wide.smin ^ wide.smax).cast_unsigned() & UPPER == 0 {
        let (lo, hi) = (wide.smin.cast_unsigned(), wide.smax.cast_unsigned());
        (low.umin, low.umax) = (lo & !UPPER, hi & !UPPER);
    }
    if i32::try_from(wide.smin).is_ok() && i32::try_from(wide.smax).is_ok() {
        (low.smin, low.smax) = (wide.smin, wide.smax);
    }
    low
}

/// `wide`, narrowed to numbers whose lower half is in `low`.
fn with_lower_half(wide: &Range<64>, low: &Range<32>) -> Option<Range<64>> {
    let bits = Tnum { value: low.bits.value, mask: low.bits.mask | UPPER };
    let smin = first_with_low(i128::from(wide.smin), low);
    let smax = last_with_low(i128::from(wide.smax), low);
    let umin = first_with_low(i128::from(wide.umin), low);
    let umax = last_with_low(i128::from(wide.umax), low);
    // Past either end of the 64-bit numbers: no member is left.
    Range {
        bits: wide.bits.intersect(bits)?,
        umin: u64::try_from(umin).ok()?,
        umax: u64::try_from(umax).ok()?,
        smin: i64::try_from(smin).ok()?,
        smax: i64::try_from(smax).ok()?,
    }
    .settle()
}

/// The smallest number from `x` upwards whose lower half is in `low`'s unsigned interval.
fn first_with_low(x: i128, low: &Range<32>) -> i128 {
    let (block, half) = (x & !0xffff_ffff, x & 0xffff_ffff);
    let (min, max) = (i128::from(low.umin), i128::from(low.umax));
    if half < min {
        block + min
    } else if half > max {
        block + (1 << 32) + min
    } else {
        x
    }
}

/// The largest number from `x` downwards whose lower half is in `low`'s unsigned interval.
fn last_with_low(x: i128, low: &Range<32>) -> i128 {
    let (block, half) = (x & !0xffff_ffff, x & 0xffff_ffff);
    let (min, max) = (i128::from(low.umin), i128::from(low.umax));
    if half > max {
        block + max
    } else if half < min {
        block - (1 << 32) + max
    } else {
        x
    }
}
