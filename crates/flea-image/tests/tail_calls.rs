//! Programs that lead to each other by tail calls: compiled into one function they do what the
//! interpreter does with one program after another.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use flea_image::{
    BODY_FRAMES_OFFSET, BodyRequest, CompileError, Cpu, PlainRequest, ProgramUse, RelocTarget,
    compile_body, compile_function,
};
use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_object::asm::{AluOp, Asm, JmpOp, Reg, Reg::*, Size};
use flea_object::helper::Helper;
use flea_object::insn::Insn;
use flea_object::interp::{Host, Interpreter, Memory, Protection};
use flea_object::spec::{MapIdx, MapKind, MapSpec, Program, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_verifier::{Context, Verified, targets, verify};
use support::Pages;
use support::programs::{ints, map, plan};

/// Map 0: what the programs leave behind. Word 0 counts runs, word 1 is mixed by all of them.
const LOG: MapIdx = MapIdx(0);
const LOG_BYTES: u32 = 16;
/// Maps 1 and 2 are program arrays.
const N_ARRAYS: u32 = 2;
/// The context's words.
const WORDS: [u64; 3] = [3, 0x1_0000_0002, 77];

type Slots = BTreeMap<(MapIdx, u32), usize>;

fn maps(max_entries: u32) -> Vec<MapSpec> {
    let array = || map(MapKind::ProgArray, 4, max_entries);
    vec![map(MapKind::Array, LOG_BYTES, 1), array(), array()]
}

fn array(n: u32) -> MapIdx {
    MapIdx(1 + n)
}

fn proved(programs: &[Vec<Insn>], maps: &[MapSpec], first: usize, slots: &Slots) -> Verified {
    let context = Context::Tracing { n_args: WORDS.len() as u8, n_results: 0, session: false };
    let prove = |i: usize| {
        let program = Program { insns: programs[i].clone(), ..Program::default() };
        verify(&program, maps, context).map(Arc::new)
    };
    targets::link(first, slots, prove).unwrap_or_else(|e| panic!("{}", e.log.join("\n")))
}

/// The interpreter's maps.
struct ArraysHost<'a> {
    slots: &'a Slots,
    log: u64,
}

const HANDLE: u64 = 0xface_0000_0000_0000;

impl Host for ArraysHost<'_> {
    fn call(&mut self, helper: i32, _: [u64; 5], _: &mut Memory) -> Result<u64, String> {
        Err(format!("helper {helper} is not for this test"))
    }

    fn map_handle(&self, map: MapIdx) -> Option<u64> {
        Some(HANDLE + u64::from(map.0))
    }

    fn map_value_address(&self, map: MapIdx) -> Option<u64> {
        (map == LOG).then_some(self.log)
    }

    fn tail_target(&self, map: u64, index: u32) -> Result<Option<usize>, String> {
        let map = u32::try_from(map - HANDLE).map_err(|e| e.to_string())?;
        Ok(self.slots.get(&(MapIdx(map), index)).copied())
    }
}

/// r0, and the log.
type Outcome = (u64, Vec<u8>);

fn interpreted(programs: &[Vec<Insn>], first: usize, slots: &Slots) -> Outcome {
    let mut memory = Memory::new();
    let context = memory.add(WORDS.map(u64::to_le_bytes).concat(), Protection::ReadOnly);
    let log = memory.add(vec![0; LOG_BYTES as usize], Protection::ReadWrite);
    let all: Vec<&[Insn]> = programs.iter().map(Vec::as_slice).collect();
    let mut interpreter = Interpreter::new(all[first]).unwrap().targets(&all).unwrap();
    interpreter.stack_fill = 0xa5;
    let mut host = ArraysHost { slots, log };
    let r0 = interpreter.run([context, 0, 0, 0, 0], &mut memory, &mut host).unwrap();
    (r0, memory.bytes(log).unwrap().to_vec())
}

