//! Linking: a program's main function and every function it reaches become one sequence of
//! instructions; relocations become map indices, calls become distances.
//!
//! ```text
//!   .text          0 thrice   8 twice   23 each          three functions
//!   fexit/malloc   0 on_malloc_return                    call thrice -> R_BPF_64_32 thrice
//!
//!   linked         0 on_malloc_return   19 thrice   27 twice
//! ```
//!
//! A call between functions of one section has no relocation when the callee is static:
//! its distance is right in the section, and wrong once the functions have moved, so every
//! call is resolved to a function first and written anew when all have their place.

use std::collections::{BTreeMap, HashMap};

use crate::btf_ext::{BtfExt, CoreRelocation, LineInfo};
use crate::elf::{Elf, R_BPF_64_32, R_BPF_64_64, Relocation, Section, SectionIdx, Symbol};
use crate::error::ObjectError;
use crate::helper::Helper;
use crate::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use crate::maps::{self, DeclaredMap};
use crate::opcode as op;
use crate::section::{SectionFault, SectionName, parse_name};
use crate::spec::{MapSpec, Program, ProgramFunction, SourceLine};
use crate::validate::MAX_INSNS;

const INSN_BYTES: u64 = 8;
/// Instructions of all programs together: a small file cannot ask for endless memory by
/// linking one large function into many programs.
const MAX_LINKED_INSNS: usize = 4 * MAX_INSNS;

/// A program that cannot be had, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("program '{program}': {fault}")]
pub struct ProgramError {
    /// Its name, or the function's where no program is known yet.
    pub program: String,
    /// Why.
    pub fault: ProgramFault,
}

/// What can be wrong with a program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProgramFault {
    /// Its section's name.
    #[error(transparent)]
    Section(#[from] SectionFault),
    /// A `static` function in a program section.
    #[error("is static in section '{section}'; programs are global functions")]
    Static {
        /// The section.
        section: String,
    },
    /// Its symbol covers no whole instructions of its section.
    #[error(
        "its symbol says {size_bytes} bytes at {offset:#x} of section '{section}', which is no function there"
    )]
    BadSymbol {
        /// The section.
        section: String,
        /// Start.
        offset: u64,
        /// Length.
        size_bytes: u64,
    },
    /// Two functions share instructions.
    #[error("overlaps function '{other}'")]
    Overlap {
        /// The other one.
        other: String,
    },
    /// A variable or function that the object does not define.
    #[error(
        "refers to '{symbol}', which the object does not define; of kernel functions only bpf_session_is_return and bpf_session_cookie can be had"
    )]
    Extern {
        /// Its name.
        symbol: String,
    },
    /// A session's kernel function in another kind of program.
    #[error("calls '{symbol}', which only SEC(\"fsession/...\") programs can")]
    NotASession {
        /// The kernel function.
        symbol: String,
    },
    /// A reference into a section that is neither code, maps nor global data.
    #[error(
        "function '{function}' refers to section '{section}', which is neither code, .maps nor global data"
    )]
    BadReference {
        /// The function that refers.
        function: String,
        /// The section referred to.
        section: String,
    },
    /// A reference to a place in `.maps` where no map begins.
    #[error("function '{function}' refers to offset {offset} of .maps, where no map begins")]
    NoSuchMap {
        /// The function that refers.
        function: String,
        /// Into `.maps`.
        offset: i64,
    },
    /// An address outside global data.
    #[error(
        "function '{function}' refers to offset {offset} of '{section}', which has {size_bytes} bytes"
    )]
    OutsideData {
        /// The function that refers.
        function: String,
        /// The section.
        section: String,
        /// Into the section.
        offset: i64,
        /// The section's size.
        size_bytes: u64,
    },
    /// A call, or function reference, that leads to no function's start.
    #[error(
        "function '{function}' calls instruction {target} of section '{section}', where no function begins"
    )]
    NoSuchFunction {
        /// The function that calls.
        function: String,
        /// The section.
        section: String,
        /// Index of an instruction there.
        target: i64,
    },
    /// A relocation, or the lack of one, that no compiler makes.
    #[error("function '{function}', instruction {insn_idx}: {what}")]
    BadRelocation {
        /// The function.
        function: String,
        /// Index in the function.
        insn_idx: usize,
        /// What is odd about it.
        what: &'static str,
    },
    /// The code depends on the layout of the target's types.
    #[error(
        "function '{function}' uses CO-RE relocations (of type '{type_name}'), which are not supported yet; compile against the target's own headers, without preserve_access_index"
    )]
    CoreRelocation {
        /// The function.
        function: String,
        /// The first type.
        type_name: String,
    },
    /// More instructions than fit.
    #[error("has {n_insns} instructions with the functions it calls; at most {max} are allowed")]
    TooLong {
        /// How many so far.
        n_insns: usize,
        /// For one program, or what is left of the object's allowance.
        max: usize,
    },
}

