//! The eBPF programs of the built-in commands. They go the way of everybody's programs:
//! verifier, compiler, patch. Each is attached once per function with the function's index as
//! its attach cookie, so one program serves them all.

use flea_object::{
    asm::{AluOp, Asm, JmpOp, Reg, Size},
    helper::Helper,
    spec::{MapIdx, MapKind, MapSpec, Object, Program, ProgramKind},
};

use super::histogram::{FIRST_BUCKET, FIRST_NEGATIVE, N_BUCKETS, Signedness, WAITING, WORDS};
use Reg::{R0, R1, R2, R3, R6, R7, R8, R9, R10};

/// The one map of each of these objects.
pub(super) const MAP: MapIdx = MapIdx(0);
/// Its name.
pub(super) const MAP_NAME: &str = "results";
/// Bytes kept of a string argument, its NUL included.
pub(super) const STRING_BYTES: u32 = 64;
/// Bytes of the ring buffer of `trace`.
const RING_BYTES: u32 = 8 << 20;

/// Where a value of a histogram comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    /// `ctx[slot]` at entry.
    Argument {
        /// The slot.
        slot: u8,
        /// Meaningful low bits.
        bits: u8,
    },
    /// The result, in the slot behind `n_args` arguments.
    Result {
        /// Argument slots.
        n_args: u8,
        /// Meaningful low bits.
        bits: u8,
    },
    /// Time from entry to exit.
    Duration,
}

/// Calls per function.
pub(super) fn count(n_functions: u32) -> Object {
    let mut a = Asm::new();
    let out = a.new_label();
    a.call(Helper::GetAttachCookie).store(Size::W, R10, -4, R0);
    lookup(&mut a);
    a.jump_if(JmpOp::Eq, R0, 0, out);
    a.load(Size::DW, R1, R0, 0).add64_imm(R1, 1).store(Size::DW, R0, 0, R1);
    a.bind(out).mov64_imm(R0, 0).exit();
    object(per_thread_array(8, n_functions), "count", ProgramKind::Fentry, &a)
}

/// A histogram per function.
pub(super) fn histogram(n_functions: u32, source: Source, sign: Signedness) -> Object {
    let mut a = Asm::new();
    let out = a.new_label();
    a.mov64_reg(R6, R1);
    let kind = match source {
        Source::Argument { slot, bits } => {
            load_value(&mut a, slot, bits, sign);
            ProgramKind::Fentry
        }
        Source::Result { n_args, bits } => {
            load_value(&mut a, n_args, bits, sign);
            ProgramKind::Fexit
        }
        Source::Duration => {
            load_duration(&mut a, out);
            ProgramKind::Fsession
        }
    };
    record_value(&mut a, sign, out);
    a.bind(out).mov64_imm(R0, 0).exit();
    let value_bytes = u32::try_from(WORDS * 8).expect("a histogram is small");
    object(per_thread_array(value_bytes, n_functions), "histogram", kind, &a)
}

/// What one call writes into the ring buffer, all little-endian u64 words.
///
/// ```text
///   entry   TAG_ENTRY << 32 | function, time, pid_tgid, n_args words, then STRING_BYTES for
///           each string argument (a NUL first where it cannot be read)
///   exit    TAG_EXIT << 32 | function, time, pid_tgid, time of the entry, result, then
///           STRING_BYTES where the result is a string
/// ```
pub(super) const TAG_ENTRY: u32 = 1;
/// See [`TAG_ENTRY`].
pub(super) const TAG_EXIT: u32 = 2;
/// Bytes before the arguments.
pub(super) const ENTRY_HEADER_BYTES: usize = 24;
/// Bytes of an exit record.
pub(super) const EXIT_BYTES: usize = 40;

/// What of a signature decides how its calls are recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Argument slots.
    pub(super) n_args: u8,
    /// Slots that hold a `char *`.
    pub(super) strings: Vec<u8>,
    /// What the result is.
    pub(super) result: ResultKind,
}

/// Whether a result is more than its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ResultKind {
    Word,
    /// A `char *`.
    Text,
}