fn compiled(verified: &Verified, maps: &[MapSpec]) -> Result<Outcome, CompileError> {
    let plan = plan(maps);
    let request = PlainRequest { verified, plan: Some(&plan), context_words: WORDS.len() as u32 };
    let code = compile_function(&request)?;
    let data = Pages::new(THREAD_TABLE_BYTES + plan.size_bytes as usize);
    let arena = data.address() + THREAD_TABLE_BYTES as u64;
    let bytes = code.resolve(|target| match target {
        RelocTarget::Arena { addend } => arena.wrapping_add_signed(addend),
        RelocTarget::Constant(value) => value,
        other => panic!("{other:?} is not needed"),
    });
    let pages = Pages::new(bytes.len().next_multiple_of(4096));
    pages.write(0, &bytes);
    pages.executable();
    // SAFETY: the pages hold a function of this very type, and the context lives on.
    let function: extern "sysv64" fn(*const u64, u64) -> u64 =
        unsafe { std::mem::transmute(pages.address()) };
    let r0 = function(WORDS.as_ptr(), 0);
    let at = THREAD_TABLE_BYTES + plan.maps[0].data_offset as usize;
    let log = (0..LOG_BYTES as usize / 8).map(|i| data.read(at + 8 * i));
    Ok((r0, log.flat_map(u64::to_le_bytes).collect()))
}

/// As a body of a function: whatever may not be in one is found by `compile_body` itself.
fn is_a_body(verified: &Verified, maps: &[MapSpec], kind: ProgramKind) {
    let programs = [ProgramUse { verified, kind, cookie: 7, state_index: 0 }];
    compile_body(&BodyRequest {
        signature: &ints(3),
        programs: &programs,
        maps,
        plan: &plan(maps),
        function_address: RemoteAddr(0x40_1000),
        frame_offset: BODY_FRAMES_OFFSET,
        printk_map: None,
        cpu: Cpu::default(),
    })
    .unwrap();
}

/// The programs from `first` on do the same in both forms; what they do.
fn check(programs: &[Vec<Insn>], max_entries: u32, first: usize, slots: &Slots) -> Outcome {
    let maps = maps(max_entries);
    let verified = proved(programs, &maps, first, slots);
    let expected = interpreted(programs, first, slots);
    assert_eq!(compiled(&verified, &maps).unwrap(), expected);
    is_a_body(&verified, &maps, ProgramKind::Fentry);
    expected
}

/// `bpf_tail_call(r6, array, index)`
fn tail_call(asm: &mut Asm, map: MapIdx, index: i32) {
    asm.mov64_reg(R1, R6).map_ref(R2, map).mov64_imm(R3, index).call(Helper::TailCall);
}

/// r8 = the log, its count one up, its mix changed by `id`.
fn note(asm: &mut Asm, id: i32) {
    asm.map_value(R8, LOG, 0).load(Size::DW, R7, R8, 0).add64_imm(R7, 1);
    asm.store(Size::DW, R8, 0, R7).load(Size::DW, R7, R8, 8);
    asm.alu64(AluOp::Mul, R7, 31).add64_imm(R7, id).store(Size::DW, R8, 8, R7);
}

/// Notes itself, calls what stands at `index`, and returns `id` where that misses.
fn step(id: i32, index: i32) -> Vec<Insn> {
    let mut asm = Asm::new();
    asm.mov64_reg(R6, R1);
    note(&mut asm, id);
    tail_call(&mut asm, array(0), index);
    asm.mov64_imm(R0, id).exit();
    asm.finish().unwrap()
}

fn log(outcome: &Outcome, word: usize) -> u64 {
    u64::from_le_bytes(outcome.1[8 * word..][..8].try_into().unwrap())
}

#[test]
fn the_result_is_that_of_the_program_that_ends_the_run() {
    let programs = [step(1, 5), step(2, 6), step(3, 100)];
    let slots = Slots::from([((array(0), 5), 1), ((array(0), 6), 2)]);
    let outcome = check(&programs, 8, 0, &slots);
    assert_eq!((outcome.0, log(&outcome, 0)), (3, 3));
    let outcome = check(&programs, 8, 0, &Slots::new());
    assert_eq!((outcome.0, log(&outcome, 0)), (1, 1));
}

#[test]
fn a_run_makes_33_tail_calls() {
    // Itself, two in turn, and a row without a circle that is just too long.
    let itself = Slots::from([((array(0), 0), 0)]);
    let outcome = check(&[step(1, 0)], 1, 0, &itself);
    assert_eq!((outcome.0, log(&outcome, 0)), (1, 34));
    let turns = Slots::from([((array(0), 0), 0), ((array(0), 1), 1)]);
    let outcome = check(&[step(1, 1), step(2, 0)], 2, 0, &turns);
    assert_eq!((outcome.0, log(&outcome, 0)), (2, 34));
    for n in [33, 34, 35, 40] {
        let row: Vec<_> = (0..n).map(|i| step(i + 1, i + 1)).collect();
        let slots = (0..n as usize).map(|i| ((array(0), i as u32), i)).collect();
        let outcome = check(&row, 64, 0, &slots);
        let last = u64::try_from(n.min(34)).unwrap();
        assert_eq!((outcome.0, log(&outcome, 0)), (last, last), "{n}");
    }
}

