//! The pieces of programs. Each is written out with its share in [`Builder::piece`].

mod callbacks;
mod calls;
mod flow;
mod memory;
mod numbers;

use crate::builder::{Builder, Callbacks};

impl Builder<'_> {
    /// Any piece; `depth` branches and loops may be around what is in it.
    pub(crate) fn piece(&mut self, depth: u32) {
        if depth == 2 && self.callbacks == Callbacks::Some && self.random.chance(10) {
            self.rounds();
            return;
        }
        match self.random.below(34) {
            0..=5 => self.arithmetic(),
            6 => {
                let reg = self.target();
                self.fresh(reg);
            }
            7 => self.copy(),
            8..=9 => self.stack(),
            10 => self.spilled_pointer(),
            11 => self.store_to_data(),
            12..=13 => self.indexed(),
            14 => self.guarded_copy(),
            15 => self.indexed_stack(),
            16 => self.constants(),
            17 => self.atomic(),
            18..=19 => self.lookup(),
            20 => self.update(),
            21 => self.delete(),
            22 => self.record(),
            23 => self.output(),
            24 => self.read_target(),
            25 => self.changing_number(),
            26 => self.call(),
            33 => self.related(),
            30 if !self.in_callback => self.tail_call(),
            27 if self.function > 0 && !self.in_callback => self.early_exit(),
            28..=29 if depth > 0 => self.repeat(depth),
            _ if depth > 0 => self.branch(depth),
            _ => self.arithmetic(),
        }
    }
}
