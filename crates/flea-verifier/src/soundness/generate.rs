//! Random programs that know how helpers, maps and branches are used, most of the time.

use flea_object::helper::Helper;
use flea_object::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};

/// xorshift64*: the seed is all there is to a failure.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut r = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        r.next();
        r.next();
        r
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Numbers near the places where orders and halves break.
    pub(crate) fn number(&mut self) -> u64 {
        let edges = [0, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 32, 1 << 63, u64::MAX];
        match self.below(4) {
            0 => self.next(),
            1 => self.below(80),
            2 => self.pick(&edges).wrapping_add(self.below(5)).wrapping_sub(2),
            _ => self.next() >> self.below(64),
        }
    }

    fn imm(&mut self) -> i32 {
        self.number() as i32
    }
}

/// How often a rule is broken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Careful,
    Careless,
}

/// Registers that hold numbers; r6 is the context, r7 points to map 0's value.
const NUMBERS: [u8; 8] = [0, 1, 2, 3, 4, 5, 8, 9];
/// Stack bytes that are written at the start: -8 to -64.
const WRITTEN: i16 = 64;

struct Builder<'a> {
    random: &'a mut Random,
    style: Style,
    out: Vec<Insn>,
    /// Calls of the function that comes last, to be linked.
    calls: Vec<usize>,
    /// References to callbacks, to be linked.
    callbacks: Vec<(usize, Helper)>,
    /// In a callback: r6 is its context, not the program's.
    in_callback: bool,
}

/// A program.
pub(crate) fn program(random: &mut Random, style: Style) -> Vec<Insn> {
    let mut b = Builder {
        random,
        style,
        out: Vec::new(),
        calls: Vec::new(),
        callbacks: Vec::new(),
        in_callback: false,
    };
    b.emit(0xbf, 6, 1, 0, 0);
    b.wide(7, PSEUDO_MAP_VALUE, 0, 0);
    for off in (8..=WRITTEN).step_by(8) {
        let imm = b.random.imm();
        b.emit(0x7a, 10, 0, -off, imm);
    }
    for reg in NUMBERS {
        b.fresh(reg);
    }
    let n = 3 + b.random.below(12);
    for _ in 0..n {
        b.piece(2);
    }
    b.emit(0x95, 0, 0, 0, 0);
    b.callbacks();
    b.link_calls();
    b.out
}