impl ProgramFault {
    fn of(self, program: &str) -> ProgramError {
        ProgramError { program: program.to_owned(), fault: self }
    }
}

/// Index into [`Linker::functions`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FunctionIdx(usize);

struct Function<'a> {
    name: &'a str,
    section: SectionIdx,
    start: usize,
    insns: Vec<Insn>,
    local: bool,
}

/// Functions by place, and what has been handed out so far.
pub(crate) struct Linker<'a> {
    elf: &'a Elf<'a>,
    functions: Vec<Function<'a>>,
    by_start: HashMap<(SectionIdx, usize), FunctionIdx>,
    relocations: HashMap<SectionIdx, BTreeMap<u64, Relocation>>,
    lines: HashMap<&'a str, Vec<LineInfo<'a>>>,
    core_relocations: HashMap<&'a str, Vec<CoreRelocation<'a>>>,
    maps_section: Option<SectionIdx>,
    /// Offset in `.maps` to index.
    map_at: HashMap<i64, u32>,
    maps: Vec<MapSpec>,
    data_maps: HashMap<SectionIdx, u32>,
    n_linked_insns: usize,
}

/// What one instruction refers to once its relocation is read.
enum Reference {
    /// Nothing: it is final.
    Plain,
    /// Its `imm` is the distance to this function.
    Function(FunctionIdx),
}

/// One program while its functions are put together.
struct Linking<'p> {
    program: &'p str,
    session: bool,
    insns: Vec<Insn>,
    /// In the order of `insns`, with their first instruction.
    placed: Vec<(FunctionIdx, usize)>,
    /// Instructions whose `imm` waits for a function's place.
    patches: Vec<(usize, FunctionIdx)>,
}

impl<'a> Linker<'a> {
    pub(crate) fn new(
        elf: &'a Elf<'a>,
        ext: &BtfExt<'a>,
        declared: Vec<DeclaredMap>,
    ) -> Result<Self, ProgramError> {
        let functions = find_functions(elf)?;
        let by_start = functions
            .iter()
            .enumerate()
            .map(|(i, f)| ((f.section, f.start), FunctionIdx(i)))
            .collect();
        let relocations = elf
            .sections
            .iter()
            .filter(|s| s.executable)
            .map(|s| (s.idx, s.relocations.iter().map(|r| (r.offset, *r)).collect()))
            .collect();
        let offsets = declared.iter().map(|m| i64::try_from(m.offset).unwrap_or(i64::MAX));
        Ok(Self {
            elf,
            by_start,
            relocations,
            lines: by_section(&ext.lines, |l| (l.section, l.insn_idx)),
            core_relocations: by_section(&ext.core_relocations, |r| (r.section, r.insn_idx)),
            maps_section: elf.section_named(".maps").map(|s| s.idx),
            map_at: offsets.zip(0..).collect(),
            maps: declared.into_iter().map(|m| m.spec).collect(),
            data_maps: HashMap::new(),
            functions,
            n_linked_insns: 0,
        })
    }

