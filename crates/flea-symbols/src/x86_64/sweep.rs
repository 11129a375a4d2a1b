//! One pass over all code and data of a module: what leads to the first bytes of functions,
//! and which computed jumps cannot be told. Start at [`Sweep::run`].
//!
//! An address can be reached by a branch that states it, by a pointer that is stored
//! somewhere (data, relocation, immediate, `lea`), or by a sum of a table's address and one
//! of its entries. The sweep collects the first two everywhere, and reads every possible
//! table of the third kind. A jump to a register whose value is neither loaded nor such a
//! sum is listed as unproven.

use std::collections::BTreeSet;
use std::ops::Bound;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use object::read::elf::Sym as _;
use object::{LittleEndian, Object as _, ObjectSection as _, SectionFlags};

use crate::addr::Svma;
use crate::module::{CodeRange, Module, read_u64};
use crate::site::ReferenceKind;
use crate::x86_64::jumps;

/// References are kept when they lead this near behind a function's start: the longest site
/// is endbr64 and one byte short of a patch followed by the longest instruction.
const WINDOW_BYTES: u64 = 64;
/// A function with more labels and tables than this to combine is not proved.
const MAX_LABEL_TABLES: usize = 1 << 14;
/// No compiler's jump table is longer.
const MAX_TABLE_ENTRIES: u64 = 1 << 16;

/// One thing that leads to `target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Reference {
    pub(crate) target: u64,
    pub(crate) from: u64,
    pub(crate) kind: ReferenceKind,
}

/// What the pass has found; every list is sorted.
#[derive(Debug, Default)]
pub(crate) struct Sweep {
    references: Vec<Reference>,
    undecodable: Vec<u64>,
    unproven_jumps: Vec<u64>,
}

impl Sweep {
    pub(crate) fn run(module: &Module<'_>) -> Self {
        let mut pass = Pass::new(module);
        for range in &module.code {
            pass.sweep_range(range);
        }
        pass.read_tables();
        pass.read_data();
        pass.read_relocations();
        pass.read_symbols();
        for pad in &module.unwind().landing_pads {
            pass.add(pad.address, pad.function, ReferenceKind::LandingPad);
        }
        let mut sweep = pass.found;
        sweep.references.sort_unstable();
        sweep
            .references
            .dedup_by_key(|reference| (reference.target, reference.kind, reference.from));
        sweep.undecodable.sort_unstable();
        sweep.unproven_jumps.sort_unstable();
        sweep
    }

    /// What leads to an address in `start..end`.
    pub(crate) fn references(&self, start: u64, end: u64) -> &[Reference] {
        let first = self.references.partition_point(|reference| reference.target < start);
        let last = self.references.partition_point(|reference| reference.target < end);
        self.references.get(first..last).unwrap_or_default()
    }

    /// The first byte in `start..end` that is no instruction.
    pub(crate) fn undecodable(&self, start: u64, end: u64) -> Option<u64> {
        first_within(&self.undecodable, start, end)
    }

    /// The first computed jump in `start..end` that cannot be told.
    pub(crate) fn unproven_jump(&self, start: u64, end: u64) -> Option<u64> {
        first_within(&self.unproven_jumps, start, end)
    }
}

fn first_within(sorted: &[u64], start: u64, end: u64) -> Option<u64> {
    sorted.get(sorted.partition_point(|at| *at < start)).copied().filter(|at| *at < end)
}

struct Pass<'m, 'data> {
    module: &'m Module<'data>,
    /// Where functions start, named or not.
    starts: Vec<u64>,
    /// Addresses that `lea` takes: each may be a table of offsets.
    table_bases: BTreeSet<u64>,
    /// Those of them that are surely addresses, and so end the table before them.
    table_bounds: BTreeSet<u64>,
    /// Labels, and tables whose entries may count from them.
    label_tables: Vec<(u64, u64)>,
    /// Immediates are addresses only where the module cannot be moved.
    immediates_are_addresses: bool,
    region: Vec<Instruction>,
    stated: Vec<u64>,
    found: Sweep,
}

impl<'m, 'data> Pass<'m, 'data> {
    fn new(module: &'m Module<'data>) -> Self {
        let mut starts: Vec<u64> = module.functions().iter().map(|f| f.address.0).collect();
        starts.extend(module.unwind().starts());
        starts.sort_unstable();
        starts.dedup();
        Self {
            module,
            starts,
            table_bases: BTreeSet::new(),
            table_bounds: BTreeSet::new(),
            label_tables: Vec::new(),
            immediates_are_addresses: !module.is_position_independent(),
            region: Vec::new(),
            stated: Vec::new(),
            found: Sweep::default(),
        }
    }

