//! Loads, stores and atomics, at places that are known and at places that are bounded first.

use flea_object::opcode as op;

use crate::builder::{Builder, CONTEXT, DATA, DATA_BYTES, DW, FP, NUMBER_BYTES};
use crate::builder::{SPILLED_CONTEXT, SPILLED_DATA};
use crate::{CONTEXT_WORDS, map};

/// Bytes of CONSTANTS' value.
const CONSTANT_BYTES: u64 = 16;
/// An index stays below this, and what is behind the last one still fits.
const INDICES: u64 = 32;

impl Builder<'_> {
    /// A load of `limit` bytes' range at `base`.
    pub(crate) fn load_from(&mut self, dst: u8, base: u8, limit: u64) {
        let size = self.size();
        let signed = size.bytes < 8 && self.random.chance(30);
        let slack = u64::from(self.mistake()) * 4;
        let off = self.random.below(limit - size.bytes + 1 + slack) as i16;
        let mode = if signed { op::MEMSX } else { op::MEM };
        self.emit(op::LDX | mode | size.bits, dst, base, off, 0);
    }

    pub(crate) fn store_into(&mut self, base: u8, limit: u64) {
        let size = self.size();
        let slack = u64::from(self.mistake()) * 4;
        let off = self.random.below(limit - size.bytes + 1 + slack) as i16;
        let (src, imm) = (self.source(), self.random.imm());
        if src != base && self.random.chance(50) {
            self.store(size, base, off, src);
        } else {
            self.store_imm(size, base, off, imm);
        }
    }

    pub(crate) fn store_to_data(&mut self) {
        self.store_into(DATA, DATA_BYTES);
    }

    pub(crate) fn constants(&mut self) {
        let (pointer, dst) = (self.scratch(), self.target());
        self.map_value(pointer, map::CONSTANTS, 0);
        self.load_from(dst, pointer, CONSTANT_BYTES);
        if self.mistake() {
            self.store_into(pointer, CONSTANT_BYTES);
        }
        if dst != pointer {
            self.fresh(pointer);
        }
    }

    /// Aligned accesses to the numbers on the stack.
    pub(crate) fn stack(&mut self) {
        let size = self.size();
        let deep = if self.mistake() { 128 } else { NUMBER_BYTES as u64 };
        let off = -(((1 + self.random.below(deep / size.bytes)) * size.bytes) as i16);
        if off < -NUMBER_BYTES {
            self.comparable = false;
        }
        if self.random.chance(50) {
            let src = self.source();
            self.store(size, FP, off, src);
        } else {
            let dst = self.target();
            self.load(size, dst, FP, off);
        }
    }

    /// Through a pointer that was spilled.
    pub(crate) fn spilled_pointer(&mut self) {
        let pointer = self.scratch();
        if self.random.chance(70) {
            self.load(DW, pointer, FP, SPILLED_DATA);
            self.load_from(pointer, pointer, DATA_BYTES);
        } else {
            self.load(DW, pointer, FP, SPILLED_CONTEXT);
            let off = 8 * self.random.below(CONTEXT_WORDS) as i16;
            let size = if self.mistake() { self.size() } else { DW };
            self.load(size, pointer, pointer, off);
        }
        if self.mistake() {
            self.comparable = false;
            let off = self.number_slot();
            self.store(DW, FP, off, DATA);
        }
    }

    /// Bounds the number in `index` to `0..INDICES`, in one of many ways.
    pub(crate) fn bound(&mut self, index: u8) {
        let limit = if self.mistake() { 127 } else { INDICES as i32 - 1 };
        match self.random.below(6) {
            0 => self.alu_imm(op::AND, index, limit),
            1 => self.alu_imm(op::MOD, index, limit),
            2 => {
                let narrow = self.random.chance(30);
                if narrow {
                    self.emit(op::ALU | op::MOV | op::X, index, index, 0, 0);
                }
                let class = if narrow { op::JMP32 } else { op::JMP };
                self.emit(class | op::JLE, index, 0, 1, limit);
                self.mov_imm(index, 3);
            }
            3 => {
                self.emit(op::JMP | op::JSLE, index, 0, 1, limit);
                self.mov_imm(index, 0);
                self.emit(op::JMP | op::JSGE, index, 0, 1, 0);
                self.mov_imm(index, 1);
            }
            4 => self.emit(op::ALU | op::AND, index, 0, 0, limit),
            _ => {
                let shift = if limit < INDICES as i32 { 59 } else { 57 };
                self.alu_imm(op::RSH, index, shift);
            }
        }
    }

    /// An access to DATA at an index that is bounded first.
    pub(crate) fn indexed(&mut self) {
        let (index, pointer) = (self.target(), self.scratch());
        if index == pointer || self.counters.contains(&index) {
            return;
        }
        self.bound(index);
        self.mov(pointer, DATA);
        self.alu(op::ADD, pointer, index);
        if self.random.chance(20) {
            self.alu_imm(op::ADD, pointer, 8);
            self.alu(op::SUB, pointer, index);
        }
        self.use_pointer(pointer, INDICES - 8);
    }

    /// A load or store, after which `pointer` is a number again.
    fn use_pointer(&mut self, pointer: u8, limit: u64) {
        if self.random.chance(30) {
            self.store_into(pointer, limit);
            self.fresh(pointer);
        } else {
            self.load_from(pointer, pointer, limit);
        }
    }

    /// A copy is compared, or the spilled number itself is, and the other is used.
    pub(crate) fn guarded_copy(&mut self) {
        let (index, pointer) = (self.source(), self.scratch());
        if index == pointer {
            return;
        }
        let off = self.number_slot();
        let spilled = self.random.chance(50);
        if spilled {
            self.store(DW, FP, off, index);
        } else {
            self.mov(pointer, index);
        }
        let limit = if self.mistake() { 90 } else { self.random.below(INDICES) as i32 };
        let guard = self.jump_if(op::JGT, index, limit);
        if spilled {
            self.load(DW, pointer, FP, off);
        }
        self.alu(op::ADD, pointer, DATA);
        self.load_from(pointer, pointer, INDICES - 8);
        let over = self.jump();
        self.land(guard);
        self.fresh(pointer);
        self.land(over);
    }

    /// A copy plus a constant, one of the two compared, the other used as an index.
    pub(crate) fn related(&mut self) {
        let (a, b, pointer) = (self.target(), self.target(), self.scratch());
        if a == b || pointer == a || pointer == b {
            return;
        }
        match self.random.below(3) {
            0 => self.alu_imm(op::AND, a, 0xff),
            1 => self.emit(op::ALU | op::MOV | op::X, a, a, 0, 0),
            _ => {}
        }
        let class = self.random.pick(&[op::ALU64, op::ALU64, op::ALU]);
        self.emit(class | op::MOV | op::X, b, a, 0, 0);
        let class = self.random.pick(&[op::ALU64, op::ALU64, op::ALU]);
        let code = self.random.pick(&[op::ADD, op::SUB]);
        let by = self.random.pick(&[1, 4, -1, -3, 16, i32::MIN]);
        let moved = self.random.pick(&[a, b]);
        self.emit(class | code, moved, 0, 0, by);
        let (tested, used) = if self.random.chance(50) { (a, b) } else { (b, a) };
        let code = self.random.pick(&[op::JGT, op::JSGT, op::JGE]);
        let limit = self.random.below(INDICES) as i32 - 8;
        let guard = self.jump_if(code, tested, limit);
        let bound = self.jump_if(op::JGT, used, INDICES as i32 - 8);
        self.mov(pointer, DATA);
        self.alu(op::ADD, pointer, used);
        self.load_from(pointer, pointer, INDICES - 8);
        let over = self.jump();
        self.land(guard);
        self.land(bound);
        self.fresh(pointer);
        self.land(over);
    }

    /// A byte of the numbers on the stack, at a place that is known when it runs.
    pub(crate) fn indexed_stack(&mut self) {
        let (index, pointer) = (self.target(), self.scratch());
        if index == pointer || self.counters.contains(&index) || !self.random.chance(50) {
            return;
        }
        self.bound(index);
        if self.random.chance(60) {
            self.alu_imm(op::AND, index, -8);
        }
        self.stack_address(pointer, -NUMBER_BYTES);
        self.alu(op::ADD, pointer, index);
        self.use_pointer(pointer, INDICES - 8);
    }

    pub(crate) fn atomic(&mut self) {
        let size = self.random.pick(&[4i16, 8]);
        let bits = if size == 4 { op::W } else { op::DW };
        let (base, off) = if self.random.chance(50) {
            (DATA, self.random.below(8) as i16 * size)
        } else {
            (FP, -(1 + self.random.below((NUMBER_BYTES / size) as u64) as i16) * size)
        };
        let plain = [op::ATOMIC_ADD, op::ATOMIC_OR, op::ATOMIC_AND, op::ATOMIC_XOR];
        let mut operation = self.random.pick(&plain);
        let mut src = self.source();
        match self.random.below(10) {
            0..=3 => {}
            4..=7 => operation |= op::ATOMIC_FETCH,
            8 => operation = op::ATOMIC_XCHG,
            _ => operation = op::ATOMIC_CMPXCHG,
        }
        if operation & op::ATOMIC_FETCH != 0 && operation != op::ATOMIC_CMPXCHG {
            src = self.target();
        }
        let off = if self.mistake() { off + 1 } else { off };
        self.emit(op::STX | op::ATOMIC | bits, base, src, off, operation);
    }

    /// The context, beyond what is read of it.
    pub(crate) fn far_context(&mut self, dst: u8) {
        let word = self.random.pick(&[0, 3, 4, 11, 12, 4000]);
        self.load(DW, dst, CONTEXT, 8 * word);
    }
}
