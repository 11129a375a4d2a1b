//! Vector registers of every width and x87 registers, as arguments and as results: each word is
//! seen, and neither the function nor its caller notices.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use flea_image::{Body, Save, Saved, SiteKind, When};
use flea_object::helper::Helper;
use flea_object::spec::{MapKind, ProgramKind};
use flea_symbols::signature::{ArgWord, RetWord, Signature};
use flea_verifier::Verified;
use flea_verifier::facts::Region;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::programs::{lddw_value, map, record, value, words};
use support::rig::{FUNCTION, HARNESS, Placing, Rig, assemble};
use support::{access, call_with, insn, plain, program};

/// What the CPU that runs the test has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Vectors {
    Sse,
    Avx,
    Avx512,
}

impl Vectors {
    fn of_this_cpu() -> Self {
        if std::arch::is_x86_feature_detected!("avx512f") {
            Self::Avx512
        } else if std::arch::is_x86_feature_detected!("avx") {
            Self::Avx
        } else {
            Self::Sse
        }
    }

    fn n_words(self) -> u8 {
        match self {
            Self::Sse => 2,
            Self::Avx => 4,
            Self::Avx512 => 8,
        }
    }

    /// Loads (or stores) the first eight vector registers from (to) `rdi`.
    fn all(self, a: &mut CodeAssembler, base: AsmRegister64, load: bool) -> Result<(), IcedError> {
        let xmms = [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7];
        let ymms = [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7];
        let zmms = [zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7];
        for i in 0..8 {
            let at = ptr(base + 64 * i);
            match (self, load) {
                (Self::Sse, true) => a.movups(xmms[i], at)?,
                (Self::Sse, false) => a.movups(at, xmms[i])?,
                (Self::Avx, true) => a.vmovups(ymms[i], at)?,
                (Self::Avx, false) => a.vmovups(at, ymms[i])?,
                (Self::Avx512, true) => a.vmovups(zmms[i], at)?,
                (Self::Avx512, false) => a.vmovups(at, zmms[i])?,
            }
        }
        Ok(())
    }
}

/// Vector registers 0 to 7, then what was on the x87 stack after the call.
#[derive(Clone, PartialEq, Eq, Debug)]
#[repr(C)]
struct State {
    vectors: [[u64; 8]; 8],
    /// st0 and st1, 10 bytes each.
    x87: [[u64; 2]; 2],
    /// What `fnstenv` stores once those two were taken off: control, status and tag word, then
    /// addresses.
    environment: [u32; 8],
}

impl State {
    fn pattern() -> Self {
        let word = |reg: usize, i: usize| 0x0101_0101_0101_0101 * (8 * reg + i + 1) as u64;
        Self {
            vectors: std::array::from_fn(|reg| std::array::from_fn(|i| word(reg, i))),
            x87: [[0; 2]; 2],
            environment: [0; 8],
        }
    }
}

/// `fn(in: &State, out: &mut State, target)`
fn harness(at: u64, vectors: Vectors) -> Vec<u8> {
    assemble(at, |a| {
        a.push(rbx)?;
        a.mov(rbx, rsi)?;
        vectors.all(a, rdi, true)?;
        a.fninit()?;
        a.call(rdx)?;
        vectors.all(a, rbx, false)?;
        a.fstp(tbyte_ptr(rbx + 512))?;
        a.fstp(tbyte_ptr(rbx + 528))?;
        a.fnstenv(ptr(rbx + 544))?;
        a.pop(rbx)?;
        if vectors > Vectors::Sse {
            a.vzeroupper()?;
        }
        a.ret()
    })
}

/// Results in two vector registers and in two x87 registers: zmm0 and zmm1 become zmm3 and
/// zmm4, st0 pi and st1 -1.
fn function(at: u64, vectors: Vectors) -> (Vec<u8>, usize) {
    let bytes = assemble(at, |a| {
        a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
        match vectors {
            Vectors::Sse => {
                a.movaps(xmm0, xmm3)?;
                a.movaps(xmm1, xmm4)?;
            }
            Vectors::Avx => {
                a.vmovaps(ymm0, ymm3)?;
                a.vmovaps(ymm1, ymm4)?;
            }
            Vectors::Avx512 => {
                a.vmovaps(zmm0, zmm3)?;
                a.vmovaps(zmm1, zmm4)?;
            }
        }
        a.fld1()?;
        a.fchs()?;
        a.fldpi()?;
        a.ret()
    });
    (bytes, 5)
}

const PI: [u64; 2] = [0xc90f_daa2_2168_c235, 0x4000];
const MINUS_ONE: [u64; 2] = [0x8000_0000_0000_0000, 0xbfff];