impl Builder<'_> {
    fn emit(&mut self, opcode: u8, dst: u8, src: u8, off: i16, imm: i32) {
        self.out.push(Insn { opcode, dst, src, off, imm });
    }

    fn wide(&mut self, dst: u8, src: u8, low: u32, high: u32) {
        self.emit(0x18, dst, src, 0, low as i32);
        self.emit(0, 0, 0, 0, high as i32);
    }

    fn reg(&mut self) -> u8 {
        self.random.pick(&NUMBERS)
    }

    fn mistake(&mut self) -> bool {
        self.style == Style::Careless && self.random.chance(6)
    }

    /// Some number in `reg`.
    fn fresh(&mut self, reg: u8) {
        match self.random.below(4) {
            2 if self.in_callback => self.load(reg, 7, 64),
            0 => {
                let imm = self.random.imm();
                self.emit(0xb7, reg, 0, 0, imm);
            }
            1 => {
                let n = self.random.number();
                self.wide(reg, 0, n as u32, (n >> 32) as u32);
            }
            2 => {
                let slot = self.random.below(4) as i16;
                self.emit(0x79, reg, 6, 8 * slot, 0);
            }
            _ => self.load(reg, 7, 64),
        }
    }

    fn load(&mut self, dst: u8, base: u8, limit: u64) {
        let (bits, size) = self.random.pick(&[(0x10, 1), (0x08, 2), (0x00, 4), (0x18, 8)]);
        let signed = size < 8 && self.random.chance(30);
        let slack = u64::from(self.mistake()) * 4;
        let off = self.random.below(limit - size + 1 + slack) as i16;
        self.emit(bits | if signed { 0x81 } else { 0x61 }, dst, base, off, 0);
    }

    fn store(&mut self, base: u8, limit: u64) {
        let (bits, size) = self.random.pick(&[(0x10, 1), (0x08, 2), (0x00, 4), (0x18, 8)]);
        let slack = u64::from(self.mistake()) * 4;
        let off = self.random.below(limit - size + 1 + slack) as i16;
        let (src, imm) = (self.reg(), self.random.imm());
        if self.random.chance(50) {
            self.emit(bits | 0x63, base, src, off, 0);
        } else {
            self.emit(bits | 0x62, base, 0, off, imm);
        }
    }

    fn piece(&mut self, depth: u32) {
        match self.random.below(19) {
            18 if depth == 2 && !self.in_callback && self.callbacks.len() < 2 => self.rounds(),
            14 | 18 if self.in_callback => self.arithmetic(),
            0..=3 => self.arithmetic(),
            4 => {
                let reg = self.reg();
                self.fresh(reg);
            }
            5 => self.copy(),
            6..=7 => self.stack(),
            8 => self.store(7, 64),
            9..=10 => self.indexed(),
            11 => self.atomic(),
            12 => self.lookup(),
            13 => self.record(),
            14 => self.read_target(),
            15 if depth > 0 => self.repeat(depth),
            16 => self.call(),
            _ if depth > 0 => self.branch(depth),
            _ => self.arithmetic(),
        }
    }

    fn arithmetic(&mut self) {
        let wide = self.random.chance(50);
        let class = if wide { 7 } else { 4 };
        let (dst, src) = (self.reg(), self.reg());
        match self.random.below(8) {
            0 => self.emit(0x80 | class, dst, 0, 0, 0),
            1 => {
                let bits = self.random.pick(&[16, 32, 64]);
                let opcode = self.random.pick(&[0xd4, 0xdc, 0xd7]);
                self.emit(opcode, dst, 0, 0, bits);
            }
            2 => {
                let bits = self.random.pick(&[8, 16, if wide { 32 } else { 8 }]);
                self.emit(0xb8 | class, dst, src, bits, 0);
            }
            _ => {
                let code = self.random.pick(&[0u8, 1, 2, 3, 4, 5, 6, 7, 9, 0xa, 0xc]);
                let signed = matches!(code, 3 | 9) && self.random.chance(50);
                let off = i16::from(signed);
                if self.random.chance(50) {
                    self.emit(code << 4 | 8 | class, dst, src, off, 0);
                } else {
                    let mut imm = self.random.imm();
                    if matches!(code, 6 | 7 | 0xc) {
                        imm &= if wide { 63 } else { 31 };
                    }
                    let imm = if matches!(code, 3 | 9) && imm == 0 { 1 } else { imm };
                    self.emit(code << 4 | class, dst, 0, off, imm);
                }
            }
        }
    }

    fn copy(&mut self) {
        let (dst, src) = (self.reg(), self.reg());
        let opcode = self.random.pick(&[0xbf, 0xbf, 0xbc]);
        self.emit(opcode, dst, src, 0, 0);
    }

    /// Aligned accesses to the written part of the stack.
    fn stack(&mut self) {
        let (bits, size) = self.random.pick(&[(0x10, 1), (0x08, 2), (0x00, 4), (0x18, 8)]);
        let deep = if self.mistake() { 96 } else { i64::from(WRITTEN) };
        let off = -((1 + self.random.below((deep / size) as u64) as i64) * size) as i16;
        let reg = if self.random.chance(8) { 7 } else { self.reg() };
        if self.random.chance(50) {
            let (size, off) = if reg == 7 { (0x18, off / 8 * 8 - 8) } else { (bits, off) };
            self.emit(size | 0x63, 10, reg, off, 0);
        } else {
            let dst = self.reg();
            self.emit(bits | 0x61, dst, 10, off, 0);
        }
    }

    /// An access to map 0's value at an index that is (nearly always) bounded first.
    fn indexed(&mut self) {
        let (index, pointer) = (self.reg(), self.reg());
        if index == pointer {
            return;
        }
        let limit = if self.mistake() { 127 } else { 31 };
        match self.random.below(5) {
            0 => self.emit(0x57, index, 0, 0, limit),
            1 => self.emit(0x97, index, 0, 0, limit),
            2 => {
                let wide = self.random.chance(80);
                if !wide {
                    self.emit(0xbc, index, index, 0, 0);
                }
                self.emit(if wide { 0xb5 } else { 0xb6 }, index, 0, 1, limit);
                self.emit(0xb7, index, 0, 0, 3);
            }
            3 => {
                self.emit(0xd5, index, 0, 1, limit);
                self.emit(0xb7, index, 0, 0, 0);
                self.emit(0x75, index, 0, 1, 0);
                self.emit(0xb7, index, 0, 0, 1);
            }
            _ => self.emit(0x77, index, 0, 0, if limit == 31 { 59 } else { 57 }),
        }
        self.emit(0xbf, pointer, 7, 0, 0);
        self.emit(0x0f, pointer, index, 0, 0);
        if self.random.chance(30) {
            self.store(pointer, 32);
            self.fresh(pointer);
        } else {
            self.load(pointer, pointer, 32);
        }
    }

    fn atomic(&mut self) {
        let (bits, size) = self.random.pick(&[(0x00u8, 4i16), (0x18, 8)]);
        let op = self.random.pick(&[0, 1, 0x40, 0x41, 0x50, 0x51, 0xa0, 0xa1, 0xe1, 0xf1]);
        let (base, off) = if self.random.chance(50) {
            (7, self.random.below(8) as i16 * size)
        } else {
            (10, -(1 + self.random.below((WRITTEN / size) as u64) as i16) * size)
        };
        let src = self.reg();
        self.emit(bits | 0xc3, base, src, off, op);
    }

    fn helper(&mut self, helper: Helper) {
        self.emit(0x85, 0, 0, 0, helper as u32 as i32);
        for reg in 1..=5 {
            if !self.mistake() {
                self.fresh(reg);
            }
        }
    }

    fn lookup(&mut self) {
        self.wide(1, PSEUDO_MAP, 1, 0);
        self.emit(0xbf, 2, 10, 0, 0);
        let off = -8 * (1 + self.random.below(8) as i32);
        self.emit(0x07, 2, 0, 0, off);
        self.helper(Helper::MapLookupElem);
        if self.random.chance(40) {
            self.emit(0xbf, 8, 0, 0, 0);
        }
        if !self.mistake() {
            self.emit(0x55, 0, 0, 2, 0);
            self.emit(0xb7, 0, 0, 0, 0);
            self.emit(0x05, 0, 0, 1, 0);
            self.load(0, 0, 32);
        }
        self.fresh(8);
    }

    fn record(&mut self) {
        self.wide(1, PSEUDO_MAP, 2, 0);
        self.emit(0xb7, 2, 0, 0, 16);
        self.emit(0xb7, 3, 0, 0, 0);
        self.helper(Helper::RingbufReserve);
        let check = self.out.len();
        self.emit(0x15, 0, 0, 0, 0);
        self.store(0, 16);
        if !self.mistake() {
            self.emit(0xbf, 1, 0, 0, 0);
            self.emit(0xb7, 2, 0, 0, 0);
            let done = self.random.pick(&[Helper::RingbufSubmit, Helper::RingbufDiscard]);
            self.helper(done);
        }
        self.jump_here(check);
        for reg in 0..=5 {
            self.fresh(reg);
        }
    }

    fn read_target(&mut self) {
        let most = if self.mistake() { 24 } else { 16 };
        let size = 1 + self.random.below(most) as i32;
        self.emit(0xbf, 1, 10, 0, 0);
        let off = -16 - 8 * self.random.below(4) as i32;
        self.emit(0x07, 1, 0, 0, off);
        if self.random.chance(50) {
            self.emit(0xb7, 2, 0, 0, size);
        } else {
            self.emit(0x79, 2, 6, 8, 0);
            self.emit(0x57, 2, 0, 0, 15);
        }
        self.emit(0x79, 3, 6, 0, 0);
        let helper = self.random.pick(&[Helper::ProbeReadUser, Helper::ProbeReadUserStr]);
        self.helper(helper);
    }

    fn repeat(&mut self, depth: u32) {
        let counter = self.random.pick(&[8u8, 9]);
        self.emit(0xb7, counter, 0, 0, 0);
        let start = self.out.len();
        for _ in 0..self.random.below(4) {
            self.piece(depth - 1);
        }
        let bound = 1 + self.random.below(5) as i32;
        if self.random.chance(70) {
            self.emit(0x57, counter, 0, 0, 7);
        }
        self.emit(0x07, counter, 0, 0, 1);
        let back = start as i64 - self.out.len() as i64 - 1;
        self.emit(0xa5, counter, 0, back as i16, bound);
    }

    fn branch(&mut self, depth: u32) {
        let code = self.random.pick(&[1u8, 2, 3, 4, 5, 6, 7, 0xa, 0xb, 0xc, 0xd]);
        let class = self.random.pick(&[5u8, 6]);
        let (dst, src, imm) = (self.reg(), self.reg(), self.random.imm());
        let at = self.out.len();
        if self.random.chance(50) {
            self.emit(code << 4 | class, dst, 0, 0, imm);
        } else {
            self.emit(code << 4 | 8 | class, dst, src, 0, 0);
        }
        for _ in 0..1 + self.random.below(3) {
            self.piece(depth - 1);
        }
        if self.random.chance(40) {
            let over = self.out.len();
            self.emit(0x05, 0, 0, 0, 0);
            self.jump_here(at);
            self.piece(depth - 1);
            self.jump_here(over);
        } else {
            self.jump_here(at);
        }
    }

    fn jump_here(&mut self, at: usize) {
        self.out[at].off = (self.out.len() - at - 1) as i16;
    }

    fn call(&mut self) {
        if self.random.chance(50) {
            self.emit(0xbf, 2, 10, 0, 0);
            let off = -8 * (1 + self.random.below(8) as i32);
            self.emit(0x07, 2, 0, 0, off);
            self.calls.push(self.out.len());
            self.emit(0x85, 0, PSEUDO_CALL, 0, 0);
            for reg in 1..=5 {
                self.fresh(reg);
            }
        }
    }

    /// A call of a helper that calls a function in rounds.
    fn rounds(&mut self) {
        let helper = self.random.pick(&[Helper::Loop, Helper::Loop, Helper::ForEachMapElem]);
        match helper {
            Helper::ForEachMapElem => self.wide(1, PSEUDO_MAP, 1, 0),
            _ if self.random.chance(50) => {
                let n = self.random.below(12) as i32;
                self.emit(0xb7, 1, 0, 0, n);
            }
            _ => {
                self.emit(0x79, 1, 6, 8, 0);
                self.emit(0x57, 1, 0, 0, 15);
            }
        }
        self.callbacks.push((self.out.len(), helper));
        self.wide(2, PSEUDO_FUNC, 0, 0);
        self.emit(0xbf, 3, 10, 0, 0);
        let off = -8 * (1 + self.random.below(8) as i32);
        self.emit(0x07, 3, 0, 0, off);
        let flags = i32::from(self.random.chance(3));
        self.emit(0xb7, 4, 0, 0, flags);
        self.helper(helper);
        self.fresh(0);
    }

    /// The functions that [`Self::rounds`] refers to.
    fn callbacks(&mut self) {
        self.in_callback = true;
        let wanted = std::mem::take(&mut self.callbacks);
        for helper in [Helper::Loop, Helper::ForEachMapElem] {
            let calls: Vec<usize> =
                wanted.iter().filter(|(_, h)| *h == helper).map(|(at, _)| *at).collect();
            if calls.is_empty() {
                continue;
            }
            let start = self.out.len();
            for at in calls {
                self.out[at].imm = (start - at - 1) as i32;
            }
            self.callback(helper);
        }
    }

    fn callback(&mut self, helper: Helper) {
        let context = if helper == Helper::Loop { 2 } else { 4 };
        self.emit(0xbf, 6, context, 0, 0);
        self.wide(7, PSEUDO_MAP_VALUE, 0, 0);
        for off in (8..=WRITTEN).step_by(8) {
            let imm = self.random.imm();
            self.emit(0x7a, 10, 0, -off, imm);
        }
        if helper == Helper::Loop {
            self.emit(0xbf, 8, 1, 0, 0);
        } else {
            self.emit(0x79, 8, 2, 0, 0);
            if self.random.chance(50) {
                self.store(3, 32);
            }
        }
        for reg in 0..=5 {
            self.fresh(reg);
        }
        self.emit(0x79, 9, 6, 0, 0);
        for _ in 0..self.random.below(5) {
            self.piece(1);
        }
        match self.random.below(3) {
            0 => {
                let reg = self.reg();
                self.emit(0x7b, 6, reg, 0, 0);
            }
            1 => {
                let imm = 1 + self.random.below(3) as i32;
                self.emit(0x79, 3, 6, 0, 0);
                self.emit(0x07, 3, 0, 0, imm);
                self.emit(0x7b, 6, 3, 0, 0);
            }
            _ => {}
        }
        if self.random.chance(50) {
            self.emit(0x57, 0, 0, 0, 1);
        } else if !self.mistake() {
            let result = i32::from(self.random.chance(20));
            self.emit(0xb7, 0, 0, 0, result);
        }
        self.emit(0x95, 0, 0, 0, 0);
    }

    /// One function: takes a number and a pointer to 8 bytes of its caller's stack.
    fn link_calls(&mut self) {
        let start = self.out.len();
        for at in std::mem::take(&mut self.calls) {
            self.out[at].imm = (start - at - 1) as i32;
        }
        if !self.out.iter().any(|i| i.opcode == 0x85 && i.src == PSEUDO_CALL) {
            return;
        }
        self.emit(0xbf, 0, 1, 0, 0);
        self.emit(0xb7, 6, 0, 0, 5);
        self.emit(0x7b, 10, 0, -8, 0);
        self.emit(0xa5, 1, 0, 1, 7);
        self.emit(0x57, 0, 0, 0, 31);
        self.emit(0x7b, 2, 0, 0, 0);
        self.emit(0x79, 3, 10, -8, 0);
        self.emit(0x1f, 0, 3, 0, 0);
        self.emit(0x95, 0, 0, 0, 0);
    }
}