    /// Keeps the reference if it leads behind a function's start. Branches to a start itself
    /// are kept too: they may be loops.
    fn add(&mut self, target: u64, from: u64, kind: ReferenceKind) {
        let after = self.starts.partition_point(|start| *start <= target);
        let Some(start) = after.checked_sub(1).and_then(|i| self.starts.get(i)) else { return };
        let near = target - start < WINDOW_BYTES;
        if near && (target != *start || kind == ReferenceKind::Branch) {
            self.found.references.push(Reference { target, from, kind });
        }
    }

    /// Decodes from every known start afresh, so that a stretch of data in the code cannot
    /// put the decoder out of step for longer than one function.
    fn sweep_range(&mut self, range: &CodeRange) {
        let Some(bytes) = self.module.bytes_of(range.start..range.end) else { return };
        let first = self.starts.partition_point(|start| *start <= range.start);
        let last = self.starts.partition_point(|start| *start < range.end);
        let mut at = range.start;
        let starts: Vec<u64> = self.starts.get(first..last).unwrap_or_default().to_vec();
        for next in starts.into_iter().chain([range.end]) {
            let offsets =
                (at - range.start).try_into().ok().zip((next - range.start).try_into().ok());
            if let Some(code) =
                offsets.and_then(|(start, end): (usize, usize)| bytes.get(start..end))
            {
                self.sweep_region(at, code);
            }
            at = next;
        }
    }