fn call(rig: &Rig, input: &State) -> State {
    let mut output = State::pattern();
    // SAFETY: the harness has this very type and keeps what the ABI says.
    let harness: extern "sysv64" fn(*const State, *mut State, u64) =
        unsafe { std::mem::transmute(rig.code.address() + HARNESS as u64) };
    harness(input, &raw mut output, rig.code.address());
    // Where the last x87 instruction was, and its operand.
    output.environment[3..].fill(0);
    output
}

fn new_rig(vectors: Vectors) -> (Rig, (Vec<u8>, usize)) {
    let rig = Rig::new(&[map(MapKind::Array, 512, 1)], true);
    rig.code.write(HARNESS, &harness(rig.code.address() + HARNESS as u64, vectors));
    let function = function(rig.code.address(), vectors);
    (rig, function)
}

fn untraced(vectors: Vectors, input: &State) -> State {
    let (rig, function) = new_rig(vectors);
    rig.code.write(FUNCTION, &function.0);
    rig.code.executable();
    call(&rig, input)
}

/// Attaches `program` and calls once: what it has stored, and its body.
fn run(
    vectors: Vectors,
    signature: &Signature,
    program: (&Verified, ProgramKind),
    placing: Placing,
) -> (Vec<u64>, Body) {
    let (rig, function) = new_rig(vectors);
    let body = rig.attach_to(&function, signature, &[program], SiteKind::Nops, placing, 3);
    let input = State::pattern();
    let output = call(&rig, &input);
    assert_eq!(output, untraced(vectors, &input), "{:?} {placing:?}", program.1);
    ((0..64).map(|i| rig.array(0, i)).collect(), body)
}

fn word(reg: u8, word: u8) -> ArgWord {
    if word == 0 { ArgWord::Xmm(reg) } else { ArgWord::XmmWord { reg, word } }
}

fn result_word(reg: u8, word: u8) -> RetWord {
    match (reg, word) {
        (0, 0) => RetWord::Xmm0,
        (1, 0) => RetWord::Xmm1,
        _ => RetWord::XmmWord { reg, word },
    }
}

/// Two arguments of this many words in different registers, the higher one first, with a
/// plain double between them.
fn arguments(n_words: u8) -> (Signature, Vec<u64>) {
    let first = (0..n_words).map(|w| (7, w));
    let all: Vec<(u8, u8)> = first.chain([(3, 0)]).chain((0..n_words).map(|w| (0, w))).collect();
    let input = State::pattern();
    let seen = all.iter().map(|(reg, w)| input.vectors[usize::from(*reg)][usize::from(*w)]);
    (words(all.iter().map(|(reg, w)| word(*reg, *w)), &[RetWord::Rax]), seen.collect())
}

/// Widths that this CPU has.
fn widths() -> impl Iterator<Item = (Vectors, u8)> {
    let vectors = Vectors::of_this_cpu();
    [2, 4, 8].into_iter().filter(move |n| *n <= vectors.n_words()).map(move |n| (vectors, n))
}

#[test]
fn wide_arguments() {
    for (vectors, n_words) in widths() {
        let (signature, expected) = arguments(n_words);
        let n = expected.len();
        let record = record(0, n as i16);
        let kinds =
            [ProgramKind::Fentry, ProgramKind::FmodRet, ProgramKind::Fexit, ProgramKind::Fsession];
        for (kind, placing) in
            kinds.into_iter().flat_map(|k| [(k, Placing::Inline), (k, Placing::Called)])
        {
            let (seen, body) = run(vectors, &signature, (&record, kind), placing);
            assert_eq!(seen[..n], expected, "{n_words} words, {kind:?} {placing:?}");
            let saved = match (kind, n_words) {
                // Both halves of an xmm register are in a parameter of the body.
                (ProgramKind::Fentry | ProgramKind::FmodRet, 2) => vec![],
                _ => [7, 0].map(|reg| (When::Entry, Saved::Vector { reg, n_words })).to_vec(),
            };
            let saves: Vec<_> = body.saves.iter().map(|s| (s.when, s.what)).collect();
            assert_eq!(saves, saved, "{kind:?}");
            assert_eq!(body.entry.is_some(), kind == ProgramKind::Fentry && n_words == 2);
        }
    }
}

#[test]
fn wide_results() {
    for (vectors, n_words) in widths() {
        let all = (0..2).flat_map(|reg| (0..n_words).map(move |w| (reg, w)));
        let ret: Vec<RetWord> = all.clone().map(|(reg, w)| result_word(reg, w)).collect();
        let input = State::pattern();
        // What comes back is what zmm3 and zmm4 were.
        let expected: Vec<u64> =
            all.map(|(reg, w)| input.vectors[usize::from(reg) + 3][usize::from(w)]).collect();
        let signature = words([ArgWord::Xmm(5)].into_iter(), &ret);
        let record = record(0, 1 + expected.len() as i16);
        for kind in [ProgramKind::Fexit, ProgramKind::Fsession] {
            for placing in [Placing::Inline, Placing::Called] {
                let (seen, _) = run(vectors, &signature, (&record, kind), placing);
                assert_eq!(seen[0], input.vectors[5][0]);
                assert_eq!(seen[1..=expected.len()], expected, "{n_words} {kind:?} {placing:?}");
            }
        }
    }
}

