//! What the verifier proved of an accepted program, for the compiler.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use flea_object::{helper::Helper, insn::Insn, opcode, spec::MapIdx};

use crate::targets::Targets;

/// Functions that are called through a register at an instruction.
pub(crate) type Callees = BTreeMap<u32, BTreeSet<u32>>;

/// An accepted program. Only [`crate::verify`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub(crate) insns: Vec<Insn>,
    pub(crate) facts: Vec<Fact>,
    pub(crate) operands: Vec<Operands>,
    pub(crate) functions: Vec<Function>,
    pub(crate) callees: Callees,
    pub(crate) returns: RangeInclusive<i64>,
    pub(crate) targets: Targets,
}

impl Verified {
    /// A program that nobody has proved anything of. For the vectors runner's `check: false`
    /// and for tests of the compiler, on code that runs in the caller's own process only.
    #[doc(hidden)]
    #[must_use]
    pub fn from_parts_unverified(
        insns: Vec<Insn>,
        facts: Vec<Fact>,
        functions: Vec<Function>,
    ) -> Self {
        let callees = Callees::new();
        let (returns, targets) = (i64::MIN..=i64::MAX, Targets::default());
        Self { insns, facts, operands: Vec::new(), functions, callees, returns, targets }
    }

    /// The same, where `function` may be called through a register at `insn_idx`: for programs
    /// of [`Self::from_parts_unverified`].
    #[doc(hidden)]
    #[must_use]
    pub fn with_callee_unverified(mut self, insn_idx: u32, function: u32) -> Self {
        self.callees.entry(insn_idx).or_default().insert(function);
        self
    }

    /// The same program where only instructions run for which `runs(insn_idx)`: proved by the
    /// caller for one of the places that it is compiled for. What was proved of all paths holds
    /// on fewer.
    #[must_use]
    pub fn narrowed(&self, runs: impl Fn(u32) -> bool) -> Self {
        let facts = (0u32..).zip(&self.facts);
        let kept = |(idx, fact): (u32, &Fact)| if runs(idx) { *fact } else { Fact::Unreachable };
        Self { facts: facts.map(kept).collect(), ..self.clone() }
    }

    /// The instructions, as they came.
    #[must_use]
    pub fn insns(&self) -> &[Insn] {
        &self.insns
    }

    /// One fact per instruction (a `lddw`'s second half is [`Fact::Unreachable`]).
    #[must_use]
    pub fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// What is known of the numbers that instruction `idx` works with.
    #[must_use]
    pub fn operands(&self, idx: u32) -> Operands {
        self.operands.get(idx as usize).copied().unwrap_or(Operands::ANY)
    }

    /// The functions: the main one first.
    #[must_use]
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// The functions that the call at `insn_idx` may lead to through a register, by index into
    /// [`Self::functions`]: those of a [`Fact::CallPointer`], and the callbacks of a helper. In
    /// the register is [`Self::function_value`] of one of them.
    pub fn callees(&self, insn_idx: u32) -> impl Iterator<Item = u32> + '_ {
        self.callees.get(&insn_idx).into_iter().flatten().copied()
    }

    /// The functions that are called at `insn_idx`, directly or through a register.
    pub fn called_at(&self, insn_idx: u32) -> impl Iterator<Item = u32> + '_ {
        let direct = match self.facts.get(insn_idx as usize) {
            Some(Fact::CallLocal { function }) => Some(*function),
            _ => None,
        };
        direct.into_iter().chain(self.callees(insn_idx))
    }

    /// What a program finds in a register that holds the address of the function that starts at
    /// `start_insn_idx`. It has no other use than to tell functions apart: nothing lets it
    /// become a number.
    #[must_use]
    pub fn function_value(start_insn_idx: u32) -> u64 {
        u64::from(start_insn_idx)
    }

    /// Where in its context it stores to, in bytes from the start of slot 0: only where it was
    /// permitted to.
    pub fn context_stores(&self) -> impl Iterator<Item = i32> + '_ {
        self.facts.iter().zip(&self.insns).filter_map(|(fact, insn)| match *fact {
            Fact::Access(Region::Ctx { offset_bytes })
                if matches!(insn.opcode & opcode::CLASS_MASK, opcode::ST | opcode::STX) =>
            {
                Some(offset_bytes)
            }
            _ => None,
        })
    }

    /// What the program returns at most, as a signed number. Exact ranges are looked for where
    /// the result matters, in fmod_ret programs; of others any number is said.
    #[must_use]
    pub fn return_range(&self) -> RangeInclusive<i64> {
        self.returns.clone()
    }
}

/// One function of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its first instruction.
    pub start_insn_idx: u32,
    /// One past its last instruction.
    pub end_insn_idx: u32,
    /// Bytes of its 512-byte stack that it can touch, a multiple of 8, from the top down.
    pub stack_bytes: u32,
}

/// What holds of an instruction's numbers on every path that reaches it.
///
/// Joined over all states that the walk visits there. That is every path: one that the walk
/// does not follow to its end was left at a state which another one includes in every number that
/// something behind it needed, and that one was followed (`crate::explore`). What says something
/// here needs its number (`crate::precision`). What is forgotten at a join is forgotten before the
/// instruction is visited, so the ranges are of what was explored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operands {
    /// The smallest and largest second operand, unsigned, in as many bits as the instruction
    /// works on. Of a lookup, the key's first four bytes.
    pub min: u64,
    /// The largest.
    pub max: u64,
    /// Which way a conditional jump goes, where it always goes the same.
    pub branch: Option<Branch>,
}

/// Which way a conditional jump goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    /// To its target.
    Jumps,
    /// To the next instruction.
    Falls,
}

impl Operands {
    /// Nothing is known.
    pub const ANY: Self = Self { min: 0, max: u64::MAX, branch: None };
}

/// What holds at one instruction on every path that reaches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// No path gets here: nothing need be emitted.
    Unreachable,
    /// Nothing special: arithmetic, jumps, moves, exit.
    Plain,
    /// A load, store or atomic whose address is always in this kind of memory.
    Access(Region),
    /// A call of a helper.
    Call {
        /// Which.
        helper: Helper,
        /// The map in the argument that takes one, the same on every path.
        map: Option<MapIdx>,
        /// `r1`..`r5` where the verifier knows the number on every path, e.g. the `n` of
        /// `bpf_get_func_arg` or a size.
        constants: [Option<u64>; 5],
    },
    /// A call of another function of the program, by index into [`Verified::functions`].
    CallLocal {
        /// The callee.
        function: u32,
    },
    /// A call through a register that holds a function of the program: one of
    /// [`Verified::callees`].
    CallPointer,
}

/// The memory an access goes to. Everything but `Target` is proved to be inside its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// This function's or a caller's stack frame.
    Stack,
    /// The context, at this constant byte offset from its start (may be -8 or -16).
    Ctx {
        /// From the start of slot 0.
        offset_bytes: i32,
    },
    /// A value of this map.
    MapValue {
        /// Which.
        map: MapIdx,
    },
    /// A map's key in the callback of `bpf_for_each_map_elem`; only read.
    MapKey,
    /// A reserved ring buffer record.
    RingbufRecord,
    /// The u64 of `bpf_session_cookie`.
    SessionCookie,
    /// The plain memory of [`crate::Context::Memory`].
    Memory,
    /// The target's own data, through a typed pointer. Nothing is proved of the address: it is
    /// loaded from without a fault, and is 0 where not all of its bytes can be read. Loads only.
    Target,
}
