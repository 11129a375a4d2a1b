//! A controller that holds the made-up process: what `flea`'s protocol asks of it is done here,
//! while the threads go on.

use std::cell::{RefCell, RefMut};
use std::ops::Range;

use flea::RemoteError;
use flea::registry::{Controller, Registry};
use flea::simulate::{Bytes, Host, REGISTRY_BYTES};
use flea_patch::{CommitError, Gate, Plan};
use flea_process::{Holder, Mapping, MemoryError, Perms, StackWord, TraceError};
use flea_symbols::addr::{FileOffset, RemoteAddr};

use crate::fault::Fault;
use crate::loader::R_DEBUG;
use crate::machine::Machine;
use crate::patcher::Patcher;
use crate::text::Arena;
use crate::trouble::{Denied, Op, Trouble, memory_error, trace_error};

/// Where the registry is.
pub const REGISTRY: u64 = 0x7000_0000;
const HEADER_BYTES: usize = 4096;
/// As much of it as is used.
const HEADER_WORDS_BYTES: usize = 40;
/// Where Flea's code goes, and how far arenas are apart.
const CODE: u64 = 0x50_0000;
const CODE_STRIDE: u64 = 0x2_0000;

/// The memory in which the registry is, as far as it was written.
#[derive(Debug)]
pub struct RegistryMemory {
    /// The words at the start of the header: as many as are used.
    header: [u8; HEADER_WORDS_BYTES],
    halves: [Vec<u8>; 2],
    /// It has been mapped.
    pub is_mapped: bool,
}

impl RegistryMemory {
    /// Zeros, mapped or not.
    pub fn new(is_mapped: bool) -> Self {
        Self { header: [0; HEADER_WORDS_BYTES], halves: [Vec::new(), Vec::new()], is_mapped }
    }
}

/// The process, and what Flea has in it.
#[derive(Debug)]
pub struct World {
    /// The process.
    pub machine: Machine,
    /// Its registry.
    pub registry: RegistryMemory,
    /// Controllers that were killed.
    pub dead: Vec<i32>,
}

/// One controller's hold on it.
#[derive(Debug)]
pub struct Hold<'w> {
    world: RefCell<&'w mut World>,
    trouble: RefCell<&'w mut Trouble>,
    registry: Registry,
    stored: Option<Registry>,
    is_made: bool,
    fault: Option<Fault>,
    /// What [`Fault::HeaderFirst`] keeps back.
    late: RefCell<Option<(usize, Vec<u8>)>>,
}

impl<'w> Hold<'w> {
    /// Takes hold of a process that has a registry.
    pub fn new(world: &'w mut World, trouble: &'w mut Trouble, fault: Option<Fault>) -> Self {
        let (world, trouble) = (RefCell::new(world), RefCell::new(trouble));
        let (registry, stored, late) = (Registry::default(), None, RefCell::new(None));
        Self { world, trouble, registry, stored, is_made: true, fault, late }
    }

    /// Reads the registry, or makes one.
    pub fn open(&mut self, arena_bytes: u64) -> Result<(), RemoteError> {
        if self.world.borrow().registry.is_mapped {
            let registry = flea::simulate::load(self, RemoteAddr(REGISTRY))?;
            self.is_made = flea::simulate::is_made(self, RemoteAddr(REGISTRY))?;
            self.stored = Some(registry.clone());
            self.registry = registry;
            return Ok(());
        }
        let base = self.map_code(arena_bytes)?;
        self.registry = flea::simulate::founded(RemoteAddr(base), arena_bytes);
        let mut world = self.world.borrow_mut();
        world.registry = RegistryMemory::new(true);
        drop(world);
        self.store()
    }

    fn map_code(&self, size_bytes: u64) -> Result<u64, RemoteError> {
        self.op(Op::Map).map_err(trace_error)?;
        let mut world = self.world.borrow_mut();
        let arenas = &mut world.machine.text.arenas;
        let base = CODE + CODE_STRIDE * arenas.len() as u64;
        let bytes = vec![0; usize::try_from(size_bytes).expect("an arena is small")];
        arenas.push(Arena { base, bytes, is_mapped: true });
        Ok(base)
    }

