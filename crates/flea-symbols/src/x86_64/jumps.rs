//! Can a computed jump be told? Knows one function's instructions and nothing else.
//!
//! A jump through memory, or to a register that was loaded, goes to an address that is
//! stored somewhere, and the sweep knows all of those. A register that was computed is
//! accepted in the one form that compilers and hand-written string functions use:
//!
//! ```text
//!     lea    B, [rip + table]        may be far away
//!     movsxd D, dword [B + I*4]      the sweep has read this table
//!     add    D, B                    or add B, D; lea D, [D + B]
//!     jmp    D                       or jmp B
//! ```
//!
//! (With labels as values, entries may count from a label of the function instead of from
//! the table: the sweep tries each label with each table of the function.)
//!
//! The register's definitions are sought backwards over all paths.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{
    FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};

use crate::x86_64::sweep::is_near_branch;

/// How far before the `add` its table load may be.
const PATTERN_INSNS: usize = 16;
/// Steps of one search: beyond that the function is too tangled to be proved.
const MAX_STEPS: usize = 200_000;

/// Whether the targets of the indirect jump `region[jump]` are among what the sweep knows.
pub(crate) fn is_proved(region: &[Instruction], jump: usize) -> bool {
    let instruction = &region[jump];
    match instruction.op0_kind() {
        OpKind::Memory => true,
        OpKind::Register => Search::new(region).run(jump, instruction.op0_register()),
        _ => false,
    }
}

/// Whether the indirect jump `region[jump]` goes through a table, and so stays in its
/// function.
pub(crate) fn is_table_jump(region: &[Instruction], jump: usize) -> bool {
    let instruction = &region[jump];
    match instruction.op0_kind() {
        OpKind::Memory => {
            instruction.memory_base() == Register::None
                && instruction.memory_index() != Register::None
                && instruction.memory_index_scale() == 8
        }
        OpKind::Register => {
            let mut search = Search::new(region);
            search.known_is_proof = false;
            search.run(jump, instruction.op0_register()) && search.n_sums > 0
        }
        _ => false,
    }
}

struct Search<'a> {
    region: &'a [Instruction],
    /// Direct branches by the index of their target.
    branches: BTreeMap<usize, Vec<usize>>,
    computed_jumps: Vec<usize>,
    info: InstructionInfoFactory,
    /// Whether a stored address will do, or only a table's sum.
    known_is_proof: bool,
    n_sums: u32,
}

/// What an instruction does to the register that is sought.
enum Definition {
    /// Nothing: look further back.
    None,
    /// A stored or stated address.
    Known,
    /// A table's address and one of its entries.
    TableSum,
    /// Loaded from the frame: look for those who stored it.
    Spilled,
    /// A copy: look for that register instead.
    Copy(Register),
    /// One of both.
    Either(Register),
    /// It may keep the old value.
    KnownOrKept,
    /// Arithmetic that is not understood.
    Unproven,
}

impl<'a> Search<'a> {
    fn new(region: &'a [Instruction]) -> Self {
        let mut branches: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let mut computed_jumps = Vec::new();
        for (i, instruction) in region.iter().enumerate() {
            if instruction.flow_control() == FlowControl::IndirectBranch {
                computed_jumps.push(i);
            }
            let branches_here = matches!(
                instruction.flow_control(),
                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
            );
            if branches_here && is_near_branch(instruction) {
                let target = instruction.near_branch_target();
                if let Ok(at) = region.binary_search_by_key(&target, Instruction::ip) {
                    branches.entry(at).or_default().push(i);
                }
            }
        }
        Self {
            region,
            branches,
            computed_jumps,
            info: InstructionInfoFactory::new(),
            known_is_proof: true,
            n_sums: 0,
        }
    }

