//! Programs that several tests use.

use flea_layout::plan::ArenaPlan;
use flea_object::helper::Helper;
use flea_object::insn::Insn;
use flea_object::spec::{MapIdx, MapKind, MapSpec};
use flea_symbols::signature::{
    ArgWord, Param, RetWord, Return, Signature, SignatureSource, StackWords, Type,
};
use flea_verifier::Verified;
use flea_verifier::facts::{Fact, Region};

use super::{access, call, insn, plain, program};

pub fn map(kind: MapKind, value_size_bytes: u32, max_entries: u32) -> MapSpec {
    let key_size_bytes = if kind == MapKind::RingBuf { 0 } else { 4 };
    MapSpec {
        name: "m".into(),
        kind,
        key_size_bytes,
        value_size_bytes,
        max_entries,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    }
}

pub fn plan(maps: &[MapSpec]) -> ArenaPlan {
    ArenaPlan::new(maps, 4)
}

pub fn int(size_bytes: u32) -> Type {
    Type::Int { name: "int".into(), size_bytes, signed: true }
}

/// A function of `n` 8-byte integers that returns one.
pub fn ints(n: u32) -> Signature {
    let registers = (0u8..6).map(ArgWord::Gpr);
    let stack = (0u32..).map(ArgWord::Stack);
    words(registers.chain(stack).take(n as usize), &[RetWord::Rax])
}

/// A function with the given words, each an 8-byte parameter.
pub fn words(args: impl Iterator<Item = ArgWord>, ret: &[RetWord]) -> Signature {
    Signature {
        params: args
            .map(|w| Param { name: None, ty: int(8), words: vec![w], absent: None })
            .collect(),
        ret: Return { ty: int(8), words: ret.to_vec(), absent: None },
        variadic: false,
        stack_words: StackWords::Known(0),
        stack_align_bytes: 16,
        doubt: None,
        source: SignatureSource::Dwarf,
    }
}

pub fn lddw_map(dst: u8, map: i32) -> [(Insn, Fact); 2] {
    [plain(insn(0x18, dst, 1, 0, map)), (insn(0, 0, 0, 0, 0), Fact::Unreachable)]
}

pub fn lddw_value(dst: u8, map: i32, offset: i32) -> [(Insn, Fact); 2] {
    [plain(insn(0x18, dst, 2, 0, map)), (insn(0, 0, 0, 0, offset), Fact::Unreachable)]
}

pub fn value(map: u32) -> Region {
    Region::MapValue { map: MapIdx(map) }
}

/// `u32 key = 0; u64 *v = bpf_map_lookup_elem(&map, &key); if (v) *v += 1;`
pub fn counter(map: u32) -> Verified {
    let mut p = vec![
        access(insn(0x62, 10, 0, -4, 0), Region::Stack),
        plain(insn(0xbf, 2, 10, 0, 0)),
        plain(insn(0x07, 2, 0, 0, -4)),
    ];
    p.extend(lddw_map(1, map as i32));
    p.extend([
        call(Helper::MapLookupElem, Some(map)),
        plain(insn(0x15, 0, 0, 3, 0)),
        access(insn(0x79, 1, 0, 0, 0), value(map)),
        plain(insn(0x07, 1, 0, 0, 1)),
        access(insn(0x7b, 0, 1, 0, 0), value(map)),
        plain(insn(0xb7, 0, 0, 0, 0)),
        plain(insn(0x95, 0, 0, 0, 0)),
    ]);
    program(&p)
}

/// Stores context slots 0..n into elements of array `map`'s element 0, one after another.
pub fn record(map: u32, n: i16) -> Verified {
    let mut p = vec![];
    p.extend(lddw_value(2, map as i32, 0));
    for i in 0..n {
        p.push(super::ctx(3, i));
        p.push(access(insn(0x7b, 2, 3, i * 8, 0), value(map)));
    }
    p.extend([plain(insn(0xb7, 0, 0, 0, 0)), plain(insn(0x95, 0, 0, 0, 0))]);
    program(&p)
}