    /// The process, for one who asks nothing of it.
    pub fn machine(&self) -> RefMut<'_, Machine> {
        RefMut::map(self.world.borrow_mut(), |world| &mut world.machine)
    }

    /// An operation begins: the threads go on, and perhaps it is not made.
    pub fn op(&self, op: Op) -> Result<(), Denied> {
        let mut machine = self.machine();
        machine.run_a_little();
        let mut trouble = self.trouble.borrow_mut();
        let outcome = trouble.meets(op);
        if outcome.is_err() {
            let what = trouble.what;
            machine.note(|| format!("controller: {op:?} is not made: {what:?}"));
            machine.is_gone |= what == crate::trouble::What::Vanishes;
        } else {
            machine.note(|| format!("controller: {op:?}"));
        }
        outcome
    }

    /// The fault that was planted.
    pub fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// The fault that was planted, whichever.
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// A data arena is mapped.
    pub fn map_data(&self, mapping: u64) -> Result<(), RemoteError> {
        self.op(Op::Map).map_err(trace_error)?;
        self.machine().data.push(mapping);
        Ok(())
    }

    fn registry_write(&self, into: usize, bytes: &[u8]) {
        let registry = &mut self.world.borrow_mut().registry;
        match half_at(into) {
            Some(half) => {
                registry.halves[half].clear();
                registry.halves[half].extend_from_slice(bytes);
            }
            None => registry.header[into..into + bytes.len()].copy_from_slice(bytes),
        }
    }

    fn registry_read(&self, into: usize, bytes: &mut [u8]) {
        let registry = &self.world.borrow().registry;
        let place = match half_at(into) {
            Some(half) => &registry.halves[half][..],
            None => &registry.header[into..],
        };
        bytes.fill(0);
        let n_bytes = bytes.len().min(place.len());
        bytes[..n_bytes].copy_from_slice(&place[..n_bytes]);
    }
}

/// The half that starts at `into` of the registry's mapping; none for the header.
fn half_at(into: usize) -> Option<usize> {
    let half = usize::try_from((REGISTRY_BYTES - HEADER_BYTES as u64) / 2).unwrap_or(usize::MAX);
    let into = into.checked_sub(HEADER_BYTES)?;
    assert!(into.is_multiple_of(half), "a registry is read and written half by half");
    Some(into / half)
}

fn in_registry(at: RemoteAddr) -> Option<usize> {
    let into = at.0.checked_sub(REGISTRY).filter(|into| *into < REGISTRY_BYTES)?;
    usize::try_from(into).ok()
}

impl Bytes for Hold<'_> {
    fn read(&self, at: RemoteAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        self.op(Op::Read).map_err(|d| memory_error(d, "reading", at, into.len()))?;
        if let Some(place) = in_registry(at) {
            self.registry_read(place, into);
            return Ok(());
        }
        let world = self.world.borrow();
        let n_bytes = into.len();
        match world.machine.text.from(at.0).and_then(|bytes| bytes.get(..n_bytes)) {
            Some(bytes) => into.copy_from_slice(bytes),
            None => return Err(memory_error(Denied { gone: false }, "reading", at, n_bytes)),
        }
        Ok(())
    }

    fn write(&self, at: RemoteAddr, bytes: &[u8]) -> Result<(), MemoryError> {
        let failed = |d| memory_error(d, "writing", at, bytes.len());
        let place = in_registry(at);
        if let Some(place) =
            place.filter(|place| half_at(*place).is_some() && self.has(Fault::HeaderFirst))
        {
            *self.late.borrow_mut() = Some((place, bytes.to_vec()));
            return Ok(());
        }
        self.op(Op::Write).map_err(failed)?;
        if let Some(place) = place {
            self.registry_write(place, bytes);
            if let Some((place, bytes)) = self.late.take() {
                self.op(Op::Write).map_err(failed)?;
                self.registry_write(place, &bytes);
            }
            return Ok(());
        }
        let mut machine = self.machine();
        let range = at.0..at.0 + bytes.len() as u64;
        if machine.text.arenas.iter().any(|arena| arena.range().contains(&at.0)) {
            machine.nobody_in(&range, "code is written to");
            machine.text.forget(&range);
        }
        for (at, &byte) in (at.0..).zip(bytes) {
            if !machine.text.write(at, byte) {
                return Err(failed(Denied { gone: false }));
            }
        }
        Ok(())
    }
}