/// Both records of a call of a function of this shape.
pub(super) fn trace_program(shape: &Shape) -> Program {
    let Shape { n_args, strings, result } = shape;
    let n_args = *n_args;
    let mut a = Asm::new();
    let (out, exit_side) = (a.new_label(), a.new_label());
    let args_bytes = ENTRY_HEADER_BYTES + 8 * usize::from(n_args);
    let entry_bytes = args_bytes + strings.len() * STRING_BYTES as usize;
    let at = |bytes: usize| i16::try_from(bytes).expect("a record is below 32 KiB");

    a.mov64_reg(R6, R1);
    a.call(Helper::GetAttachCookie).mov64_reg(R8, R0);
    a.mov64_reg(R1, R6).call(Helper::SessionIsReturn);
    a.jump_if(JmpOp::Ne, R0, 0, exit_side);

    reserve(&mut a, entry_bytes, out);
    header(&mut a, TAG_ENTRY);
    for slot in 0..n_args {
        a.load(Size::DW, R1, R6, 8 * i16::from(slot));
        a.store(Size::DW, R7, at(ENTRY_HEADER_BYTES + 8 * usize::from(slot)), R1);
    }
    for (i, &slot) in strings.iter().enumerate() {
        let offset = at(args_bytes + i * STRING_BYTES as usize);
        read_string(&mut a, offset, slot);
    }
    a.mov64_reg(R1, R6).call(Helper::SessionCookie).mov64_reg(R9, R0);
    // The time last, so that the duration is the function's and not this program's.
    a.call(Helper::KtimeGetNs).store(Size::DW, R7, 8, R0).store(Size::DW, R9, 0, R0);
    submit(&mut a, out);

    // For the same reason, the time first.
    a.bind(exit_side).call(Helper::KtimeGetNs).store(Size::DW, R10, -8, R0);
    a.mov64_reg(R1, R6).call(Helper::SessionCookie).load(Size::DW, R9, R0, 0);
    a.jump_if(JmpOp::Eq, R9, 0, out);
    let text_bytes = if *result == ResultKind::Text { STRING_BYTES as usize } else { 0 };
    reserve(&mut a, EXIT_BYTES + text_bytes, out);
    header(&mut a, TAG_EXIT);
    a.load(Size::DW, R1, R10, -8).store(Size::DW, R7, 8, R1).store(Size::DW, R7, 24, R9);
    a.load(Size::DW, R1, R6, 8 * i16::from(n_args)).store(Size::DW, R7, 32, R1);
    if *result == ResultKind::Text {
        read_string(&mut a, at(EXIT_BYTES), n_args);
    }
    submit(&mut a, out);

    a.bind(out).mov64_imm(R0, 0).exit();
    program("trace", ProgramKind::Fsession, &a)
}

/// The map of [`trace_program`]s, to which the caller adds one program per shape.
pub(super) fn trace_object(programs: Vec<Program>) -> Object {
    let map = MapSpec {
        name: MAP_NAME.to_owned(),
        kind: MapKind::RingBuf,
        key_size_bytes: 0,
        value_size_bytes: 0,
        max_entries: RING_BYTES,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    };
    Object { maps: vec![map], programs, ..Object::default() }
}

/// r7 = a new record of `bytes`; jumps to `out` where there is no room.
fn reserve(a: &mut Asm, bytes: usize, out: flea_object::asm::Label) {
    a.map_ref(R1, MAP).mov64_imm(R2, i32::try_from(bytes).expect("a record is small"));
    a.mov64_imm(R3, 0).call(Helper::RingbufReserve);
    a.jump_if(JmpOp::Eq, R0, 0, out).mov64_reg(R7, R0);
}

/// The record in r7 but for its time, for the function whose index is in r8.
fn header(a: &mut Asm, tag: u32) {
    a.call(Helper::GetCurrentPidTgid).store(Size::DW, R7, 16, R0);
    a.store(Size::W, R7, 0, R8).store_imm(Size::W, R7, 4, tag.cast_signed());
}

/// Copies the string that `ctx[slot]` points at to `offset` in the record.
fn read_string(a: &mut Asm, offset: i16, slot: u8) {
    // A record's memory was zeroed by the reader; an unreadable string stays "".
    a.store_imm(Size::B, R7, offset, 0);
    a.mov64_reg(R1, R7).add64_imm(R1, offset.into());
    a.mov64_imm(R2, STRING_BYTES.cast_signed());
    a.load(Size::DW, R3, R6, 8 * i16::from(slot)).call(Helper::ProbeReadUserStr);
}

fn submit(a: &mut Asm, out: flea_object::asm::Label) {
    a.mov64_reg(R1, R7).mov64_imm(R2, 0).call(Helper::RingbufSubmit).jump(out);
}

/// r0 = address of the element whose index is at r10 - 4, or 0.
fn lookup(a: &mut Asm) {
    a.map_ref(R1, MAP).mov64_reg(R2, R10).add64_imm(R2, -4).call(Helper::MapLookupElem);
}

/// r7 = `ctx[slot]`, extended from `bits`. The context is in r6.
fn load_value(a: &mut Asm, slot: u8, bits: u8, sign: Signedness) {
    a.load(Size::DW, R7, R6, 8 * i16::from(slot));
    let unused = 64 - i32::from(bits);
    if unused > 0 {
        let back = if sign == Signedness::Signed { AluOp::Arsh } else { AluOp::Rsh };
        a.alu64(AluOp::Lsh, R7, unused).alu64(back, R7, unused);
    }
}

