//! Calls of helpers and of the program's own functions.

use flea_object::helper::Helper;
use flea_object::opcode as op;

use crate::builder::{Builder, CONTEXT, DW, FP, NUMBER_BYTES};
use crate::{CONTEXT_WORDS, map, maps};

/// Maps that have elements to look up.
const TABLES: [u32; 4] = [map::HASH, map::ARRAY, map::PER_CPU_ARRAY, map::PER_CPU_HASH];
/// Bytes of a reserved record.
const RECORD_BYTES: u64 = 16;

impl Builder<'_> {
    fn value_bytes(map: u32) -> u64 {
        u64::from(maps()[map as usize].value_size_bytes)
    }

    /// r1 a map, r2 a key on the stack: a small number, so that it is met again.
    fn key(&mut self, map: u32) {
        let off = self.number_slot();
        let wide = matches!(map, map::HASH | map::PER_CPU_HASH);
        if self.random.chance(70) {
            let key = self.random.below(10) as i32;
            let size = if wide { DW } else { crate::builder::SIZES[2] };
            self.store_imm(size, FP, off, key);
        }
        self.map(1, map);
        self.stack_address(2, off);
    }

    pub(crate) fn lookup(&mut self) {
        let map = self.random.pick(&TABLES);
        let limit = Self::value_bytes(map);
        self.key(map);
        self.helper(Helper::MapLookupElem);
        let copies = self.random.chance(30) && !self.counters.contains(&8);
        if copies {
            self.mov(8, 0);
        }
        self.pointers = if copies { &[0, 8] } else { &[0] };
        if self.mistake() {
            self.comparable = false;
        } else {
            let null = self.jump_if(op::JEQ, 0, 0);
            let pointer = if copies && self.random.chance(50) { 8 } else { 0 };
            if self.random.chance(40) {
                self.store_into(pointer, limit);
            }
            if self.random.chance(25) {
                self.indexed_value(pointer, limit);
            }
            self.load_from(0, pointer, limit);
            let over = self.jump();
            self.land(null);
            self.mov_imm(0, 77);
            self.land(over);
        }
        self.pointers = &[];
        if copies {
            self.fresh(8);
        }
    }

    /// Moves `pointer` by a bounded number, and uses it there.
    fn indexed_value(&mut self, pointer: u8, limit: u64) {
        let index = self.scratch();
        let most = limit / 2 - 1;
        self.alu_imm(op::AND, index, most as i32);
        self.alu(op::ADD, index, pointer);
        self.load_from(index, index, limit - most);
    }

    pub(crate) fn update(&mut self) {
        let map = self.random.pick(&TABLES);
        self.key(map);
        let value = -(NUMBER_BYTES as u64 as i16) + 8 * self.random.below(4) as i16;
        let value = if self.mistake() { -8 } else { value };
        self.stack_address(3, value);
        let flags = self.random.pick(&[0, 0, 0, 1, 2, 2, 3]);
        self.mov_imm(4, flags);
        self.helper(Helper::MapUpdateElem);
    }

    pub(crate) fn delete(&mut self) {
        let map = self.random.pick(&TABLES);
        self.key(map);
        self.helper(Helper::MapDeleteElem);
    }

    pub(crate) fn record(&mut self) {
        self.map(1, map::RING);
        self.mov_imm(2, RECORD_BYTES as i32);
        self.mov_imm(3, 0);
        self.helper(Helper::RingbufReserve);
        let check = self.jump_if(op::JEQ, 0, 0);
        self.store_imm(DW, 0, 0, 1);
        self.store_into(0, RECORD_BYTES);
        if self.random.chance(50) {
            let dst = self.scratch();
            self.load_from(dst, 0, 8);
        }
        if !self.mistake() {
            self.mov(1, 0);
            self.mov_imm(2, 0);
            let done = self.random.pick(&[Helper::RingbufSubmit, Helper::RingbufDiscard]);
            self.helper(done);
        }
        self.land(check);
        for reg in 0..=5 {
            self.fresh(reg);
        }
    }

    pub(crate) fn output(&mut self) {
        self.map(1, map::RING);
        if self.random.chance(30) {
            let what = self.random.pick(&[0, 1, 9]);
            self.mov_imm(2, what);
            self.helper(Helper::RingbufQuery);
            return;
        }
        let off = self.number_slot();
        self.stack_address(2, off);
        let slack = i64::from(self.mistake()) * 16;
        let size = 1 + self.random.below((i64::from(-off) + slack) as u64) as i32;
        self.mov_imm(3, size);
        self.mov_imm(4, 0);
        self.helper(Helper::RingbufOutput);
    }

    /// Memory that is not there: the buffer is zeroes afterwards.
    pub(crate) fn read_target(&mut self) {
        let slack = u64::from(self.mistake()) * 80;
        let deep = 16 + 8 * self.random.below(4) as i32;
        let size = 1 + self.random.below(15 + slack) as i32;
        self.stack_address(1, -deep as i16);
        if self.random.chance(50) {
            self.mov_imm(2, size);
        } else {
            self.load(DW, 2, CONTEXT, 8);
            self.alu_imm(op::AND, 2, 15);
        }
        let word = self.random.below(CONTEXT_WORDS) as i16;
        self.load(DW, 3, CONTEXT, 8 * word);
        let helper = self.random.pick(&[Helper::ProbeReadUser, Helper::ProbeReadUserStr]);
        self.helper(helper);
    }

    /// What is different each time, of which so many bits are kept as are always 0.
    pub(crate) fn changing_number(&mut self) {
        let (helper, shift) = self.random.pick(&[
            (Helper::KtimeGetNs, 63),
            (Helper::KtimeGetBootNs, 63),
            (Helper::GetCurrentPidTgid, 63),
            (Helper::GetPrandomU32, 32),
            (Helper::GetSmpProcessorId, 32),
        ]);
        self.helper(helper);
        self.alu_imm(op::RSH, 0, shift);
        if self.mistake() {
            self.far_context(0);
        }
    }

    /// Any number is an index; nothing comes back.
    pub(crate) fn tail_call(&mut self) {
        let index = self.source();
        self.mov(3, index);
        if self.random.chance(50) {
            let known = self.random.below(10) as i32;
            self.mov_imm(3, known);
        }
        self.mov(1, CONTEXT);
        let map = if self.mistake() { map::ARRAY } else { map::JUMPS };
        self.map(2, map);
        self.helper(Helper::TailCall);
        if !self.mistake() {
            self.fresh(0);
        }
    }

    /// Only functions behind this one: there is no recursion.
    pub(crate) fn call(&mut self) {
        let behind = self.n_functions - self.function - 1;
        if behind == 0 {
            return;
        }
        let function = self.function + 1 + self.random.index(behind);
        let number = self.source();
        let slot = self.number_slot();
        self.mov(2, number);
        self.stack_address(3, slot);
        self.mov(1, CONTEXT);
        self.call_function(function);
    }
}
