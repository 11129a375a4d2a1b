//! Random images: any signature, any programs of several controllers, any first instructions.

use flea_image::{
    BODY_FRAMES_OFFSET, Body, BodyRef, BodyRequest, Cpu, FrameArena, ProgramUse, Question,
    RelocTarget, SiteKind, Skeleton, SkeletonBody, SkeletonRequest, StackCopy, changeable,
    compile_body, link_skeleton, link_unwinder_skeleton, skip_result,
};
use flea_layout::shared::RuntimeFn;
use flea_object::helper::Helper;
use flea_object::insn::Insn;
use flea_object::spec::{MapKind, MapSpec, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::{ArgWord, RetWord, Signature};
use flea_verifier::Verified;
use flea_verifier::facts::Region;
use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, FlowControl, IcedError, Instruction};
use proptest::prelude::*;
use proptest::sample::subsequence;

use super::arithmetic::operation;
use super::programs::{counter, lddw_map, lddw_value, map, plan, record, value, words};
use super::rig::assemble;
use super::{access, call, call_with, insn, plain, program};

pub const SITE: RemoteAddr = RemoteAddr(0x40_1000);
pub const IMAGE: RemoteAddr = RemoteAddr(0x60_0000);
const CALLED: RemoteAddr = RemoteAddr(0x50_0000);
pub const ARENA: u64 = 0x7000_0000_0000;
pub const RUNTIME: u64 = 0x7001_0000_0000;

/// What a program does.
#[derive(Clone, Debug)]
pub enum Does {
    Count,
    Record,
    Latency,
    Hash,
    Stack,
    Arithmetic(Vec<Insn>),
    /// Adds to what it can change: bit i for the i-th of that.
    Change(u8),
}

/// The programs of one controller.
#[derive(Clone, Debug)]
pub struct Controller {
    pub programs: Vec<(Does, ProgramKind)>,
    pub is_inline: bool,
    /// Frame words that somebody before it has left.
    pub hole_words: u32,
}

impl Controller {
    /// Where no value can be the function's result.
    fn without_fmod_ret(&mut self) {
        for (_, kind) in &mut self.programs {
            if *kind == ProgramKind::FmodRet {
                *kind = ProgramKind::Fsession;
            }
        }
    }
}

/// Everything that goes into an image.
#[derive(Clone, Debug)]
pub struct Case {
    pub signature: Signature,
    pub controllers: Vec<Controller>,
    pub replaced: Vec<u8>,
    pub kind: SiteKind,
    pub stack_copy: StackCopy,
    pub stack_align_bytes: u32,
    pub asked: Option<Question>,
}

/// What a skeleton was linked from.
pub struct Linked<'a> {
    pub request: &'a SkeletonRequest<'a>,
    pub asked: Option<Question>,
}

/// Where `target` is.
pub fn address_of(target: RelocTarget) -> u64 {
    match target {
        RelocTarget::Arena { addend } => ARENA.wrapping_add_signed(addend),
        RelocTarget::Runtime(f) => {
            RUNTIME + 64 * RuntimeFn::ALL.iter().position(|g| *g == f).unwrap() as u64
        }
        RelocTarget::VdsoClockGettime => 0x7fff_0000_1000,
        RelocTarget::FunctionAddress => SITE.0,
        RelocTarget::Cookie { program } => 1 + u64::from(program),
        RelocTarget::Constant(_) | RelocTarget::ThreadPointer | RelocTarget::SkeletonFrame => {
            unreachable!()
        }
    }
}

fn maps() -> [MapSpec; 3] {
    [map(MapKind::PerCpuArray, 8, 1), map(MapKind::Array, 256, 1), map(MapKind::Hash, 8, 16)]
}

impl Does {
    fn program(&self, signature: &Signature, kind: ProgramKind) -> Verified {
        let n_args = i16::try_from(signature.arg_words().count()).unwrap();
        let n_results = i16::from(kind == ProgramKind::Fexit);
        match self {
            Self::Count => counter(0),
            Self::Record => record(1, n_args + n_results),
            Self::Latency => latency(),
            Self::Hash => hash(),
            Self::Stack => stack(),
            Self::Arithmetic(ops) => arithmetic(ops, n_args),
            Self::Change(which) => change(*which, signature, kind),
        }
    }
}

/// `*total += bpf_ktime_get_ns() - ...`, without a cookie: any kind may run it.
fn latency() -> Verified {
    let mut p = vec![call(Helper::KtimeGetNs, None), plain(insn(0xbf, 7, 0, 0, 0))];
    p.extend(lddw_value(2, 1, 0));
    p.extend([
        access(insn(0xdb, 2, 7, 0, 0), value(1)),
        plain(insn(0xb7, 0, 0, 0, 0)),
        plain(insn(0x95, 0, 0, 0, 0)),
    ]);
    program(&p)
}

