//! Calls through function references: `callx`, and the helpers that call a function in rounds.
//! A function has no address; each is inlined where it can be called.
//!
//! ```text
//!   bpf_loop            if flags != 0: -EINVAL; if n > 2^23: -E2BIG; if n == 0: 0
//!     body(i):          r0 = function(i, ctx); if r0 == 0 and i + 1 < n: body(i + 1)
//!                       result i + 1
//!   for each, array     the same over the elements; the key is i, in a stack slot
//!   for each, hash
//!     head(i):          value = flea_hash_next(arena, map, &cursor, &key, slot)
//!                       if value == 0 or i == max_entries: result i
//!                       r0 = function(map, &key, value, ctx); if r0 == 0: head(i + 1)
//!                       result i + 1
//! ```
//! No lock is held while the function runs. The key is a copy that nobody changes.

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{Block, InstBuilder, StackSlotData, StackSlotKind, Value, types};
use flea_layout::plan::MapPlacement;
use flea_layout::shared::RuntimeFn;
use flea_object::helper::Helper;
use flea_object::spec::{MapIdx, MapKind};
use flea_verifier::Verified;

use super::helper::EINVAL;
use super::{Scope, Translator, proved};
use crate::request::CompileError;

const E2BIG: i64 = -7;
/// Rounds of one `bpf_loop`, as in Linux.
const MAX_LOOPS: u64 = 1 << 23;

/// A call of a helper that is being translated.
struct Call<'a> {
    scope: &'a Scope,
    idx: u32,
    function: Value,
    context: Value,
    /// Where its result goes.
    done: Block,
}

impl Translator<'_, '_> {
    pub(super) fn rounds(
        &mut self,
        scope: &Scope,
        idx: u32,
        helper: Helper,
        map: Option<MapIdx>,
        constants: [Option<u64>; 5],
    ) -> Result<Value, CompileError> {
        let [count, function, context, flags] = [1, 2, 3, 4].map(|r| self.reg(scope, r));
        let done = self.b.create_block();
        let result = self.b.append_block_param(done, types::I64);
        let call = Call { scope, idx, function, context, done };
        if constants[3] != Some(0) {
            self.refuse_if(flags, EINVAL, done);
        }
        // Where none was verified, none is ever called.
        let runs = self.used.verified.callees(idx).next().is_some();
        match helper {
            _ if !runs => {
                if helper == Helper::Loop {
                    self.refuse_large(count, done);
                }
                let none = self.iconst(0);
                self.b.ins().jump(done, &[none.into()]);
            }
            Helper::Loop => {
                if constants[0].is_none_or(|n| n > MAX_LOOPS) {
                    self.refuse_large(count, done);
                }
                self.counted(&call, count, |_, i| Ok([i, context, i, i, i]))?;
            }
            _ => {
                let map =
                    map.ok_or(CompileError::BadFacts { insn_idx: idx, what: "which map?" })?;
                let placed = self.map(map)?;
                match placed.kind {
                    MapKind::Array | MapKind::PerCpuArray => self.each_of_array(&call, placed)?,
                    MapKind::Hash | MapKind::PerCpuHash => self.each_of_hash(&call, placed)?,
                    MapKind::RingBuf
                    | MapKind::ProgArray
                    | MapKind::ArrayOfMaps
                    | MapKind::HashOfMaps => {
                        let what = "a map without elements";
                        return Err(CompileError::BadFacts { insn_idx: idx, what });
                    }
                }
            }
        }
        self.b.switch_to_block(done);
        Ok(result)
    }

    /// A call of the function that `callee` refers to.
    pub(super) fn call_through(
        &mut self,
        scope: &Scope,
        idx: u32,
        callee: Value,
        args: [Value; 5],
    ) -> Result<Value, CompileError> {
        let verified = self.used.verified;
        let callees: Vec<u32> = verified.callees(idx).collect();
        let Some((&last, others)) = callees.split_last() else {
            return Err(CompileError::BadFacts { insn_idx: idx, what: "call of no function" });
        };
        if others.is_empty() {
            return self.deeper(scope, idx, last, args);
        }
        let joined = self.b.create_block();
        let result = self.b.append_block_param(joined, types::I64);
        for &function in others {
            let outside = CompileError::BadFacts { insn_idx: idx, what: "no such function" };
            let start = verified.functions().get(function as usize).ok_or(outside)?.start_insn_idx;
            let value = Verified::function_value(start).cast_signed();
            let (this, other) = (self.b.create_block(), self.b.create_block());
            let is_this = self.b.ins().icmp_imm_s(IntCC::Equal, callee, value);
            self.b.ins().brif(is_this, this, &[], other, &[]);
            self.b.switch_to_block(this);
            let r0 = self.deeper(scope, idx, function, args)?;
            self.b.ins().jump(joined, &[r0.into()]);
            self.b.switch_to_block(other);
        }
        let r0 = self.deeper(scope, idx, last, args)?;
        self.b.ins().jump(joined, &[r0.into()]);
        self.b.switch_to_block(joined);
        Ok(result)
    }

