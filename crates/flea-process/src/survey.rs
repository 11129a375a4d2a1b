//! Where the threads are: instruction pointers and words on stacks.
//!
//! Before bytes *inside* a replaced sequence are overwritten, or code is freed, it must be
//! known that no thread stands there, and that none will come back there: not by a return
//! address, and not from a signal handler, whose frame holds the interrupted `rip`.
//!
//! # One thread is looked at as one instant
//!
//! Registers and stack must be of the same moment, else a thread could leave a signal handler
//! between the two looks and be missed by both.
//! 1. A *running* thread is stopped, its registers and stack read, and resumed.
//! 2. A *sleeping* thread is left alone. What was read counts only if the thread has not been
//!    on a CPU meanwhile (the count of its context switches, and its place, are unchanged);
//!    else it is looked at again, and in the end stopped.
//! 3. A thread that wakes after it was found clean can get into the range only by its first
//!    instruction, and that is a breakpoint by then.
//!
//! Reading stacks takes long, and while breakpoints are in the text others wait for it. So the
//! sleeping threads are looked at before ([`Tracer::look`]): one that has not been given a CPU
//! since is still clean.
//!
//! The search is conservative: any word that looks like an address in the range counts. It
//! does not see the stacks of coroutines that no thread is on.

use std::collections::BTreeSet;
use std::ops::Range;

use flea_symbols::addr::RemoteAddr;

use crate::maps::Mapping;
use crate::memory::Memory;
use crate::proc::{self, Tid, Whereabouts};
use crate::ptrace;
use crate::tracer::{TraceError, Tracer};
use crate::x86_64::{Registers, SIGNAL_FRAME_RSP_WORDS_BACK, SIGNAL_FRAME_SEGMENTS};

const LOOKS_AT_A_SLEEPER: u32 = 3;
const CHUNK_BYTES: usize = 64 << 10;
/// Goroutine stacks lie in arenas of 64 MiB; no ordinary stack is larger.
const DEEPEST_STACK_BYTES: u64 = 64 << 20;

/// A word of a thread that is an address in a range asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackWord {
    /// The thread.
    pub tid: Tid,
    /// Where the word is.
    pub holder: Holder,
    /// The address.
    pub value: RemoteAddr,
}

/// Where a thread has a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// In a register, the instruction pointer perhaps.
    Register,
    /// On its stack: a return address, or anything.
    Stack(RemoteAddr),
    /// On its stack, as the instruction pointer that a signal interrupted. That word is also
    /// reported as one on the stack.
    SignalFrame(RemoteAddr),
}

/// What to do with a stopped thread: where it is to go on, if not where it is.
type Mover<'a> = dyn FnMut(Tid, &Registers) -> Option<RemoteAddr> + 'a;

struct Wanted {
    /// Sorted by start, not overlapping.
    ranges: Vec<Range<RemoteAddr>>,
    /// General registers count as well as the instruction pointer.
    any_register: bool,
    /// These are places that threads are moved from, of those looked for last.
    is_for_moves: bool,
}

impl Wanted {
    /// All words that point into these ranges.
    fn words(ranges: &[Range<RemoteAddr>]) -> Self {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable_by_key(|range| range.start);
        Self { ranges, any_register: true, is_for_moves: false }
    }

    /// Threads at these places, which are sorted, and what returns there.
    fn places(places: &[RemoteAddr]) -> Self {
        let ranges = places.iter().map(|&place| place..place.offset(1)).collect();
        Self { ranges, any_register: false, is_for_moves: true }
    }

    fn contains(&self, addr: RemoteAddr) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= addr);
        after > 0 && addr < self.ranges[after - 1].end
    }
}