/// `u32 key = 3; u64 *v = lookup(&hash, &key); if (v) *v = 7; else update(&hash, &key, &one, 0);`
fn hash() -> Verified {
    let mut p = vec![
        access(insn(0x62, 10, 0, -4, 3), Region::Stack),
        access(insn(0x7a, 10, 0, -16, 1), Region::Stack),
        plain(insn(0xbf, 2, 10, 0, 0)),
        plain(insn(0x07, 2, 0, 0, -4)),
    ];
    p.extend(lddw_map(1, 2));
    p.extend([
        call(Helper::MapLookupElem, Some(2)),
        plain(insn(0x15, 0, 0, 2, 0)),
        access(insn(0x7a, 0, 0, 0, 7), value(2)),
        plain(insn(0x05, 0, 0, 8, 0)),
        plain(insn(0xbf, 2, 10, 0, 0)),
        plain(insn(0x07, 2, 0, 0, -4)),
        plain(insn(0xbf, 3, 10, 0, 0)),
        plain(insn(0x07, 3, 0, 0, -16)),
        plain(insn(0xb7, 4, 0, 0, 0)),
    ]);
    p.extend(lddw_map(1, 2));
    p.extend([
        call(Helper::MapUpdateElem, Some(2)),
        plain(insn(0xb7, 0, 0, 0, 0)),
        plain(insn(0x95, 0, 0, 0, 0)),
    ]);
    program(&p)
}

/// `bpf_get_current_comm(buf, 16)`, and a byte of it by a computed index into the array.
fn stack() -> Verified {
    let mut p = vec![
        plain(insn(0xbf, 1, 10, 0, 0)),
        plain(insn(0x07, 1, 0, 0, -16)),
        plain(insn(0xb7, 2, 0, 0, 16)),
        call_with(Helper::GetCurrentComm, None, [None, Some(16), None, None, None]),
        plain(insn(0x57, 0, 0, 0, 15)),
        plain(insn(0xbf, 3, 10, 0, 0)),
        plain(insn(0x0f, 3, 0, 0, 0)),
        access(insn(0x71, 4, 3, -16, 0), Region::Stack),
        access(insn(0x72, 3, 0, -16, 1), Region::Stack),
    ];
    p.extend(lddw_value(2, 1, 8));
    p.extend([
        access(insn(0x7b, 2, 4, 0, 0), value(1)),
        plain(insn(0xb7, 0, 0, 0, 0)),
        plain(insn(0x95, 0, 0, 0, 0)),
    ]);
    program(&p)
}

/// r0 to r5 from the arguments, `ops`, everything into the array.
fn arithmetic(ops: &[Insn], n_args: i16) -> Verified {
    let mut p = vec![plain(insn(0xbf, 6, 1, 0, 0))];
    for r in 0..6u8 {
        if n_args == 0 {
            p.push(plain(insn(0xb7, r, 0, 0, i32::from(r) + 3)));
            continue;
        }
        let offset = i16::from(r) % n_args * 8;
        let region = Region::Ctx { offset_bytes: offset.into() };
        p.push(access(insn(0x79, r, 6, offset, 0), region));
    }
    p.extend(ops.iter().map(|op| plain(*op)));
    p.extend(lddw_value(7, 1, 0));
    for r in 0..6u8 {
        p.push(access(insn(0x7b, 7, r, i16::from(r) * 8, 0), value(1)));
    }
    p.extend([plain(insn(0xb7, 0, 0, 0, 0)), plain(insn(0x95, 0, 0, 0, 0))]);
    program(&p)
}

/// `if (ctx[i]) ctx[i] += 5;` for each bit of `which`, by turns all 8 bytes and the low 4.
fn change(which: u8, signature: &Signature, kind: ProgramKind) -> Verified {
    let mut p = vec![plain(insn(0xbf, 6, 1, 0, 0))];
    let words = changeable(kind, signature).words();
    for (i, word) in words.enumerate().filter(|(i, _)| which >> (i % 8) & 1 != 0) {
        let offset = i16::try_from(8 * word).unwrap();
        let region = Region::Ctx { offset_bytes: offset.into() };
        let store = if i % 2 == 0 { 0x7b } else { 0x63 };
        p.extend([
            access(insn(0x79, 2, 6, offset, 0), region),
            plain(insn(0x15, 2, 0, 2, 0)),
            plain(insn(0x07, 2, 0, 0, 5)),
            access(insn(store, 6, 2, offset, 0), region),
        ]);
    }
    p.extend([plain(insn(0xb7, 0, 0, 0, 0)), plain(insn(0x95, 0, 0, 0, 0))]);
    program(&p)
}