/// Calls what stands at context word `word`, changed by `ops`.
fn dispatch(id: i32, word: i16, ops: impl FnOnce(&mut Asm)) -> Vec<Insn> {
    let mut asm = Asm::new();
    asm.mov64_reg(R6, R1);
    note(&mut asm, id);
    asm.load(Size::DW, R3, R6, 8 * word);
    ops(&mut asm);
    asm.mov64_reg(R1, R6).map_ref(R2, array(0)).call(Helper::TailCall);
    asm.mov64_imm(R0, id).exit();
    asm.finish().unwrap()
}

#[test]
fn an_index_that_is_not_known() {
    let ends: Vec<_> = (10..15).map(|id| step(id, 1_000_000)).collect();
    // Neighbours, gaps, both ends, one program in several places.
    let places = [(0, 1), (1, 1), (2, 2), (3, 1), (7, 3), (8, 3), (9, 3), (15, 4), (16, 5)];
    let slots: Slots = places.iter().map(|&(i, program)| ((array(0), i), program)).collect();
    for index in -2..20 {
        let programs: Vec<_> = std::iter::once(dispatch(1, 0, |asm| {
            asm.add64_imm(R3, index - 3);
        }))
        .chain(ends.clone())
        .collect();
        let outcome = check(&programs, 17, 0, &slots);
        let found = places.iter().find(|(i, _)| i64::from(*i) == i64::from(index));
        let expected = found.map_or(1, |(_, program)| 9 + *program as u64);
        assert_eq!(outcome.0, expected, "{index}");
    }
}

#[test]
fn only_the_low_half_of_an_index_counts() {
    let slots = Slots::from([((array(0), 2), 1)]);
    let known = step(1, 2);
    let mut asm = Asm::new();
    asm.mov64_reg(R6, R1);
    note(&mut asm, 1);
    asm.mov64_reg(R1, R6).map_ref(R2, array(0)).lddw(R3, 0xffff_ffff_0000_0002);
    asm.call(Helper::TailCall).mov64_imm(R0, 1).exit();
    for first in [known, dispatch(1, 1, |_| ()), asm.finish().unwrap()] {
        assert_eq!(check(&[first, step(2, 0)], 3, 0, &slots).0, 2);
    }
}

/// A function that is called makes the tail call: its caller goes on with the target's result.
#[test]
fn a_tail_call_of_a_called_function() {
    let mut asm = Asm::new();
    let callee = asm.new_label();
    asm.mov64_reg(R6, R1).store_imm(Size::DW, R10, -8, 1000);
    asm.mov64_imm(R2, 0).call_local(callee).mov64_reg(R9, R0);
    asm.mov64_reg(R1, R6).mov64_imm(R2, 1).call_local(callee).add64_reg(R9, R0);
    asm.load(Size::DW, R0, R10, -8).add64_reg(R0, R9).exit();
    asm.bind(callee).store_imm(Size::DW, R10, -8, 5).mov64_reg(R6, R1).mov64_reg(R3, R2);
    asm.map_ref(R2, array(0)).call(Helper::TailCall);
    asm.load(Size::DW, R0, R10, -8).exit();
    let first = asm.finish().unwrap();
    let slots = Slots::from([((array(0), 1), 1), ((array(0), 2), 2)]);
    let outcome = check(&[first, step(2, 2), step(30, 3)], 4, 0, &slots);
    assert_eq!((outcome.0, log(&outcome, 0)), (1000 + 5 + 30, 2));
}

#[test]
fn a_called_function_that_leads_back_is_refused() {
    let mut asm = Asm::new();
    let callee = asm.new_label();
    asm.call_local(callee).exit();
    asm.bind(callee).mov64_reg(R6, R1);
    tail_call(&mut asm, array(0), 0);
    asm.mov64_imm(R0, 0).exit();
    let first = asm.finish().unwrap();
    for (programs, slots) in [
        (vec![first.clone()], Slots::from([((array(0), 0), 0)])),
        (vec![first, step(1, 1)], Slots::from([((array(0), 0), 1), ((array(0), 1), 0)])),
    ] {
        let maps = maps(2);
        let verified = proved(&programs, &maps, 0, &slots);
        let error = compiled(&verified, &maps).unwrap_err();
        assert!(matches!(error, CompileError::TailRecursion { .. }), "{error}");
    }
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % u64::from(n)) as u32
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }
}