    /// Links every program, in the order of the file.
    pub(crate) fn link_programs(&mut self) -> Result<Vec<Program>, ObjectError> {
        let mut programs = Vec::new();
        for i in 0..self.functions.len() {
            let function = &self.functions[i];
            let section = self.elf.section(function.section).map_or("", |s| s.name.as_str());
            if is_text(section) {
                continue;
            }
            let (name, local) = (function.name, function.local);
            let kind = parse_name(section).map_err(|e| ProgramFault::from(e).of(name))?;
            if local {
                return Err(ProgramFault::Static { section: section.to_owned() }.of(name).into());
            }
            programs.push(self.link(FunctionIdx(i), section, kind)?);
        }
        Ok(programs)
    }

    /// `.maps` first, then the global data that linked programs refer to.
    pub(crate) fn into_maps(self) -> Vec<MapSpec> {
        self.maps
    }

    fn link(
        &mut self,
        main: FunctionIdx,
        section: &str,
        name: SectionName,
    ) -> Result<Program, ObjectError> {
        let program = self.functions[main.0].name;
        let mut linking = Linking {
            program,
            session: name.kind == crate::spec::ProgramKind::Fsession,
            insns: Vec::new(),
            placed: Vec::new(),
            patches: Vec::new(),
        };
        let mut pending = vec![main];
        let mut seen = std::collections::HashSet::from([main]);
        let mut next = 0;
        while let Some(&function) = pending.get(next) {
            next += 1;
            let first_patch = linking.patches.len();
            self.append(&mut linking, function)?;
            let callees = linking.patches[first_patch..].iter().map(|&(_, callee)| callee);
            pending.extend(callees.filter(|callee| seen.insert(*callee)));
        }
        linking.resolve_calls();
        self.n_linked_insns += linking.insns.len();
        Ok(Program {
            name: program.to_owned(),
            section: section.to_owned(),
            kind: name.kind,
            target: name.target,
            autoload: name.autoload,
            lines: self.lines_of(&linking.placed),
            functions: self.names_of(&linking.placed),
            insns: linking.insns,
        })
    }

    /// Puts `function` behind what is there, and notes whom it calls.
    fn append(
        &mut self,
        linking: &mut Linking<'_>,
        function: FunctionIdx,
    ) -> Result<(), ObjectError> {
        let base = linking.insns.len();
        let n_insns = base + self.functions[function.0].insns.len();
        let max = MAX_INSNS.min(MAX_LINKED_INSNS - self.n_linked_insns);
        if n_insns > max {
            return Err(ProgramFault::TooLong { n_insns, max }.of(linking.program).into());
        }
        self.check_core(function).map_err(|fault| fault.of(linking.program))?;
        linking.placed.push((function, base));
        linking.insns.extend_from_slice(&self.functions[function.0].insns);
        let mut i = base;
        while i < n_insns {
            let is_lddw = linking.insns[i].is_lddw();
            let second = if is_lddw && i + 1 < n_insns { i + 1 } else { i };
            let at = Place { function, insn_idx: i - base };
            let (first, second) = (linking.insns[i], linking.insns[second]);
            let (reference, [new_first, new_second]) =
                self.relocate(at, [first, second], linking)?;
            linking.insns[i] = new_first;
            if is_lddw && i + 1 < n_insns {
                linking.insns[i + 1] = new_second;
                i += 1;
            }
            if let Reference::Function(callee) = reference {
                let insn_idx = base + at.insn_idx;
                linking.patches.push((insn_idx, callee));
            }
            i += 1;
        }
        Ok(())
    }

    fn check_core(&self, function: FunctionIdx) -> Result<(), ProgramFault> {
        let f = &self.functions[function.0];
        let section = self.elf.section(f.section).map_or("", |s| s.name.as_str());
        let range = f.start..f.start + f.insns.len();
        let of_section = self.core_relocations.get(section);
        match in_range(of_section, range, |r| r.insn_idx).first() {
            None => Ok(()),
            Some(relocation) => Err(ProgramFault::CoreRelocation {
                function: f.name.to_owned(),
                type_name: relocation.type_name.to_owned(),
            }),
        }
    }
}