impl Host for Hold<'_> {
    fn registry(&self) -> &Registry {
        &self.registry
    }

    fn registry_mut(&mut self) -> &mut Registry {
        &mut self.registry
    }

    fn store(&mut self) -> Result<(), RemoteError> {
        if self.stored.as_ref() == Some(&self.registry) {
            return Ok(());
        }
        if self.has(Fault::NoAnnouncement) && self.is_announcement() {
            return Ok(());
        }
        self.stored = None;
        flea::simulate::store(self, RemoteAddr(REGISTRY), &self.registry)?;
        self.machine().stored(&self.registry);
        self.stored = Some(self.registry.clone());
        if self.is_made {
            flea::simulate::note_made(self, RemoteAddr(REGISTRY))?;
        }
        Ok(())
    }

    fn is_made(&self) -> bool {
        self.is_made
    }

    fn set_made(&mut self, is_made: bool) {
        self.is_made = is_made;
    }

    fn note_made(&mut self) -> Result<(), RemoteError> {
        self.is_made = true;
        Ok(flea::simulate::note_made(self, RemoteAddr(REGISTRY))?)
    }

    fn commit(&mut self, plan: &Plan) -> Result<(), CommitError<TraceError>> {
        let mut machine = self.machine();
        for poke in &plan.pokes {
            let len = match poke.new[0] {
                0xe9 | 0xe8 => 5,
                0xeb => 2,
                // Instructions that were there before.
                _ => continue,
            };
            machine.text.allow(
                poke.site.0,
                &poke.new[..len],
                &poke.expected[..5.min(poke.expected.len())],
            );
        }
        machine.note(|| format!("controller: commits {plan:x?}"));
        drop(machine);
        let before = self.bytes_of(plan);
        self.trouble.borrow_mut().begin_commit();
        let began = self.machine().now;
        let gate = self.gate();
        let outcome =
            flea_patch::commit_behind(&mut Patcher::new(self, plan), plan, gate).map(drop);
        self.trouble.borrow_mut().in_commit = false;
        let after = self.bytes_of(plan);
        let mut machine = self.machine();
        machine.note(|| format!("controller: the commit's outcome is {outcome:?}"));
        let is_undone = outcome.as_ref().is_err_and(CommitError::is_undone);
        let is_as_it_was = before == after || machine.loader.has_reopened_any(began);
        if is_undone && !machine.is_gone && !is_as_it_was {
            machine.violate(format!("a commit failed and left {after:02x?}, not {before:02x?}"));
        }
        outcome
    }

    fn add_code_arena(&mut self, _near: RemoteAddr) -> Result<(), RemoteError> {
        let size_bytes = self.registry.code.iter().map(|a| 2 * a.size_bytes).max().unwrap_or(4096);
        let base = self.map_code(size_bytes.min(0x8000))?;
        let arena = flea::simulate::code_arena(RemoteAddr(base), size_bytes.min(0x8000));
        self.registry.code.push(arena);
        self.store()
    }

    fn unmap(&mut self, at: RemoteAddr, size_bytes: u64) -> Result<(), RemoteError> {
        self.op(Op::Unmap).map_err(trace_error)?;
        if at.0 == REGISTRY {
            self.world.borrow_mut().registry.is_mapped = false;
            return Ok(());
        }
        let mut machine = self.machine();
        let range = at.0..at.0 + size_bytes;
        let arena = machine.text.arenas.iter_mut().find(|arena| arena.base == at.0);
        let was_mapped = match arena {
            Some(arena) => std::mem::replace(&mut arena.is_mapped, false),
            None => {
                let before = machine.data.len();
                machine.data.retain(|mapping| *mapping != at.0);
                machine.data.len() < before
            }
        };
        machine.nobody_in(&range, "code is unmapped");
        if !was_mapped {
            machine.violate(format!("{at} is unmapped again: by now it may be somebody else's"));
        }
        Ok(())
    }

    fn storage_base(&self) -> RemoteAddr {
        RemoteAddr(REGISTRY)
    }

    fn is_alive(&self, controller: &Controller) -> bool {
        !self.world.borrow().dead.contains(&controller.pid)
    }

    fn maps(&self) -> Result<Vec<Mapping>, RemoteError> {
        self.op(Op::Maps).map_err(trace_error)?;
        let machine = self.machine();
        let perms = Perms { read: true, write: true, execute: false, shared: false };
        let mapping = |range: Range<u64>, perms| Mapping {
            start: RemoteAddr(range.start),
            end: RemoteAddr(range.end),
            perms,
            offset: FileOffset(0),
            dev: (0, 0),
            inode: 0,
            path: String::new(),
            deleted: false,
        };
        let code = Perms { write: false, execute: true, ..perms };
        let text = crate::functions::TEXT..crate::functions::TEXT + 0x1000;
        let mut maps = vec![mapping(text, code)];
        if !self.has(Fault::BlindToMemory) {
            maps.extend(machine.contexts().map(|context| mapping(context.stack(), perms)));
        }
        Ok(maps)
    }

    fn written(&self, _: &Mapping, range: Range<u64>) -> Vec<Range<u64>> {
        vec![range]
    }

    fn read_to_hole(&self, at: RemoteAddr, into: &mut [u8]) -> Result<usize, MemoryError> {
        self.op(Op::Read).map_err(|d| memory_error(d, "reading", at, into.len()))?;
        let machine = self.machine();
        let Some(context) = machine.contexts().find(|context| context.stack().start == at.0) else {
            return Ok(0);
        };
        for (place, word) in into.chunks_exact_mut(8).zip(context.words()) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        Ok(into.len().min(8 * context.words().len()))
    }

    fn words_on_stacks(
        &mut self,
        ranges: &[Range<RemoteAddr>],
    ) -> Result<Vec<StackWord>, RemoteError> {
        self.op(Op::Stacks).map_err(trace_error)?;
        let mut found = Vec::new();
        if self.has(Fault::BlindToThreads) {
            return Ok(found);
        }
        let mut machine = self.machine();
        for i in 0..machine.threads.len() {
            machine.run_a_little();
            let tid = i32::try_from(i).unwrap_or(0) + 1;
            let context = &machine.threads[i].context;
            let mut see = |holder, word| {
                let value = RemoteAddr(word);
                if ranges.iter().any(|range| range.contains(&value)) {
                    found.push(StackWord { tid, holder, value });
                }
            };
            see(Holder::Register, context.rip);
            context.regs.iter().for_each(|word| see(Holder::Register, *word));
            let used = (context.stack().start..).step_by(8).zip(context.words());
            for (at, word) in used.filter(|(at, _)| *at >= context.regs[crate::context::RSP]) {
                see(Holder::Stack(RemoteAddr(at)), *word);
            }
            for handler in &context.handlers {
                see(Holder::SignalFrame(RemoteAddr(handler.frame)), handler.rip);
            }
        }
        Ok(found)
    }
}

impl Hold<'_> {
    fn gate(&self) -> Option<Gate> {
        let stop = RemoteAddr(self.machine().loader.gate);
        (!self.has(Fault::NoGate)).then_some(Gate { stop, r_debug: RemoteAddr(R_DEBUG) })
    }

    /// Whether the registry says what is not there yet.
    fn is_announcement(&self) -> bool {
        let machine = self.machine();
        let differs = |f: &flea::registry::FunctionState| {
            machine.text.from(f.site.0).is_some_and(|now| now[..5] != f.patched)
        };
        self.registry.functions.iter().any(|f| differs(f))
    }

    fn bytes_of(&self, plan: &Plan) -> Vec<Option<Vec<u8>>> {
        let machine = self.machine();
        let of = |poke: &flea_patch::Poke| {
            Some(machine.text.from(poke.site.0)?.get(..poke.n_bytes())?.to_vec())
        };
        plan.pokes.iter().map(of).collect()
    }
}