    fn run(&mut self, jump: usize, register: Register) -> bool {
        let mut seen = BTreeSet::new();
        let mut work = vec![(jump, register.full_register())];
        // Each item: just before `at`, who has defined `register`?
        while let Some((at, register)) = work.pop() {
            if seen.len() > MAX_STEPS {
                return false;
            }
            if !seen.insert((at, register)) {
                continue;
            }
            for before in self.predecessors(at) {
                match self.definition(before, register) {
                    Definition::None => work.push((before, register)),
                    Definition::TableSum => self.n_sums += 1,
                    Definition::Known if self.known_is_proof => {}
                    Definition::KnownOrKept if self.known_is_proof => {
                        work.push((before, register));
                    }
                    Definition::Copy(source) => work.push((before, source)),
                    Definition::Spilled => work.extend(self.spills(before)),
                    Definition::Either(source) => {
                        work.push((before, source));
                        work.push((before, register));
                    }
                    Definition::Known | Definition::KnownOrKept | Definition::Unproven => {
                        return false;
                    }
                }
            }
        }
        true
    }

    /// Which instructions may run just before `at`. The function's start has none: what is in
    /// the register then came from the caller, as a pointer.
    fn predecessors(&self, at: usize) -> Vec<usize> {
        let mut before = self.branches.get(&at).cloned().unwrap_or_default();
        let falls_through = at > 0
            && !matches!(
                self.region[at - 1].flow_control(),
                FlowControl::UnconditionalBranch
                    | FlowControl::IndirectBranch
                    | FlowControl::Return
                    | FlowControl::Exception
            );
        if falls_through {
            before.push(at - 1);
        } else if before.is_empty() && at > 0 {
            // Only a computed jump (or an unwinder) leads here.
            before.clone_from(&self.computed_jumps);
        }
        before
    }

    fn definition(&mut self, at: usize, register: Register) -> Definition {
        let instruction = &self.region[at];
        if instruction.flow_control() == FlowControl::Call
            || instruction.flow_control() == FlowControl::IndirectCall
        {
            // A result is a pointer; other registers may be known to survive the call.
            return if register == Register::RAX { Definition::Known } else { Definition::None };
        }
        let writes = self.info.info(instruction).used_registers().iter().any(|used| {
            used.register().full_register() == register
                && matches!(
                    used.access(),
                    OpAccess::Write
                        | OpAccess::ReadWrite
                        | OpAccess::CondWrite
                        | OpAccess::ReadCondWrite
                )
        });
        if !writes {
            return Definition::None;
        }
        let wide =
            instruction.op0_kind() == OpKind::Register && instruction.op0_register() == register;
        let from_memory = instruction.op1_kind() == OpKind::Memory;
        let from_register = instruction.op1_kind() == OpKind::Register;
        match instruction.mnemonic() {
            Mnemonic::Mov if wide && from_register => {
                Definition::Copy(instruction.op1_register().full_register())
            }
            Mnemonic::Mov
                if wide
                    && matches!(instruction.memory_base(), Register::RSP | Register::RBP)
                    && !self.spills(at).is_empty() =>
            {
                Definition::Spilled
            }
            Mnemonic::Mov if wide => Definition::Known,
            // Where code has 32-bit addresses: `mov eax, imm32`.
            Mnemonic::Mov if matches!(instruction.op1_kind(), OpKind::Immediate32) => {
                Definition::Known
            }
            Mnemonic::Movq | Mnemonic::Vmovq if wide => Definition::Known,
            Mnemonic::Lea if wide && instruction.is_ip_rel_memory_operand() => Definition::Known,
            Mnemonic::Pop | Mnemonic::Xchg if wide => Definition::Known,
            Mnemonic::Xor if from_memory && is_pointer_guard(instruction) => Definition::Known,
            Mnemonic::Add | Mnemonic::Lea if wide && self.is_table_sum(at) => Definition::TableSum,
            _ if wide && is_cmov(instruction) && from_register => {
                Definition::Either(instruction.op1_register().full_register())
            }
            _ if wide && is_cmov(instruction) && from_memory => Definition::KnownOrKept,
            _ => Definition::Unproven,
        }
    }

    /// The registers that `add D, B` or `lea D, [D + B]` adds up; one of them twice where the
    /// other summand is a stated label of this function (code that cannot be moved).
    fn summands(&self, instruction: &Instruction) -> Option<(Register, Register)> {
        let is_label = |address: u64| {
            let (first, last) = (self.region.first(), self.region.last());
            first.zip(last).is_some_and(|(a, b)| (a.ip()..b.next_ip()).contains(&address))
        };
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        match instruction.mnemonic() {
            Mnemonic::Add if instruction.op1_kind() == OpKind::Register => {
                Some((instruction.op0_register(), instruction.op1_register()))
            }
            Mnemonic::Add if instruction.try_immediate(1).is_ok_and(is_label) => {
                Some((instruction.op0_register(), instruction.op0_register()))
            }
            Mnemonic::Lea if base == Register::None => None,
            Mnemonic::Lea if index == Register::None => {
                is_label(instruction.memory_displacement64()).then_some((base, base))
            }
            Mnemonic::Lea
                if instruction.memory_index_scale() == 1
                    && instruction.memory_displacement64() == 0 =>
            {
                Some((base, index))
            }
            _ => None,
        }
    }