impl Tracer {
    /// Stops each thread that is running, one at a time, and lets `mover` say where it is to
    /// go on. Sleeping threads are left alone.
    pub fn interrupt_running(
        &mut self,
        mut mover: impl FnMut(Tid, &Registers) -> Option<RemoteAddr>,
    ) -> Result<(), TraceError> {
        self.pump()?;
        self.urgently(|tracer| {
            for tid in tracer.threads() {
                if tracer.whereabouts(tid) == Whereabouts::Running {
                    tracer.look_at_stopped(tid, None, &[], &mut mover)?;
                }
            }
            Ok(())
        })
    }

    /// Which of `places` are on the stack of a thread that sleeps: most likely in the frame of a
    /// signal handler, which returns there. Those that sleep on need not be looked at again by
    /// [`Tracer::evacuate`].
    pub fn look(&mut self, places: &[RemoteAddr]) -> Result<Vec<StackWord>, TraceError> {
        self.pump()?;
        self.looked_for = places.to_vec();
        self.looked_for.sort_unstable();
        let wanted = Wanted::places(&self.looked_for);
        let mut maps = proc::maps(self.pid)?;
        let mut found = Vec::new();
        for tid in self.threads() {
            let n_runs = proc::n_runs(self.process_of(tid), tid);
            let seen = self.look_at_sleeper(tid, &wanted, &mut maps)?;
            let is_clean = seen.as_ref().is_some_and(Vec::is_empty);
            if let Some(task) = self.tasks.get_mut(&tid) {
                task.clean_at = n_runs.filter(|_| is_clean);
            }
            found.extend(seen.unwrap_or_default());
            self.pump_when_due()?;
        }
        Ok(found)
    }

    /// All words in registers and on stacks, of all threads, that point into `ranges`, which
    /// do not overlap. None: no thread is in there or returns there.
    pub fn words_on_stacks(
        &mut self,
        ranges: &[Range<RemoteAddr>],
    ) -> Result<Vec<StackWord>, TraceError> {
        self.survey(&Wanted::words(ranges), &mut |_, _| None)
    }

    /// Moves every thread that stands at the first address of a pair to the second one, and
    /// returns what still points to one of the first: frames of signal handlers. Where both are
    /// the same, a thread that stands there as well.
    pub fn evacuate(
        &mut self,
        moves: &[(RemoteAddr, RemoteAddr)],
    ) -> Result<Vec<StackWord>, TraceError> {
        let mut moves = moves.to_vec();
        moves.sort_unstable();
        let froms: Vec<RemoteAddr> = moves.iter().map(|&(from, _)| from).collect();
        if !froms.iter().all(|from| self.looked_for.binary_search(from).is_ok()) {
            self.forget_looks();
        }
        let left = self.survey(&Wanted::places(&froms), &mut |_, registers| {
            let at = froms.binary_search(&registers.pc()).ok()?;
            Some(moves[at].1)
        })?;
        if left.is_empty() {
            self.traps.note_evacuated();
        }
        Ok(left)
    }

    fn forget_looks(&mut self) {
        self.looked_for.clear();
        self.tasks.values_mut().for_each(|task| task.clean_at = None);
    }

    fn survey(
        &mut self,
        wanted: &Wanted,
        mover: &mut Mover<'_>,
    ) -> Result<Vec<StackWord>, TraceError> {
        self.pump()?;
        self.urgently(|tracer| tracer.survey_all(wanted, mover))
    }

    fn survey_all(
        &mut self,
        wanted: &Wanted,
        mover: &mut Mover<'_>,
    ) -> Result<Vec<StackWord>, TraceError> {
        let mut maps = proc::maps(self.pid)?;
        let mut found = Vec::new();
        let mut seen = BTreeSet::new();
        // Threads born while we look are looked at as well; a new one's stack is its parent's
        // doing, and its parent may have been looked at before it was born.
        loop {
            // Where threads are born and end all the time, those that have ended would otherwise
            // become ever more, and looking at them take longer than others take to be born.
            self.reap_ended();
            let new: Vec<Tid> = self.tasks.keys().copied().filter(|&t| seen.insert(t)).collect();
            if new.is_empty() {
                break;
            }
            for tid in new {
                found.extend(self.look_at(tid, wanted, &mut maps, mover)?);
                self.pump_when_due()?;
            }
        }
        for child in self.held.clone() {
            if let (Ok(registers), Ok(memory)) = (ptrace::registers(child), Memory::open(child)) {
                found.extend(search(child, &memory, &maps, &registers, wanted));
            }
        }
        Ok(found)
    }

