//! What is attached where, kept in the target itself, so that any later `flea` finds it:
//! `flea ps`, `flea detach`, and a second controller on the same function.
//!
//! It is private memory of the target (a `MAP_PRIVATE` mapping of a memfd named `flea`, so
//! that `/proc/PID/maps` shows it and a forked child has a copy of its own), read and written
//! through `/proc/PID/mem` alone. Who changes it holds the target by `PTRACE_SEIZE`: the
//! kernel gives that to one process at a time and takes it back from a dead one, so there is
//! no lock word that a dead owner could keep.
//!
//! Protected: the consistency of the state under the writer's death. By: two halves.
//! 1. the new state is written into the half that is not in use,
//! 2. then one aligned 8-byte write makes that half the current one.
//!
//! Everything read from it is untrusted: lengths are bounded, the text is checked by a sum and
//! parsed by serde, what it says is checked against itself (`check.rs`), addresses in it are
//! used only to read and write this very target.

mod check;
mod hex;
mod replaced;
mod saves;
mod shared;

use std::{collections::HashSet, sync::OnceLock};

use flea_image::Save;
use flea_process::{Mapping, MemoryError};
use flea_symbols::addr::RemoteAddr;
use serde::{Deserialize, Serialize};

pub use self::replaced::{LoadedObject, ReplacementState};
pub use self::shared::Shared;
use crate::host::Bytes;

/// The memfd's name: `/proc/PID/maps` shows `/memfd:flea (deleted)`.
pub(crate) const NAME: &str = "flea";
/// How `/proc/PID/maps` shows the registry.
pub(crate) const MAPS_PATH: &str = "/memfd:flea";
/// Bytes of one half. Sparse until written.
const HALF_BYTES: u64 = 64 << 20;
/// Bytes of the whole mapping: a page of header and two halves.
pub(crate) const MAPPING_BYTES: u64 = HEADER_BYTES + 2 * HALF_BYTES;
const HEADER_BYTES: u64 = 4096;
/// Behind the header's words: the sum of the state that has been carried out.
const MADE_OFFSET: i64 = 32;
/// Stores that may overtake one load. Each takes a seize, which takes longer.
const MAX_LOADS: u32 = 64;
const JMP_REL8: u8 = 0xeb;
/// Header word 0: "flea\0reg" with the format's version in the last byte.
const MAGIC: u64 = u64::from_le_bytes(*b"flea-re\x0a");

/// Whether a field says nothing: then it is left out of the text, most of which that would be.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// All that is attached in one process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    /// Counts up; the number of the next body.
    pub next_id: u32,
    /// Executable memory of ours.
    pub code: Vec<CodeArena>,
    /// The runtimes in its code arenas, one of each build of Flea that came.
    pub runtimes: Vec<Runtime>,
    /// Shared memory of ours, thread table included.
    pub data: Vec<DataArena>,
    /// Shared objects of ours, whose functions replace some of the target's.
    pub objects: Vec<LoadedObject>,
    /// The functions that are patched.
    pub functions: Vec<Shared<FunctionState>>,
    /// Code that no function enters any more and that some thread may still be in.
    pub retired: Vec<Retired>,
}

/// A copy of the runtime. Bodies and skeletons call the one that they were made for: another
/// build's functions are elsewhere in it, and may do other things.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// Where it is.
    pub code: Placed,
    /// Which it is: a sum over its bytes.
    pub sum: u64,
}

/// A stretch of executable memory within reach of the modules it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeArena {
    /// Its start.
    pub base: RemoteAddr,
    /// Its size.
    pub size_bytes: u64,
    /// Where nothing is placed yet.
    pub next: RemoteAddr,
    /// Stretches given back, each (start, bytes), ascending, no two touching.
    pub free: Vec<(RemoteAddr, u64)>,
    /// Its unwind rows, while unwinders are told of it.
    pub rows: Option<Placed>,
}

/// The memory of one loaded object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataArena {
    /// Start of the thread table; the arena's base is `flea_layout`'s table size above.
    pub mapping: RemoteAddr,
    /// Bytes of table and arena together.
    pub size_bytes: u64,
    /// Who made it.
    pub owner: Controller,
    /// Its owner has no more use for it.
    pub released: bool,
}

