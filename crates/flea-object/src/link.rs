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

mod core;
mod fault;
mod functions;
mod prototype;
mod relocate;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::btf::{Btf, Graph};
use crate::btf_ext::{BtfExt, CoreRelocation, LineInfo};
use crate::elf::{Elf, Relocation, SectionIdx};
use crate::error::ObjectError;
use crate::insn::Insn;
use crate::maps::Declared;
use crate::section::{SectionName, parse_name};
use crate::spec::{MapSpec, Program, ProgramFunction, ProgramKind, SourceLine};
use crate::types::Types;
use crate::validate::MAX_INSNS;

use functions::{Function, find_functions, is_text};
use prototype::{Prototypes, is_probe};
use relocate::{Place, Reference};

pub use fault::{ProgramError, ProgramFault};

/// Instructions of all programs together: a small file cannot ask for endless memory by
/// linking one large function into many programs.
const MAX_LINKED_INSNS: usize = 4 * MAX_INSNS;

/// Index into [`Linker::functions`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FunctionIdx(usize);

/// Functions by place, and what has been handed out so far.
pub(crate) struct Linker<'a> {
    elf: &'a Elf<'a>,
    functions: Vec<Function<'a>>,
    by_start: HashMap<(SectionIdx, usize), FunctionIdx>,
    relocations: HashMap<SectionIdx, BTreeMap<u64, Relocation>>,
    lines: HashMap<&'a str, Vec<LineInfo<'a>>>,
    core_relocations: HashMap<&'a str, Vec<CoreRelocation<'a>>>,
    prototypes: Prototypes<'a>,
    btf: &'a [Btf<'a>],
    /// The types that CO-RE relocations are about.
    types: Graph<'a, 'a>,
    /// What these may be called, by type id.
    type_names: HashMap<u32, Arc<[String]>>,
    maps_section: Option<SectionIdx>,
    /// Offset in `.maps` to index.
    map_at: HashMap<i64, u32>,
    maps: Vec<MapSpec>,
    data_maps: HashMap<SectionIdx, u32>,
    /// Where global data sections have a lock.
    data_locks: HashMap<SectionIdx, u32>,
    n_linked_insns: usize,
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
        btf: Option<&'a Btf<'a>>,
        ext: &BtfExt<'a>,
        declared: Declared,
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
        let prototypes = Prototypes::new(btf, ext);
        let btf = btf.map_or(&[][..], std::slice::from_ref);
        Ok(Self {
            elf,
            btf,
            types: Graph::new(btf, Types::default()),
            type_names: HashMap::new(),
            by_start,
            relocations,
            lines: by_section(&ext.lines, |l| (l.section, l.insn_idx)),
            core_relocations: by_section(&ext.core_relocations, |r| (r.section, r.insn_idx)),
            prototypes,
            maps_section: elf.section_named(".maps").map(|s| s.idx),
            map_at: declared.at,
            maps: declared.maps,
            data_maps: HashMap::new(),
            data_locks: declared.data_locks,
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

    /// `.maps` first, then the global data that linked programs refer to; and the types of
    /// their CO-RE relocations.
    pub(crate) fn into_parts(self) -> (Vec<MapSpec>, Types) {
        (self.maps, self.types.into_types())
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
            session: name.kind == ProgramKind::Fsession,
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
        let core_relocations = self.core_of(&linking).map_err(|fault| fault.of(program))?;
        self.n_linked_insns += linking.insns.len();
        Ok(Program {
            name: program.to_owned(),
            section: section.to_owned(),
            kind: name.kind,
            multi: name.multi,
            target: name.target,
            autoload: name.autoload,
            lines: self.lines_of(&linking.placed),
            functions: self.functions_of(&linking.placed, name.kind),
            core_relocations,
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
}

impl<'a> Linker<'a> {
    fn functions_of(
        &self,
        placed: &[(FunctionIdx, usize)],
        kind: ProgramKind,
    ) -> Vec<ProgramFunction> {
        let described = placed.iter().map(|&(function, base)| {
            let f = &self.functions[function.0];
            let section = self.elf.section(f.section).map_or("", |s| s.name.as_str());
            // The main function is the program's own, whatever else may call it.
            let global = base > 0 && !f.local && !f.hidden;
            let prototype = || self.prototypes.of(section, f.start, is_probe(kind));
            ProgramFunction {
                insn_idx: index_u32(base),
                name: f.name.to_owned(),
                prototype: global.then(prototype).flatten(),
            }
        });
        described.collect()
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

fn to_i64(i: usize) -> i64 {
    i64::try_from(i).expect("an index into bytes in memory")
}

fn index_u32(i: usize) -> u32 {
    u32::try_from(i).expect("a program has at most MAX_INSNS instructions")
}