/// At entry notes the time and jumps to `out`; at exit r7 = time since then.
fn load_duration(a: &mut Asm, out: flea_object::asm::Label) {
    let exit_side = a.new_label();
    a.call(Helper::SessionIsReturn).jump_if(JmpOp::Ne, R0, 0, exit_side);
    a.mov64_reg(R1, R6).call(Helper::SessionCookie).mov64_reg(R7, R0);
    a.call(Helper::KtimeGetNs).store(Size::DW, R7, 0, R0).jump(out);
    a.bind(exit_side).call(Helper::KtimeGetNs).mov64_reg(R7, R0);
    a.mov64_reg(R1, R6).call(Helper::SessionCookie).load(Size::DW, R1, R0, 0);
    // Zero: nobody has noted when this call was entered.
    a.jump_if(JmpOp::Eq, R1, 0, out).alu64(AluOp::Sub, R7, R1);
}

/// Adds r7 to the histogram of the function in the attach cookie; see `histogram`'s layout.
fn record_value(a: &mut Asm, sign: Signedness, out: flea_object::asm::Label) {
    a.mov64_reg(R1, R6).call(Helper::GetAttachCookie).store(Size::W, R10, -4, R0);
    lookup(a);
    a.jump_if(JmpOp::Eq, R0, 0, out).mov64_reg(R8, R0);
    a.load(Size::DW, R1, R8, 0).add64_imm(R1, 1).store(Size::DW, R8, 0, R1);
    a.load(Size::DW, R1, R8, 8).alu64(AluOp::Add, R1, R7).store(Size::DW, R8, 8, R1);

    a.mov64_reg(R1, R7);
    if sign == Signedness::Signed {
        a.lddw(R2, 1 << 63).alu64(AluOp::Xor, R1, R2);
    }
    let (not_largest, not_smallest) = (a.new_label(), a.new_label());
    a.load(Size::DW, R2, R8, 16).jump_if(JmpOp::Le, R1, R2, not_largest);
    a.store(Size::DW, R8, 16, R1).bind(not_largest);
    a.alu64(AluOp::Xor, R1, -1);
    a.load(Size::DW, R2, R8, 24).jump_if(JmpOp::Le, R1, R2, not_smallest);
    a.store(Size::DW, R8, 24, R1).bind(not_smallest);

    // The value before this one goes into its bucket, this one waits: so nothing that depends on
    // a clock's answer is an address. A clock waits for all loads before it.
    bucket(a, sign);
    let waiting = i16::try_from(WAITING * 8).expect("a few words");
    let last = i32::try_from(N_BUCKETS).expect("a few words");
    a.add64_imm(R9, 1).load(Size::DW, R1, R8, waiting).store(Size::DW, R8, waiting, R9);
    a.jump_if(JmpOp::Eq, R1, 0, out).jump_if(JmpOp::Gt, R1, last, out);
    a.alu64(AluOp::Lsh, R1, 3).alu64(AluOp::Add, R8, R1);
    let first = i16::try_from((FIRST_BUCKET - 1) * 8).expect("a few words");
    a.load(Size::DW, R1, R8, first).add64_imm(R1, 1).store(Size::DW, R8, first, R1);
}

/// r9 = the bucket of r7, in 0..=128: the number of its highest set bit.
fn bucket(a: &mut Asm, sign: Signedness) {
    a.mov64_reg(R1, R7);
    if sign == Signedness::Unsigned {
        a.call(Helper::Fls64).mov64_reg(R9, R0);
        return;
    }
    let (positive, done) = (a.new_label(), a.new_label());
    a.jump_if(JmpOp::Sge, R1, 0, positive);
    a.neg64(R1).call(Helper::Fls64).mov64_reg(R9, R0);
    // Those of negative numbers come behind those of 0 and the positive ones.
    let behind = i32::try_from(FIRST_NEGATIVE - 1).expect("a few words");
    a.add64_imm(R9, behind).jump(done);
    a.bind(positive).call(Helper::Fls64).mov64_reg(R9, R0).bind(done);
}

fn per_thread_array(value_size_bytes: u32, max_entries: u32) -> MapSpec {
    MapSpec {
        name: MAP_NAME.to_owned(),
        kind: MapKind::PerCpuArray,
        key_size_bytes: 4,
        value_size_bytes,
        max_entries: max_entries.max(1),
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    }
}

fn object(map: MapSpec, name: &str, kind: ProgramKind, a: &Asm) -> Object {
    Object { maps: vec![map], programs: vec![program(name, kind, a)], ..Object::default() }
}

fn program(name: &str, kind: ProgramKind, a: &Asm) -> Program {
    Program {
        name: name.to_owned(),
        section: format!("built-in/{name}"),
        kind,
        insns: a.finish().expect("a built-in program's labels are bound and near"),
        ..Program::default()
    }
}