/// An instruction of a function.
#[derive(Clone, Copy)]
struct Place {
    function: FunctionIdx,
    insn_idx: usize,
}

/// The instructions that a reference may change: both halves of a `lddw`, or the same twice.
type Halves = [Insn; 2];

impl<'a> Linker<'a> {
    /// Applies the relocation of one instruction, if it has or needs one.
    fn relocate(
        &mut self,
        at: Place,
        halves: Halves,
        linking: &Linking<'_>,
    ) -> Result<(Reference, Halves), ObjectError> {
        let insn = halves[0];
        let f = &self.functions[at.function.0];
        let section = f.section;
        let offset = (f.start + at.insn_idx) as u64 * INSN_BYTES;
        let bad = |what| {
            let (function, insn_idx) = (f.name.to_owned(), at.insn_idx);
            ProgramFault::BadRelocation { function, insn_idx, what }.of(linking.program)
        };
        let of_this_section = self.relocations.get(&section);
        let mut here = of_this_section
            .into_iter()
            .flat_map(|r| r.range(offset..offset + INSN_BYTES).map(|(_, relocation)| *relocation));
        let relocation = here.next();
        let is_call = insn.opcode == op::CALL_OP;
        match relocation {
            None if is_call && insn.src == PSEUDO_CALL => {
                let target = to_i64(f.start + at.insn_idx) + 1 + i64::from(insn.imm);
                let callee = self.function_at(at, section, target, linking)?;
                Ok((Reference::Function(callee), halves))
            }
            None if (is_call || insn.is_lddw()) && insn.src != 0 => {
                Err(bad("refers to something, but has no relocation to say to what").into())
            }
            None => Ok((Reference::Plain, halves)),
            Some(r) if r.offset != offset => Err(bad("has a relocation in its middle").into()),
            Some(r) if insn.is_lddw() && r.r_type == R_BPF_64_64 => {
                self.relocate_lddw(at, halves, &self.elf.symbols[r.symbol], linking)
            }
            Some(r) if is_call && insn.src == PSEUDO_CALL && r.r_type == R_BPF_64_32 => {
                self.relocate_call(at, halves, &self.elf.symbols[r.symbol], linking)
            }
            Some(_) => Err(bad("has a relocation that its kind cannot have").into()),
        }
    }

    fn relocate_call(
        &self,
        at: Place,
        [mut insn, second]: Halves,
        symbol: &Symbol,
        linking: &Linking<'_>,
    ) -> Result<(Reference, Halves), ObjectError> {
        let Some(section) = symbol.section else {
            let helper = session_function(&symbol.name).ok_or_else(|| {
                ProgramFault::Extern { symbol: symbol.name.clone() }.of(linking.program)
            })?;
            if !linking.session {
                let fault = ProgramFault::NotASession { symbol: symbol.name.clone() };
                return Err(fault.of(linking.program).into());
            }
            insn.src = 0;
            insn.imm = (helper as u32).cast_signed();
            return Ok((Reference::Plain, [insn, second]));
        };
        // A named function: its value, and imm -1. A static one: the section's symbol with
        // value 0, and imm the function's first instruction less one.
        let start = to_i64_saturating(symbol.value / INSN_BYTES);
        let target = start.saturating_add(1 + i64::from(insn.imm));
        let callee = self.function_at(at, section, target, linking)?;
        Ok((Reference::Function(callee), [insn, second]))
    }

