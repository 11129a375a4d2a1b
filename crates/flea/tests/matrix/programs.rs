//! The eBPF side: for every function and kind a program that stores every `ctx` slot, and at
//! exit every slot of the result, where this test finds it. Start at [`object`].

use flea::asm::{Asm, JmpOp, Reg, Size};
use flea::signature::{RetWord, Signature};
use flea::{Helper, MapIdx, MapKind, MapSpec, ObjectSpec, ProgramKind, ProgramSpec};

use Reg::{R0, R1, R2, R3, R6, R7, R10};

/// The kinds that every function is traced with, all at once.
pub const KINDS: &[ProgramKind] =
    &[ProgramKind::Fentry, ProgramKind::Fsession, ProgramKind::FmodRet, ProgramKind::Fexit];

/// The one map.
pub const MAP_NAME: &str = "seen";

/// Words of a record before the arguments: how often it was written, what
/// bpf_get_func_arg_cnt and bpf_get_func_ip say, the session's cookie.
pub const HEADER_WORDS: usize = 4;

/// One run of a program: of which kind, and on which side of the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    pub kind: ProgramKind,
    pub is_exit: bool,
}

/// All sides of `kinds`.
pub fn sides(kinds: &[ProgramKind]) -> Vec<Side> {
    let mut sides = Vec::new();
    for &kind in kinds {
        if has_entry(kind) {
            sides.push(Side { kind, is_exit: false });
        }
        if has_exit(kind) {
            sides.push(Side { kind, is_exit: true });
        }
    }
    sides
}

fn has_entry(kind: ProgramKind) -> bool {
    kind != ProgramKind::Fexit
}

fn has_exit(kind: ProgramKind) -> bool {
    matches!(kind, ProgramKind::Fexit | ProgramKind::Fsession)
}

/// What a record of one function holds.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Argument slots.
    pub n_args: usize,
    /// Result slots.
    pub n_results: usize,
    /// Memory that is read through a slot: the slot, and how many bytes.
    pub reads: Vec<(usize, usize)>,
    /// Memory that is read through the first slot of the result.
    pub result_bytes: usize,
}

impl Shape {
    /// For a function of this signature.
    pub fn new(signature: &Signature, reads: Vec<(usize, usize)>, result_bytes: usize) -> Self {
        let in_memory = signature.ret.words == [RetWord::Rax];
        Self {
            n_args: signature.arg_words().count(),
            n_results: signature.ret.words.len(),
            reads,
            result_bytes: if in_memory { result_bytes } else { 0 },
        }
    }

    /// Where the result's slots begin, in words.
    pub fn result_at(&self) -> usize {
        HEADER_WORDS + self.n_args
    }

    /// Where the memory behind the n-th read begins, in words.
    pub fn read_at(&self, n: usize) -> usize {
        let before: usize = self.reads.iter().take(n).map(|(_, bytes)| bytes.div_ceil(8)).sum();
        self.result_at() + self.n_results + before
    }

    /// Where the memory behind the result begins, in words.
    pub fn result_memory_at(&self) -> usize {
        self.read_at(self.reads.len())
    }

    /// Words of one record.
    pub fn n_words(&self) -> usize {
        self.result_memory_at() + self.result_bytes.div_ceil(8)
    }
}

/// Where every record is in the map's one value, in words: by function, then by side.
pub struct Records {
    first: Vec<usize>,
    stride: Vec<usize>,
    n_words: usize,
}

impl Records {
    pub fn of(shapes: &[Shape]) -> Self {
        let n_sides = sides(KINDS).len();
        let stride: Vec<usize> = shapes.iter().map(Shape::n_words).collect();
        let mut n_words = 0;
        let first = stride
            .iter()
            .map(|stride| {
                let at = n_words;
                n_words += stride * n_sides;
                at
            })
            .collect();
        Self { first, stride, n_words }
    }

    /// Of function `f`.
    pub fn at(&self, f: usize, side: Side) -> usize {
        let n = sides(KINDS).iter().position(|s| *s == side).expect("a side of a kind");
        self.first[f] + self.stride[f] * n
    }
}

/// The name of the program for function `f`.
pub fn program_name(f: usize, kind: ProgramKind) -> String {
    format!("{}_{f:03}", kind.name())
}

