//! When a program may run without the recursion guard.
//!
//! A program is re-entered when a signal handler runs a traced function while the program is
//! running, or when something the program calls does. Without a call out of the image only the
//! signal is left. The guard then protects the program's view of memory that outlives the
//! run: map values and ring buffer records (stack, registers and session cookies belong to one
//! activation). If each change of such memory is one machine instruction, a signal falls
//! between two such instructions, never inside one; the handler's run is then one that came
//! wholly before the rest, and no update is lost: the guard would only hide a run that Linux
//! counts as a miss. So no guard where
//! - the program calls no runtime function but the clock, which keeps nothing between two calls,
//!   touches nothing of ours and calls nothing but the vDSO, no function of which is traced, and
//! - it writes no map value, or each write is an atomic or a load-operate-store on one cell
//!   that Cranelift merges into one instruction (`add qword [mem], x`).
//!
//! Each side of an fsession program is decided on alone: one that only notes the time in its
//! session cookie needs no guard, whatever its exit side writes.
//!
//! Programs that take locks are always guarded, and by one guard for all of them: in a signal
//! handler above a run that holds a lock, another program would wait for that lock for ever, or
//! take a second one while other threads take the two in the other order.
//!
//! The last part depends on instruction selection, so it is *checked* on the machine code
//! ([`writes_are_single_instructions`]); where it does not hold the body is compiled again
//! with guards.

use flea_layout::plan::{ArenaPlan, MapPlacement};
use flea_object::helper::Helper;
use flea_verifier::Verified;
use flea_verifier::facts::{Fact, Region};
use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, Register};

use crate::translate::{is_inline_array, op};

/// `bpf_map_update_elem`'s flags are in r4.
const FLAGS_ARG: usize = 3;
/// Update with the lock in the value held.
const BPF_F_LOCK: u64 = 4;

/// Whether a program needs its guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guard {
    /// Always.
    Needed,
    /// Not if the machine code shows its read-modify-writes merged.
    UnlessMerged,
    /// Never: nothing that outlives the run is written but by atomics.
    Needless,
}

/// Decides from the program and what its tail calls lead to: one run, one guard.
pub(crate) fn of_program(verified: &Verified, plan: &ArenaPlan) -> Guard {
    let of_all = verified.members().map(|member| of_member(member, plan));
    of_all.fold(Guard::Needless, |strictest, guard| match (strictest, guard) {
        (Guard::Needed, _) | (_, Guard::Needed) => Guard::Needed,
        (Guard::UnlessMerged, _) | (_, Guard::UnlessMerged) => Guard::UnlessMerged,
        _ => Guard::Needless,
    })
}

fn of_member(verified: &Verified, plan: &ArenaPlan) -> Guard {
    let mut merged_writes = false;
    for (i, fact) in verified.facts().iter().enumerate() {
        match *fact {
            Fact::Call { helper, map, .. }
                if may_disturb(helper, map.and_then(|m| plan.maps.get(m.0 as usize))) =>
            {
                return Guard::Needed;
            }
            // What a global function is given the address of may be a map's value.
            Fact::Access(Region::MapValue { .. } | Region::RingbufRecord | Region::Memory)
                if is_plain_store(verified, i) =>
            {
                if !ends_read_modify_write(verified, i) {
                    return Guard::Needed;
                }
                merged_writes = true;
            }
            _ => {}
        }
    }
    if merged_writes { Guard::UnlessMerged } else { Guard::Needless }
}

/// May the program, or what its tail calls lead to, hold the lock of a map's value, if only while a helper updates it?
pub(crate) fn takes_locks(verified: &Verified, plan: &ArenaPlan) -> bool {
    let mut facts = verified.members().flat_map(Verified::facts);
    facts.any(|fact| match *fact {
        Fact::Call { helper: Helper::SpinLock, .. } => true,
        Fact::Call { helper: Helper::MapUpdateElem, map: Some(map), constants } => {
            let locks = plan.maps.get(map.0 as usize).is_some_and(|m| m.lock_offset.is_some());
            locks && constants[FLAGS_ARG].is_none_or(|flags| flags & BPF_F_LOCK != 0)
        }
        _ => false,
    })
}

/// Does `helper` become a call of the runtime that works on what outlives the run, or that may
/// lead to traced code?
fn may_disturb(helper: Helper, map: Option<&MapPlacement>) -> bool {
    match helper {
        Helper::MapLookupElem | Helper::ForEachMapElem => !map.is_some_and(is_inline_array),
        Helper::Loop
        | Helper::KtimeGetNs
        | Helper::KtimeGetBootNs
        | Helper::GetFuncIp
        | Helper::GetAttachCookie
        | Helper::GetFuncArg
        | Helper::GetFuncRet
        | Helper::GetFuncArgCnt
        | Helper::Fls64
        | Helper::TailCall
        | Helper::RdonlyCast
        | Helper::SessionIsReturn
        | Helper::SessionCookie => false,
        _ => true,
    }
}

fn is_plain_store(verified: &Verified, i: usize) -> bool {
    let opcode = verified.insns()[i].opcode;
    op::class(opcode) == op::ST || (op::class(opcode) == op::STX && op::mode(opcode) == op::MEM)
}

/// `r = *(T *)(p + off); r op= x; *(T *)(p + off) = r` with the store at `i`. Jumps between
/// the three would show in the machine code, where merging needs one block.
fn ends_read_modify_write(verified: &Verified, i: usize) -> bool {
    let insns = verified.insns();
    let Some(load_idx) = i.checked_sub(2) else { return false };
    let (load, alu, store) = (insns[load_idx], insns[i - 1], insns[i]);
    let alu_ok = matches!(op::class(alu.opcode), op::ALU | op::ALU64)
        && matches!(alu.opcode & 0xf0, op::ADD | op::SUB | op::AND | op::OR | op::XOR);
    op::class(store.opcode) == op::STX
        && op::class(load.opcode) == op::LDX
        && op::mode(load.opcode) == op::MEM
        && op::size(load.opcode) == op::size(store.opcode)
        && load.src == store.dst
        && load.off == store.off
        && load.dst == store.src
        && load.dst != load.src
        && alu_ok
        && alu.dst == load.dst
}

/// Is every write to memory other than the stack frame a single read-modify-write instruction?
pub(crate) fn writes_are_single_instructions(code: &[u8]) -> bool {
    let mut info = InstructionInfoFactory::new();
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    decoder.iter().all(|insn| {
        info.info(&insn).used_memory().iter().all(|m| {
            let on_stack = matches!(m.base(), Register::RSP | Register::RBP);
            let plain_write = matches!(m.access(), OpAccess::Write | OpAccess::CondWrite);
            on_stack || !plain_write
        })
    })
}