/// A controller: a process id alone could be somebody else's by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Controller {
    /// Its process id, in its own pid namespace.
    pub pid: i32,
    /// When it started, in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub started: u64,
}

/// One patched function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// The module's path.
    pub module: String,
    /// Its name, as listed.
    pub name: String,
    /// The function's address.
    pub address: RemoteAddr,
    /// What is mapped at the site. Builds that know nothing of it leave it out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub file: Option<SiteFile>,
    /// The first patched byte (behind an `endbr64`).
    pub site: RemoteAddr,
    /// Where a short jump back to `site` stands while that is patched: the site is nops before
    /// the function's entry.
    #[serde(default, skip_serializing_if = "is_default")]
    pub door: Option<RemoteAddr>,
    /// Nop or relocated.
    pub kind: SiteKind,
    /// The original instructions from `site` on that were replaced.
    #[serde(with = "hex")]
    pub original: Vec<u8>,
    /// Length of each of them.
    #[serde(with = "hex")]
    pub insn_lens: Vec<u8>,
    /// The five bytes there now.
    #[serde(with = "hex")]
    pub patched: [u8; 5],
    /// The five bytes before the last change: what is there if its author died before it was
    /// made.
    #[serde(with = "hex")]
    pub previous: [u8; 5],
    /// The skeleton, unless the site calls a body directly.
    #[serde(default, skip_serializing_if = "is_default")]
    pub skeleton: Option<Placed>,
    /// Where the value goes with which an fmod_ret program skips it, where one is attached and
    /// may.
    #[serde(default, skip_serializing_if = "is_default")]
    pub skip: Option<Skip>,
    /// The stack arguments to pass on, where an exit program is attached.
    #[serde(default, skip_serializing_if = "is_default")]
    pub stack: StackArgs,
    /// The skeleton calls the original from a frame of its own.
    #[serde(default, skip_serializing_if = "is_default")]
    pub calls_original: bool,
    /// What unwinders ask it for; its skeleton tells them of such frames. It need not have
    /// bodies.
    #[serde(default, skip_serializing_if = "is_default")]
    pub finds_frames: Option<Question>,
    /// Where the original returns to then.
    #[serde(default, skip_serializing_if = "is_default")]
    pub returns_to: Option<RemoteAddr>,
    /// The bodies that the skeleton calls, as opposed to holding copies of them.
    #[serde(default, skip_serializing_if = "is_default")]
    pub calls: Vec<RemoteAddr>,
    /// How the skeleton is made to jump over the exit bodies of those that go.
    #[serde(default, skip_serializing_if = "is_default")]
    pub switches: Vec<Switch>,
    /// Newest first.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bodies: Vec<BodyState>,
    /// Newest first: calls go to the first one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub replacements: Vec<ReplacementState>,
}

impl FunctionState {
    /// The two bytes at the door, closed, and the short jump that stands there open.
    pub(crate) fn door(&self) -> Option<(RemoteAddr, [u8; 2], [u8; 2])> {
        let door = self.door?;
        let at = usize::try_from(door.0.checked_sub(self.site.0)?).ok()?;
        let closed = *self.original.get(at..)?.first_chunk()?;
        let back = i8::try_from(-(i64::try_from(at).ok()? + 2)).ok()?;
        Some((door, closed, [JMP_REL8, back.cast_unsigned()]))
    }
}

/// The file that a site's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteFile {
    /// Device: major, minor.
    pub dev: (u32, u32),
    /// The file's number there.
    pub inode: u64,
    /// Where in it the site is.
    pub offset: u64,
}

impl SiteFile {
    /// What is mapped at `site`, which is in `mapping`.
    pub(crate) fn at(site: RemoteAddr, mapping: &Mapping) -> Self {
        let offset = mapping.offset.0 + (site.0 - mapping.start.0);
        Self { dev: mapping.dev, inode: mapping.inode, offset }
    }
}

/// What unwinders ask a function for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// `_Unwind_Find_FDE`.
    Row,
    /// `_dl_find_object`.
    Object,
}

/// Where the result of a skipped function goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Skip {
    /// It has none.
    Nowhere,
    /// Into rax.
    Rax,
    /// Into xmm0.
    Xmm0,
}