#[test]
fn x87_results() {
    let vectors = Vectors::of_this_cpu();
    let untouched = untraced(vectors, &State::pattern());
    assert_eq!(untouched.x87.map(|[low, high]| [low, high & 0xffff]), [PI, MINUS_ONE]);
    for n_registers in [1, 2] {
        let ret: Vec<RetWord> = (0..n_registers)
            .flat_map(|reg| [0, 1].map(|word| RetWord::X87 { reg, word }))
            .collect();
        let signature = words([].into_iter(), &ret);
        let record = record(0, ret.len() as i16);
        for placing in [Placing::Inline, Placing::Called] {
            let (seen, body) = run(vectors, &signature, (&record, ProgramKind::Fexit), placing);
            assert_eq!(seen[..ret.len()], [PI, MINUS_ONE].concat()[..ret.len()], "{placing:?}");
            assert_eq!(body.frame_words, 2 * u32::from(n_registers));
        }
    }
}

/// A word that nobody reads is not saved, and an entry program that reads none but narrow
/// words stays where it is cheap.
#[test]
fn what_is_not_read_costs_nothing() {
    for (vectors, n_words) in widths() {
        let (signature, expected) = arguments(n_words);
        let narrow = record(0, 2);
        let (seen, body) =
            run(vectors, &signature, (&narrow, ProgramKind::Fentry), Placing::Direct);
        assert_eq!(seen[..2], expected[..2]);
        assert!(body.entry.is_some() && body.session.is_none() && body.saves.is_empty());
        let (_, body) =
            run(vectors, &signature, (&record(0, 1), ProgramKind::Fexit), Placing::Inline);
        assert_eq!(body.saves, [], "the low word is no save");
    }
}

/// `bpf_get_func_arg` with a number that is known, and with one that is not.
#[test]
fn wide_arguments_by_number() {
    let get = |n: i16, constant: Option<u64>| {
        let (call, fact) = call_with(Helper::GetFuncArg, None, [None, constant, None, None, None]);
        let mut p = lddw_value(9, 0, 0).to_vec();
        p.extend([
            plain(insn(0xbf, 3, 10, 0, 0)),
            plain(insn(0x07, 3, 0, 0, -8)),
            access(insn(0x7a, 10, 0, -8, 0), Region::Stack),
            plain(insn(0xb7, 2, 0, 0, i32::from(n))),
            (call, fact),
            access(insn(0x79, 2, 10, -8, 0), Region::Stack),
            access(insn(0x7b, 9, 2, 0, 0), value(0)),
            access(insn(0x7b, 9, 0, 8, 0), value(0)),
            plain(insn(0xb7, 0, 0, 0, 0)),
            plain(insn(0x95, 0, 0, 0, 0)),
        ]);
        program(&p)
    };
    for (vectors, n_words) in widths() {
        let (signature, expected) = arguments(n_words);
        for (n, constant) in
            (0..).zip(&expected).flat_map(|(n, _)| [(n, Some(n as u64)), (n, None)])
        {
            let program = get(n, constant);
            for kind in [ProgramKind::Fentry, ProgramKind::Fexit] {
                let (seen, body) = run(vectors, &signature, (&program, kind), Placing::Inline);
                assert_eq!(seen[..2], [expected[n as usize], 0], "{n} {constant:?} {kind:?}");
                let word = (n as u8) % (n_words + 1);
                let framed = n_words > 2 && (constant.is_none() || (2..n_words).contains(&word));
                let is_entry = kind == ProgramKind::Fentry;
                assert_eq!(body.session.is_some(), is_entry && framed, "{n} {constant:?}");
            }
        }
    }
}

/// Two programs share one save, and a session's cookie has a word beside it.
#[test]
fn a_save_is_shared() {
    let vectors = Vectors::of_this_cpu();
    let signature = words([word(2, 0), word(2, 1)].into_iter(), &[RetWord::Rax]);
    let (rig, function) = new_rig(vectors);
    let record = record(0, 2);
    let programs = [
        (&record, ProgramKind::Fexit),
        (&record, ProgramKind::Fsession),
        (&record, ProgramKind::Fexit),
    ];
    let body = rig.attach_to(&function, &signature, &programs, SiteKind::Nops, Placing::Inline, 0);
    let what = Saved::Vector { reg: 2, n_words: 2 };
    assert_eq!(body.saves, [Save { when: When::Entry, what, word: 2 }]);
    assert_eq!(body.frame_words, 3);
    let input = State::pattern();
    assert_eq!(call(&rig, &input), untraced(vectors, &input));
    assert_eq!([rig.array(0, 0), rig.array(0, 1)], input.vectors[2][..2]);
}
