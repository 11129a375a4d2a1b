//! Code as CPUs see it: each may go on with bytes that have been overwritten, any of them, in any
//! mixture, until it is serialised.
//!
//! What may be executed is written down as whole instructions; whatever else a CPU puts together
//! from old and new bytes is an instruction that nobody has written.

use std::ops::Range;

use crate::functions::{Function, STRIDE, TEXT};

/// The breakpoint.
pub const INT3: u8 = 0xcc;
const RET: u8 = 0xc3;
/// The longest instruction.
pub const INSN_BYTES: usize = 15;

/// Executable memory of Flea's.
#[derive(Clone, Debug)]
pub struct Arena {
    /// Its start.
    pub base: u64,
    /// What is in it.
    pub bytes: Vec<u8>,
    /// It has not been given back.
    pub is_mapped: bool,
}

impl Arena {
    /// Where it is.
    pub fn range(&self) -> Range<u64> {
        self.base..self.base + self.bytes.len() as u64
    }
}

/// An instruction that somebody has written on purpose.
#[derive(Clone, Copy, Debug)]
struct Legal {
    at: u64,
    len: usize,
    bytes: [u8; INSN_BYTES],
}

impl Legal {
    fn new(at: u64, insn: &[u8]) -> Self {
        let mut bytes = [0; INSN_BYTES];
        bytes[..insn.len()].copy_from_slice(insn);
        Self { at, len: insn.len(), bytes }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Text {
    functions: Vec<u8>,
    /// Those of Flea's, also those given back.
    pub arenas: Vec<Arena>,
    /// Of each CPU: bytes that it may still see, oldest first.
    stale: Vec<Vec<(u64, u8)>>,
    /// Bytes that are changed while they may be executed.
    changing: Vec<Range<u64>>,
    legal: Vec<Legal>,
}

impl Text {
    /// The text of `functions`, on so many CPUs.
    pub fn new(functions: &[Function], n_cpus: usize) -> Self {
        let stride = usize::try_from(STRIDE).expect("functions are small");
        // Behind them, the function that the loader calls: `ret`.
        let gate = functions.len() * stride;
        let mut bytes = vec![INT3; gate + stride];
        bytes[gate] = RET;
        let mut legal = Vec::with_capacity(64);
        let mut changing = Vec::with_capacity(16);
        for (i, function) in functions.iter().enumerate() {
            let all = function.layout.bytes;
            bytes[i * stride..][..all.len()].copy_from_slice(all);
            legal.extend(function.replaced().map(|(at, insn)| Legal::new(at, insn)));
            changing.push(function.site..function.site + function.original().len() as u64);
        }
        let stale = vec![Vec::new(); n_cpus];
        Self { functions: bytes, arenas: Vec::new(), stale, changing, legal }
    }

    /// What is at `at` and behind it, in one piece of memory.
    pub fn from(&self, at: u64) -> Option<&[u8]> {
        if let Some(into) = at.checked_sub(TEXT)
            && let Some(bytes) = usize::try_from(into).ok().and_then(|i| self.functions.get(i..))
        {
            return Some(bytes);
        }
        let arena = self.arenas.iter().find(|arena| arena.range().contains(&at))?;
        let into = usize::try_from(at - arena.base).ok()?;
        arena.is_mapped.then(|| &arena.bytes[into..])
    }

    fn byte_mut(&mut self, at: u64) -> Option<&mut u8> {
        if let Some(into) = at.checked_sub(TEXT)
            && let Ok(into) = usize::try_from(into)
            && into < self.functions.len()
        {
            return self.functions.get_mut(into);
        }
        let arena = self.arenas.iter_mut().find(|arena| arena.range().contains(&at))?;
        let into = usize::try_from(at - arena.base).ok()?;
        if arena.is_mapped { arena.bytes.get_mut(into) } else { None }
    }

    /// Changes one byte; whether there is one. CPUs may see the old one for long.
    pub fn write(&mut self, at: u64, byte: u8) -> bool {
        let Some(place) = self.byte_mut(at) else { return false };
        let before = std::mem::replace(place, byte);
        if before != byte {
            self.stale.iter_mut().for_each(|stale| stale.push((at, before)));
        }
        true
    }

    /// What `cpu` sees from `at` on.
    pub fn fetch(&self, cpu: usize, at: u64) -> Option<([u8; INSN_BYTES], usize)> {
        let now = self.from(at)?;
        let n_bytes = now.len().min(INSN_BYTES);
        let mut seen = [0; INSN_BYTES];
        seen[..n_bytes].copy_from_slice(&now[..n_bytes]);
        // The oldest comes last, and stays.
        for &(place, byte) in self.stale[cpu].iter().rev() {
            if let Some(into) = place.checked_sub(at)
                && into < n_bytes as u64
            {
                seen[usize::try_from(into).expect("below 15")] = byte;
            }
        }
        Some((seen, n_bytes))
    }

    /// How many bytes `cpu` does not see yet.
    pub fn n_stale(&self, cpu: usize) -> usize {
        self.stale[cpu].len()
    }

    /// Some byte arrives at `cpu`: of those at one place, the oldest goes first.
    pub fn arrive(&mut self, cpu: usize, which: usize) {
        let stale = &mut self.stale[cpu];
        let at = stale[which].0;
        let first = stale.iter().position(|(place, _)| *place == at).unwrap_or(which);
        stale.remove(first);
    }

    /// `cpu` sees what has been written to these bytes.
    pub fn forget_stale(&mut self, cpu: usize, from: u64, n_bytes: usize) {
        let range = from..from + n_bytes as u64;
        self.stale[cpu].retain(|(at, _)| !range.contains(at));
    }

    /// `cpu` sees all that has been written.
    pub fn serialise(&mut self, cpu: usize) {
        self.stale[cpu].clear();
    }

    /// Of Flea's own code, it does: a thread came to it through the scheduler, and what stands
    /// there has not been executed since it was freed.
    pub fn arrive_by_scheduler(&mut self, cpu: usize) {
        let end = TEXT + self.functions.len() as u64;
        self.stale[cpu].retain(|(at, _)| (TEXT..end).contains(at));
    }

    /// How many CPUs there are.
    pub fn n_cpus(&self) -> usize {
        self.stale.len()
    }

    /// From now on `insn` may be executed at `at`, as well as what was allowed there before; where
    /// nothing was, what `before` begins with.
    pub fn allow(&mut self, at: u64, insn: &[u8], before: &[u8]) {
        if !self.changing.iter().any(|range| range.contains(&at)) {
            self.changing.push(at..at + insn.len() as u64);
            self.legal.push(Legal::new(at, before));
        }
        let known = |legal: &Legal| legal.at == at && &legal.bytes[..legal.len] == insn;
        if !self.legal.iter().any(known) {
            self.legal.push(Legal::new(at, insn));
        }
    }

    /// Other code is written there that nobody executes yet.
    pub fn forget(&mut self, range: &Range<u64>) {
        let outside = |at: u64| !range.contains(&at);
        // Also where it began in code that was freed with this, and is not written to.
        self.changing.retain(|other| other.end <= range.start || other.start >= range.end);
        self.legal.retain(|legal| outside(legal.at));
    }

    /// Whether a CPU that sees `seen` at `at`, an instruction of `len` bytes, sees one that is, or
    /// was, meant to be there.
    pub fn is_whole(&self, at: u64, seen: &[u8], len: usize) -> bool {
        if self.changing.iter().any(|range| range.contains(&at)) {
            let is_it = |l: &Legal| l.at == at && l.len == len && l.bytes[..len] == seen[..len];
            let is_start = || self.legal.iter().any(|legal| legal.at == at);
            return self.legal.iter().any(is_it) || (seen[0] == INT3 && is_start());
        }
        self.from(at).is_some_and(|now| now.get(..len) == Some(&seen[..len]))
    }
}