    fn relocate_lddw(
        &mut self,
        at: Place,
        [mut first, mut second]: Halves,
        symbol: &Symbol,
        linking: &Linking<'_>,
    ) -> Result<(Reference, Halves), ObjectError> {
        let program = linking.program;
        let function = || self.functions[at.function.0].name.to_owned();
        let Some(idx) = symbol.section else {
            return Err(ProgramFault::Extern { symbol: symbol.name.clone() }.of(program).into());
        };
        let section = self.elf.section(idx);
        let offset = to_i64_saturating(symbol.value).saturating_add(i64::from(first.imm));
        if Some(idx) == self.maps_section {
            let map = *self.map_at.get(&offset).ok_or_else(|| {
                ProgramFault::NoSuchMap { function: function(), offset }.of(program)
            })?;
            (first.src, first.imm, second.imm) = (PSEUDO_MAP, map.cast_signed(), 0);
            return Ok((Reference::Plain, [first, second]));
        }
        match section {
            Some(section) if section.executable => {
                let aligned = offset % 8 == 0;
                let target = if aligned { offset / 8 } else { -1 };
                let callee = self.function_at(at, idx, target, linking)?;
                (first.src, second.imm) = (PSEUDO_FUNC, 0);
                Ok((Reference::Function(callee), [first, second]))
            }
            Some(section) if maps::is_global_data(&section.name) => {
                let size_bytes = section.size_bytes;
                let inside = u64::try_from(offset).is_ok_and(|offset| offset < size_bytes);
                if !inside {
                    let (function, section) = (function(), section.name.clone());
                    let fault = ProgramFault::OutsideData { function, section, offset, size_bytes };
                    return Err(fault.of(program).into());
                }
                let map = self.data_map(section)?;
                let offset = i32::try_from(offset).expect("below MAX_GLOBAL_DATA_BYTES");
                (first.src, first.imm) = (PSEUDO_MAP_VALUE, map.cast_signed());
                second.imm = offset;
                Ok((Reference::Plain, [first, second]))
            }
            _ => {
                let section = section.map_or_else(String::new, |s| s.name.clone());
                let fault = ProgramFault::BadReference { function: function(), section };
                Err(fault.of(program).into())
            }
        }
    }

    /// The map of a global data section, made when it is first referred to.
    fn data_map(&mut self, section: &Section<'_>) -> Result<u32, ObjectError> {
        if let Some(&map) = self.data_maps.get(&section.idx) {
            return Ok(map);
        }
        let map = u32::try_from(self.maps.len()).expect("a map takes bytes of the file");
        self.maps.push(maps::global_data(self.elf, section)?);
        self.data_maps.insert(section.idx, map);
        Ok(map)
    }

    fn function_at(
        &self,
        at: Place,
        section: SectionIdx,
        target: i64,
        linking: &Linking<'_>,
    ) -> Result<FunctionIdx, ProgramError> {
        let start = usize::try_from(target).ok();
        let found = start.and_then(|start| self.by_start.get(&(section, start)).copied());
        found.ok_or_else(|| {
            let function = self.functions[at.function.0].name.to_owned();
            let section = self.elf.section(section).map_or("", |s| s.name.as_str()).to_owned();
            ProgramFault::NoSuchFunction { function, section, target }.of(linking.program)
        })
    }

    fn names_of(&self, placed: &[(FunctionIdx, usize)]) -> Vec<ProgramFunction> {
        placed
            .iter()
            .map(|&(function, base)| ProgramFunction {
                insn_idx: index_u32(base),
                name: self.functions[function.0].name.to_owned(),
            })
            .collect()
    }

    fn lines_of(&self, placed: &[(FunctionIdx, usize)]) -> Vec<SourceLine> {
        let mut lines = Vec::new();
        for &(function, base) in placed {
            let f = &self.functions[function.0];
            let section = self.elf.section(f.section).map_or("", |s| s.name.as_str());
            let range = f.start..f.start + f.insns.len();
            let inside = in_range(self.lines.get(section), range, |l| l.insn_idx);
            lines.extend(inside.iter().map(|line| SourceLine {
                insn_idx: index_u32(base + line.insn_idx - f.start),
                file: line.file.to_owned(),
                line: line.line,
                text: line.text.to_owned(),
            }));
        }
        lines
    }
}

