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
mod saves;

use std::collections::HashSet;

use flea_image::Save;
use flea_process::{Memory, MemoryError};
use flea_symbols::addr::RemoteAddr;
use serde::{Deserialize, Serialize};

/// The memfd's name: `/proc/PID/maps` shows `/memfd:flea (deleted)`.
pub(crate) const NAME: &str = "flea";
/// How `/proc/PID/maps` shows the registry.
pub(crate) const MAPS_PATH: &str = "/memfd:flea";
/// Bytes of one half. Sparse until written.
const HALF_BYTES: u64 = 64 << 20;
/// Bytes of the whole mapping: a page of header and two halves.
pub(crate) const MAPPING_BYTES: u64 = HEADER_BYTES + 2 * HALF_BYTES;
const HEADER_BYTES: u64 = 4096;
/// Stores that may overtake one load. Each takes a seize, which takes longer.
const MAX_LOADS: u32 = 64;
const JMP_REL8: u8 = 0xeb;
/// Header word 0: "flea\0reg" with the format's version in the last byte.
const MAGIC: u64 = u64::from_le_bytes(*b"flea-re\x06");

/// All that is attached in one process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    /// Counts up; the number of the next body.
    pub next_id: u32,
    /// Executable memory of ours.
    pub code: Vec<CodeArena>,
    /// Where the runtime blob is.
    pub runtime: Option<RemoteAddr>,
    /// Shared memory of ours, thread table included.
    pub data: Vec<DataArena>,
    /// The functions that are patched.
    pub functions: Vec<FunctionState>,
    /// Code that no function enters any more and that some thread may still be in.
    pub retired: Vec<Retired>,
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
    /// The first patched byte (behind an `endbr64`).
    pub site: RemoteAddr,
    /// Where a short jump back to `site` stands while that is patched: the site is nops before
    /// the function's entry.
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
    pub skeleton: Option<Placed>,
    /// Where the value goes with which an fmod_ret program skips it, where one is attached and
    /// may.
    pub skip: Option<Skip>,
    /// The stack arguments to pass on, where an exit program is attached.
    pub stack: StackArgs,
    /// The skeleton calls the original from a frame of its own.
    pub calls_original: bool,
    /// What unwinders ask it for; its skeleton tells them of such frames. It need not have
    /// bodies.
    pub finds_frames: Option<Question>,
    /// Where the original returns to then.
    pub returns_to: Option<RemoteAddr>,
    /// The bodies that the skeleton calls, as opposed to holding copies of them.
    pub calls: Vec<RemoteAddr>,
    /// How the skeleton is made to jump over the exit bodies of those that go.
    pub switches: Vec<Switch>,
    /// Newest first.
    pub bodies: Vec<BodyState>,
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
    /// Fentry programs.
    pub entry: Option<Placed>,
    /// Fsession programs, entry side.
    pub session: Option<Placed>,
    /// Fmod_ret programs.
    pub modify: Option<Placed>,
    /// Fexit programs, and fsession programs, exit side.
    pub exit: Option<Placed>,
    /// First word of its frame, below the skeleton's own words.
    pub frame_offset: u32,
    /// Words of its frame.
    pub frame_words: u32,
    /// Bit i: the exit side reads integer argument i; bit 8 + i: xmm argument i; bits 16 to
    /// 19: results rax, rdx, xmm0, xmm1.
    pub reads: u32,
    /// What else the skeleton stores, into its frame's words.
    #[serde(with = "saves")]
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
    pub calls_original: bool,
    /// Where the original returns to, for a skeleton that calls it.
    pub returns_to: Option<RemoteAddr>,
    /// The bodies that threads in it may yet call.
    pub calls: Vec<RemoteAddr>,
    /// The data arenas that threads in it may yet work on.
    pub arenas: Vec<RemoteAddr>,
    /// Exit bodies that it still runs when the original returns.
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

impl BodyState {
    /// Its code.
    pub(crate) fn placed(&self) -> impl Iterator<Item = Placed> + use<> {
        [self.entry, self.session, self.modify, self.exit].into_iter().flatten()
    }
}

impl Registry {
    /// The numbers of all bodies.
    pub(crate) fn body_ids(&self) -> HashSet<u32> {
        self.functions.iter().flat_map(|f| &f.bodies).map(|b| b.id).collect()
    }

