//! One instruction's relocation: what it refers to, and the instruction with that in it.
//!
//! | instruction | relocation against | becomes |
//! |---|---|---|
//! | `lddw` | a variable in `.maps` | `PSEUDO_MAP`, the map's index |
//! | `lddw` | global data | `PSEUDO_MAP_VALUE`, the section's map and an offset |
//! | `lddw` | a function | `PSEUDO_FUNC`, a distance |
//! | `call` | a function, or none | `PSEUDO_CALL`, a distance |
//! | `call` | fsession's kernel functions, undefined | a helper call |

use super::fault::{ProgramError, ProgramFault};
use super::{FunctionIdx, Linker, Linking, to_i64};
use crate::elf::{R_BPF_64_32, R_BPF_64_64, Section, SectionIdx, Symbol};
use crate::error::ObjectError;
use crate::helper::Helper;
use crate::insn::{INSN_BYTES, Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use crate::maps;
use crate::opcode as op;

/// What one instruction refers to once its relocation is read.
pub(super) enum Reference {
    /// Nothing: it is final.
    Plain,
    /// Its `imm` is the distance to this function.
    Function(FunctionIdx),
}

/// An instruction of a function.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub function: FunctionIdx,
    pub insn_idx: usize,
}

/// The instructions that a reference may change: both halves of a `lddw`, or the same twice.
pub(super) type Halves = [Insn; 2];

impl Linker<'_> {
    /// Applies the relocation of one instruction, if it has or needs one.
    pub(super) fn relocate(
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
            let helper = kernel_function(&symbol.name).ok_or_else(|| {
                ProgramFault::Extern { symbol: symbol.name.clone() }.of(linking.program)
            })?;
            let of_sessions = matches!(helper, Helper::SessionIsReturn | Helper::SessionCookie);
            if of_sessions && !linking.session {
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
        let held = self.data_maps.values().filter_map(|&map| self.maps[map as usize].init.as_ref());
        let held_bytes = held.map(|bytes| bytes.len() as u64).sum();
        let lock_offset = self.data_locks.get(&section.idx).copied();
        self.maps.push(maps::global_data(self.elf, section, held_bytes, lock_offset)?);
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
}

fn kernel_function(name: &str) -> Option<Helper> {
    let all = [Helper::SessionIsReturn, Helper::SessionCookie, Helper::RdonlyCast];
    all.into_iter().find(|h| h.name() == name)
}

fn to_i64_saturating(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
