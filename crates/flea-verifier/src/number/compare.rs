//! What the outcome of a comparison says about both sides.

use super::range::Range;
use super::tnum::Tnum;

/// A comparison that a conditional jump makes, or the opposite of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cond {
    Eq,
    Ne,
    Gt,
    Ge,
    Lt,
    Le,
    Sgt,
    Sge,
    Slt,
    Sle,
    /// `a & b != 0`
    Set,
    /// `a & b == 0`
    Unset,
}

impl Cond {
    /// What holds where this does not.
    pub(crate) const fn opposite(self) -> Self {
        match self {
            Self::Eq => Self::Ne,
            Self::Ne => Self::Eq,
            Self::Gt => Self::Le,
            Self::Ge => Self::Lt,
            Self::Lt => Self::Ge,
            Self::Le => Self::Gt,
            Self::Sgt => Self::Sle,
            Self::Sge => Self::Slt,
            Self::Slt => Self::Sge,
            Self::Sle => Self::Sgt,
            Self::Set => Self::Unset,
            Self::Unset => Self::Set,
        }
    }
}

impl<const BITS: u32> Range<BITS> {
    /// Narrows `a` and `b` by `a cond b`; `None` where that cannot be.
    pub(crate) fn refine(cond: Cond, a: &Self, b: &Self) -> Option<(Self, Self)> {
        match cond {
            Cond::Eq => {
                let both = a.intersect(b)?;
                Some((both, both))
            }
            Cond::Ne => Some((a.without(b)?, b.without(a)?)),
            Cond::Lt => Self::less(a, b, 1),
            Cond::Le => Self::less(a, b, 0),
            Cond::Gt => Self::less(b, a, 1).map(swap),
            Cond::Ge => Self::less(b, a, 0).map(swap),
            Cond::Slt => Self::signed_less(a, b, 1),
            Cond::Sle => Self::signed_less(a, b, 0),
            Cond::Sgt => Self::signed_less(b, a, 1).map(swap),
            Cond::Sge => Self::signed_less(b, a, 0).map(swap),
            Cond::Set => Some((a.meeting(b)?, b.meeting(a)?)),
            Cond::Unset => Some((a.avoiding(b)?, b.avoiding(a)?)),
        }
    }

    /// `small + gap <= large`, unsigned.
    fn less(small: &Self, large: &Self, gap: u64) -> Option<(Self, Self)> {
        let umax = small.umax.min(large.umax.checked_sub(gap)?);
        let umin = large.umin.max(small.umin.checked_add(gap)?);
        Some((Self { umax, ..*small }.settle()?, Self { umin, ..*large }.settle()?))
    }

    /// `small + gap <= large`, signed.
    fn signed_less(small: &Self, large: &Self, gap: i64) -> Option<(Self, Self)> {
        let smax = small.smax.min(large.smax.checked_sub(gap)?);
        let smin = large.smin.max(small.smin.checked_add(gap)?);
        Some((Self { smax, ..*small }.settle()?, Self { smin, ..*large }.settle()?))
    }

    /// Without the number that `b` is, if it is one number and at an end of an interval.
    fn without(&self, b: &Self) -> Option<Self> {
        let Some(c) = b.as_const() else { return Some(*self) };
        if self.as_const() == Some(c) {
            return None;
        }
        let mut r = *self;
        let s = Self::signed(c);
        // No overflow: an interval of one number would have been settled to a constant.
        if r.umin == c {
            r.umin = c.checked_add(1)?;
        }
        if r.umax == c {
            r.umax = c.checked_sub(1)?;
        }
        if r.smin == s {
            r.smin = s.checked_add(1)?;
        }
        if r.smax == s {
            r.smax = s.checked_sub(1)?;
        }
        r.settle()
    }

    /// `self & b != 0`.
    fn meeting(&self, b: &Self) -> Option<Self> {
        let common = self.bits.max() & b.bits.max();
        if common == 0 {
            return None;
        }
        if !common.is_power_of_two() {
            return Some(*self);
        }
        // The one bit that both may have, both must have.
        let bits = Tnum::new(self.bits.value | common, self.bits.mask & !common);
        Self { bits, ..*self }.settle()
    }

    /// `self & b == 0`.
    fn avoiding(&self, b: &Self) -> Option<Self> {
        if self.bits.value & b.bits.value != 0 {
            return None;
        }
        let bits = Tnum::new(self.bits.value, self.bits.mask & !b.bits.value);
        Self { bits, ..*self }.settle()
    }
}

fn swap<T>((a, b): (T, T)) -> (T, T) {
    (b, a)
}
