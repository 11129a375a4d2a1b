//! Helpers that call a function of the program in rounds, and those functions.
//!
//! A callback's context is the address of what its caller has spilled, with the caller's numbers
//! above it: see [`crate::builder`].

use flea_object::helper::Helper;
use flea_object::insn::PSEUDO_FUNC;
use flea_object::opcode as op;

use crate::builder::{Builder, CONTEXT, DATA, DW, FP, NUMBER_BYTES, SPILLED_CONTEXT};
use crate::map;

/// Calls of callbacks in one program, at most: each is verified for several rounds.
const MAX_REFERENCES: usize = 2;
/// Where a callback keeps its context.
const SPILLED_CALLBACK_CONTEXT: i16 = -88;

impl Builder<'_> {
    pub(crate) fn rounds(&mut self) {
        if self.references.len() >= MAX_REFERENCES {
            return;
        }
        let helper = self.random.pick(&[Helper::Loop, Helper::Loop, Helper::ForEachMapElem]);
        match helper {
            Helper::ForEachMapElem => {
                // A hash table's order is its own.
                self.comparable = false;
                self.map(1, map::HASH);
            }
            _ if self.random.chance(50) => {
                let n = self.random.below(12) as i32;
                self.mov_imm(1, n);
            }
            _ => {
                self.load(DW, 1, CONTEXT, 8);
                self.alu_imm(op::AND, 1, 15);
            }
        }
        self.references.push((self.out.len(), helper));
        self.wide(2, PSEUDO_FUNC, 0, 0);
        self.stack_address(3, SPILLED_CONTEXT);
        let flags = i32::from(self.random.chance(3));
        self.mov_imm(4, flags);
        self.helper(helper);
    }

    /// The functions that the program refers to, one for each helper.
    pub(crate) fn place_callbacks(&mut self) {
        self.in_callback = true;
        self.callbacks = crate::builder::Callbacks::None;
        // As the last function: it calls none.
        self.function = self.n_functions - 1;
        let references = std::mem::take(&mut self.references);
        for helper in [Helper::Loop, Helper::ForEachMapElem] {
            let start = self.out.len();
            let here = references.iter().filter(|(_, caller)| *caller == helper);
            let here: Vec<usize> = here.map(|(insn_idx, _)| *insn_idx).collect();
            for insn_idx in &here {
                self.out[*insn_idx].imm = (start - insn_idx - 1) as i32;
            }
            if !here.is_empty() {
                self.callback(helper);
            }
        }
    }

    fn callback(&mut self, helper: Helper) {
        let context = if helper == Helper::Loop { 2 } else { 4 };
        if helper == Helper::Loop {
            self.mov(9, 1);
        } else {
            self.load(DW, 9, 2, 0);
            let imm = self.random.imm();
            self.store_imm(DW, 3, 8, imm);
        }
        self.store(DW, FP, SPILLED_CALLBACK_CONTEXT, context);
        self.load(DW, CONTEXT, context, 0);
        let off = self.callers_number();
        self.load(DW, 8, context, off);
        self.map_value(DATA, map::DATA, 0);
        self.frame();
        for reg in 0..=5 {
            self.fresh(reg);
        }
        for _ in 0..self.random.below(5) {
            self.piece(1);
        }
        self.change_callers_number();
        match self.random.below(4) {
            0..=1 => self.alu_imm(op::AND, 0, 1),
            _ if self.mistake() => {}
            _ => {
                let stops = i32::from(self.random.chance(20));
                self.mov_imm(0, stops);
            }
        }
        self.exit();
    }

    /// Where one of the caller's numbers is, from the callback's context.
    fn callers_number(&mut self) -> i16 {
        let slot = self.number_slot();
        debug_assert!((-NUMBER_BYTES..0).contains(&slot));
        slot - SPILLED_CONTEXT
    }

    /// Overwrites one of the caller's numbers, or adds to it, or leaves them.
    fn change_callers_number(&mut self) {
        let off = self.callers_number();
        let src = self.random.pick(&[0, 2, 3, 4, 5, 8, 9]);
        self.load(DW, 1, FP, SPILLED_CALLBACK_CONTEXT);
        match self.random.below(3) {
            0 => self.store(DW, 1, off, src),
            1 => {
                let more = 1 + self.random.below(3) as i32;
                self.load(DW, 2, 1, off);
                self.alu_imm(op::ADD, 2, more);
                self.store(DW, 1, off, 2);
            }
            _ => {}
        }
    }
}