/// An index in r3: known, or made of what is in the log.
fn random_index(asm: &mut Asm, random: &mut Random, max_entries: u32, log: Reg) {
    if random.one_in(2) {
        asm.mov64_imm(R3, random.below(max_entries + 2) as i32);
        return;
    }
    asm.load(Size::DW, R3, log, 8).alu64(AluOp::Rsh, R3, random.below(6) as i32);
    if random.one_in(3) {
        return;
    }
    asm.alu64(AluOp::And, R3, (max_entries + 2).next_power_of_two() as i32 - 1);
}

/// A program that notes itself, uses its stack, and tries some tail calls, perhaps in a function
/// that it calls.
fn random_program(id: i32, random: &mut Random, max_entries: u32, calls: bool) -> Vec<Insn> {
    let mut asm = Asm::new();
    let callee = asm.new_label();
    let is_called = calls && random.one_in(2);
    asm.mov64_reg(R6, R1);
    note(&mut asm, id);
    let off = -8 * (1 + random.below(8) as i16);
    asm.mov64_reg(R9, R10).add64_imm(R9, i32::from(off));
    asm.store_imm(Size::DW, R9, 0, id);
    for _ in 0..1 + random.below(3) {
        let skip = asm.new_label();
        if random.one_in(3) {
            asm.load(Size::DW, R2, R8, 8).jump_if(JmpOp::Set, R2, 1 << random.below(8), skip);
        }
        if is_called && random.one_in(2) {
            asm.mov64_reg(R1, R6).call_local(callee);
            asm.load(Size::DW, R1, R8, 8).add64_reg(R1, R0).store(Size::DW, R8, 8, R1);
        } else {
            random_index(&mut asm, random, max_entries, R8);
            asm.mov64_reg(R1, R6).map_ref(R2, array(random.below(N_ARRAYS)));
            asm.call(Helper::TailCall);
        }
        asm.bind(skip);
    }
    asm.load(Size::DW, R0, R9, 0).load(Size::DW, R1, R8, 8).add64_reg(R0, R1);
    if is_called {
        asm.mov64_reg(R7, R0).mov64_reg(R1, R6).call_local(callee).add64_reg(R0, R7);
    }
    asm.exit();
    if is_called {
        asm.bind(callee).mov64_reg(R6, R1).store_imm(Size::DW, R10, off, -id);
        asm.map_value(R8, LOG, 0);
        random_index(&mut asm, random, max_entries, R8);
        asm.mov64_reg(R1, R6).map_ref(R2, array(random.below(N_ARRAYS)));
        asm.call(Helper::TailCall);
        asm.load(Size::DW, R0, R10, off).exit();
    }
    asm.finish().unwrap()
}

#[test]
fn random_graphs_do_what_the_interpreter_does() {
    let (mut n_run, mut n_long, mut n_refused) = (0, 0, 0);
    for seed in 1..=250u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (n, max_entries) = (1 + random.below(6), 1 + random.below(9));
        let calls = seed.is_multiple_of(2);
        let programs: Vec<_> =
            (0..n).map(|i| random_program(1 + i as i32, &mut random, max_entries, calls)).collect();
        let mut slots = Slots::new();
        for map in 0..N_ARRAYS {
            for index in 0..max_entries {
                if random.below(4) > 0 {
                    slots.insert((array(map), index), random.below(n) as usize);
                }
            }
        }
        let maps = maps(max_entries);
        let verified = proved(&programs, &maps, 0, &slots);
        let found = match compiled(&verified, &maps) {
            Ok(found) => found,
            Err(CompileError::TailRecursion { .. }) => {
                n_refused += 1;
                continue;
            }
            Err(other) => panic!("seed {seed}: {other}"),
        };
        let expected = interpreted(&programs, 0, &slots);
        assert_eq!(found, expected, "seed {seed}");
        is_a_body(&verified, &maps, ProgramKind::FmodRet);
        n_run += 1;
        n_long += u32::from(log(&expected, 0) >= 34);
    }
    println!("{n_run} run, {n_long} of them to the limit, {n_refused} refused");
    assert!(n_run > 150 && n_long > 20, "{n_run} run, {n_long} of them to the limit");
}
