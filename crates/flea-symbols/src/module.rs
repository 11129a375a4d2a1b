//! An ELF module: its segments, its identity, and lazily everything else. Start at
//! [`Module::parse`]. Knows nothing of where the module is loaded.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::OnceLock;

use object::elf;
use object::read::elf::{ElfFile64, FileHeader as _, ProgramHeader as _};
use object::{LittleEndian, Object as _, ObjectSection as _};

use crate::addr::{FileOffset, Svma};
use crate::btf::TypeInfo;
use crate::dwarf::DebugInfo;
use crate::function::{self, Function};
use crate::unwind::UnwindIndex;
use crate::unwinder::Unwinder;
use crate::x86_64::sweep::Sweep;

/// What the kernel rounds mappings to.
const PAGE_BYTES: u64 = 4096;

pub(crate) type Elf<'data> = ElfFile64<'data, LittleEndian>;

/// Why a file is not a module that can be traced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// The magic bytes are missing.
    #[error("not an ELF file")]
    NotElf,
    /// ELFCLASS32.
    #[error("32-bit ({machine}) ELF: Flea traces 64-bit x86-64 only")]
    Not64Bit {
        /// Its machine, in words.
        machine: String,
    },
    /// 64-bit, another machine.
    #[error("ELF for {machine}: Flea traces 64-bit x86-64 only")]
    OtherMachine {
        /// Its machine, in words.
        machine: String,
    },
    /// An object file, a core dump.
    #[error("ELF of type {e_type}: only executables and shared libraries can be traced")]
    NotLoadable {
        /// `e_type`.
        e_type: u16,
    },
    /// A table reaches past the end of the file or contradicts itself.
    #[error("truncated or damaged ELF file: {what}")]
    Damaged {
        /// What the reader ran into.
        what: String,
    },
    /// The separate debug file is damaged or of another machine.
    #[error("the debug file cannot be used: {0}")]
    Debug(Box<ModuleError>),
}

/// The bytes of a module's files.
#[derive(Clone, Copy, Debug)]
pub struct Files<'data> {
    /// The executable or shared library.
    pub image: &'data [u8],
    /// Its separate debug file ([`Module::build_id`], [`Module::debuglink`]), if there is one.
    pub debug: Option<&'data [u8]>,
    /// The file that several debug files share ([`Module::debugaltlink`], made by `dwz`).
    pub alt_debug: Option<&'data [u8]>,
}

/// One PT_LOAD segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub address: Svma,
    /// Bytes in memory.
    pub size_bytes: u64,
    /// Where its bytes are in the file.
    pub file_offset: FileOffset,
    /// Bytes in the file; the rest is zero.
    pub file_size_bytes: u64,
    /// PF_X.
    pub executable: bool,
    /// PF_W.
    pub writable: bool,
}

/// An ELF module. Parsing reads headers only; functions, branches, unwind rows and DWARF are
/// indexed when first asked for.
pub struct Module<'data> {
    pub(crate) files: Files<'data>,
    pub(crate) elf: Elf<'data>,
    pub(crate) debug_elf: Option<Elf<'data>>,
    pub(crate) segments: Vec<Segment>,
    /// Executable sections, or segments where there are no sections; sorted.
    pub(crate) code: Vec<CodeRange>,
    pub(crate) functions: OnceLock<Vec<Function>>,
    /// Cold parts, as indices into `functions`, by the name of the function they belong to.
    cold_parts: OnceLock<HashMap<String, usize>>,
    pub(crate) unwind: OnceLock<UnwindIndex>,
    pub(crate) sweep: OnceLock<Sweep>,
    pub(crate) debug_info: OnceLock<DebugInfo<'data>>,
    type_info: OnceLock<TypeInfo<'data>>,
    pub(crate) unwinder: OnceLock<Unwinder>,
}

/// A stretch of executable bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CodeRange {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// `.plt` and its relatives: stubs, not functions.
    pub(crate) is_plt: bool,
}

impl std::fmt::Debug for Module<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Module")
            .field("build_id", &self.build_id())
            .field("segments", &self.segments)
            .finish_non_exhaustive()
    }
}

