//! Machine state that a body reads from its own frame words, where the skeleton has stored it:
//! what has neither a parameter nor a place among the frame's argument and result words.

use cranelift_codegen::ir::Value;

use super::Translator;
use super::context::cookie_offset;
use crate::request::{Save, Saved, When};

/// The frame words of a body so far: session cookies, then saves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Saves {
    list: Vec<Save>,
    frame_words: u32,
}

impl Saves {
    /// None yet, behind `n_words` that are for something else.
    pub fn behind(n_words: u32) -> Self {
        Self { list: Vec::new(), frame_words: n_words }
    }

    /// Words in use.
    pub fn frame_words(&self) -> u32 {
        self.frame_words
    }

    /// What the skeleton is to store.
    pub fn into_list(self) -> Vec<Save> {
        self.list
    }

    /// The save of `what`, asked for once however many programs read it.
    pub fn of(&mut self, when: When, what: Saved) -> Save {
        if let Some(save) = self.list.iter().find(|save| (save.when, save.what) == (when, what)) {
            return *save;
        }
        self.frame_words += what.n_words();
        let save = Save { when, what, word: self.frame_words - 1 };
        self.list.push(save);
        save
    }
}

impl Translator<'_, '_> {
    /// Word `n` of `what`. `None` where there is no frame, or no such word.
    pub(super) fn saved(&mut self, when: When, what: Saved, n: u8) -> Option<Value> {
        if self.env.args.skeleton_rbp().is_none() || u32::from(n) >= what.n_words() {
            return None;
        }
        let save = self.out.saves.of(when, what);
        let offset = cookie_offset(self.env.frame_offset, save.word) + 8 * i64::from(n);
        self.frame_word(i32::try_from(offset).ok()?)
    }
}

/// How many words to save of each vector register, of which these (register, word) are wanted:
/// all of xmm, ymm or zmm.
pub(super) fn widths(wanted: impl Iterator<Item = (u8, u8)>) -> [u8; 8] {
    let mut widths = [0; 8];
    for (reg, word) in wanted {
        if let Some(width) = widths.get_mut(usize::from(reg)) {
            *width = word.saturating_add(1).min(9).next_power_of_two().max(*width);
        }
    }
    widths
}
