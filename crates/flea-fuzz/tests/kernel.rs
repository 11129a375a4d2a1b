//! The kernel's verdicts, logs and results; skipped where it cannot be asked.
#![allow(clippy::unwrap_used, reason = "a test")]

use flea_fuzz::kernel::{CONTEXT_WORDS, Kernel, KernelError, KernelMaps, LogLevel};
use flea_object::asm::{AluOp, Asm, Reg::*, Size};
use flea_object::helper::Helper;
use flea_object::spec::{MapIdx, MapKind, MapSpec};

fn kernel() -> Option<Kernel> {
    Kernel::open().inspect_err(|e| println!("skipped: {e}")).ok()
}

fn map(kind: MapKind, key: u32, value: u32, max_entries: u32) -> MapSpec {
    MapSpec {
        name: "map".into(),
        kind,
        key_size_bytes: key,
        value_size_bytes: value,
        max_entries,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    }
}

#[test]
fn a_program_runs_on_its_context() {
    let Some(kernel) = kernel() else { return };
    let maps = KernelMaps::create(&[map(MapKind::Array, 4, 8, 1)]).unwrap();
    let mut asm = Asm::new();
    asm.load(Size::DW, R0, R1, 88).alu64(AluOp::Lsh, R0, 4).map_value(R1, MapIdx(0), 0);
    asm.store(Size::DW, R1, 0, R0).exit();
    let loaded = kernel.load(&asm.finish().unwrap(), &maps, LogLevel::Silent).unwrap().unwrap();
    let mut context = [0; CONTEXT_WORDS];
    context[11] = 0x0123_4567_89ab_cdef;
    assert_eq!(loaded.run(&context).unwrap(), 0x9abc_def0);
    assert_eq!(maps.first_value(MapIdx(0)).unwrap(), 0x1234_5678_9abc_def0u64.to_le_bytes());
}

#[test]
fn a_refusal_has_a_reason() {
    let Some(kernel) = kernel() else { return };
    let maps = KernelMaps::create(&[]).unwrap();
    let mut asm = Asm::new();
    asm.mov64_imm(R0, 0).load(Size::DW, R2, R0, 0).exit();
    let insns = asm.finish().unwrap();
    let refusal = kernel.load(&insns, &maps, LogLevel::Branches).unwrap().unwrap_err();
    assert_eq!(refusal.reason(), "R0 invalid mem access 'scalar'", "{}", refusal.log);
    let silent = kernel.load(&insns, &maps, LogLevel::Silent).unwrap().unwrap_err();
    assert_eq!(silent.log, "");
    assert_eq!(silent.error.raw_os_error(), refusal.error.raw_os_error());
}

#[test]
fn an_accepted_program_has_a_log_too() {
    let Some(kernel) = kernel() else { return };
    let maps = KernelMaps::create(&[]).unwrap();
    let mut asm = Asm::new();
    asm.mov64_imm(R0, 5);
    for _ in 0..3000 {
        asm.alu64(AluOp::Add, R0, 1);
    }
    asm.exit();
    let log = kernel.log(&asm.finish().unwrap(), &maps, LogLevel::Steps).unwrap();
    assert!(log.len() > 1 << 16, "the log had to grow: {} bytes", log.len());
    assert!(log.contains("=3005"), "{}", &log[log.len() - 400..]);
}

#[test]
fn maps_are_made_anew() {
    let Some(kernel) = kernel() else { return };
    let init = Some(vec![7, 0, 0, 0, 1, 2, 3, 4]);
    let read_only = MapSpec { init, read_only: true, ..map(MapKind::Array, 4, 8, 1) };
    let specs = [map(MapKind::Hash, 8, 16, 4), read_only, map(MapKind::RingBuf, 0, 0, 4096)];
    let mut maps = KernelMaps::create(&specs).unwrap();
    // Adds an element, unless it is there; returns that plus a constant of the read-only map.
    let mut asm = Asm::new();
    asm.store_imm(Size::DW, R10, -8, 1).store_imm(Size::DW, R10, -16, 2);
    asm.store_imm(Size::DW, R10, -24, 3).map_ref(R1, MapIdx(0)).mov64_reg(R2, R10);
    asm.add64_imm(R2, -8).mov64_reg(R3, R10).add64_imm(R3, -24).mov64_imm(R4, 1);
    asm.call(Helper::MapUpdateElem).map_value(R1, MapIdx(1), 0).load(Size::W, R1, R1, 0);
    asm.add64_reg(R0, R1).exit();
    let insns = asm.finish().unwrap();
    let loaded = kernel.load(&insns, &maps, LogLevel::Silent).unwrap().unwrap();
    let context = [0; CONTEXT_WORDS];
    assert_eq!(loaded.run(&context).unwrap(), 7);
    assert_eq!(loaded.run(&context).unwrap().cast_signed(), 7 - 17, "EEXIST");
    maps.renew(MapIdx(0)).unwrap();
    let loaded = kernel.load(&insns, &maps, LogLevel::Silent).unwrap().unwrap();
    assert_eq!(loaded.run(&context).unwrap(), 7);
}

#[test]
fn a_map_that_is_not_there() {
    let Some(kernel) = kernel() else { return };
    let maps = KernelMaps::create(&[]).unwrap();
    let mut asm = Asm::new();
    asm.map_ref(R0, MapIdx(3)).exit();
    let got = kernel.load(&asm.finish().unwrap(), &maps, LogLevel::Silent);
    assert!(matches!(got, Err(KernelError::NoSuchMap { insn_idx: 0, map: 3 })), "{got:?}");
}