impl<'data> Module<'data> {
    /// Parses the headers of `image`; `debug` is its separate debug file.
    ///
    /// # Errors
    /// [`ModuleError`]: not an x86-64 executable or shared library, or damaged.
    pub fn parse(image: &'data [u8], debug: Option<&'data [u8]>) -> Result<Self, ModuleError> {
        Self::parse_files(Files { image, debug, alt_debug: None })
    }

    /// As [`Module::parse`], also with the supplementary debug file that `dwz` makes.
    ///
    /// # Errors
    /// As [`Module::parse`].
    pub fn parse_files(files: Files<'data>) -> Result<Self, ModuleError> {
        let elf = parse_elf(files.image)?;
        let e_type = elf.elf_header().e_type(LittleEndian);
        if e_type != elf::ET_EXEC && e_type != elf::ET_DYN {
            return Err(ModuleError::NotLoadable { e_type: e_type.0 });
        }
        let debug_elf = match files.debug {
            Some(bytes) => {
                Some(parse_elf(bytes).map_err(|error| ModuleError::Debug(Box::new(error)))?)
            }
            None => None,
        };
        let segments = read_segments(&elf, files.image)?;
        let code = read_code_ranges(&elf, &segments);
        Ok(Self {
            files,
            elf,
            debug_elf,
            segments,
            code,
            functions: OnceLock::new(),
            cold_parts: OnceLock::new(),
            unwind: OnceLock::new(),
            sweep: OnceLock::new(),
            debug_info: OnceLock::new(),
            type_info: OnceLock::new(),
            unwinder: OnceLock::new(),
        })
    }

    /// Its PT_LOAD segments, in file order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Where `address` is in the file; `None` outside the file-backed segments.
    #[must_use]
    pub fn svma_to_offset(&self, address: Svma) -> Option<FileOffset> {
        self.segments.iter().find_map(|segment| {
            let into = address.0.checked_sub(segment.address.0)?;
            (into < segment.file_size_bytes).then(|| FileOffset(segment.file_offset.0 + into))
        })
    }

    /// Which address the byte at `offset` gets; `None` where no segment loads it.
    #[must_use]
    pub fn offset_to_svma(&self, offset: FileOffset) -> Option<Svma> {
        self.segments.iter().find_map(|segment| {
            let into = offset.0.checked_sub(segment.file_offset.0)?;
            (into < segment.file_size_bytes).then(|| Svma(segment.address.0 + into))
        })
    }

    /// Which address the first byte of an executable mapping that begins at `offset` gets.
    ///
    /// A mapping begins at a page boundary, before its segment where that does not: with lld
    /// the first page of the code begins with the end of another segment's bytes, which are
    /// mapped there a second time.
    #[must_use]
    pub fn code_mapping_to_svma(&self, offset: FileOffset) -> Option<Svma> {
        let code = self.segments.iter().find(|segment| {
            let first_page = segment.file_offset.0 & !(PAGE_BYTES - 1);
            let end = segment.file_offset.0.saturating_add(segment.file_size_bytes);
            segment.executable && (first_page..end).contains(&offset.0)
        })?;
        Some(Svma(code.address.0.wrapping_add(offset.0.wrapping_sub(code.file_offset.0))))
    }

