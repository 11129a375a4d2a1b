//! Which words of its context a program may store to, once somebody has allowed it to change the
//! target.

/// A set of words of a context, each 8 bytes: `ctx[i]`, or the i-th register of
/// `struct pt_regs`. Those that are in no set can only be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Changeable(u128);

/// `struct pt_regs` of x86-64, in order.
const REGISTERS: [&str; 21] = [
    "r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di",
    "orig_ax", "ip", "cs", "flags", "sp", "ss",
];

impl Changeable {
    /// No word.
    pub const NONE: Self = Self(0);

    /// These words. Those from 128 on cannot be changed.
    pub fn of(words: impl IntoIterator<Item = usize>) -> Self {
        let bits =
            words.into_iter().filter_map(|word| 1u128.checked_shl(u32::try_from(word).ok()?));
        Self(bits.fold(0, |set, bit| set | bit))
    }

    /// Its words, lowest first.
    pub fn words(self) -> impl Iterator<Item = usize> {
        (0..128).filter(move |word| self.0 >> word & 1 != 0)
    }

    /// Whether `size_bytes` at `offset_bytes` are the lowest bytes of one of its words: what of a
    /// register has a name.
    #[must_use]
    pub fn has(self, offset_bytes: i64, size_bytes: u32) -> bool {
        let word = u32::try_from(offset_bytes / 8).ok().filter(|_| offset_bytes >= 0);
        let is_word = word.is_some_and(|word| word < 128 && self.0 >> word & 1 != 0);
        is_word && offset_bytes % 8 == 0 && matches!(size_bytes, 1 | 2 | 4 | 8)
    }

    /// Its words as people write them: numbers, or registers' names.
    pub(crate) fn names(self, are_registers: bool) -> String {
        let name = |word: usize| match REGISTERS.get(word) {
            Some(name) if are_registers => (*name).to_owned(),
            _ => word.to_string(),
        };
        self.words().map(name).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_what_it_was_made_of() {
        let set = Changeable::of([0, 2, 127, 128, usize::MAX]);
        assert_eq!(set.words().collect::<Vec<_>>(), [0, 2, 127]);
        assert!(set.has(0, 8) && set.has(16, 4) && set.has(8 * 127, 1));
        assert!(!set.has(8, 8) && !set.has(4, 4) && !set.has(-8, 8) && !set.has(8 * 128, 8));
        assert!(!Changeable::NONE.has(0, 8) && Changeable::NONE.words().next().is_none());
        assert_eq!(Changeable::of([10, 14]).names(true), "ax, di");
    }
}