/// What a session leaves in its cookie.
pub fn session_cookie(f: usize) -> u64 {
    0x5e55_1000_0000_0000 + f as u64
}

/// A program per function and kind, and the map.
pub fn object(shapes: &[Shape]) -> ObjectSpec {
    let records = Records::of(shapes);
    let mut programs = Vec::new();
    for (f, shape) in shapes.iter().enumerate() {
        for &kind in KINDS {
            programs.push(ProgramSpec {
                name: program_name(f, kind),
                section: kind.name().to_owned(),
                kind,
                insns: program(f, kind, shape, &records).finish().expect("all labels are bound"),
                ..ProgramSpec::default()
            });
        }
    }
    let map = MapSpec {
        name: MAP_NAME.to_owned(),
        kind: MapKind::Array,
        key_size_bytes: 4,
        value_size_bytes: u32::try_from(8 * records.n_words).expect("a small source"),
        max_entries: 1,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    };
    ObjectSpec { maps: vec![map], programs, ..ObjectSpec::default() }
}

fn program(f: usize, kind: ProgramKind, shape: &Shape, records: &Records) -> Asm {
    let mut a = Asm::new();
    a.mov64_reg(R6, R1);
    let (exit_side, out) = (a.new_label(), a.new_label());
    if kind == ProgramKind::Fsession {
        a.call(Helper::SessionIsReturn).jump_if(JmpOp::Ne, R0, 0, exit_side);
    }
    if has_entry(kind) {
        record(&mut a, shape, records.at(f, Side { kind, is_exit: false }), false);
        disturb(&mut a);
    }
    if kind == ProgramKind::Fsession {
        a.mov64_reg(R1, R6).call(Helper::SessionCookie);
        a.lddw(R1, session_cookie(f)).store(Size::DW, R0, 0, R1).jump(out);
        a.bind(exit_side);
    }
    if has_exit(kind) {
        record(&mut a, shape, records.at(f, Side { kind, is_exit: true }), true);
        if kind == ProgramKind::Fsession {
            a.mov64_reg(R1, R6).call(Helper::SessionCookie);
            a.load(Size::DW, R1, R0, 0).store(Size::DW, R7, 24, R1);
        }
        disturb(&mut a);
    }
    a.bind(out).mov64_imm(R0, 0).exit();
    a
}

/// Stores the record at word `at`.
fn record(a: &mut Asm, shape: &Shape, at: usize, is_exit: bool) {
    let word = |n: usize| i16::try_from(8 * n).expect("a record is small");
    a.map_value(R7, MapIdx(0), u32::try_from(8 * at).expect("a small map"));
    a.load(Size::DW, R1, R7, 0).add64_imm(R1, 1).store(Size::DW, R7, 0, R1);
    a.mov64_reg(R1, R6).call(Helper::GetFuncArgCnt).store(Size::DW, R7, 8, R0);
    a.mov64_reg(R1, R6).call(Helper::GetFuncIp).store(Size::DW, R7, 16, R0);
    let n_slots = shape.n_args + if is_exit { shape.n_results } else { 0 };
    for slot in 0..n_slots {
        a.load(Size::DW, R1, R6, word(slot)).store(Size::DW, R7, word(HEADER_WORDS + slot), R1);
    }
    let mut read = |slot: usize, n_bytes: usize, to: usize| {
        a.mov64_reg(R1, R7).add64_imm(R1, i32::from(word(to)));
        a.mov64_imm(R2, i32::try_from(n_bytes).expect("a small type"));
        a.load(Size::DW, R3, R6, word(slot)).call(Helper::ProbeReadUser);
    };
    for (n, &(slot, n_bytes)) in shape.reads.iter().enumerate() {
        read(slot, n_bytes, shape.read_at(n));
    }
    if is_exit && shape.result_bytes > 0 {
        read(shape.n_args, shape.result_bytes, shape.result_memory_at());
    }
}

/// A call of the runtime that fails: it goes through a system call, and whatever compiled Rust
/// does with registers must not be seen outside.
fn disturb(a: &mut Asm) {
    a.mov64_reg(R1, R10).add64_imm(R1, -16).mov64_imm(R2, 16).mov64_imm(R3, 8);
    a.call(Helper::ProbeReadUser);
}
