//! What an object declares: maps and programs. Plain data; nothing here is verified yet.

use crate::core_relo::CoreRelocation;
use crate::insn::Insn;
use crate::maps::BPF_F_INNER_MAP;
use crate::types::Types;

/// A loaded object: the input of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Object {
    /// `.maps`, then one per global data section that is used.
    pub maps: Vec<MapSpec>,
    /// One per `SEC("kind/target")` function.
    pub programs: Vec<Program>,
    /// The `license` section.
    pub license: Option<String>,
    /// The types that [`Program::core_relocations`] are about, as the object has them.
    pub types: Types,
    /// What program arrays hold to begin with.
    pub program_slots: Vec<ProgramSlot>,
}

/// A program in a program array, where `bpf_tail_call` finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramSlot {
    /// The array.
    pub map: MapIdx,
    /// Where in it.
    pub index: u32,
    /// Index into [`Object::programs`].
    pub program: usize,
}

/// Index into [`Object::maps`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MapIdx(pub u32);

/// A map, as the object describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapSpec {
    /// The variable's name; `.rodata`, `.data`, `.bss` (and `.rodata.x`) for global data.
    pub name: String,
    /// The type.
    pub kind: MapKind,
    /// Bytes per key; 4 for arrays, 0 for ring buffers.
    pub key_size_bytes: u32,
    /// Bytes per value; 0 for ring buffers.
    pub value_size_bytes: u32,
    /// Elements; bytes for a ring buffer (a power of two, at least 4096).
    pub max_entries: u32,
    /// `BPF_F_*` as given.
    pub flags: u32,
    /// Initial bytes of element 0 (global data).
    pub init: Option<Vec<u8>>,
    /// Programs may only read it (`.rodata`, `BPF_F_RDONLY_PROG`).
    pub read_only: bool,
    /// Where in a value its `struct bpf_spin_lock` is, if it has one.
    pub lock_offset: Option<u32>,
    /// What a map of maps holds; `None` for other kinds.
    pub inner: Option<InnerMaps>,
    /// Stands for the maps that a map of maps may hold: a shape without elements. A lookup in
    /// that map gives a program some map of this shape.
    pub template: bool,
}

/// What programs count on of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its type.
    pub kind: MapKind,
    /// Bytes per key.
    pub key_size_bytes: u32,
    /// Bytes per value.
    pub value_size_bytes: u32,
    /// Elements.
    pub max_entries: u32,
    /// `BPF_F_*`
    pub flags: u32,
    /// Where in a value its lock is.
    pub lock_offset: Option<u32>,
}

impl Shape {
    /// Whether a map of this shape may be put into a map of maps whose template has the other:
    /// what a program was verified for must hold of it too (Linux: `bpf_map_meta_equal`).
    #[must_use]
    pub fn fits(self, template: Self) -> bool {
        let any_length = self.kind != MapKind::Array || self.flags & BPF_F_INNER_MAP != 0;
        let max_entries = if any_length { template.max_entries } else { self.max_entries };
        Self { max_entries, ..self } == template
    }
}

impl MapSpec {
    /// What programs count on.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape {
            kind: self.kind,
            key_size_bytes: self.key_size_bytes,
            value_size_bytes: self.value_size_bytes,
            max_entries: self.max_entries,
            flags: self.flags,
            lock_offset: self.lock_offset,
        }
    }
}

/// What a map of maps holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InnerMaps {
    /// The map that is a [`MapSpec::template`] for all that may be put in.
    pub template: MapIdx,
    /// What is in it at the start: index or 4-byte key, and map.
    pub init: Vec<(u32, MapIdx)>,
}