    /// Who has written the frame slot that `load` reads; `None` where that is nobody here (an
    /// argument on the stack), so that the value is the caller's.
    fn spills(&self, load: usize) -> Vec<(usize, Register)> {
        let load = &self.region[load];
        let stores = self.region.iter().enumerate().filter(|(_, store)| {
            store.mnemonic() == Mnemonic::Mov
                && store.op0_kind() == OpKind::Memory
                && store.op1_kind() == OpKind::Register
                && store.memory_base() == load.memory_base()
                && store.memory_index() == load.memory_index()
                && store.memory_displacement64() == load.memory_displacement64()
        });
        stores.map(|(at, store)| (at, store.op1_register().full_register())).collect()
    }

    /// `cdqe` behind `mov eax, dword [A + B]`.
    fn is_unoptimized_load(&self, at: usize) -> bool {
        self.region[at].mnemonic() == Mnemonic::Cdqe
            && at > 0
            && !self.branches.contains_key(&at)
            && is_indexed_dword_load(&self.region[at - 1])
    }

    /// A sum of two registers of which one is `movsxd D, [T + I*4]`, in one straight run
    /// that nothing else enters.
    fn is_table_sum(&mut self, sum: usize) -> bool {
        let Some(pair) = self.summands(&self.region[sum]) else { return false };
        for at in (sum.saturating_sub(PATTERN_INSNS)..sum).rev() {
            let instruction = &self.region[at];
            let enters = self.branches.contains_key(&(at + 1));
            if enters || instruction.flow_control() != FlowControl::Next {
                return false;
            }
            let is_cdqe = instruction.mnemonic() == Mnemonic::Cdqe;
            let into = if is_cdqe { Register::RAX } else { instruction.op0_register() };
            let is_of_pair = into == pair.0 || into == pair.1;
            if is_of_pair && (is_table_load(instruction) || self.is_unoptimized_load(at)) {
                return true;
            }
            let is_lea =
                instruction.mnemonic() == Mnemonic::Lea && instruction.is_ip_rel_memory_operand();
            let clobbers = self.info.info(instruction).used_registers().iter().any(|used| {
                let register = used.register().full_register();
                (register == pair.0 || register == pair.1)
                    && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead)
            });
            if clobbers && !is_lea {
                return false;
            }
        }
        false
    }
}

/// `mov eax, dword [A + B]` or `[B*4 + table]`, of one table and a scaled index, as gcc -O0 writes it.
fn is_indexed_dword_load(instruction: &Instruction) -> bool {
    let frame = |register| matches!(register, Register::RSP | Register::RBP);
    instruction.mnemonic() == Mnemonic::Mov
        && instruction.op0_register() == Register::EAX
        && instruction.op1_kind() == OpKind::Memory
        && instruction.memory_index() != Register::None
        && !frame(instruction.memory_base())
        && !frame(instruction.memory_index())
}

/// `movsxd D, [T + I*4]`, or of a table's one entry, `movsxd D, [rip + table]`.
pub(crate) fn is_table_load(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Movsxd
        && instruction.op1_kind() == OpKind::Memory
        && (instruction.is_ip_rel_memory_operand()
            || (instruction.memory_index() != Register::None
                && instruction.memory_index_scale() == 4))
}

/// glibc's PTR_DEMANGLE: what longjmp goes to was stored as a pointer.
fn is_pointer_guard(instruction: &Instruction) -> bool {
    instruction.memory_segment() == Register::FS && instruction.memory_displacement64() == 0x30
}

fn is_cmov(instruction: &Instruction) -> bool {
    format!("{:?}", instruction.mnemonic()).starts_with("Cmov")
}
