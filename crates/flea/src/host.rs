//! What `transaction` and `reclaim` need of the process that they change: in life a seized one
//! ([`Ground`]), in the simulator a made-up one whose threads stand wherever a seed says.
//!
//! Nothing is decided here. It is a seam, so that the protocol that runs on real processes is the
//! one that is simulated.

use std::ops::Range;

use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_patch::{CommitError, Plan};
use flea_process::{Mapping, Memory, MemoryError, StackWord, TraceError};
use flea_symbols::addr::RemoteAddr;

use crate::{
    error::RemoteError,
    gate,
    pages::Pages,
    registry::{self, Controller, DataArena, Registry},
    remote::Ground,
};

/// Memory of a process.
pub trait Bytes {
    /// Fills `into` from `at`, or fails.
    fn read(&self, at: RemoteAddr, into: &mut [u8]) -> Result<(), MemoryError>;

    /// Writes all of `bytes` at `at`, whatever the page's permissions.
    fn write(&self, at: RemoteAddr, bytes: &[u8]) -> Result<(), MemoryError>;
}

/// A process that is held by one controller, and the registry in it.
pub trait Host: Bytes {
    /// The registry as it is here.
    fn registry(&self) -> &Registry;

    /// The same, to be changed.
    fn registry_mut(&mut self) -> &mut Registry;

    /// Writes the registry into the process.
    fn store(&mut self) -> Result<(), RemoteError>;

    /// Whether what the registry says has been done to the target's code.
    fn is_made(&self) -> bool;

    /// It has, or has not, as far as is known here.
    fn set_made(&mut self, is_made: bool);

    /// It has: written into the process as well.
    fn note_made(&mut self) -> Result<(), RemoteError>;

    /// Swaps the sites: [`flea_patch::commit_behind`].
    fn commit(&mut self, plan: &Plan) -> Result<(), CommitError<TraceError>>;

    /// More room for code near `near`.
    fn add_code_arena(&mut self, near: RemoteAddr) -> Result<(), RemoteError>;

    /// Takes memory out of the process.
    fn unmap(&mut self, at: RemoteAddr, size_bytes: u64) -> Result<(), RemoteError>;

    /// Where the registry is.
    fn storage_base(&self) -> RemoteAddr;

    /// Whether that controller still runs.
    fn is_alive(&self, controller: &Controller) -> bool;

    /// The memory map.
    fn maps(&self) -> Result<Vec<Mapping>, RemoteError>;

    /// The stretches of `range`, which is in `mapping`, that can hold something that was written:
    /// all of it, where that is not known.
    fn written(&self, mapping: &Mapping, range: Range<u64>) -> Vec<Range<u64>>;

    /// Fills as much of `into` as can be read without a hole, and says how much.
    fn read_to_hole(&self, at: RemoteAddr, into: &mut [u8]) -> Result<usize, MemoryError>;

    /// All words in registers and on stacks, of all threads, that point into `ranges`.
    fn words_on_stacks(
        &mut self,
        ranges: &[Range<RemoteAddr>],
    ) -> Result<Vec<StackWord>, RemoteError>;
}

impl Bytes for Memory {
    fn read(&self, at: RemoteAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        Self::read(self, at, into)
    }

    fn write(&self, at: RemoteAddr, bytes: &[u8]) -> Result<(), MemoryError> {
        Self::write(self, at, bytes)
    }
}

impl Bytes for Ground<'_> {
    fn read(&self, at: RemoteAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory().read(at, into)
    }

    fn write(&self, at: RemoteAddr, bytes: &[u8]) -> Result<(), MemoryError> {
        self.memory().write(at, bytes)
    }
}