/// Links `case` and shows `look` the outcome.
pub fn with_image(case: &Case, look: impl FnOnce(&Linked<'_>, &Skeleton)) {
    let mut offset = BODY_FRAMES_OFFSET;
    let mut made = Vec::new();
    for controller in &case.controllers {
        offset += 8 * controller.hole_words;
        let body = compile(&case.signature, controller, offset);
        offset += 8 * body.frame_words;
        let sides = [&body.entry, &body.session, &body.modify, &body.exit];
        let resolved = sides.map(|code| code.as_ref().map(|c| c.resolve(address_of)));
        made.push((offset - 8 * body.frame_words, body, resolved));
    }
    let bodies: Vec<SkeletonBody<'_>> = (0..)
        .zip(case.controllers.iter().zip(&made))
        .map(|(i, (controller, (frame_offset, body, resolved)))| {
            let refer = |side: usize| {
                resolved[side].as_deref().map(|bytes| match controller.is_inline {
                    true => BodyRef::Inline(bytes),
                    false => BodyRef::Call(CALLED.offset(0x1000 * i + 0x100 * side as i64)),
                })
            };
            SkeletonBody {
                entry: refer(0),
                session: refer(1),
                modify: refer(2),
                exit: refer(3),
                reads: &body.reads,
                saves: &body.saves,
                changes: body.changes,
                frame_words: body.frame_words,
                frame_offset: *frame_offset,
            }
        })
        .collect();
    let request = SkeletonRequest {
        replacement: None,
        site: SITE,
        replaced: &case.replaced,
        kind: case.kind,
        image_address: IMAGE,
        bodies: &bodies,
        skip: skip_result(&case.signature).ok(),
        stack_copy: case.stack_copy,
        stack_align_bytes: case.stack_align_bytes,
    };
    let at = |offset| RemoteAddr(IMAGE.0 + offset);
    let arena = FrameArena { start: at(0), end: at(0x20_0000), rows: at(0x1000) };
    let skeleton = match case.asked {
        Some(question) => link_unwinder_skeleton(&request, question, &[arena]).unwrap(),
        None => link_skeleton(&request).unwrap(),
    };
    look(&Linked { request: &request, asked: case.asked }, &skeleton);
}

fn compile(signature: &Signature, controller: &Controller, frame_offset: u32) -> Body {
    let programs: Vec<(Verified, ProgramKind)> = controller
        .programs
        .iter()
        .map(|(does, kind)| (does.program(signature, *kind), *kind))
        .collect();
    let programs: Vec<ProgramUse<'_>> = (0u32..)
        .zip(&programs)
        .map(|(i, (verified, kind))| ProgramUse {
            verified,
            kind: *kind,
            cookie: 1,
            state_index: i % 4,
        })
        .collect();
    let maps = maps();
    let request = BodyRequest {
        signature,
        programs: &programs,
        maps: &maps,
        plan: &plan(&maps),
        function_address: SITE,
        frame_offset,
        printk_map: None,
        cpu: Cpu::default(),
    };
    compile_body(&request).unwrap()
}

fn does() -> impl Strategy<Value = Does> {
    prop_oneof![
        Just(Does::Count),
        Just(Does::Record),
        Just(Does::Latency),
        Just(Does::Hash),
        Just(Does::Stack),
        proptest::collection::vec(operation(), 1..24).prop_map(Does::Arithmetic),
    ]
}

fn controller() -> impl Strategy<Value = Controller> {
    let kinds =
        [ProgramKind::Fentry, ProgramKind::Fsession, ProgramKind::FmodRet, ProgramKind::Fexit];
    let programs =
        proptest::collection::vec((does(), proptest::sample::select(kinds.to_vec())), 1..4);
    let mostly_no_hole = prop_oneof![4 => Just(0u32), 1 => 1u32..5];
    (programs, any::<bool>(), mostly_no_hole).prop_map(|(programs, is_inline, hole_words)| {
        Controller { programs, is_inline, hole_words }
    })
}

fn signature() -> impl Strategy<Value = Signature> {
    let args = (0u8..=6, 0u8..=8, 0u32..=7).prop_flat_map(|(gpr, xmm, stack)| {
        let all = (0..gpr).map(ArgWord::Gpr).chain((0..xmm).map(ArgWord::Xmm));
        Just(all.chain((0..stack).map(ArgWord::Stack)).collect::<Vec<_>>()).prop_shuffle()
    });
    let results = [RetWord::Rax, RetWord::Rdx, RetWord::Xmm0, RetWord::Xmm1];
    (args, subsequence(results.to_vec(), 0..=2))
        .prop_map(|(args, ret)| words(args.into_iter().take(20), &ret))
}

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Instructions that functions begin with.
const FIRST: [Write; 21] = [
    CodeAssembler::endbr64,
    |a| a.push(rbp),
    |a| a.mov(rbp, rsp),
    |a| a.push(r15),
    |a| a.sub(rsp, 0x18),
    |a| a.sub(rsp, 0x1238),
    |a| a.mov(ptr(rsp - 8), rdi),
    |a| a.mov(rax, qword_ptr(SITE.0 + 0x2345)),
    |a| a.lea(rdx, ptr(SITE.0 - 0x1234)),
    |a| a.cmp(dword_ptr(SITE.0 + 0x3000), 7),
    |a| a.test(edi, edi),
    |a| a.je(SITE.0 + 0x40),
    |a| a.jg(SITE.0 + 0x4000),
    |a| a.xor(eax, eax),
    |a| a.movaps(xmm2, xmm0),
    |a| a.vxorps(ymm3, ymm3, ymm3),
    |a| a.mov(rax, qword_ptr(0x28).fs()),
    |a| a.mov(r9d, 0x1234_5678),
    |a| a.call(SITE.0 + 0x5000),
    |a| a.call(qword_ptr(SITE.0 + 0x6000)),
    |a| a.call(qword_ptr(rsp + 0x18)),
];

fn replaced() -> impl Strategy<Value = (SiteKind, Vec<u8>)> {
    let nops = proptest::sample::select(vec![
        vec![0x0f, 0x1f, 0x44, 0, 0],
        vec![0x90; 5],
        vec![0x66, 0x90, 0x0f, 0x1f, 0x44, 0, 0],
    ]);
    let moved = proptest::collection::vec(proptest::sample::select(&FIRST[..]), 5..8);
    let moved = moved.prop_map(|insns| {
        let long_enough = (1..=insns.len())
            .map(|n| assemble(SITE.0, |a| insns[..n].iter().try_for_each(|write| write(a))));
        long_enough.into_iter().find(|bytes| bytes.len() >= 5).unwrap()
    });
    prop_oneof![
        1 => nops.prop_map(|bytes| (SiteKind::Nops, bytes)),
        3 => moved.prop_filter("a call in the middle", |bytes| can_move(bytes))
            .prop_map(|bytes| (SiteKind::Relocated, bytes)),
    ]
}

/// A call can be moved only if it is the last instruction.
fn can_move(bytes: &[u8]) -> bool {
    let insns: Vec<_> = Decoder::new(64, bytes, DecoderOptions::NONE).iter().collect();
    let is_call = |insn: &Instruction| {
        matches!(insn.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
    };
    !insns[..insns.len() - 1].iter().any(is_call)
}

/// Any image.
pub fn case() -> impl Strategy<Value = Case> {
    let asked = prop_oneof![
        6 => Just(None),
        1 => Just(Some(Question::Row)),
        1 => Just(Some(Question::Object)),
    ];
    let controllers = proptest::collection::vec(controller(), 1..4);
    let align = proptest::sample::select(vec![16, 16, 32, 64]);
    let stack = (0u32..4, any::<bool>(), align);
    (signature(), controllers, replaced(), stack, asked).prop_map(
        |(signature, mut controllers, (kind, replaced), stack, asked)| {
            if skip_result(&signature).is_err() {
                controllers.iter_mut().for_each(Controller::without_fmod_ret);
            }
            let (more_words, is_exact, stack_align_bytes) = stack;
            let on_stack = signature.arg_words().filter(|w| matches!(w, ArgWord::Stack(_)));
            let n_words = u32::try_from(on_stack.count()).unwrap() + more_words;
            let probe_read_user =
                RemoteAddr(address_of(RelocTarget::Runtime(RuntimeFn::ProbeReadUser)));
            let stack_copy = match is_exact {
                true => StackCopy::Exactly(n_words),
                false => StackCopy::UpTo { n_words, probe_read_user },
            };
            Case { signature, controllers, replaced, kind, stack_copy, stack_align_bytes, asked }
        },
    )
}

/// Any image with programs in it that change arguments and results.
pub fn changing_case() -> impl Strategy<Value = Case> {
    let kinds = [
        ProgramKind::Fentry,
        ProgramKind::Fsession,
        ProgramKind::Fexit,
        ProgramKind::Uprobe,
        ProgramKind::Uretprobe,
    ];
    let change = (1u8.., proptest::sample::select(kinds.to_vec()), any::<usize>());
    let changes = proptest::collection::vec(change, 1..4);
    (case(), changes).prop_map(|(mut case, changes)| {
        for (i, (which, kind, at)) in changes.into_iter().enumerate() {
            let n_controllers = case.controllers.len();
            let programs = &mut case.controllers[i % n_controllers].programs;
            programs.insert(at % (programs.len() + 1), (Does::Change(which), kind));
        }
        case
    })
}
