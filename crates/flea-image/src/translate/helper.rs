//! Helpers: emitted inline where that is a few instructions, else a call of the runtime.

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{
    AbiParam, ExtFuncData, ExternalName, InstBuilder, Signature, StackSlotData, StackSlotKind,
    UserExternalName, Value, types,
};
use cranelift_codegen::isa::CallConv;
use cranelift_frontend::FunctionBuilder;
use flea_layout::plan::MapPlacement;
use flea_layout::shared::RuntimeFn;
use flea_object::helper::Helper;
use flea_object::spec::{MapIdx, MapKind, ProgramKind};
use flea_verifier::facts::Fact;

use super::context::Side;
use super::{Scope, Translator, proved};
use crate::clif::{runtime_index, select, symbol};
use crate::code::RelocTarget;
use crate::request::CompileError;

pub(super) const EINVAL: i64 = -22;
const EOPNOTSUPP: i64 = -95;
const CLOCK_MONOTONIC: i64 = 1;
const CLOCK_BOOTTIME: i64 = 7;
/// `bpf_trace_printk` takes three values.
const PRINTK_ARGS: i32 = 3;

impl Translator<'_, '_> {
    /// Does the lookup at `idx` read its key here, rather than pass its address on?
    pub(super) fn reads_key_inline(&self, idx: u32) -> bool {
        let Some(Fact::Call { map: Some(map), .. }) = self.used.verified.facts().get(idx as usize)
        else {
            return false;
        };
        self.env.plan.maps.get(map.0 as usize).is_some_and(is_inline_array)
    }

    pub(super) fn helper(
        &mut self,
        scope: &Scope,
        idx: u32,
        helper: Helper,
        map: Option<MapIdx>,
        constants: [Option<u64>; 5],
    ) -> Result<Value, CompileError> {
        let not_here = CompileError::HelperNotHere { insn_idx: idx, helper };
        let [r1, r2, r3] = [1, 2, 3].map(|r| self.reg(scope, r));
        let side = self.env.args.side;
        let probe = matches!(self.used.kind, Some(ProgramKind::Uprobe | ProgramKind::Uretprobe));
        let words =
            matches!(helper, Helper::GetFuncArg | Helper::GetFuncArgCnt | Helper::GetFuncRet);
        if !self.env.has_runtime || (probe && words) {
            return Err(not_here);
        }
        match helper {
            Helper::MapLookupElem
            | Helper::MapUpdateElem
            | Helper::MapDeleteElem
            | Helper::RingbufOutput
            | Helper::RingbufReserve
            | Helper::RingbufQuery => self.map_helper(scope, idx, helper, map),
            Helper::Loop | Helper::ForEachMapElem => {
                self.rounds(scope, idx, helper, map, constants)
            }
            Helper::KtimeGetNs => Ok(self.clock(CLOCK_MONOTONIC)),
            Helper::KtimeGetBootNs => Ok(self.clock(CLOCK_BOOTTIME)),
            Helper::TracePrintk | Helper::TraceVprintk => self.printk(scope, helper),
            Helper::GetPrandomU32 => {
                let slot = self.slot(idx)?;
                let random = self.runtime(RuntimeFn::Prandom, &[slot]);
                let random = self.b.ins().ireduce(types::I32, random);
                Ok(self.widen(random))
            }
            Helper::GetSmpProcessorId => Ok(self.runtime(RuntimeFn::ProcessorId, &[])),
            Helper::GetCurrentPidTgid => Ok(self.runtime(RuntimeFn::PidTgid, &[])),
            Helper::GetCurrentUidGid => Ok(self.runtime(RuntimeFn::UidGid, &[])),
            Helper::GetCurrentComm => Ok(self.runtime(RuntimeFn::Comm, &[r1, r2])),
            Helper::ProbeReadUser | Helper::ProbeRead | Helper::ProbeReadKernel => {
                Ok(self.runtime(RuntimeFn::ProbeReadUser, &[r1, r2, r3]))
            }
            Helper::ProbeWriteUser => Ok(self.runtime(RuntimeFn::ProbeWriteUser, &[r1, r2, r3])),
            Helper::ProbeReadUserStr | Helper::ProbeReadStr | Helper::ProbeReadKernelStr => {
                Ok(self.runtime(RuntimeFn::ProbeReadUserStr, &[r1, r2, r3]))
            }
            Helper::SpinLock => self.spin_lock(idx, r1),
            Helper::SpinUnlock => {
                let (arena, slot) = (self.arena(0, 0), self.slot(idx)?);
                Ok(self.runtime(RuntimeFn::SpinUnlock, &[arena, r1, slot]))
            }
            Helper::RingbufSubmit | Helper::RingbufDiscard => {
                self.note_given_back(r1);
                let discards = helper == Helper::RingbufDiscard;
                let f = if discards { RuntimeFn::RingbufDiscard } else { RuntimeFn::RingbufSubmit };
                Ok(self.runtime(f, &[r1, r2]))
            }
            Helper::Fls64 => {
                let zeros = self.b.ins().clz(r1);
                let bits = self.iconst(64);
                Ok(self.b.ins().isub(bits, zeros))
            }
            // Only the verifier knows the difference.
            Helper::RdonlyCast => Ok(r1),
            Helper::GetFuncIp => Ok(self.number(self.env.function_address)),
            Helper::GetAttachCookie => Ok(self.number(self.used.cookie)),
            Helper::GetFuncArgCnt => {
                Ok(self.iconst(i64::try_from(self.env.args.n_args()).unwrap_or(i64::MAX)))
            }
            Helper::GetFuncArg => self.get_func_arg(scope, idx, constants[1]),
            Helper::GetFuncRet => self.get_func_ret(scope, idx),
            Helper::SessionIsReturn if self.used.kind == Some(ProgramKind::Fsession) => {
                Ok(self.iconst(i64::from(side == Side::Exit)))
            }
            Helper::SessionCookie if self.used.kind == Some(ProgramKind::Fsession) => {
                self.cookie_address().ok_or(not_here)
            }
            // A tail call goes another way: it is no call.
            Helper::SessionIsReturn | Helper::SessionCookie | Helper::TailCall => Err(not_here),
        }
    }