    /// The GNU build id; the debug file is `/usr/lib/debug/.build-id/xx/yyyy.debug`.
    #[must_use]
    pub fn build_id(&self) -> Option<&'data [u8]> {
        self.elf.build_id().ok().flatten()
    }

    /// Name and CRC-32 of the separate debug file.
    #[must_use]
    pub fn debuglink(&self) -> Option<(&'data [u8], u32)> {
        self.elf.gnu_debuglink().ok().flatten()
    }

    /// Path and build id of the supplementary debug file (`dwz`), as the file with the
    /// debug information names it.
    #[must_use]
    pub fn debugaltlink(&self) -> Option<(&'data [u8], &'data [u8])> {
        let elf = self.debug_elf.as_ref().unwrap_or(&self.elf);
        elf.gnu_debugaltlink().ok().flatten()
    }

    /// Where execution starts; 0 for most shared libraries.
    #[must_use]
    pub fn entry(&self) -> Svma {
        Svma(self.elf.entry())
    }

    /// PT_INTERP: the dynamic loader's path.
    #[must_use]
    pub fn interpreter(&self) -> Option<&'data [u8]> {
        self.elf
            .elf_program_headers()
            .iter()
            .find_map(|header| header.interpreter(LittleEndian, self.files.image).ok().flatten())
    }

    /// Loaded where the kernel or the loader likes (ET_DYN).
    #[must_use]
    pub fn is_position_independent(&self) -> bool {
        self.elf.elf_header().e_type(LittleEndian) == elf::ET_DYN
    }

    /// An executable that needs no loader, also a position-independent one (`static-pie`).
    #[must_use]
    pub fn is_static(&self) -> bool {
        if self.interpreter().is_some() {
            return false;
        }
        !self.is_position_independent() || self.has_pie_flag()
    }

    /// The file's bytes from `address` up to the end of its segment's file part.
    #[must_use]
    pub fn bytes_from(&self, address: Svma) -> Option<&'data [u8]> {
        self.segments.iter().find_map(|segment| {
            let into = address.0.checked_sub(segment.address.0)?;
            let left = segment.file_size_bytes.checked_sub(into).filter(|left| *left > 0)?;
            slice(self.files.image, segment.file_offset.0.checked_add(into)?, left)
        })
    }

    /// All functions, by address. Indexed on the first call.
    #[must_use]
    pub fn functions(&self) -> &[Function] {
        self.functions.get_or_init(|| function::collect(self))
    }

    /// The function whose bytes hold `address`.
    #[must_use]
    pub fn function_at(&self, address: Svma) -> Option<&Function> {
        let functions = self.functions();
        let after = functions.partition_point(|function| function.address <= address);
        let function = functions.get(after.checked_sub(1)?)?;
        (address.0 - function.address.0 < function.size_bytes.max(1)).then_some(function)
    }

    /// The part that the compiler split off the function called `name`.
    pub(crate) fn cold_part_of(&self, name: &str) -> Option<&Function> {
        let parts = self.cold_parts.get_or_init(|| {
            let functions = self.functions().iter().enumerate();
            functions
                .filter(|(_, function)| function.is_cold_part())
                .filter_map(|(i, part)| Some((part.name.split_once(".cold")?.0.to_owned(), i)))
                .collect()
        });
        self.functions().get(*parts.get(name)?)
    }

    pub(crate) fn unwind(&self) -> &UnwindIndex {
        self.unwind.get_or_init(|| UnwindIndex::read(self))
    }

    pub(crate) fn sweep(&self) -> &Sweep {
        self.sweep.get_or_init(|| Sweep::run(self))
    }

    pub(crate) fn debug_info(&self) -> &DebugInfo<'data> {
        self.debug_info.get_or_init(|| DebugInfo::read(self))
    }

    pub(crate) fn type_info(&self) -> &TypeInfo<'data> {
        self.type_info.get_or_init(|| TypeInfo::read(self))
    }

    /// The stretch of code that `address` is in.
    pub(crate) fn code_range(&self, address: u64) -> Option<&CodeRange> {
        let after = self.code.partition_point(|range| range.start <= address);
        self.code.get(after.checked_sub(1)?).filter(|range| address < range.end)
    }

    /// The bytes of `range`, as far as the file has them.
    pub(crate) fn bytes_of(&self, range: Range<u64>) -> Option<&'data [u8]> {
        let bytes = self.bytes_from(Svma(range.start))?;
        let len = usize::try_from(range.end.checked_sub(range.start)?).ok()?;
        Some(&bytes[..len.min(bytes.len())])
    }

    /// An allocated section's address and bytes.
    pub(crate) fn section(&self, name: &str) -> Option<(u64, &'data [u8])> {
        let section = self.elf.section_by_name(name)?;
        let bytes = section.data().ok()?;
        (!bytes.is_empty()).then(|| (section.address(), bytes))
    }

    fn has_pie_flag(&self) -> bool {
        let Some(header) = self
            .elf
            .elf_program_headers()
            .iter()
            .find(|header| header.p_type(LittleEndian) == elf::PT_DYNAMIC)
        else {
            return false;
        };
        let Some(entries) =
            slice(self.files.image, header.p_offset(LittleEndian), header.p_filesz(LittleEndian))
        else {
            return false;
        };
        entries.chunks_exact(16).any(|entry| {
            let tag = read_u64(entry, 0);
            let value = read_u64(entry, 8);
            tag == Some(0x6fff_fffb /* DT_FLAGS_1 */)
                && value.is_some_and(|flags| flags & 0x0800_0000 /* DF_1_PIE */ != 0)
        })
    }
}