/// A function's stack arguments, as far as exit programs pass them on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackArgs {
    /// How many words.
    pub n_words: u32,
    /// There may be fewer (a variadic function): what is above them need not be mapped.
    pub may_be_fewer: bool,
    /// What the first one's address is a multiple of: 16, 32 or 64.
    pub align_bytes: u32,
}

impl Default for StackArgs {
    fn default() -> Self {
        Self::NONE
    }
}

impl StackArgs {
    /// No stack arguments.
    pub const NONE: Self = Self { n_words: 0, may_be_fewer: false, align_bytes: 16 };

    /// What does for both: two controllers may know different things of one function.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        Self {
            n_words: self.n_words.max(other.n_words),
            may_be_fewer: self.may_be_fewer || other.may_be_fewer,
            align_bytes: self.align_bytes.max(other.align_bytes),
        }
    }
}

/// Where a site's bytes came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SiteKind {
    /// Nops at entry.
    Nop,
    /// Instructions that were relocated.
    Relocated,
}

/// Code that was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// Its start.
    pub at: RemoteAddr,
    /// Its size.
    pub len: u32,
}

/// What one controller attached to one function in one go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BodyState {
    /// Unique in this process.
    pub id: u32,
    /// Who attached it.
    pub owner: Controller,
    /// Seconds since the epoch.
    pub since: u64,
    /// The memory it works on.
    pub arena: RemoteAddr,
    /// Its programs, newest first: (kind, name).
    pub programs: Vec<(String, String)>,
    /// They can change the target's memory. Only to be shown: builds that know nothing of it
    /// leave it out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub writes_target: bool,
    /// Bit i: the session side changes integer argument i; bit 16: the exit side changes the
    /// result rax.
    #[serde(default, skip_serializing_if = "is_default")]
    pub changes: u32,
    /// Fentry programs.
    #[serde(default, skip_serializing_if = "is_default")]
    pub entry: Option<Placed>,
    /// Fsession programs, entry side.
    #[serde(default, skip_serializing_if = "is_default")]
    pub session: Option<Placed>,
    /// Fmod_ret programs.
    #[serde(default, skip_serializing_if = "is_default")]
    pub modify: Option<Placed>,
    /// Fexit programs, and fsession programs, exit side.
    #[serde(default, skip_serializing_if = "is_default")]
    pub exit: Option<Placed>,
    /// First word of its frame, below the skeleton's own words.
    pub frame_offset: u32,
    /// Words of its frame.
    #[serde(default, skip_serializing_if = "is_default")]
    pub frame_words: u32,
    /// Bit i: the exit side reads integer argument i; bit 8 + i: xmm argument i; bits 16 to
    /// 19: results rax, rdx, xmm0, xmm1.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reads: u32,
    /// What else the skeleton stores, into its frame's words.
    #[serde(default, skip_serializing_if = "is_default", with = "saves")]
    pub saves: Vec<Save>,
}

/// What makes a skeleton jump over one exit body, from then on. Calls that are inside the
/// original need neither the body nor its memory any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// Whose exit body: [`BodyState::id`].
    pub body: u32,
    /// The memory that body works on.
    pub arena: RemoteAddr,
    /// The body, where the skeleton calls it.
    pub calls: Option<RemoteAddr>,
    /// Where the jump goes.
    pub at: RemoteAddr,
    /// What is there.
    #[serde(with = "hex")]
    pub expected: [u8; 5],
    /// The jump.
    #[serde(with = "hex")]
    pub new: [u8; 5],
    /// Where a thread goes on that arrives meanwhile.
    pub trap_to: RemoteAddr,
}

/// Memory that is to be given back as soon as nobody can be in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// The code.
    pub code: Placed,
    /// It calls the original, so a thread can be inside it for as long as it likes, also one
    /// whose stack is switched away.
    #[serde(default, skip_serializing_if = "is_default")]
    pub calls_original: bool,
    /// Where the original returns to, for a skeleton that calls it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub returns_to: Option<RemoteAddr>,
    /// The bodies that threads in it may yet call.
    #[serde(default, skip_serializing_if = "is_default")]
    pub calls: Vec<RemoteAddr>,
    /// The data arenas that threads in it may yet work on.
    #[serde(default, skip_serializing_if = "is_default")]
    pub arenas: Vec<RemoteAddr>,
    /// Exit bodies that it still runs when the original returns.
    #[serde(default, skip_serializing_if = "is_default")]
    pub switches: Vec<Switch>,
}