impl Host for Ground<'_> {
    fn registry(&self) -> &Registry {
        &self.registry
    }

    fn registry_mut(&mut self) -> &mut Registry {
        &mut self.registry
    }

    fn store(&mut self) -> Result<(), RemoteError> {
        Self::store(self)
    }

    fn is_made(&self) -> bool {
        self.is_made
    }

    fn set_made(&mut self, is_made: bool) {
        self.is_made = is_made;
    }

    fn note_made(&mut self) -> Result<(), RemoteError> {
        Self::note_made(self)
    }

    fn commit(&mut self, plan: &Plan) -> Result<(), CommitError<TraceError>> {
        // A process of which that cannot be told has none that we know of.
        let gate = gate::find(self.tracer.pid(), self.tracer.memory()).unwrap_or_default();
        flea_patch::commit_behind(self.tracer, plan, gate).map(drop)
    }

    fn add_code_arena(&mut self, near: RemoteAddr) -> Result<(), RemoteError> {
        Self::add_code_arena(self, near)
    }

    fn unmap(&mut self, at: RemoteAddr, size_bytes: u64) -> Result<(), RemoteError> {
        self.tracer.remote_syscall(libc::SYS_munmap, [at.0, size_bytes, 0, 0, 0, 0])?;
        Ok(())
    }

    fn storage_base(&self) -> RemoteAddr {
        self.storage.base()
    }

    fn is_alive(&self, controller: &Controller) -> bool {
        controller.is_alive()
    }

    fn maps(&self) -> Result<Vec<Mapping>, RemoteError> {
        Ok(flea_process::maps(self.tracer.pid())?)
    }

    fn written(&self, mapping: &Mapping, range: Range<u64>) -> Vec<Range<u64>> {
        self.pages.get_or_init(|| Pages::open(self.tracer.pid())).existing(mapping, range)
    }

    fn read_to_hole(&self, at: RemoteAddr, into: &mut [u8]) -> Result<usize, MemoryError> {
        self.memory().read_to_hole(at, into)
    }

    fn words_on_stacks(
        &mut self,
        ranges: &[Range<RemoteAddr>],
    ) -> Result<Vec<StackWord>, RemoteError> {
        Ok(self.tracer.words_on_stacks(ranges)?)
    }
}

/// Takes data arenas out of the target that were released and that no retired code works on any
/// more.
pub(crate) fn unmap_released<H: Host>(ground: &mut H) -> Result<(), RemoteError> {
    let table = THREAD_TABLE_BYTES as u64;
    let registry = ground.registry();
    let in_use = |arena: &DataArena| {
        let base = RemoteAddr(arena.mapping.0 + table);
        let mut bodies = registry.functions.iter().flat_map(|f| &f.bodies);
        let mut retired = registry.retired.iter().flat_map(|r| &r.arenas);
        bodies.any(|b| b.arena == base) || retired.any(|a| *a == base)
    };
    let is_over = |arena: &DataArena| arena.released || !ground.is_alive(&arena.owner);
    let (gone, stay): (Vec<_>, Vec<_>) =
        registry.data.iter().cloned().partition(|arena| is_over(arena) && !in_use(arena));
    if gone.is_empty() {
        return Ok(());
    }
    // Forgotten first: who finds it in the registry may take it that it is there, and unmaps what
    // is somebody else's by then.
    ground.registry_mut().data = stay;
    ground.store()?;
    gone.iter().try_for_each(|arena| ground.unmap(arena.mapping, arena.size_bytes))
}

/// Writes the registry; or, where nothing is left in it, takes all of our ground out of the
/// target.
pub(crate) fn close<H: Host>(mut ground: H) -> Result<(), RemoteError> {
    let r = ground.registry();
    let empty =
        r.functions.is_empty() && r.data.is_empty() && r.objects.is_empty() && r.retired.is_empty();
    if !empty {
        return ground.store();
    }
    // The registry first, for the same reason.
    let base = ground.storage_base();
    ground.unmap(base, registry::MAPPING_BYTES)?;
    let arenas = std::mem::take(&mut ground.registry_mut().code);
    arenas.iter().try_for_each(|arena| ground.unmap(arena.base, arena.size_bytes))
}