/// A little-endian u64 at `at`.
pub(crate) fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

fn slice(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    bytes.get(start..end)
}

fn parse_elf(bytes: &[u8]) -> Result<Elf<'_>, ModuleError> {
    if !bytes.starts_with(b"\x7fELF") {
        return Err(ModuleError::NotElf);
    }
    let (Some(class), Some(machine)) = (bytes.get(4), bytes.get(18..20)) else {
        return Err(ModuleError::Damaged { what: "the file ends within the ELF header".into() });
    };
    let little = bytes[5] != 2;
    let machine = [machine[0], machine[1]];
    let machine = if little { u16::from_le_bytes(machine) } else { u16::from_be_bytes(machine) };
    if *class == 1 {
        return Err(ModuleError::Not64Bit { machine: machine_name(machine) });
    }
    if machine != 62 || !little {
        return Err(ModuleError::OtherMachine { machine: machine_name(machine) });
    }
    Elf::parse(bytes).map_err(|error| ModuleError::Damaged { what: error.to_string() })
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "i386".into(),
        8 => "MIPS".into(),
        20 => "PowerPC".into(),
        21 => "PowerPC64".into(),
        22 => "s390".into(),
        40 => "ARM".into(),
        62 => "x86-64".into(),
        183 => "AArch64".into(),
        243 => "RISC-V".into(),
        247 => "BPF".into(),
        258 => "LoongArch".into(),
        other => format!("machine {other}"),
    }
}

fn read_segments(elf: &Elf<'_>, image: &[u8]) -> Result<Vec<Segment>, ModuleError> {
    let le = LittleEndian;
    let mut segments = Vec::new();
    for header in elf.elf_program_headers() {
        if header.p_type(le) != elf::PT_LOAD {
            continue;
        }
        let flags = header.p_flags(le);
        let segment = Segment {
            address: Svma(header.p_vaddr(le)),
            size_bytes: header.p_memsz(le),
            file_offset: FileOffset(header.p_offset(le)),
            file_size_bytes: header.p_filesz(le),
            executable: flags.0 & 1 != 0,
            writable: flags.0 & 2 != 0,
        };
        let in_file = slice(image, segment.file_offset.0, segment.file_size_bytes).is_some();
        let in_memory = segment.address.0.checked_add(segment.size_bytes).is_some()
            && segment.file_size_bytes <= segment.size_bytes;
        if !in_file || !in_memory {
            let at = segment.address;
            return Err(ModuleError::Damaged {
                what: format!("the segment at {at} reaches past the end of the file"),
            });
        }
        segments.push(segment);
    }
    if segments.is_empty() {
        return Err(ModuleError::Damaged { what: "no PT_LOAD segment".into() });
    }
    Ok(segments)
}

fn read_code_ranges(elf: &Elf<'_>, segments: &[Segment]) -> Vec<CodeRange> {
    let within_code = |start: u64, end: u64| {
        segments.iter().any(|segment| {
            segment.executable
                && segment.address.0 <= start
                && end <= segment.address.0 + segment.file_size_bytes
        })
    };
    let mut ranges: Vec<CodeRange> = elf
        .sections()
        .filter(|section| match section.flags() {
            object::SectionFlags::Elf { sh_flags, .. } => sh_flags.0 & 6 == 6, // ALLOC, EXECINSTR
            _ => false,
        })
        .filter_map(|section| {
            let start = section.address();
            let end = start.checked_add(section.size())?;
            let is_plt = section.name_bytes().is_ok_and(|name| name.starts_with(b".plt"));
            (start < end && within_code(start, end)).then_some(CodeRange { start, end, is_plt })
        })
        .collect();
    if ranges.is_empty() {
        ranges = segments
            .iter()
            .filter(|segment| segment.executable)
            .map(|segment| CodeRange {
                start: segment.address.0,
                end: segment.address.0 + segment.file_size_bytes,
                is_plt: false,
            })
            .collect();
    }
    ranges.sort_by_key(|range| range.start);
    ranges
}
