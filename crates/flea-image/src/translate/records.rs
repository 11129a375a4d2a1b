//! Ring buffer records that a run must give back where it cannot get a lock and ends there.
//!
//! Each call of `bpf_ringbuf_reserve` has a variable with the record that it gave last, 0 once
//! that was submitted or discarded. One is enough: the verifier lets a program take a lock only
//! while it holds at most one record of each such call, and a function that is called make a tail
//! call.

use std::collections::BTreeMap;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, Value, types};
use cranelift_frontend::Variable;
use flea_layout::shared::RuntimeFn;
use flea_object::helper::Helper;
use flea_verifier::facts::Fact;
use flea_verifier::targets::Member;

use super::Translator;
use crate::clif::select;

/// The records, by the program and the instruction that reserves them; none in programs that
/// take no lock, and come to none that does.
#[derive(Default)]
pub(super) struct Records(BTreeMap<(Member, u32), Variable>);

impl Translator<'_, '_> {
    /// At the program's start nothing is held.
    pub(super) fn begin_records(&mut self) {
        let calls =
            |wanted| move |f: &Fact| matches!(f, Fact::Call { helper, .. } if *helper == wanted);
        let mut facts = self.members.iter().flat_map(|member| member.verified.facts());
        if !facts.any(calls(Helper::SpinLock)) {
            return;
        }
        for (member, used) in (0..).map(Member).zip(self.members) {
            for (idx, fact) in (0u32..).zip(used.verified.facts()) {
                if calls(Helper::RingbufReserve)(fact) {
                    let record = self.b.declare_var(types::I64);
                    let none = self.iconst(0);
                    self.b.def_var(record, none);
                    self.records.0.insert((member, idx), record);
                }
            }
        }
    }

    /// The call at `idx` gave `record`, or null.
    pub(super) fn note_reserved(&mut self, idx: u32, record: Value) {
        if let Some(var) = self.records.0.get(&(self.member(), idx)) {
            self.b.def_var(*var, record);
        }
    }

    /// `record` was submitted or discarded.
    pub(super) fn note_given_back(&mut self, record: Value) {
        for var in self.records.0.values().copied().collect::<Vec<_>>() {
            let held = self.b.use_var(var);
            let same = self.b.ins().icmp(IntCC::Equal, held, record);
            let none = self.iconst(0);
            let still_held = select(self.b, same, none, held);
            self.b.def_var(var, still_held);
        }
    }

    /// Discards what is held.
    pub(super) fn discard_records(&mut self) {
        for var in self.records.0.values().copied().collect::<Vec<_>>() {
            let held = self.b.use_var(var);
            let (discard, next) = (self.b.create_block(), self.b.create_block());
            self.b.ins().brif(held, discard, &[], next, &[]);
            self.b.switch_to_block(discard);
            let flags = self.iconst(0);
            self.runtime(RuntimeFn::RingbufDiscard, &[held, flags]);
            self.b.ins().jump(next, &[]);
            self.b.switch_to_block(next);
        }
    }
}