    /// The sites have been swapped and the switches thrown: what is only there for one who
    /// would have had to do it again can go.
    pub(crate) fn committed(&mut self) {
        self.functions.retain(|f| !f.bodies.is_empty() || f.finds_frames.is_some());
        let attached = self.body_ids();
        for retired in &mut self.retired {
            retired.switches.retain(|switch| attached.contains(&switch.body));
        }
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

    fn half(self, which: u64) -> RemoteAddr {
        self.base.offset((HEADER_BYTES + (which & 1) * HALF_BYTES).cast_signed())
    }

    /// The current state; an empty one where nothing was ever written.
    ///
    /// Who has not seized the target may read while another writes. Two stores later the half
    /// being read is written again, which the sum shows, and the header, being another by
    /// then, that it is no damage.
    pub(crate) fn load(self, memory: &Memory) -> Result<Registry, RegistryError> {
        for _ in 0..MAX_LOADS {
            let header = self.header(memory)?;
            let loaded = self.load_as(header, memory);
            if loaded.is_ok() || self.header(memory)? == header {
                return loaded;
            }
        }
        Err(self.damaged("it changes all the time".to_owned()))
    }

    fn load_as(self, header: [u64; 4], memory: &Memory) -> Result<Registry, RegistryError> {
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
    pub(crate) fn store(self, memory: &Memory, registry: &Registry) -> Result<(), RegistryError> {
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

    fn header(self, memory: &Memory) -> Result<[u64; 4], RegistryError> {
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

/// FNV-1a over 8-byte words: finds accidents, not attackers.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;

    use super::*;
    use flea_image::{Saved, When};

    /// A registry's place in this very process, zeros at first.
    struct Place {
        memory: Memory,
        bytes: Vec<u8>,
        storage: Storage,
    }

    impl Place {
        fn new() -> Self {
            let size_bytes = usize::try_from(MAPPING_BYTES).unwrap();
            // Untouched pages of it take no memory.
            let bytes = vec![0; size_bytes];
            let storage = Storage::at(RemoteAddr(bytes.as_ptr().addr() as u64));
            let pid = std::process::id().cast_signed();
            Self { memory: Memory::open(pid).unwrap(), bytes, storage }
        }

        fn load(&self) -> Result<Registry, RegistryError> {
            self.storage.load(&self.memory)
        }

        fn store(&self, registry: &Registry) {
            self.storage.store(&self.memory, registry).unwrap();
        }

        fn write(&self, offset: u64, bytes: &[u8]) {
            let at = self.storage.base().offset(offset.cast_signed());
            self.memory.write(at, bytes).unwrap();
        }

        /// The text of the current half.
        fn text(&self) -> Range<u64> {
            let [_, which, len, _] = self.storage.header(&self.memory).unwrap();
            let start = HEADER_BYTES + (which & 1) * HALF_BYTES;
            assert!(start + len <= self.bytes.len() as u64);
            start..start + len
        }

        /// Makes `text` the current state, with a sum that fits.
        fn scribble(&self, text: &[u8]) {
            self.write(HEADER_BYTES, text);
            let header = [MAGIC, 0, text.len() as u64, checksum(text)];
            self.write(0, &header.map(u64::to_le_bytes).concat());
        }
    }

    fn sample() -> Registry {
        let code = RemoteAddr(0x10_0000);
        let mut arena = CodeArena::new(code, 0x1000);
        arena.next = code.offset(0x200);
        arena.free = vec![(code.offset(0x40), 0x10)];
        let owner = Controller { pid: 7, started: 9 };
        let body = BodyState {
            id: 3,
            owner,
            since: 1,
            arena: RemoteAddr(0x50_0000),
            programs: vec![("fexit".into(), "p".into())],
            entry: None,
            session: None,
            modify: None,
            exit: Some(Placed { at: code.offset(0x80), len: 0x30 }),
            frame_offset: flea_image::BODY_FRAMES_OFFSET,
            frame_words: 1,
            reads: 1,
            saves: vec![Save { when: When::Exit, what: Saved::Gpr(3), word: 0 }],
        };
        Registry {
            next_id: 4,
            code: vec![arena],
            runtime: Some(code),
            data: vec![DataArena {
                mapping: RemoteAddr(0x40_0000),
                size_bytes: 0x20_0000,
                owner,
                released: false,
            }],
            functions: vec![FunctionState {
                module: "/bin/true".into(),
                name: "f\u{fc}r \"<T>\"".into(),
                address: RemoteAddr(0x20_0000),
                site: RemoteAddr(0x20_0004),
                door: None,
                kind: SiteKind::Relocated,
                original: vec![0x55, 0x48, 0x89, 0xe5, 0x90, 0x90],
                insn_lens: vec![1, 3, 1, 1],
                patched: [0xe9, 1, 2, 3, 4],
                previous: [0x55, 0x48, 0x89, 0xe5, 0x90],
                skeleton: Some(Placed { at: code.offset(0x100), len: 0x60 }),
                skip: None,
                stack: StackArgs { may_be_fewer: true, ..StackArgs::NONE },
                calls_original: true,
                finds_frames: None,
                returns_to: Some(code.offset(0x120)),
                calls: vec![],
                switches: vec![Switch {
                    body: 3,
                    arena: RemoteAddr(0x50_0000),
                    calls: None,
                    at: code.offset(0x120),
                    expected: [0x48, 0x89, 0x6c, 0x24, 0xf8],
                    new: [0xe9, 1, 0, 0, 0],
                    trap_to: code.offset(0x126),
                }],
                bodies: vec![body],
            }],
            retired: vec![Retired::plain(Placed { at: code.offset(0x180), len: 0x20 }, vec![])],
        }
    }

    #[test]
    fn what_is_stored_is_loaded() {
        let place = Place::new();
        assert_eq!(place.load().unwrap(), Registry::default(), "nothing was ever written");
        for next_id in 4..8 {
            let registry = Registry { next_id, ..sample() };
            place.store(&registry);
            assert_eq!(place.load().unwrap(), registry);
        }
    }

    /// A writer that dies before the header has changed nothing.
    #[test]
    fn the_other_half_does_not_matter() {
        let place = Place::new();
        place.store(&sample());
        let current = place.text().start;
        let other = if current == HEADER_BYTES { HEADER_BYTES + HALF_BYTES } else { HEADER_BYTES };
        place.write(other, b"half of a new sta");
        assert_eq!(place.load().unwrap(), sample());
    }

    #[test]
    fn a_damaged_header_is_noticed() {
        for (offset, bytes) in [(0, 0u64), (0, 1), (16, HALF_BYTES + 1), (16, u64::MAX), (24, 5)] {
            let place = Place::new();
            place.store(&sample());
            place.write(offset, &bytes.to_le_bytes());
            let error = place.load().unwrap_err();
            assert!(matches!(error, RegistryError::Damaged { .. }), "{offset}: {error}");
            assert!(error.to_string().contains("nothing was changed"), "{error}");
        }
    }

    #[test]
    fn one_changed_byte_is_noticed() {
        let place = Place::new();
        place.store(&sample());
        let text = place.text();
        for offset in text.clone().step_by(7) {
            let at = place.storage.base().offset(offset.cast_signed());
            let old = place.memory.read_vec(at, 1).unwrap()[0];
            place.write(offset, &[old ^ 0x20]);
            assert!(place.load().is_err(), "byte {offset}");
            place.write(offset, &[old]);
        }
        assert_eq!(place.load().unwrap(), sample());
    }

    /// One lie at a time, in a text whose sum is right.
    #[test]
    fn what_others_rely_on_is_checked() {
        type Lie = fn(&mut Registry);
        let lies: [(&str, Lie); 23] = [
            ("switch", |r| r.functions[0].switches[0].at = RemoteAddr(8)),
            ("rows", |r| r.code[0].rows = Some(Placed { at: RemoteAddr(8), len: 8 })),
            ("no runtime to read the stack with", |r| r.runtime = None),
            ("a door in the patch", |r| r.functions[0].door = Some(RemoteAddr(0x20_0008))),
            ("a door outside", |r| r.functions[0].door = Some(RemoteAddr(0x20_0009))),
            ("few bytes", |r| r.functions[0].original.truncate(4)),
            ("no instructions", |r| r.functions[0].insn_lens.clear()),
            ("an empty instruction", |r| r.functions[0].insn_lens.extend([0])),
            ("long instructions", |r| r.functions[0].insn_lens = vec![200, 200]),
            ("a site at the end", |r| r.functions[0].site = RemoteAddr(u64::MAX - 2)),
            ("frame offset", |r| r.functions[0].bodies[0].frame_offset = u32::MAX - 7),
            ("frame words", |r| r.functions[0].bodies[0].frame_words = u32::MAX / 8),
            ("a save outside the frame", |r| r.functions[0].bodies[0].saves[0].word = 1),
            ("a save of no register", |r| r.functions[0].bodies[0].saves[0].what = Saved::Gpr(4)),
            ("result words for a frame", |r| r.functions[0].bodies[0].frame_offset = 8),
            ("body length", |r| r.functions[0].bodies[0].exit.as_mut().unwrap().len = u32::MAX),
            ("skeleton", |r| r.functions[0].skeleton.as_mut().unwrap().at = RemoteAddr(8)),
            ("retired", |r| r.retired[0].code.at = RemoteAddr(u64::MAX)),
            ("arena size", |r| r.code[0].size_bytes = u64::MAX),
            ("next", |r| r.code[0].next = RemoteAddr(0)),
            ("free", |r| r.code[0].free.push((RemoteAddr(u64::MAX), u64::MAX))),
            ("data", |r| r.data[0].mapping = RemoteAddr(u64::MAX - 1)),
            ("ids", |r| r.next_id = u32::MAX),
        ];
        let place = Place::new();
        for (what, lie) in lies {
            let mut registry = sample();
            lie(&mut registry);
            place.scribble(&serde_json::to_vec(&registry).unwrap());
            assert!(matches!(place.load(), Err(RegistryError::Damaged { .. })), "{what}");
        }
        let mut many = sample();
        many.retired = vec![many.retired[0].clone(); 1000];
        place.scribble(&serde_json::to_vec(&many).unwrap());
        assert!(place.load().is_err(), "a thousand images in the same place");
        place.scribble(&serde_json::to_vec(&sample()).unwrap());
        assert_eq!(place.load().unwrap(), sample());
    }

    #[test]
    fn bytes_are_hexadecimal_text() {
        let text = serde_json::to_string(&sample()).unwrap();
        assert!(text.contains("\"original\":\"554889e59090\""), "{text}");
        for (good, bad) in [("554889e59090", "5548xx"), ("554889e59090", "554"), ("e901020304", "")]
        {
            let bad = text.replace(&format!("\"{good}\""), &format!("\"{bad}\""));
            let parsed: Result<Registry, _> = serde_json::from_str(&bad);
            assert!(parsed.is_err() || check::check(&parsed.unwrap()).is_err(), "{bad}");
        }
    }

    fn damage() -> impl Strategy<Value = Vec<u8>> {
        let text = serde_json::to_vec(&sample()).unwrap();
        let n_bytes = text.len();
        let edits = prop::collection::vec((0..n_bytes, any::<u8>()), 0..8);
        // Digits for digits keep it parseable, with other numbers in it.
        let digits = prop::collection::vec((0..n_bytes, b'0'..=b'9'), 0..40);
        (edits, digits, 0..n_bytes * 40).prop_map(move |(edits, digits, len)| {
            let mut text = text.clone();
            for (at, byte) in edits {
                text[at] = byte;
            }
            for (at, digit) in digits {
                if text[at].is_ascii_digit() {
                    text[at] = digit;
                }
            }
            text.truncate(len.max(1));
            text
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever stands there, loading ends with a registry or an error, and what a change
        /// of everything in it does is an error or a plan.
        #[test]
        fn scribbled_registries_harm_nobody(text in damage()) {
            let Ok(mut registry) = serde_json::from_slice::<Registry>(&text) else { return Ok(()) };
            if check::check(&registry).is_err() {
                return Ok(());
            }
            for retired in std::mem::take(&mut registry.retired) {
                registry.unplace(retired.code);
            }
            let _ = registry.place(RemoteAddr(0x20_0000), 100);
            let mut change = crate::change::Change::new(registry, std::collections::HashMap::new());
            let _ = change.remove_bodies(|_| true);
        }

        #[test]
        fn garbage_headers_harm_nobody(words in any::<[u64; 4]>(), magic in any::<bool>()) {
            let place = Place::new();
            let mut words = words;
            if magic {
                words[0] = MAGIC;
                words[2] %= 2 * HALF_BYTES;
            }
            place.write(0, &words.map(u64::to_le_bytes).concat());
            prop_assert!(place.load().is_err());
        }
    }
}