    /// `if condition: done(errno)`
    fn refuse_if(&mut self, condition: Value, errno: i64, done: Block) {
        let (refused, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(refused);
        self.b.ins().brif(condition, refused, &[], go_on, &[]);
        self.b.switch_to_block(refused);
        let errno = self.iconst(errno);
        self.b.ins().jump(done, &[errno.into()]);
        self.b.switch_to_block(go_on);
    }

    fn refuse_large(&mut self, count: Value, done: Block) {
        let most = i64::try_from(MAX_LOOPS).unwrap_or(i64::MAX);
        let large = self.b.ins().icmp_imm_u(IntCC::UnsignedGreaterThan, count, most);
        self.refuse_if(large, E2BIG, done);
    }

    /// Rounds 0 to `count`, each with the arguments that `args` makes of its number.
    fn counted(
        &mut self,
        call: &Call<'_>,
        count: Value,
        args: impl FnOnce(&mut Self, Value) -> Result<[Value; 5], CompileError>,
    ) -> Result<(), CompileError> {
        let (body, again) = (self.b.create_block(), self.b.create_block());
        let i = self.b.append_block_param(body, types::I64);
        let zero = self.iconst(0);
        self.b.ins().brif(count, body, &[zero.into()], call.done, &[zero.into()]);
        self.b.switch_to_block(body);
        let args = args(self, i)?;
        let stops = self.call_through(call.scope, call.idx, call.function, args)?;
        let n_done = self.b.ins().iadd_imm_s(i, 1);
        self.b.ins().brif(stops, call.done, &[n_done.into()], again, &[]);
        self.b.switch_to_block(again);
        let more = self.b.ins().icmp(IntCC::UnsignedLessThan, n_done, count);
        self.b.ins().brif(more, body, &[n_done.into()], call.done, &[n_done.into()]);
        Ok(())
    }

    fn each_of_array(&mut self, call: &Call<'_>, map: MapPlacement) -> Result<(), CompileError> {
        let key = self.stack_bytes(8);
        let header = self.arena(map.header_offset, 0);
        let base = self.element(call.idx, map, 0)?;
        let count = self.iconst(i64::from(map.max_entries));
        self.counted(call, count, |this, i| {
            this.b.ins().store(proved(), i, key, 0);
            let offset = this.b.ins().imul_imm_s(i, i64::from(map.value_stride));
            let value = this.b.ins().iadd(base, offset);
            Ok([header, key, value, call.context, i])
        })
    }

    fn each_of_hash(&mut self, call: &Call<'_>, map: MapPlacement) -> Result<(), CompileError> {
        let (cursor, key) = (self.stack_bytes(8), self.stack_bytes(map.key_size_bytes));
        let (arena, header) = self.arena_and_header(map);
        let slot = self.slot(call.idx)?;
        let (head, body) = (self.b.create_block(), self.b.create_block());
        let found = self.b.create_block();
        let i = self.b.append_block_param(head, types::I64);
        let zero = self.iconst(0);
        self.b.ins().store(proved(), zero, cursor, 0);
        self.b.ins().jump(head, &[zero.into()]);
        self.b.switch_to_block(head);
        // The runtime's cursor ends by itself, at what the map's header says; this is ours.
        let bound = i64::from(map.max_entries);
        let over = self.b.ins().icmp_imm_u(IntCC::UnsignedGreaterThanOrEqual, i, bound);
        self.b.ins().brif(over, call.done, &[i.into()], found, &[]);
        self.b.switch_to_block(found);
        let key_bytes = self.iconst(i64::from(map.key_size_bytes));
        let args = [arena, header, cursor, key, key_bytes, slot];
        let value = self.runtime(RuntimeFn::HashNext, &args);
        self.b.ins().brif(value, body, &[], call.done, &[i.into()]);
        self.b.switch_to_block(body);
        let args = [header, key, value, call.context, i];
        let stops = self.call_through(call.scope, call.idx, call.function, args)?;
        let n_done = self.b.ins().iadd_imm_s(i, 1);
        self.b.ins().brif(stops, call.done, &[n_done.into()], head, &[n_done.into()]);
        Ok(())
    }

    /// The address of so many bytes of the body's own stack, rounded up to 8.
    fn stack_bytes(&mut self, n_bytes: u32) -> Value {
        let slot = self.b.create_sized_stack_slot(StackSlotData::new(
            StackSlotKind::ExplicitSlot,
            n_bytes.next_multiple_of(8),
            3,
        ));
        self.b.ins().stack_addr(types::I64, slot, 0)
    }
}
