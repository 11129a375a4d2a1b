//! Accepted programs put together along their tail calls. The verifier itself needs none of it:
//! it follows a tail call both ways, whatever stands in a program array.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use flea_object::helper::Helper;
use flea_object::spec::MapIdx;

use crate::facts::{Fact, Verified};

/// Programs that tail calls lead to, and where they stand. Each was proved for the same context
/// as the program that they belong to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// What [`Member`]s from 1 on are.
    pub programs: Vec<Arc<Verified>>,
    /// Where they stand in program arrays; what is not here is empty.
    pub slots: BTreeMap<(MapIdx, u32), Member>,
}

/// One of the programs that a run may come through: 0 is the one that it begins with, others are
/// [`Targets::programs`] in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(pub usize);

impl Member {
    /// The program itself.
    pub const FIRST: Self = Self(0);
}

/// A place where a program makes a tail call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailCall {
    /// The instruction.
    pub insn_idx: u32,
    /// The program array.
    pub map: MapIdx,
    /// The index, where it is known.
    pub index: Option<u32>,
}

impl TailCall {
    /// Of the call of a helper at `insn_idx`, if it is a tail call. Linux looks at the low 32
    /// bits of the index.
    #[must_use]
    pub fn of(insn_idx: u32, fact: Fact) -> Option<Self> {
        let Fact::Call { helper: Helper::TailCall, map: Some(map), constants } = fact else {
            return None;
        };
        let low = |index: u64| u32::try_from(index & 0xffff_ffff).unwrap_or(u32::MAX);
        Some(Self { insn_idx, map, index: constants[2].map(low) })
    }

    /// What stands at the indices that it may have.
    pub fn reached<'a, T>(
        &self,
        slots: &'a BTreeMap<(MapIdx, u32), T>,
    ) -> impl Iterator<Item = (u32, &'a T)> + use<'a, T> {
        let (first, last) = self.index.map_or((0, u32::MAX), |index| (index, index));
        slots.range((self.map, first)..=(self.map, last)).map(|(&(_, index), at)| (index, at))
    }
}

/// Program number `first` with all that its tail calls can lead to. `slots` has what stands in
/// program arrays, `prove` gives the proof of a program.
///
/// # Errors
/// The first of `prove`.
pub fn link<E>(
    first: usize,
    slots: &BTreeMap<(MapIdx, u32), usize>,
    mut prove: impl FnMut(usize) -> Result<Arc<Verified>, E>,
) -> Result<Verified, E> {
    let mut members = BTreeMap::from([(first, Member::FIRST)]);
    let mut proofs = vec![prove(first)?];
    let mut targets = Targets::default();
    let mut next = 0;
    while let Some(proof) = proofs.get(next).map(Arc::clone) {
        next += 1;
        for call in proof.tail_calls() {
            for (index, &program) in call.reached(slots) {
                let member = match members.entry(program) {
                    Entry::Occupied(known) => *known.get(),
                    Entry::Vacant(new) => {
                        let member = *new.insert(Member(proofs.len()));
                        proofs.push(prove(program)?);
                        member
                    }
                };
                targets.slots.insert((call.map, index), member);
            }
        }
    }
    let first = proofs.remove(0);
    targets.programs = proofs;
    Ok(first.with_targets(targets))
}

impl Verified {
    /// The same program, with what its tail calls lead to.
    #[must_use]
    pub fn with_targets(&self, targets: Targets) -> Self {
        Self { targets, ..self.clone() }
    }

    /// What its tail calls, and those of its targets, lead to.
    #[must_use]
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// All programs that a run may come through, this one first.
    pub fn members(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(self.targets.programs.iter().map(|program| &**program))
    }

    /// The places where this program itself makes tail calls.
    pub fn tail_calls(&self) -> impl Iterator<Item = TailCall> + '_ {
        (0u32..).zip(&self.facts).filter_map(|(idx, fact)| TailCall::of(idx, *fact))
    }
}
