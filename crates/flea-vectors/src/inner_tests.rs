//! Maps of maps and locks, which no vector can describe: interpreted and compiled alike.

use flea_object::asm::{AluOp, Asm, JmpOp, Reg::*, Size};
use flea_object::helper::Helper;
use flea_object::spec::{InnerMaps, MapIdx, MapKind, MapSpec, Program};

use crate::{Prepared, context, interpret, native, verify};

const OUTER: MapIdx = MapIdx(0);
const BPF_F_LOCK: i32 = 4;

/// An array or hash of maps (0) with maps 2 and 3 at 1 and 5, like template 1: values of 24
/// bytes, a lock at 8.
fn maps(outer: MapKind, inner: MapKind) -> Vec<MapSpec> {
    let map = |kind, value_size_bytes, max_entries| MapSpec {
        kind,
        key_size_bytes: 4,
        value_size_bytes,
        max_entries,
        ..MapSpec::default()
    };
    let like = MapSpec { lock_offset: Some(8), ..map(inner, 24, 4) };
    let init = vec![(1, MapIdx(2)), (5, MapIdx(3))];
    vec![
        MapSpec { inner: Some(InnerMaps { template: MapIdx(1), init }), ..map(outer, 4, 8) },
        MapSpec { template: true, ..like.clone() },
        like.clone(),
        like,
    ]
}

/// `r0 = lookup(map in r1 or OUTER, key)`; to `out` with `otherwise` in r9 where it is null.
fn lookup(a: &mut Asm, outer: bool, key: i32, otherwise: i32, out: flea_object::asm::Label) {
    a.store_imm(Size::W, R10, -4, key);
    if outer {
        a.map_ref(R1, OUTER);
    }
    a.mov64_reg(R2, R10).add64_imm(R2, -4).mov64_imm(R9, otherwise);
    a.call(Helper::MapLookupElem).jump_if(JmpOp::Eq, R0, 0, out);
}

/// Updates element 3 of the map at `outer_key` with `flags`, then adds to it under its lock.
/// The result tells apart how far it came, what the update said and what the value is.
fn program(outer_key: i32, flags: i32) -> Program {
    let mut a = Asm::new();
    let out = a.new_label();
    lookup(&mut a, true, outer_key, 1000, out);
    a.mov64_reg(R6, R0);
    for off in [-32, -24, -16] {
        a.store_imm(Size::DW, R10, off, -1);
    }
    a.store_imm(Size::DW, R10, -32, 70).store_imm(Size::W, R10, -4, 3);
    a.mov64_reg(R1, R6).mov64_reg(R2, R10).add64_imm(R2, -4);
    a.mov64_reg(R3, R10).add64_imm(R3, -32).mov64_imm(R4, flags);
    a.call(Helper::MapUpdateElem).mov64_reg(R7, R0);
    a.mov64_reg(R1, R6);
    lookup(&mut a, false, 3, 2000, out);
    a.mov64_reg(R8, R0).mov64_reg(R1, R8).add64_imm(R1, 8).call(Helper::SpinLock);
    a.load(Size::DW, R9, R8, 0).add64_imm(R9, 5).store(Size::DW, R8, 0, R9);
    a.load(Size::W, R1, R8, 12).add64_reg(R9, R1);
    a.mov64_reg(R1, R8).add64_imm(R1, 8).call(Helper::SpinUnlock);
    a.alu64(AluOp::Mul, R9, 1000).add64_reg(R9, R7);
    a.bind(out).mov64_reg(R0, R9).exit();
    Program { insns: a.finish().expect("all labels are bound"), ..Program::default() }
}

fn run(maps: Vec<MapSpec>, program: Program) -> u64 {
    let prepared = Prepared { program, maps, memory: None };
    let verified = verify(&prepared).ok().expect("it is a safe program");
    let interpreted = interpret(&prepared).expect("it stays within its memory");
    let compiled = native::run(&verified, &prepared.maps, None, context()).expect("it compiles");
    assert_eq!(interpreted, compiled);
    compiled
}

#[test]
fn interpreted_and_compiled_programs_agree() {
    let (einval, eexist) = (-22, -17);
    let done = |value: i64, status: i64| (value * 1000 + status).cast_unsigned();
    let filled = 75 + 0xffff_ffff;
    for outer in [MapKind::ArrayOfMaps, MapKind::HashOfMaps] {
        for (inner, is_array) in [(MapKind::Array, true), (MapKind::Hash, false)] {
            let go = |key, flags| run(maps(outer, inner), program(key, flags));
            assert_eq!(go(0, 0), 1000, "nothing there");
            assert_eq!(go(9, 0), 1000, "out of range");
            for key in [1, 5] {
                assert_eq!(go(key, 0), done(filled, 0));
                assert_eq!(go(key, BPF_F_LOCK), done(filled, 0));
                let (no_exist, exist, wrong) = (go(key, 1), go(key, 2), go(key, 8));
                if is_array {
                    assert_eq!((no_exist, exist), (done(5, eexist), done(filled, 0)));
                    assert_eq!(wrong, done(5, einval));
                } else {
                    assert_eq!((no_exist, exist, wrong), (done(filled, 0), 2000, 2000));
                }
            }
        }
    }
}
