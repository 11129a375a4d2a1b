//! [`Save`]s as serde has them: a number each. A function may have dozens.

use flea_image::{Save, Saved, When};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(super) fn serialize<S: Serializer>(saves: &[Save], to: S) -> Result<S::Ok, S::Error> {
    saves.iter().map(|save| pack(*save)).collect::<Vec<u32>>().serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Save>, D::Error> {
    let packed = Vec::<u32>::deserialize(from)?;
    let no_save = |bits| D::Error::custom(format!("no save: {bits:#x}"));
    packed.into_iter().map(|bits| unpack(bits).ok_or_else(|| no_save(bits))).collect()
}

/// Bits 0 to 3 the register, 4 to 7 its words, 8 to 11 what kind of register (1 general, 2
/// vector, 3 x87), bit 12 at exit, from bit 16 on the frame word.
fn pack(save: Save) -> u32 {
    let (kind, n_words, reg) = match save.what {
        Saved::Gpr(reg) => (1, 0, reg),
        Saved::Vector { reg, n_words } => (2, n_words, reg),
        Saved::X87 { reg } => (3, 0, reg),
    };
    let exit = u32::from(save.when == When::Exit);
    save.word << 16 | exit << 12 | kind << 8 | u32::from(n_words) << 4 | u32::from(reg)
}

/// The reverse of [`pack`]; `None` for what it does not make.
fn unpack(bits: u32) -> Option<Save> {
    let [low, high, ..] = bits.to_le_bytes();
    let (reg, n_words) = (low & 0xf, low >> 4);
    let what = match (high & 0xf, n_words) {
        (1, 0) => Saved::Gpr(reg),
        (2, _) => Saved::Vector { reg, n_words },
        (3, 0) => Saved::X87 { reg },
        _ => return None,
    };
    let when = match high >> 4 {
        0 => When::Entry,
        1 => When::Exit,
        _ => return None,
    };
    Some(Save { when, what, word: bits >> 16 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let whats = (0..16)
            .map(Saved::Gpr)
            .chain([2, 4, 8].map(|n_words| Saved::Vector { reg: 7, n_words }))
            .chain([0, 1].map(|reg| Saved::X87 { reg }));
        let mut seen = std::collections::HashSet::new();
        for what in whats {
            for (when, word) in [(When::Entry, 0), (When::Exit, 0), (When::Exit, 4095)] {
                let save = Save { when, what, word };
                assert_eq!(unpack(pack(save)), Some(save));
                assert!(seen.insert(pack(save)), "{save:?}");
            }
        }
        // No kind, words of a general register, a third point in time.
        for bits in [0, 0x113, 0x2103] {
            assert_eq!(unpack(bits), None, "{bits:#x}");
        }
    }
}