impl Linking<'_> {
    /// Now that every function has its place, writes the distances.
    fn resolve_calls(&mut self) {
        let base_of: HashMap<FunctionIdx, usize> = self.placed.iter().copied().collect();
        for &(insn_idx, callee) in &self.patches {
            let distance = to_i64(base_of[&callee]) - to_i64(insn_idx) - 1;
            self.insns[insn_idx].imm =
                i32::try_from(distance).expect("a program has at most MAX_INSNS instructions");
        }
    }
}

fn find_functions<'a>(elf: &'a Elf<'_>) -> Result<Vec<Function<'a>>, ProgramError> {
    let mut found = Vec::new();
    for symbol in elf.symbols.iter().filter(|s| s.function) {
        let section = symbol.section.and_then(|idx| elf.section(idx));
        let Some(section) = section.filter(|s| s.executable) else { continue };
        let (offset, size_bytes) = (symbol.value, symbol.size_bytes);
        let code = function_bytes(section, symbol).ok_or_else(|| {
            let section = section.name.clone();
            ProgramFault::BadSymbol { section, offset, size_bytes }.of(&symbol.name)
        })?;
        found.push((section.idx, symbol, code));
    }
    found.sort_by_key(|(section, symbol, _)| (*section, symbol.value));
    for pair in found.windows(2) {
        let ((a_section, a, a_code), (b_section, b, _)) = (&pair[0], &pair[1]);
        if a_section == b_section && a.value + a_code.len() as u64 > b.value {
            return Err(ProgramFault::Overlap { other: a.name.clone() }.of(&b.name));
        }
    }
    // Decoded only now: what does not overlap is no larger than the file.
    let decode = |code: &[u8]| code.as_chunks::<8>().0.iter().map(|&b| Insn::decode(b)).collect();
    Ok(found
        .into_iter()
        .map(|(section, symbol, code)| Function {
            name: &symbol.name,
            section,
            start: usize::try_from(symbol.value / INSN_BYTES).expect("inside the section"),
            insns: decode(code),
            local: symbol.local,
        })
        .collect())
}

fn function_bytes<'a>(section: &Section<'a>, symbol: &Symbol) -> Option<&'a [u8]> {
    let whole = |bytes: u64| bytes.is_multiple_of(INSN_BYTES);
    if symbol.size_bytes == 0 || !whole(symbol.size_bytes) || !whole(symbol.value) {
        return None;
    }
    let start = usize::try_from(symbol.value).ok()?;
    let end = start.checked_add(usize::try_from(symbol.size_bytes).ok()?)?;
    section.data.get(start..end)
}

/// Records by their section's name, sorted by instruction.
fn by_section<'a, T: Copy>(
    records: &[T],
    key: impl Fn(&T) -> (&'a str, usize),
) -> HashMap<&'a str, Vec<T>> {
    let mut sections: HashMap<&str, Vec<T>> = HashMap::new();
    for record in records {
        sections.entry(key(record).0).or_default().push(*record);
    }
    for of_section in sections.values_mut() {
        of_section.sort_by_key(|record| key(record).1);
    }
    sections
}

/// Those of sorted records whose instruction is in `range`.
fn in_range<T>(
    records: Option<&Vec<T>>,
    range: std::ops::Range<usize>,
    insn_idx: impl Fn(&T) -> usize,
) -> &[T] {
    let records = records.map_or(&[][..], Vec::as_slice);
    let start = records.partition_point(|r| insn_idx(r) < range.start);
    let end = records.partition_point(|r| insn_idx(r) < range.end);
    &records[start..end.max(start)]
}

/// Functions that are no programs; `-ffunction-sections` makes `.text.name` of them.
fn is_text(section: &str) -> bool {
    section == ".text" || section.starts_with(".text.")
}

fn session_function(name: &str) -> Option<Helper> {
    [Helper::SessionIsReturn, Helper::SessionCookie].into_iter().find(|h| h.name() == name)
}

fn to_i64(i: usize) -> i64 {
    i64::try_from(i).expect("an index into bytes in memory")
}

fn to_i64_saturating(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn index_u32(i: usize) -> u32 {
    u32::try_from(i).expect("a program has at most MAX_INSNS instructions")
}
