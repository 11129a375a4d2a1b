//! A program in the making, and what every piece may rely on:
//!
//! ```text
//!   r6                 the context           r0-r5, r8, r9     some number
//!   r7                 the value of DATA     fp-8 .. fp-64     numbers, 8 bytes each
//!   r10                the frame             fp-72, fp-80      r7 and r6, spilled
//! ```
//!
//! Functions have the same, in their own frame.

use flea_object::helper::Helper;
use flea_object::insn::{Insn, PSEUDO_CALL, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use flea_object::opcode as op;

use crate::{Generated, Random, Style, map};

/// Registers that hold numbers.
pub(crate) const NUMBERS: [u8; 8] = [0, 1, 2, 3, 4, 5, 8, 9];
pub(crate) const CONTEXT: u8 = 6;
pub(crate) const DATA: u8 = 7;
pub(crate) const FP: u8 = 10;
/// Bytes of DATA's value.
pub(crate) const DATA_BYTES: u64 = 64;
/// Stack bytes that hold numbers, from the top down.
pub(crate) const NUMBER_BYTES: i16 = 64;
/// Where the frame keeps r7 and r6.
pub(crate) const SPILLED_DATA: i16 = -72;
pub(crate) const SPILLED_CONTEXT: i16 = -80;
/// Functions beside the main one, at most.
const MAX_FUNCTIONS: u64 = 3;

/// Bytes that an access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) bits: u8,
    pub(crate) bytes: u64,
}

pub(crate) const SIZES: [Size; 4] = [
    Size { bits: op::B, bytes: 1 },
    Size { bits: op::H, bytes: 2 },
    Size { bits: op::W, bytes: 4 },
    Size { bits: op::DW, bytes: 8 },
];
pub(crate) const DW: Size = SIZES[3];

/// A call whose function is not yet placed.
struct Call {
    insn_idx: usize,
    function: usize,
}

/// Whether a program calls helpers that call its functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Callbacks {
    None,
    Some,
}