    fn map_helper(
        &mut self,
        scope: &Scope,
        idx: u32,
        helper: Helper,
        map: Option<MapIdx>,
    ) -> Result<Value, CompileError> {
        let map = map.ok_or(CompileError::BadFacts { insn_idx: idx, what: "which map?" })?;
        let placed = self.map(map)?;
        let [r2, r3, r4] = [2, 3, 4].map(|r| self.reg(scope, r));
        if helper == Helper::MapLookupElem && is_inline_array(&placed) {
            return self.array_lookup(scope, idx, placed);
        }
        let (arena, header) = self.arena_and_header(placed);
        // Of a template nothing but the shape is known: which map it is, r1 says.
        let header = if placed.template { self.reg(scope, 1) } else { header };
        Ok(match helper {
            Helper::MapLookupElem if placed.kind.holds_maps() => {
                self.runtime(RuntimeFn::InnerMap, &[arena, header, r2])
            }
            Helper::MapLookupElem => {
                let slot =
                    if placed.kind == MapKind::Array { self.iconst(0) } else { self.slot(idx)? };
                self.runtime(RuntimeFn::HashLookup, &[arena, header, r2, slot])
            }
            Helper::MapUpdateElem => {
                let slot = self.slot(idx)?;
                self.runtime(RuntimeFn::MapUpdate, &[arena, header, r2, r3, r4, slot])
            }
            Helper::MapDeleteElem => self.runtime(RuntimeFn::MapDelete, &[arena, header, r2]),
            Helper::RingbufOutput => {
                self.runtime(RuntimeFn::RingbufOutput, &[arena, header, r2, r3, r4])
            }
            Helper::RingbufReserve => {
                let record = self.runtime(RuntimeFn::RingbufReserve, &[arena, header, r2]);
                self.note_reserved(idx, record);
                record
            }
            _ => self.runtime(RuntimeFn::RingbufQuery, &[header, r2]),
        })
    }

