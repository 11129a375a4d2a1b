//! Facts about instructions, gathered over all paths.

use flea_object::helper::Helper;
use flea_object::spec::MapIdx;

use crate::facts::{Branch, Callees, Fact, Operands, Region};
use crate::report::Fault;

/// One fact per instruction so far.
#[derive(Debug)]
pub(crate) struct Collector {
    facts: Vec<Fact>,
    callees: Callees,
    numbers: Vec<Seen>,
}

/// What the visits of one instruction have had in common.
#[derive(Clone, Copy, Debug)]
struct Seen {
    min: u64,
    max: u64,
    jumps: bool,
    falls: bool,
}

impl Seen {
    /// Of no visit.
    const NOTHING: Self = Self { min: u64::MAX, max: 0, jumps: false, falls: false };

    fn operands(&self) -> Operands {
        let branch = match (self.jumps, self.falls) {
            (true, false) => Some(Branch::Jumps),
            (false, true) => Some(Branch::Falls),
            _ => None,
        };
        // No visit noted a number: nothing was asked.
        if self.min > self.max {
            return Operands { branch, ..Operands::ANY };
        }
        Operands { min: self.min, max: self.max, branch }
    }
}

impl Collector {
    pub(crate) fn new(n_insns: usize) -> Self {
        let numbers = vec![Seen::NOTHING; n_insns];
        Self { facts: vec![Fact::Unreachable; n_insns], callees: Callees::new(), numbers }
    }

    pub(crate) fn operands(&self) -> Vec<Operands> {
        self.numbers.iter().map(Seen::operands).collect()
    }

    pub(crate) fn into_parts(self) -> (Vec<Fact>, Callees) {
        (self.facts, self.callees)
    }

    /// On a path, the second operand of `idx` is in `min..=max`; anything where it is not known.
    pub(crate) fn number(&mut self, idx: usize, range: Option<(u64, u64)>) {
        let (min, max) = range.unwrap_or((0, u64::MAX));
        let seen = &mut self.numbers[idx];
        seen.min = seen.min.min(min);
        seen.max = seen.max.max(max);
    }

    /// A path goes on from the conditional jump at `idx` so.
    pub(crate) fn branch(&mut self, idx: usize, branch: Branch) {
        let seen = &mut self.numbers[idx];
        match branch {
            Branch::Jumps => seen.jumps = true,
            Branch::Falls => seen.falls = true,
        }
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