    fn sweep_region(&mut self, start: u64, code: &[u8]) {
        let mut decoder = Decoder::with_ip(64, code, start, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        let mut region = std::mem::take(&mut self.region);
        region.clear();
        let mut computed_jumps = Vec::new();
        while decoder.can_decode() {
            let (at, position) = (decoder.ip(), decoder.position());
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() {
                self.found.undecodable.push(at);
                // Data, or a byte that hides the rest: look at every offset behind it.
                decoder.set_ip(at + 1);
                if decoder.set_position(position + 1).is_err() {
                    break;
                }
                continue;
            }
            self.note(&instruction);
            if instruction.flow_control() == FlowControl::IndirectBranch {
                computed_jumps.push(region.len());
            }
            region.push(instruction);
        }
        for jump in &computed_jumps {
            if !jumps::is_proved(&region, *jump) {
                self.found.unproven_jumps.push(region[*jump].ip());
            }
        }
        if let Some(jump) = computed_jumps.first() {
            let at = region[*jump].ip();
            self.note_label_tables(&region, at);
        }
        self.region = region;
    }

    /// Labels of a function with computed jumps, with the tables whose entries may count from
    /// them.
    fn note_label_tables(&mut self, region: &[Instruction], jump: u64) {
        let (Some(first), Some(last)) = (region.first(), region.last()) else { return };
        let (start, end) = (first.ip(), last.next_ip());
        let mut taken = BTreeSet::new();
        for instruction in region {
            self.stated_addresses(instruction, |address| {
                taken.insert(address);
            });
        }
        let labels = taken.iter().filter(|at| (start + 1..end).contains(*at));
        let labels: Vec<u64> = labels.copied().collect();
        if labels.len() * taken.len() > MAX_LABEL_TABLES {
            self.found.unproven_jumps.push(jump);
            return;
        }
        for label in labels {
            self.label_tables.extend(taken.iter().map(|table| (label, *table)));
        }
    }

    fn note(&mut self, instruction: &Instruction) {
        let at = instruction.ip();
        match instruction.flow_control() {
            FlowControl::UnconditionalBranch
            | FlowControl::ConditionalBranch
            | FlowControl::XbeginXabortXend
                if is_near_branch(instruction) =>
            {
                self.add(instruction.near_branch_target(), at, ReferenceKind::Branch);
            }
            FlowControl::Call if is_near_branch(instruction) => {
                self.add(instruction.near_branch_target(), at, ReferenceKind::Call);
            }
            _ => {}
        }
        let mut stated = std::mem::take(&mut self.stated);
        self.stated_addresses(instruction, |address| stated.push(address));
        for address in stated.drain(..) {
            self.table_bases.insert(address);
            self.add(address, at, ReferenceKind::CodeAddress);
        }
        self.stated = stated;
        if instruction.is_ip_rel_memory_operand() && instruction.mnemonic() == Mnemonic::Lea {
            self.table_bounds.insert(instruction.ip_rel_memory_address());
        }
    }

    /// Addresses that an instruction states as values, not only to read what is there. A
    /// table may be read in place.
    fn stated_addresses(&self, instruction: &Instruction, mut found: impl FnMut(u64)) {
        let is_lea = instruction.mnemonic() == Mnemonic::Lea;
        if instruction.is_ip_rel_memory_operand() {
            if is_lea || jumps::is_table_load(instruction) {
                found(instruction.ip_rel_memory_address());
            }
            return;
        }
        if !self.immediates_are_addresses {
            return;
        }
        if is_lea || instruction.memory_index() != Register::None {
            found(instruction.memory_displacement64());
        }
        for operand in 0..instruction.op_count() {
            let wide = matches!(
                instruction.op_kind(operand),
                OpKind::Immediate32 | OpKind::Immediate64 | OpKind::Immediate32to64
            );
            if let Some(value) = instruction.try_immediate(operand).ok().filter(|_| wide) {
                found(value);
            }
        }
    }

    /// Reads each possible table of 32-bit offsets from its own address: up to the next
    /// address that is taken, as long as the sums are code. Reading too far yields addresses
    /// that nothing jumps to, which can only refuse a site, not allow one.
    fn read_tables(&mut self) {
        for base in std::mem::take(&mut self.table_bases) {
            self.read_table(base, base);
        }
        for (label, table) in std::mem::take(&mut self.label_tables) {
            self.read_table(label, table);
        }
    }

    /// Adds `label` and each 32-bit entry of `table`.
    fn read_table(&mut self, label: u64, table: u64) {
        let next = self.table_bounds.range((Bound::Excluded(table), Bound::Unbounded)).next();
        let Some(bytes) = self.module.bytes_from(Svma(table)) else { return };
        let bound = next.map_or(u64::MAX, |next| (next - table) / 4);
        for (entry, n) in bytes.chunks_exact(4).zip(0..bound.min(MAX_TABLE_ENTRIES)) {
            let Some(chunk) = entry.first_chunk() else { break };
            let target = label.wrapping_add_signed(i64::from(i32::from_le_bytes(*chunk)));
            let is_code = self.module.code_range(target).is_some()
                || self.module.code.iter().any(|range| range.end == target);
            if !is_code {
                break;
            }
            self.add(target, table + 4 * n, ReferenceKind::JumpTable);
        }
    }

    /// Every aligned word of data that is an address of code. Where the module can be moved,
    /// words that hold addresses are relocated, so they are writable (before RELRO).
    fn read_data(&mut self) {
        for segment in self.module.segments.clone() {
            if self.module.is_position_independent() && !segment.writable {
                continue;
            }
            let start = segment.address.0.next_multiple_of(8);
            let Some(bytes) = self.module.bytes_from(Svma(start)) else { continue };
            for (word, i) in bytes.chunks_exact(8).zip(0u64..) {
                let Some(value) = read_u64(word, 0).filter(|value| *value != 0) else { continue };
                let at = start + 8 * i;
                if self.module.code_range(value).is_some() && self.module.code_range(at).is_none() {
                    self.add(value, at, ReferenceKind::Pointer);
                }
            }
        }
    }

    /// Dynamic relocations put addresses into data when the module is loaded.
    fn read_relocations(&mut self) {
        let symbols = self.module.elf.elf_dynamic_symbol_table();
        let sections: Vec<_> = self.module.elf.sections().collect();
        for section in sections {
            let is_rela = |sh_type: object::elf::SectionType| sh_type.0 == 4;
            let SectionFlags::Elf { sh_type, sh_flags } = section.flags() else { continue };
            if !is_rela(sh_type) || sh_flags.0 & 2 == 0 {
                continue;
            }
            for entry in section.data().unwrap_or_default().chunks_exact(24) {
                let (Some(at), Some(info), Some(addend)) =
                    (read_u64(entry, 0), read_u64(entry, 8), read_u64(entry, 16))
                else {
                    continue;
                };
                let index = usize::try_from(info >> 32).unwrap_or(0);
                let value = match index {
                    0 => 0,
                    _ => symbols
                        .symbol(object::SymbolIndex(index))
                        .map_or(0, |symbol| symbol.st_value(LittleEndian)),
                };
                self.add(value.wrapping_add(addend), at, ReferenceKind::Pointer);
            }
        }
    }

    /// A symbol is an entry that another module may call; so is the start of unwind rows.
    fn read_symbols(&mut self) {
        let module = self.module;
        for elf in std::iter::once(&module.elf).chain(&module.debug_elf) {
            for table in [elf.elf_symbol_table(), elf.elf_dynamic_symbol_table()] {
                for symbol in table.iter() {
                    let of_code = !symbol.is_undefined(LittleEndian) && symbol.st_type().0 <= 2
                        || symbol.st_type().0 == 10;
                    let address = symbol.st_value(LittleEndian);
                    if of_code && module.code_range(address).is_some() {
                        self.add_entry(address);
                    }
                }
            }
        }
        for start in self.starts.clone() {
            self.add_entry(start);
        }
    }

    /// Unlike [`Pass::add`], also at a function's start: that start may lie in the replaced
    /// bytes of the function before it.
    fn add_entry(&mut self, address: u64) {
        let kind = ReferenceKind::Symbol;
        self.found.references.push(Reference { target: address, from: address, kind });
    }
}

pub(crate) fn is_near_branch(instruction: &Instruction) -> bool {
    matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    )
}