pub(crate) struct Builder<'a> {
    pub(crate) random: &'a mut Random,
    pub(crate) style: Style,
    pub(crate) out: Vec<Insn>,
    /// Numbers that count the rounds of a loop around this place.
    pub(crate) counters: Vec<u8>,
    /// Numbers' registers that hold a pointer for a while.
    pub(crate) pointers: &'static [u8],
    /// 0 for the main function.
    pub(crate) function: usize,
    pub(crate) n_functions: usize,
    pub(crate) comparable: bool,
    calls: Vec<Call>,
    /// Whether there are callbacks at all.
    pub(crate) callbacks: Callbacks,
    pub(crate) in_callback: bool,
    /// References to callbacks, and who calls them.
    pub(crate) references: Vec<(usize, Helper)>,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(random: &'a mut Random, style: Style) -> Self {
        let n_functions = 1 + random.below(MAX_FUNCTIONS + 1) as usize;
        Self {
            random,
            style,
            out: Vec::new(),
            counters: Vec::new(),
            pointers: &[],
            function: 0,
            n_functions,
            comparable: true,
            calls: Vec::new(),
            callbacks: Callbacks::None,
            in_callback: false,
            references: Vec::new(),
        }
    }

    pub(crate) fn with_callbacks(self) -> Self {
        Self { callbacks: Callbacks::Some, ..self }
    }

    pub(crate) fn program(mut self) -> Generated {
        self.mov(CONTEXT, 1);
        self.main_prologue();
        for _ in 0..3 + self.random.below(12) {
            self.piece(2);
        }
        self.fold();
        self.map_value(1, map::RESULT, 0);
        self.store(DW, 1, 0, 0);
        self.exit();
        for function in 1..self.n_functions {
            self.function(function);
        }
        self.place_callbacks();
        Generated { insns: self.out, comparable: self.comparable }
    }

    fn main_prologue(&mut self) {
        self.map_value(DATA, map::DATA, 0);
        self.frame();
        for reg in NUMBERS {
            self.fresh(reg);
        }
    }

    /// r1 the context, r2 a number, r3 a place for 8 bytes in the caller's frame. Only those that
    /// are called are placed: the kernel refuses what nothing reaches.
    fn function(&mut self, function: usize) {
        let start = self.out.len();
        let mut is_called = false;
        for call in self.calls.iter().filter(|call| call.function == function) {
            self.out[call.insn_idx].imm = (start - call.insn_idx - 1) as i32;
            is_called = true;
        }
        if !is_called {
            return;
        }
        self.function = function;
        self.mov(CONTEXT, 1);
        self.mov(9, 2);
        self.store(DW, 3, 0, 2);
        self.load(SIZES[2], 8, 3, 0);
        self.map_value(DATA, map::DATA, 0);
        self.frame();
        for reg in [0, 1, 2, 3, 4, 5] {
            self.fresh(reg);
        }
        for _ in 0..1 + self.random.below(4) {
            self.piece(1);
        }
        self.fold();
        self.exit();
    }

    pub(crate) fn frame(&mut self) {
        for off in (8..=NUMBER_BYTES).step_by(8) {
            let imm = self.random.imm();
            self.store_imm(DW, FP, -off, imm);
        }
        self.store(DW, FP, SPILLED_DATA, DATA);
        self.store(DW, FP, SPILLED_CONTEXT, CONTEXT);
    }

    /// What the registers, the stack and the map hold, made one number: r0.
    pub(crate) fn fold(&mut self) {
        for reg in NUMBERS.into_iter().skip(1) {
            if self.random.chance(60) {
                self.alu_imm(op::MUL, 0, 31);
                self.alu(op::ADD, 0, reg);
            }
        }
        for _ in 0..self.random.below(3) {
            let off = self.number_slot();
            self.load(DW, 1, FP, off);
            self.alu(op::XOR, 0, 1);
        }
        let off = 8 * self.random.below(DATA_BYTES / 8) as i16;
        self.load(DW, 1, DATA, off);
        self.alu(op::ADD, 0, 1);
    }

    pub(crate) fn emit(&mut self, opcode: u8, dst: u8, src: u8, off: i16, imm: i32) {
        self.out.push(Insn { opcode, dst, src, off, imm });
    }

    pub(crate) fn wide(&mut self, dst: u8, src: u8, low: u32, high: u32) {
        self.emit(op::LDDW, dst, src, 0, low.cast_signed());
        self.emit(0, 0, 0, 0, high.cast_signed());
    }

    pub(crate) fn constant(&mut self, dst: u8, value: u64) {
        self.wide(dst, 0, value as u32, (value >> 32) as u32);
    }

    pub(crate) fn map(&mut self, dst: u8, map: u32) {
        self.wide(dst, PSEUDO_MAP, map, 0);
    }

    pub(crate) fn map_value(&mut self, dst: u8, map: u32, off: u32) {
        self.wide(dst, PSEUDO_MAP_VALUE, map, off);
    }

    pub(crate) fn mov(&mut self, dst: u8, src: u8) {
        self.emit(op::ALU64 | op::MOV | op::X, dst, src, 0, 0);
    }

    pub(crate) fn mov_imm(&mut self, dst: u8, imm: i32) {
        self.emit(op::ALU64 | op::MOV, dst, 0, 0, imm);
    }

    pub(crate) fn alu(&mut self, code: u8, dst: u8, src: u8) {
        self.emit(op::ALU64 | code | op::X, dst, src, 0, 0);
    }

    pub(crate) fn alu_imm(&mut self, code: u8, dst: u8, imm: i32) {
        self.emit(op::ALU64 | code, dst, 0, 0, imm);
    }

    pub(crate) fn load(&mut self, size: Size, dst: u8, base: u8, off: i16) {
        self.emit(op::LDX | op::MEM | size.bits, dst, base, off, 0);
    }

    pub(crate) fn store(&mut self, size: Size, base: u8, off: i16, src: u8) {
        self.emit(op::STX | op::MEM | size.bits, base, src, off, 0);
    }

    pub(crate) fn store_imm(&mut self, size: Size, base: u8, off: i16, imm: i32) {
        self.emit(op::ST | op::MEM | size.bits, base, 0, off, imm);
    }

    pub(crate) fn exit(&mut self) {
        self.emit(op::EXIT_OP, 0, 0, 0, 0);
    }

    /// `reg = fp + off`
    pub(crate) fn stack_address(&mut self, reg: u8, off: i16) {
        self.mov(reg, FP);
        self.alu_imm(op::ADD, reg, i32::from(off));
    }

    /// A jump whose target comes later: its index.
    pub(crate) fn jump_if(&mut self, code: u8, dst: u8, imm: i32) -> usize {
        self.emit(op::JMP | code, dst, 0, 0, imm);
        self.out.len() - 1
    }

    pub(crate) fn jump(&mut self) -> usize {
        let opcode = if self.random.chance(30) { op::GOTOL_OP } else { op::JA_OP };
        self.emit(opcode, 0, 0, 0, 0);
        self.out.len() - 1
    }

    /// The jump at `from` comes here.
    pub(crate) fn land(&mut self, from: usize) {
        let distance = self.out.len() - from - 1;
        let insn = &mut self.out[from];
        if insn.opcode == op::GOTOL_OP {
            insn.imm = distance as i32;
        } else {
            insn.off = distance as i16;
        }
    }

    /// A call of a helper; the numbers are numbers again, but for r0, which is what it says.
    pub(crate) fn helper(&mut self, helper: Helper) {
        self.emit(op::CALL_OP, 0, 0, 0, helper as i32);
        for reg in 1..=5 {
            if !self.mistake() {
                self.fresh(reg);
            }
        }
    }

    pub(crate) fn call_function(&mut self, function: usize) {
        self.calls.push(Call { insn_idx: self.out.len(), function });
        self.emit(op::CALL_OP, 0, PSEUDO_CALL, 0, 0);
        for reg in 1..=5 {
            self.fresh(reg);
        }
    }

    pub(crate) fn mistake(&mut self) -> bool {
        self.style == Style::Careless && self.random.chance(3)
    }

    /// A number to be read.
    pub(crate) fn source(&mut self) -> u8 {
        loop {
            let reg = self.random.pick(&NUMBERS);
            if !self.pointers.contains(&reg) {
                return reg;
            }
        }
    }

    /// A number to be overwritten: no loop depends on it, nearly always.
    pub(crate) fn target(&mut self) -> u8 {
        loop {
            let reg = self.source();
            if !self.counters.contains(&reg) || self.mistake() {
                return reg;
            }
        }
    }

    /// The same, but r0 and r8 are not asked for.
    pub(crate) fn scratch(&mut self) -> u8 {
        self.random.pick(&[1, 2, 3, 4, 5])
    }

    pub(crate) fn number_slot(&mut self) -> i16 {
        -8 * (1 + self.random.below(NUMBER_BYTES as u64 / 8) as i16)
    }

    pub(crate) fn size(&mut self) -> Size {
        self.random.pick(&SIZES)
    }
}
