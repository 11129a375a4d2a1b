//! Facts about instructions, gathered over all paths.

use flea_object::helper::Helper;
use flea_object::spec::MapIdx;

use crate::facts::{Callees, Fact, Region};
use crate::report::Fault;

/// One fact per instruction so far.
#[derive(Debug)]
pub(crate) struct Collector {
    facts: Vec<Fact>,
    callees: Callees,
}

impl Collector {
    pub(crate) fn new(n_insns: usize) -> Self {
        Self { facts: vec![Fact::Unreachable; n_insns], callees: Callees::new() }
    }

    pub(crate) fn into_parts(self) -> (Vec<Fact>, Callees) {
        (self.facts, self.callees)
    }

    /// A path gets to `idx`.
    pub(crate) fn plain(&mut self, idx: usize) {
        if let Some(fact @ Fact::Unreachable) = self.facts.get_mut(idx) {
            *fact = Fact::Plain;
        }
    }

    /// On a path, `idx` accesses `region`.
    pub(crate) fn access(&mut self, idx: usize, region: Region) -> Result<(), Fault> {
        match &mut self.facts[idx] {
            Fact::Access(known) if *known == region => Ok(()),
            Fact::Access(_) => Err(Fault::new("same insn cannot be used with different pointers")
                .hint(
                    "the paths that meet here must bring pointers into the same kind of memory, \
                     and the same map",
                )),
            fact => {
                *fact = Fact::Access(region);
                Ok(())
            }
        }
    }

    /// On a path, `idx` calls `helper` so.
    pub(crate) fn call(
        &mut self,
        idx: usize,
        helper: Helper,
        map: Option<MapIdx>,
        constants: [Option<u64>; 5],
    ) -> Result<(), Fault> {
        match &mut self.facts[idx] {
            Fact::Call { map: known, .. } if *known != map => {
                Err(Fault::new("same insn cannot be used with different maps")
                    .hint("call the helper once on each of the paths"))
            }
            Fact::Call { constants: known, .. } => {
                for (known, now) in known.iter_mut().zip(constants) {
                    if *known != now {
                        *known = None;
                    }
                }
                Ok(())
            }
            fact => {
                *fact = Fact::Call { helper, map, constants };
                Ok(())
            }
        }
    }

    /// `idx` calls function number `function`.
    pub(crate) fn call_local(&mut self, idx: usize, function: usize) {
        self.facts[idx] = Fact::CallLocal { function: index(function) };
    }

    /// `idx` calls function number `function`, whose address is in a register.
    pub(crate) fn call_pointer(&mut self, idx: usize, function: usize) {
        self.facts[idx] = Fact::CallPointer;
        self.callback(idx, function);
    }

    /// The helper called at `idx` calls function number `function`.
    pub(crate) fn callback(&mut self, idx: usize, function: usize) {
        self.callees.entry(index(idx)).or_default().insert(index(function));
    }
}

/// Instructions are counted in a u32, and there are no more functions than those.
fn index(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