impl Retired {
    /// Code that calls no original.
    pub(crate) fn plain(code: Placed, arenas: Vec<RemoteAddr>) -> Self {
        let (calls_original, returns_to) = (false, None);
        Self { code, calls_original, returns_to, calls: vec![], arenas, switches: vec![] }
    }

    /// Nobody runs in it: what those will run that return from the original is what has not
    /// been switched off.
    pub(crate) fn is_only_returned_to(&mut self) {
        self.calls = self.switches.iter().filter_map(|switch| switch.calls).collect();
        self.arenas = self.switches.iter().map(|switch| switch.arena).collect();
        self.arenas.sort_unstable();
        self.arenas.dedup();
    }
}

impl FunctionState {
    /// Whether there is a reason to keep it patched.
    pub(crate) fn is_in_use(&self) -> bool {
        !self.bodies.is_empty() || !self.replacements.is_empty() || self.finds_frames.is_some()
    }
}

impl BodyState {
    /// Its code.
    pub(crate) fn placed(&self) -> impl Iterator<Item = Placed> + use<> {
        [self.entry, self.session, self.modify, self.exit].into_iter().flatten()
    }
}

impl Registry {
    /// Where the runtime of this build is.
    pub(crate) fn own_runtime(&self) -> Option<RemoteAddr> {
        let sum = runtime_sum();
        self.runtimes.iter().find(|runtime| runtime.sum == sum).map(|runtime| runtime.code.at)
    }

    /// The numbers of all bodies.
    pub(crate) fn body_ids(&self) -> HashSet<u32> {
        self.functions.iter().flat_map(|f| &f.bodies).map(|b| b.id).collect()
    }

    /// The sites have been swapped: what is only there for one who would have had to do it again
    /// can go; switches as well, if they were thrown.
    pub(crate) fn committed(&mut self, is_thrown: bool) {
        self.functions.retain(|f| f.is_in_use());
        if !is_thrown {
            return;
        }
        let attached = self.body_ids();
        for retired in &mut self.retired {
            retired.switches.retain(|switch| attached.contains(&switch.body));
        }
    }

    /// Whether exit bodies that are attached no longer have not been switched off.
    pub(crate) fn has_switches_to_throw(&self) -> bool {
        let mut switches = self.retired.iter().flat_map(|r| &r.switches).peekable();
        if switches.peek().is_none() {
            return false;
        }
        let attached = self.body_ids();
        switches.any(|switch| !attached.contains(&switch.body))
    }

    /// Whether a frame of ours may be on a stack, now or as soon as a function is called.
    pub(crate) fn has_frames(&self) -> bool {
        self.functions.iter().any(|f| f.calls_original)
            || self.retired.iter().any(|r| r.calls_original)
    }
}

/// Where the registry is and which half is current.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Storage {
    base: RemoteAddr,
}

/// A registry that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Reading or writing the target's memory failed.
    #[error("the target's registry at {at} cannot be reached: {source}")]
    Memory {
        /// The address.
        at: RemoteAddr,
        /// Why.
        source: MemoryError,
    },
    /// Not ours, not this version, or scribbled over.
    #[error(
        "the target's registry at {at} is damaged ({what}): what is attached there cannot be \
         known, so nothing was changed; restart the process to be rid of it"
    )]
    Damaged {
        /// The address.
        at: RemoteAddr,
        /// What is wrong with it.
        what: String,
    },
    /// Too much is attached.
    #[error(
        "the registry would take {bytes} bytes, more than its {HALF_BYTES}: attach to fewer functions"
    )]
    Full {
        /// What it would take.
        bytes: usize,
    },
}

impl Storage {
    /// A registry whose mapping starts at `base`.
    pub(crate) fn at(base: RemoteAddr) -> Self {
        Self { base }
    }

    /// Start of the mapping.
    pub(crate) fn base(self) -> RemoteAddr {
        self.base
    }

    /// Memory of the target for a word or two that its kernel is to write.
    pub(crate) fn scratch(self) -> RemoteAddr {
        self.base.offset(HEADER_BYTES.cast_signed() / 2)
    }

    fn half(self, which: u64) -> RemoteAddr {
        self.base.offset((HEADER_BYTES + (which & 1) * HALF_BYTES).cast_signed())
    }

