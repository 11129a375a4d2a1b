//! Reads every instruction of the blob: what it must not contain, it does not.
#![allow(missing_docs, reason = "a test")]

use flea_layout::shared::RuntimeFn;
use flea_runtime::{BLOB, BLOB_CODE_BYTES, offset_of};
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpKind,
    Register,
};

fn instructions() -> Vec<Instruction> {
    let options = DecoderOptions::NONE;
    Decoder::with_ip(64, &BLOB[..BLOB_CODE_BYTES], 0, options).into_iter().collect()
}

#[test]
fn no_instruction_touches_a_vector_or_x87_register() {
    let mut infos = InstructionInfoFactory::new();
    for instruction in instructions() {
        assert!(!instruction.is_invalid(), "{:#x}: no instruction", instruction.ip());
        for used in infos.info(&instruction).used_registers() {
            let register = used.register();
            let allowed = register.is_gpr() || register.is_segment_register();
            assert!(allowed, "{:#x}: {instruction} uses {register:?}", instruction.ip());
        }
        assert!(instruction.fpu_stack_increment_info().increment() == 0, "{instruction}");
    }
}

#[test]
fn every_reference_stays_inside_and_none_is_written() {
    let mut infos = InstructionInfoFactory::new();
    for instruction in instructions() {
        let at = instruction.ip();
        if instruction.is_ip_rel_memory_operand() {
            let target = instruction.ip_rel_memory_address();
            assert!(target < BLOB.len() as u64, "{at:#x}: {instruction} leaves the blob");
        }
        for memory in infos.info(&instruction).used_memory() {
            let relative = memory.base() == Register::RIP || memory.base() == Register::None;
            let reads =
                memory.access() == OpAccess::Read || memory.access() == OpAccess::NoMemAccess;
            assert!(reads || !relative, "{at:#x}: {instruction} writes to the blob");
        }
        let near = matches!(instruction.op0_kind(), OpKind::NearBranch64);
        if instruction.flow_control() != FlowControl::Next && near {
            let target = instruction.near_branch_target();
            assert!(target < BLOB_CODE_BYTES as u64, "{at:#x}: {instruction} leaves the blob");
        }
    }
}

#[test]
fn every_function_begins_with_its_wrapper() {
    let boundaries: Vec<u64> = instructions().iter().map(Instruction::ip).collect();
    let mut offsets: Vec<u32> = RuntimeFn::ALL.map(offset_of).to_vec();
    for offset in &offsets {
        assert!(boundaries.contains(&u64::from(*offset)));
        let at = *offset as usize;
        // endbr64; push rbp; mov rbp, rsp
        assert_eq!(BLOB[at..at + 8], [0xf3, 0x0f, 0x1e, 0xfa, 0x55, 0x48, 0x89, 0xe5]);
    }
    offsets.sort_unstable();
    offsets.dedup();
    assert_eq!(offsets.len(), RuntimeFn::ALL.len());
}
