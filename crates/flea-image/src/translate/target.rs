//! Loads from the target's own data. Nobody has proved their addresses, and they must not fault,
//! not even in a thread that blocks every signal: the kernel reads (`flea_probe_read_user`), and
//! a field that is not there is 0.
//!
//! A system call takes longer than all the rest of a program, so a load reads along what the
//! instructions after it will read through the same pointer, in one go. Bytes between two fields
//! may be missing where both fields are there (a guard page, a file's end): if the whole cannot
//! be read, each field is read by itself.
//!
//! One page needs no kernel: the one that the body's own `push rbp` has just written to. What is
//! above it there is the caller's, out-parameters and small structures among it, and stays while
//! the body runs.
//!
//! ```text
//!          at = base + first                    the fields are in [at, at + n_bytes)
//!          if at - rbp < 4096 and ((at + n_bytes - 1) ^ rbp) < 4096: from = at
//!          else: failed = flea_probe_read_user(buffer, n_bytes, at)
//!                if failed: (cold) flea_probe_read_user(buffer + x, size, at + x), each field
//!                from = buffer
//!          each field = [from + x]
//! ```

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types;
use cranelift_codegen::ir::{InstBuilder, StackSlot, StackSlotData, StackSlotKind, Type, Value};
use flea_layout::shared::RuntimeFn;
use flea_object::insn::Insn;
use flea_verifier::facts::{Fact, Region};

use super::mem::access_type;
use super::{Scope, Translator, op, proved};
use crate::request::CompileError;

/// Bytes that are read in one go at most.
const MAX_RUN_BYTES: i32 = 256;
/// Instructions after the first load that are looked at.
const MAX_RUN_INSNS: u32 = 64;
/// Pages are at least this large.
const PAGE_BYTES: i64 = 4096;

/// Fields behind one pointer that are read in one go.
struct Run {
    /// The register with the pointer.
    base: u8,
    /// From the pointer: the first byte, and one past the last.
    first: i32,
    end: i32,
    fields: Vec<Field>,
}

/// What one instruction loads.
#[derive(Clone, Copy)]
struct Field {
    insn_idx: u32,
    off: i32,
    ty: Type,
}

impl Translator<'_, '_> {
    /// The field that the load at `idx` reads, not extended yet.
    pub(super) fn load_target(
        &mut self,
        scope: &mut Scope,
        idx: u32,
        insn: Insn,
    ) -> Result<Value, CompileError> {
        if let Some(value) = scope.loaded.remove(&idx) {
            return Ok(value);
        }
        if !self.env.has_runtime {
            let what = "load from the target without a runtime";
            return Err(CompileError::BadFacts { insn_idx: idx, what });
        }
        let run = self.run(scope, idx, insn);
        let from = self.read_run(scope, &run);
        for field in &run.fields {
            let value = self.b.ins().load(field.ty, proved(), from, field.off - run.first);
            scope.loaded.insert(field.insn_idx, value);
        }
        let missing = CompileError::BadFacts { insn_idx: idx, what: "a run without its start" };
        scope.loaded.remove(&idx).ok_or(missing)
    }

    /// The load at `idx` and what follows it for certain, or unless a jump is taken: to read more
    /// than is needed harms nobody.
    fn run(&self, scope: &Scope, idx: u32, insn: Insn) -> Run {
        let first = field(idx, insn);
        let end = first.off + n_bytes(first.ty);
        let mut run = Run { base: insn.src, first: first.off, end, fields: vec![first] };
        let mut is_kept = insn.dst != run.base;
        let mut at = idx + 1;
        let last = scope.range.end.min(idx.saturating_add(MAX_RUN_INSNS));
        while is_kept && at < last && !scope.blocks.contains_key(&at) {
            let insn = self.used.verified.insns()[at as usize];
            match self.used.verified.facts()[at as usize] {
                Fact::Unreachable
                | Fact::Call { .. }
                | Fact::CallLocal { .. }
                | Fact::CallPointer => break,
                Fact::Access(Region::Target) if insn.src == run.base => run.add(field(at, insn)),
                Fact::Access(_) | Fact::Plain => {}
            }
            if matches!(insn.opcode, op::JA | op::JA32 | op::EXIT) {
                break;
            }
            is_kept = !changes(insn, run.base);
            at += if insn.opcode == op::LDDW { 2 } else { 1 };
        }
        run
    }