/// Map types, with Linux's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_HASH`
    Hash = 1,
    /// `BPF_MAP_TYPE_ARRAY`
    #[default]
    Array = 2,
    /// `BPF_MAP_TYPE_PROG_ARRAY`: its elements are programs, see [`Object::program_slots`].
    ProgArray = 3,
    /// `BPF_MAP_TYPE_PERCPU_HASH`
    PerCpuHash = 5,
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`
    PerCpuArray = 6,
    /// `BPF_MAP_TYPE_ARRAY_OF_MAPS`
    ArrayOfMaps = 12,
    /// `BPF_MAP_TYPE_HASH_OF_MAPS`
    HashOfMaps = 13,
    /// `BPF_MAP_TYPE_RINGBUF`
    RingBuf = 27,
}

impl MapKind {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::Hash,
        Self::Array,
        Self::ProgArray,
        Self::PerCpuHash,
        Self::PerCpuArray,
        Self::ArrayOfMaps,
        Self::HashOfMaps,
        Self::RingBuf,
    ];

    /// Whether its values are maps.
    #[must_use]
    pub const fn holds_maps(self) -> bool {
        matches!(self, Self::ArrayOfMaps | Self::HashOfMaps)
    }
}

/// One program: a main function and the functions it calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The C function's name.
    pub name: String,
    /// The section, e.g. `fentry/malloc`.
    pub section: String,
    /// When it runs.
    pub kind: ProgramKind,
    /// A `.multi` form: functions that its target matches and that it cannot be attached to are
    /// left out.
    pub multi: bool,
    /// What follows the slash: `FUNC` or `MODULE:FUNC`, perhaps with wildcards.
    pub target: Option<String>,
    /// The main function first, then the functions it reaches, linked: every call is
    /// [`crate::insn::PSEUDO_CALL`] with a resolved `imm`, every map reference a
    /// [`crate::insn::PSEUDO_MAP`] or [`crate::insn::PSEUDO_MAP_VALUE`].
    pub insns: Vec<Insn>,
    /// Source lines from `.BTF.ext`, sorted by instruction; may be empty.
    pub lines: Vec<SourceLine>,
    /// The functions that were linked into `insns`, sorted by instruction, the main one
    /// first; empty where the program was made in code.
    pub functions: Vec<ProgramFunction>,
    /// Instructions that wait for the target's types, sorted by instruction. Until
    /// [`crate::core_relo::relocate`] has seen to them, they hold what the object's own types
    /// say.
    pub core_relocations: Vec<CoreRelocation>,
    /// False for `SEC("?...")`: not attached unless asked for by name.
    pub autoload: bool,
}

impl Default for Program {
    fn default() -> Self {
        Self {
            name: String::new(),
            section: String::new(),
            kind: ProgramKind::default(),
            multi: false,
            target: None,
            insns: Vec::new(),
            lines: Vec::new(),
            functions: Vec::new(),
            core_relocations: Vec::new(),
            autoload: true,
        }
    }
}

/// One function inside a [`Program`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramFunction {
    /// Its first instruction, an index into [`Program::insns`].
    pub insn_idx: u32,
    /// Its name in the source.
    pub name: String,
    /// What a global function takes and gives: it is proved alone, for all callers that keep to
    /// this. `None` for the main function, for static ones, which are proved with each caller,
    /// and where there is no type information.
    pub prototype: Option<Prototype>,
}

/// What a global function takes and gives (Linux: `btf_prepare_func_args`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prototype {
    /// In `r1` and those behind it.
    pub params: Vec<Param>,
    /// Why its result is none that a program can use; `None` for a number.
    pub bad_result: Option<String>,
}

/// A parameter of a global function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Param {
    /// Any number.
    Number,
    /// The program's context.
    Context,
    /// Memory to be read and written.
    Memory {
        /// How much.
        size_bytes: u32,
        /// What its address is a multiple of, 1 to 8.
        align_bytes: u32,
        /// It is never NULL (`__arg_nonnull`).
        nonnull: bool,
    },
    /// A type that no caller can give.
    Unsupported {
        /// What it is.
        what: String,
    },
}

/// When a program runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ProgramKind {
    /// At entry, with the arguments.
    #[default]
    Fentry,
    /// At exit, with the arguments and the result.
    Fexit,
    /// At both, with a u64 carried between them.
    Fsession,
    /// Before the function, which it can skip: the first non-zero return value of such a
    /// program is the function's result.
    FmodRet,
    /// At entry, with `struct pt_regs *`: the registers at the function's first instruction.
    Uprobe,
    /// At exit, with `struct pt_regs *`: the registers behind the function's `ret`. As in Linux
    /// the argument registers hold there what the function has left in them.
    Uretprobe,
}

impl ProgramKind {
    /// Its name in section names and listings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fentry => "fentry",
            Self::Fexit => "fexit",
            Self::Fsession => "fsession",
            Self::FmodRet => "fmod_ret",
            Self::Uprobe => "uprobe",
            Self::Uretprobe => "uretprobe",
        }
    }
}

/// The source line of an instruction and those after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceLine {
    /// Index into [`Program::insns`].
    pub insn_idx: u32,
    /// File name as compiled.
    pub file: String,
    /// 1-based.
    pub line: u32,
    /// The line's text.
    pub text: String,
}