    fn look_at(
        &mut self,
        tid: Tid,
        wanted: &Wanted,
        maps: &mut Vec<Mapping>,
        mover: &mut Mover<'_>,
    ) -> Result<Vec<StackWord>, TraceError> {
        if wanted.is_for_moves && self.sleeps_on(tid) {
            return Ok(Vec::new());
        }
        match self.look_at_sleeper(tid, wanted, maps)? {
            Some(found) => Ok(found),
            None => self.look_at_stopped(tid, Some(wanted), maps, mover),
        }
    }

    /// Whether a thread that was clean when it slept has slept ever since.
    fn sleeps_on(&self, tid: Tid) -> bool {
        let clean_at = self.tasks.get(&tid).and_then(|task| task.clean_at);
        clean_at.is_some() && proc::n_runs(self.process_of(tid), tid) == clean_at
    }

    /// What a thread has that sleeps, and not in `wanted`; else it has to be stopped.
    fn look_at_sleeper(
        &self,
        tid: Tid,
        wanted: &Wanted,
        maps: &mut Vec<Mapping>,
    ) -> Result<Option<Vec<StackWord>>, TraceError> {
        for _ in 0..LOOKS_AT_A_SLEEPER {
            let before = self.whereabouts(tid);
            let (Whereabouts::Syscall { sp, pc, .. } | Whereabouts::Elsewhere { sp, pc }) = before
            else {
                return Ok((before == Whereabouts::Gone).then(Vec::new));
            };
            if wanted.contains(pc) {
                // Stopped by SIGSTOP, perhaps, or in a page fault: it has to be moved.
                break;
            }
            let Ok(status) = proc::thread_status(self.process_of(tid), tid) else {
                return Ok(Some(Vec::new()));
            };
            if !maps.iter().any(|m| m.contains(sp)) {
                *maps = proc::maps(self.pid)?;
            }
            let found = search_stack(tid, &self.memory, maps, sp, wanted);
            let unmoved = proc::thread_status(self.process_of(tid), tid)
                .is_ok_and(|later| later.switches == status.switches);
            if unmoved && self.whereabouts(tid) == before {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn look_at_stopped(
        &mut self,
        tid: Tid,
        wanted: Option<&Wanted>,
        maps: &[Mapping],
        mover: &mut Mover<'_>,
    ) -> Result<Vec<StackWord>, TraceError> {
        let Some(stop) = self.halt_unless_asleep(tid)? else {
            return Ok(self.look_at_stuck(tid, wanted, maps));
        };
        let mut registers = self.still_there(tid, "reading registers", ptrace::registers(tid))?;
        if let Some(now) = registers
            && let Some(goes_to) = mover(tid, &now)
        {
            let moved = now.with_pc(goes_to);
            let set = ptrace::set_registers(tid, &moved);
            registers = self.still_there(tid, "setting registers", set)?.map(|()| moved);
        }
        let mut found = Vec::new();
        if let (Some(registers), Some(wanted)) = (registers, wanted) {
            if maps.iter().any(|m| m.contains(registers.sp())) {
                found = search(tid, &self.memory, maps, &registers, wanted);
            } else {
                let fresh = proc::maps(self.pid)?;
                found = search(tid, &self.memory, &fresh, &registers, wanted);
            }
        }
        self.unhalt(tid, stop)?;
        Ok(found)
    }

    /// A thread that does not stop: asleep in a page fault or in vfork, it is where it is until
    /// that is over; and our interrupt waits for it there, so that what is read is of one
    /// instant.
    fn look_at_stuck(&self, tid: Tid, wanted: Option<&Wanted>, maps: &[Mapping]) -> Vec<StackWord> {
        let (Whereabouts::Syscall { sp, pc, .. } | Whereabouts::Elsewhere { sp, pc }) =
            self.whereabouts(tid)
        else {
            return Vec::new();
        };
        let Some(wanted) = wanted else {
            return Vec::new();
        };
        let mut found = search_stack(tid, &self.memory, maps, sp, wanted);
        if wanted.contains(pc) {
            found.push(StackWord { tid, holder: Holder::Register, value: pc });
        }
        found
    }
}

fn search(
    tid: Tid,
    memory: &Memory,
    maps: &[Mapping],
    registers: &Registers,
    wanted: &Wanted,
) -> Vec<StackWord> {
    let words = registers.words();
    let searched = if wanted.any_register { &words[..] } else { &words[..1] };
    let mut found: Vec<StackWord> = searched
        .iter()
        .map(|&word| RemoteAddr(word))
        .filter(|&value| wanted.contains(value))
        .map(|value| StackWord { tid, holder: Holder::Register, value })
        .collect();
    found.extend(search_stack(tid, memory, maps, registers.sp(), wanted));
    found
}

/// Searches from `sp` to the end of its mapping; and, where that is a signal's alternate
/// stack, the stack that was interrupted, by the stack pointer in the signal's frame.
fn search_stack(
    tid: Tid,
    memory: &Memory,
    maps: &[Mapping],
    sp: RemoteAddr,
    wanted: &Wanted,
) -> Vec<StackWord> {
    let mut found = Vec::new();
    let mut to_search = vec![sp];
    let mut searched = BTreeSet::new();
    while let Some(sp) = to_search.pop() {
        let Some(stack) = maps.iter().find(|m| m.contains(sp)) else {
            continue;
        };
        if !searched.insert(stack.start) {
            continue;
        }
        let start = sp.0 & !7;
        let end = stack.end.0.min(start.saturating_add(DEEPEST_STACK_BYTES));
        let mut recent = [0u64; SIGNAL_FRAME_RSP_WORDS_BACK];
        for_each_word(memory, start, end, |at, word| {
            if wanted.contains(RemoteAddr(word)) {
                let holder = Holder::Stack(RemoteAddr(at));
                found.push(StackWord { tid, holder, value: RemoteAddr(word) });
            }
            if word == SIGNAL_FRAME_SEGMENTS {
                let [sp, pc, _eflags] = recent.map(RemoteAddr);
                to_search.push(sp);
                if wanted.contains(pc) {
                    let holder = Holder::SignalFrame(RemoteAddr(at.wrapping_sub(16)));
                    found.push(StackWord { tid, holder, value: pc });
                }
            }
            recent.rotate_left(1);
            recent[SIGNAL_FRAME_RSP_WORDS_BACK - 1] = word;
        });
    }
    found
}

fn for_each_word(memory: &Memory, start: u64, end: u64, mut visit: impl FnMut(u64, u64)) {
    let mut chunk = vec![0u8; CHUNK_BYTES];
    let mut at = start;
    while at < end {
        let wanted = usize::try_from(end - at).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let n_read = memory.read_prefix(RemoteAddr(at), &mut chunk[..wanted]);
        for (i, bytes) in (0u64..).zip(chunk[..n_read].chunks_exact(8)) {
            let word = bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
            visit(at + 8 * i, word);
        }
        if n_read < wanted {
            return;
        }
        at += wanted as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_asked_for() {
        let range = |a, b| RemoteAddr(a)..RemoteAddr(b);
        let wanted = Wanted::words(&[range(40, 50), range(10, 20)]);
        let inside: Vec<u64> = (0..60).filter(|&addr| wanted.contains(RemoteAddr(addr))).collect();
        assert_eq!(inside, (10..20).chain(40..50).collect::<Vec<_>>());
    }
}