    /// `if flea_spin_lock(arena, lock, slot) != 0 { discard records; leave the program }`: without
    /// the lock nothing that follows may run.
    fn spin_lock(&mut self, idx: u32, lock: Value) -> Result<Value, CompileError> {
        let given_up = self
            .used
            .given_up
            .ok_or(CompileError::BadFacts { insn_idx: idx, what: "no way out of a lock" })?;
        let (arena, slot) = (self.arena(0, 0), self.slot(idx)?);
        let status = self.runtime(RuntimeFn::SpinLock, &[arena, lock, slot]);
        let (taken, failed) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(failed);
        self.b.ins().brif(status, failed, &[], taken, &[]);
        self.b.switch_to_block(failed);
        self.discard_records();
        self.b.ins().jump(given_up, &[]);
        self.b.switch_to_block(taken);
        Ok(self.iconst(0))
    }

    pub(super) fn arena_and_header(&mut self, placed: MapPlacement) -> (Value, Value) {
        (self.arena(0, 0), self.arena(placed.header_offset, 0))
    }

    /// `key < max_entries ? element 0 + key * stride : 0`; no test where that is known.
    fn array_lookup(
        &mut self,
        scope: &Scope,
        idx: u32,
        map: MapPlacement,
    ) -> Result<Value, CompileError> {
        let key = self.read_through(scope, idx, 2, types::I32)?;
        let known = self.used.verified.operands(idx);
        let only_key = (known.min == known.max).then_some(known.min);
        if let Some(key) = self.constant(key).or(only_key) {
            if key >= u64::from(map.max_entries) {
                return Ok(self.iconst(0));
            }
            let offset = key * u64::from(map.value_stride);
            return self.element(idx, map, i64::try_from(offset).unwrap_or(i64::MAX));
        }
        let key = self.widen(key);
        let offset = self.b.ins().imul_imm_s(key, i64::from(map.value_stride));
        let base = self.element(idx, map, 0)?;
        let address = self.b.ins().iadd(base, offset);
        if known.max < u64::from(map.max_entries) {
            self.nonnull.insert(address);
            return Ok(address);
        }
        let bound = i64::from(map.max_entries);
        let inside = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, key, bound);
        let null = self.iconst(0);
        Ok(select(self.b, inside, address, null))
    }

    /// The number that an `i32` value is known to be.
    fn constant(&self, value: Value) -> Option<u64> {
        use cranelift_codegen::ir::{InstructionData, Opcode};
        let dfg = &self.b.func.dfg;
        let mut value = dfg.resolve_aliases(value);
        loop {
            let inst = dfg.value_def(value).inst()?;
            match dfg.insts[inst] {
                InstructionData::UnaryImm { opcode: Opcode::Iconst, imm } => {
                    return Some(imm.bits().cast_unsigned() & 0xffff_ffff);
                }
                // Only the low 32 bits matter, and those pass unchanged unless a narrower type
                // is between.
                InstructionData::Unary { opcode: Opcode::Ireduce | Opcode::Uextend, arg }
                    if [value, arg].iter().all(|v| dfg.value_type(*v).bits() >= 32) =>
                {
                    value = dfg.resolve_aliases(arg);
                }
                _ => return None,
            }
        }
    }

    fn get_func_arg(
        &mut self,
        scope: &Scope,
        idx: u32,
        n: Option<u64>,
    ) -> Result<Value, CompileError> {
        // Linux declares `u32 n`.
        let known = n.and_then(|n| usize::try_from(n & 0xffff_ffff).ok());
        if let Some(n) = known {
            let Some(value) = self.argument(n) else { return Ok(self.iconst(EINVAL)) };
            self.write_through(scope, idx, 3, value)?;
            return Ok(self.iconst(0));
        }
        let n = self.reg(scope, 2);
        let n = self.narrow(n, types::I32);
        let n = self.widen(n);
        let (value, valid) = self.argument_by_value(n);
        // An invalid number leaves the program's memory as it was.
        let old = self.read_through(scope, idx, 3, types::I64)?;
        let value = select(self.b, valid, value, old);
        self.write_through(scope, idx, 3, value)?;
        let (ok, einval) = (self.iconst(0), self.iconst(EINVAL));
        Ok(select(self.b, valid, ok, einval))
    }

    fn get_func_ret(&mut self, scope: &Scope, idx: u32) -> Result<Value, CompileError> {
        if self.used.kind == Some(ProgramKind::Fentry) {
            return Ok(self.iconst(EOPNOTSUPP));
        }
        let value = self.result(0);
        self.write_through(scope, idx, 2, value)?;
        Ok(self.iconst(0))
    }

    fn clock(&mut self, clock_id: i64) -> Value {
        let vdso = symbol(self.b, RelocTarget::VdsoClockGettime);
        let clock_id = self.iconst(clock_id);
        self.runtime(RuntimeFn::ClockNs, &[vdso, clock_id])
    }

    fn printk(&mut self, scope: &Scope, helper: Helper) -> Result<Value, CompileError> {
        let Some(map) = self.env.printk_map else { return Ok(self.iconst(EINVAL)) };
        let placed = self.map(map)?;
        let [fmt, fmt_size, r3, r4, r5] = [1, 2, 3, 4, 5].map(|r| self.reg(scope, r));
        let (args, n_args) = if helper == Helper::TraceVprintk {
            (r3, self.b.ins().ushr_imm_s(r4, 3))
        } else {
            let slot = self.b.create_sized_stack_slot(StackSlotData::new(
                StackSlotKind::ExplicitSlot,
                8 * PRINTK_ARGS.cast_unsigned(),
                3,
            ));
            for (i, value) in (0..PRINTK_ARGS).zip([r3, r4, r5]) {
                let at = self.b.ins().stack_addr(types::I64, slot, 8 * i);
                self.b.ins().store(proved(), value, at, 0);
            }
            let args = self.b.ins().stack_addr(types::I64, slot, 0);
            (args, self.iconst(i64::from(PRINTK_ARGS)))
        };
        let (arena, header) = self.arena_and_header(placed);
        Ok(self.runtime(RuntimeFn::Printk, &[arena, header, fmt, fmt_size, args, n_args]))
    }

    pub(super) fn runtime(&mut self, f: RuntimeFn, args: &[Value]) -> Value {
        self.out.calls_runtime = true;
        call_runtime(self.b, f, args)
    }
}

/// An array whose elements compiled code finds by itself.
pub(crate) fn is_inline_array(map: &MapPlacement) -> bool {
    matches!(map.kind, MapKind::Array | MapKind::PerCpuArray) && !map.template
}

/// Calls a runtime function: `movabs reg, address; call reg`, nothing clobbered but rax.
pub(crate) fn call_runtime(b: &mut FunctionBuilder<'_>, f: RuntimeFn, args: &[Value]) -> Value {
    let mut signature = Signature::new(CallConv::PreserveAll);
    signature.params = vec![AbiParam::new(types::I64); args.len()];
    signature.returns = vec![AbiParam::new(types::I64)];
    let signature = b.import_signature(signature);
    // Namespace 1 is the runtime's, see `clif`.
    let name = UserExternalName::new(1, runtime_index(f));
    let name = b.func.declare_imported_user_function(name);
    let callee = b.import_function(ExtFuncData {
        name: ExternalName::user(name),
        signature,
        colocated: false,
        patchable: false,
    });
    let call = b.ins().call(callee, args);
    b.inst_results(call)[0]
}