    /// Makes a run's fields readable; where its first byte is then.
    fn read_run(&mut self, scope: &Scope, run: &Run) -> Value {
        let n_bytes = i64::from(run.end - run.first);
        let base = self.reg(scope, run.base);
        let at = self.b.ins().iadd_imm_s(base, i64::from(run.first));
        let (called, done) = (self.b.create_block(), self.b.create_block());
        let from = self.b.append_block_param(done, types::I64);
        let is_ours = self.is_in_own_page(at, n_bytes);
        self.b.ins().brif(is_ours, done, &[at.into()], called, &[]);

        self.b.switch_to_block(called);
        let slot = self.buffer((run.end - run.first).unsigned_abs());
        let buffer = self.b.ins().stack_addr(types::I64, slot, 0);
        let size = self.iconst(n_bytes);
        let failed = self.runtime(RuntimeFn::ProbeReadUser, &[buffer, size, at]);
        if run.fields.len() == 1 {
            // It has zeroed the buffer if it failed.
            self.b.ins().jump(done, &[buffer.into()]);
        } else {
            let one_by_one = self.b.create_block();
            self.b.set_cold_block(one_by_one);
            self.b.ins().brif(failed, one_by_one, &[], done, &[buffer.into()]);
            self.b.switch_to_block(one_by_one);
            for field in &run.fields {
                let into = field.off - run.first;
                let to = self.b.ins().stack_addr(types::I64, slot, into);
                let from = self.b.ins().iadd_imm_s(at, i64::from(into));
                let size = self.iconst(i64::from(field.ty.bytes()));
                self.runtime(RuntimeFn::ProbeReadUser, &[to, size, from]);
            }
            let buffer = self.b.ins().stack_addr(types::I64, slot, 0);
            self.b.ins().jump(done, &[buffer.into()]);
        }
        self.b.switch_to_block(done);
        from
    }

    /// Whether `n_bytes` bytes at `at` are above the body's rbp and in its page. Neither sum can
    /// overflow where the first test holds: stacks are in the lower half of the addresses.
    fn is_in_own_page(&mut self, at: Value, n_bytes: i64) -> Value {
        let rbp = self.b.ins().get_frame_pointer(types::I64);
        let above = self.b.ins().isub(at, rbp);
        let is_near = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, above, PAGE_BYTES);
        let last = self.b.ins().iadd_imm_s(at, n_bytes - 1);
        let differ = self.b.ins().bxor(last, rbp);
        let in_page = self.b.ins().icmp_imm_u(IntCC::UnsignedLessThan, differ, PAGE_BYTES);
        self.b.ins().band(is_near, in_page)
    }

    /// Room for a run of `n_bytes`: the same for all, one after another, as a run's fields are in
    /// registers before the next is read.
    fn buffer(&mut self, n_bytes: u32) -> StackSlot {
        let slots = &mut self.b.func.sized_stack_slots;
        let slot = *self.out.target_buffer.get_or_insert_with(|| {
            slots.push(StackSlotData::new(StackSlotKind::ExplicitSlot, n_bytes, 3))
        });
        slots[slot].size = slots[slot].size.max(n_bytes);
        slot
    }
}

impl Run {
    /// Takes `field` along, if all still fit. Of fields that overlap, one may be there and another
    /// not: what is written for the one would be read as the other.
    fn add(&mut self, field: Field) {
        if self.fields.iter().any(|other| field.spoils(other)) {
            return;
        }
        let first = self.first.min(field.off);
        let end = self.end.max(field.off + n_bytes(field.ty));
        if end - first <= MAX_RUN_BYTES {
            (self.first, self.end) = (first, end);
            self.fields.push(field);
        }
    }
}

impl Field {
    /// It is another field, and has bytes of `other`.
    fn spoils(self, other: &Self) -> bool {
        let (end, other_end) = (self.off + n_bytes(self.ty), other.off + n_bytes(other.ty));
        let is_same = (self.off, end) == (other.off, other_end);
        !is_same && self.off < other_end && other.off < end
    }
}

fn field(insn_idx: u32, insn: Insn) -> Field {
    Field { insn_idx, off: i32::from(insn.off), ty: access_type(insn) }
}

/// At most 8.
fn n_bytes(ty: Type) -> i32 {
    ty.bytes().cast_signed()
}

/// Whether `insn`, which is no call, gives `reg` a new value.
fn changes(insn: Insn, reg: u8) -> bool {
    match op::class(insn.opcode) {
        op::LD | op::LDX | op::ALU | op::ALU64 => insn.dst == reg,
        // Atomics may load into any of these.
        op::STX if op::mode(insn.opcode) == op::ATOMIC => [insn.dst, insn.src, 0].contains(&reg),
        _ => false,
    }
}