    /// The current state; an empty one where nothing was ever written.
    ///
    /// Who has not seized the target may read while another writes. Two stores later the half
    /// being read is written again, which the sum shows, and the header, being another by
    /// then, that it is no damage.
    pub(crate) fn load(self, memory: &impl Bytes) -> Result<Registry, RegistryError> {
        for _ in 0..MAX_LOADS {
            let header = self.header(memory)?;
            let loaded = self.load_as(header, memory);
            if loaded.is_ok() || self.header(memory)? == header {
                return loaded;
            }
        }
        Err(self.damaged("it changes all the time".to_owned()))
    }

    fn load_as(self, header: [u64; 4], memory: &impl Bytes) -> Result<Registry, RegistryError> {
        if header == [0; 4] {
            return Ok(Registry::default());
        }
        let [magic, which, len, sum] = header;
        if magic != MAGIC {
            return Err(self.damaged(format!("it starts with {magic:#x}")));
        }
        if len > HALF_BYTES {
            return Err(self.damaged(format!("its length is {len}")));
        }
        let len = usize::try_from(len).expect("bounded by HALF_BYTES");
        let mut text = vec![0; len];
        let at = self.half(which);
        memory.read(at, &mut text).map_err(|source| RegistryError::Memory { at, source })?;
        if checksum(&text) != sum {
            return Err(self.damaged("its sum does not match".to_owned()));
        }
        let registry: Registry =
            serde_json::from_slice(&text).map_err(|e| self.damaged(e.to_string()))?;
        check::check(&registry).map_err(|what| self.damaged(what))?;
        Ok(registry)
    }

    /// Makes `registry` the current state.
    pub(crate) fn store(
        self,
        memory: &impl Bytes,
        registry: &Registry,
    ) -> Result<(), RegistryError> {
        let text = serde_json::to_vec(registry).expect("plain data serializes");
        if text.len() as u64 > HALF_BYTES {
            return Err(RegistryError::Full { bytes: text.len() });
        }
        let unused = (self.header(memory)?[1] & 1) ^ 1;
        let write = |at: RemoteAddr, bytes: &[u8]| {
            memory.write(at, bytes).map_err(|source| RegistryError::Memory { at, source })
        };
        write(self.half(unused), &text)?;
        let mut header = Vec::with_capacity(32);
        for word in [MAGIC, unused, text.len() as u64, checksum(&text)] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        // The header is one write inside one page: a writer that dies makes all of it or none
        // (the kernel copies it in one go), and a torn one would be caught by the sum.
        write(self.base, &header)
    }

    /// Notes that what the current state says has been done to the target's code.
    pub(crate) fn note_made(self, memory: &impl Bytes) -> Result<(), RegistryError> {
        let [_, _, _, sum] = self.header(memory)?;
        let at = self.base.offset(MADE_OFFSET);
        memory.write(at, &sum.to_le_bytes()).map_err(|source| RegistryError::Memory { at, source })
    }

    /// Whether that has been noted. Where it has not, its author died or could not say so.
    pub(crate) fn is_made(self, memory: &impl Bytes) -> Result<bool, RegistryError> {
        let [_, _, _, sum] = self.header(memory)?;
        let at = self.base.offset(MADE_OFFSET);
        let mut made = [0; 8];
        memory.read(at, &mut made).map_err(|source| RegistryError::Memory { at, source })?;
        Ok(u64::from_le_bytes(made) == sum)
    }

    fn header(self, memory: &impl Bytes) -> Result<[u64; 4], RegistryError> {
        let mut bytes = [0; 32];
        memory
            .read(self.base, &mut bytes)
            .map_err(|source| RegistryError::Memory { at: self.base, source })?;
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().expect("chunks of 8"));
        }
        Ok(words)
    }

    pub(crate) fn damaged(self, what: String) -> RegistryError {
        RegistryError::Damaged { at: self.base, what }
    }
}

/// [`Runtime::sum`] of the runtime of this build.
pub(crate) fn runtime_sum() -> u64 {
    static SUM: OnceLock<u64> = OnceLock::new();
    *SUM.get_or_init(|| checksum(flea_runtime::BLOB))
}

/// FNV-1a over 8-byte words: finds accidents, not attackers.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests;
