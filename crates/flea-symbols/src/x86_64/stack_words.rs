//! How many words of stack arguments a function can reach, read from its code. Start at
//! [`prove`].
//!
//! ```text
//!     CFA + 8*i    argument word i        what is sought: accesses here
//!     CFA - 8      return address
//!     CFA - ...    the function's own frame
//! ```
//!
//! `.eh_frame` says at each instruction where the CFA is, relative to rsp or rbp. An address
//! of something *in* the frame may be taken: code stays within the object it points to. An
//! address at or above the CFA may not: it could reach any argument. Whatever is not
//! understood makes the answer [`StackWords::Unknown`].

use std::collections::BTreeMap;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};

use crate::function::{Function, FunctionKind};
use crate::module::Module;
use crate::signature::StackWords;
use crate::unwind::{CfaRegister, CfaRow, cfa_rows};
use crate::x86_64::{jumps, sweep::is_near_branch};

/// A function that jumps to more others than this is not followed.
pub(super) const MAX_RANGES: usize = 32;
/// What Linux and Flea bound arguments to anyway; a larger result is a misreading.
const MAX_WORDS: i64 = 4096;

/// The stack argument words that `function`'s code can reach, at most.
pub(crate) fn prove(module: &Module<'_>, function: &Function) -> StackWords {
    if function.kind == FunctionKind::Ifunc || function.is_cold_part() {
        return StackWords::Unknown;
    }
    let mut todo = vec![function.address.0];
    let mut seen = Vec::new();
    let mut words = 0;
    // Parts of the function and functions it jumps to: all run with the same CFA.
    while let Some(address) = todo.pop() {
        let Some(entry) = module.unwind().entry_at(address) else { return StackWords::Unknown };
        let (start, end) = (entry.start, entry.end);
        if seen.contains(&start) {
            continue;
        }
        seen.push(start);
        if seen.len() > MAX_RANGES || (seen.len() == 1 && start != function.address.0) {
            return StackWords::Unknown;
        }
        let Some(rows) = cfa_rows(module, start) else { return StackWords::Unknown };
        let Some(region) = decode(module, start, end) else { return StackWords::Unknown };
        let mut reader = Reader::new(&rows);
        match reader.read(&region) {
            Some(found) => words = words.max(found),
            None => return StackWords::Unknown,
        }
        todo.extend(reader.leaves_to.iter().filter(|target| !(start..end).contains(target)));
    }
    StackWords::Proved(words)
}

/// Whether `function`, or what it jumps to, reads, takes or changes its own return address, as
/// `vfork`, `setjmp` and `dlsym` do: an exit program's image returns to its caller by another
/// way, and the frame between them would be found out. Only what unwind rows tell exactly is
/// seen: where there are none, nobody has claimed to know the stack words either.
pub(crate) fn uses_return_address(module: &Module<'_>, function: &Function) -> bool {
    let mut todo = vec![function.address.0];
    let mut seen = Vec::new();
    while let Some(address) = todo.pop() {
        let Some(entry) = module.unwind().entry_at(address) else { continue };
        let (start, end) = (entry.start, entry.end);
        if seen.contains(&start) || seen.len() >= MAX_RANGES {
            continue;
        }
        seen.push(start);
        let Some(rows) = cfa_rows(module, start) else { continue };
        let Some(region) = decode(module, start, end) else { continue };
        for instruction in &region {
            let row = rows.iter().find(|row| (row.start..row.end).contains(&instruction.ip()));
            if let Some((register, offset)) = row.and_then(|row| row.cfa)
                && touches_return_address(instruction, register, offset)
            {
                return true;
            }
            if is_near_branch(instruction)
                && !instruction.is_call_near()
                && !(start..end).contains(&instruction.near_branch_target())
            {
                todo.push(instruction.near_branch_target());
            }
        }
    }
    false
}

/// Whether `instruction`, which runs with the CFA at `register + offset`, has the word below
/// the CFA as an operand.
fn touches_return_address(instruction: &Instruction, register: CfaRegister, offset: i64) -> bool {
    if instruction.mnemonic() == Mnemonic::Pop {
        return (register, offset) == (CfaRegister::Rsp, 8);
    }
    let has_memory =
        (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    let base = match register {
        CfaRegister::Rsp => Register::RSP,
        CfaRegister::Rbp => Register::RBP,
        CfaRegister::Other => return false,
    };
    if !has_memory
        || instruction.memory_base() != base
        || instruction.memory_index() != Register::None
        || matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Lea)
    {
        return false;
    }
    let Ok(size) = i64::try_from(instruction.memory_size().size()) else { return false };
    let at = instruction.memory_displacement64().cast_signed().wrapping_sub(offset);
    at < 0 && at.wrapping_add(size) > -8
}

pub(super) fn decode(module: &Module<'_>, start: u64, end: u64) -> Option<Vec<Instruction>> {
    let code = module.bytes_of(start..end)?;
    let mut decoder = Decoder::with_ip(64, code, start, DecoderOptions::NONE);
    let region: Vec<Instruction> = decoder.iter().collect();
    let whole = !region.iter().any(Instruction::is_invalid)
        && region.last().is_some_and(|last| last.next_ip() == end);
    whole.then_some(region)
}

/// Reads the instructions of one unwind entry.
struct Reader<'a> {
    rows: &'a [CfaRow],
    /// Distance from rsp up to the CFA, at least, while the CFA is rbp's.
    depth: i64,
    /// The prologue is over: pushes are no longer counted.
    depth_is_final: bool,
    /// Registers that were given rsp or rbp as they are, with the highest such address
    /// (relative to the CFA).
    copies: BTreeMap<Register, i64>,
    /// Jump targets, in and out of the function.
    leaves_to: Vec<u64>,
    max_words: u32,
    info: InstructionInfoFactory,
}

impl<'a> Reader<'a> {
    fn new(rows: &'a [CfaRow]) -> Self {
        Self {
            rows,
            depth: 0,
            depth_is_final: false,
            copies: BTreeMap::new(),
            leaves_to: Vec::new(),
            max_words: 0,
            info: InstructionInfoFactory::new(),
        }
    }

    /// The highest argument word that is reached; `None` if that cannot be told.
    fn read(&mut self, region: &[Instruction]) -> Option<u32> {
        let mut row_at = 0;
        let mut previous: Option<&Instruction> = None;
        let mut frames = Vec::with_capacity(region.len());
        for instruction in region {
            while self.rows.get(row_at)?.end <= instruction.ip() {
                row_at += 1;
            }
            let row = self.rows[row_at];
            let (register, offset) = row.cfa.filter(|_| row.start <= instruction.ip())?;
            self.track_depth(register, offset, instruction, previous);
            frames.push((register, offset, self.depth));
            previous = Some(instruction);
        }
        for (i, instruction) in region.iter().enumerate() {
            let (register, offset, depth) = frames[i];
            if register == CfaRegister::Other {
                return None;
            }
            let next_is_rbp = frames.get(i + 1).is_some_and(|next| next.0 == CfaRegister::Rbp);
            self.flow(region, i)?;
            self.stack_pointer(instruction, register)?;
            self.copy(instruction, register, offset, depth, next_is_rbp)?;
            self.memory(instruction, register, offset, depth)?;
        }
        self.through_copies(region)?;
        Some(self.max_words)
    }

    /// While the CFA is counted from rsp, the row says how deep the frame is. Once it is
    /// counted from rbp, only the prologue's own pushes and subtractions are: the body never
    /// runs with less.
    fn track_depth(
        &mut self,
        register: CfaRegister,
        offset: i64,
        instruction: &Instruction,
        previous: Option<&Instruction>,
    ) {
        if register == CfaRegister::Rsp {
            if !self.depth_is_final || self.depth == 0 {
                self.depth = offset;
            }
            return;
        }
        let enters_frame = previous.is_some_and(|previous| {
            previous.mnemonic() == Mnemonic::Mov
                && previous.op0_register() == Register::RBP
                && previous.op1_register() == Register::RSP
        });
        if enters_frame {
            self.depth = offset;
            self.depth_is_final = false;
        } else if let Some(previous) = previous.filter(|_| !self.depth_is_final) {
            let by = previous.stack_pointer_increment();
            let is_sub =
                previous.mnemonic() == Mnemonic::Sub && previous.op0_register() == Register::RSP;
            if is_sub {
                let by = previous.try_immediate(1).map_or(0, u64::cast_signed);
                self.depth += by.max(0);
            } else if previous.mnemonic() == Mnemonic::Push {
                self.depth += i64::from(-by).max(0);
            }
            self.depth_is_final = by > 0 || previous.flow_control() != FlowControl::Next;
        }
        // The last row of the prologue may already be the body's: nothing else to learn here.
        self.depth_is_final |= instruction.flow_control() != FlowControl::Next;
    }

    fn flow(&mut self, region: &[Instruction], at: usize) -> Option<()> {
        let instruction = &region[at];
        match instruction.flow_control() {
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                is_near_branch(instruction).then_some(())?;
                self.leaves_to.push(instruction.near_branch_target());
                Some(())
            }
            FlowControl::IndirectBranch => jumps::is_table_jump(region, at).then_some(()),
            FlowControl::Return => (instruction.op_count() == 0).then_some(()),
            FlowControl::XbeginXabortXend | FlowControl::Interrupt => None,
            _ => Some(()),
        }
    }

    /// rsp may be moved in the ways that unwind rows account for, and no other.
    fn stack_pointer(&mut self, instruction: &Instruction, register: CfaRegister) -> Option<()> {
        let writes = instruction.op_count() > 0
            && instruction.op0_kind() == OpKind::Register
            && instruction.op0_register().full_register() == Register::RSP;
        if !writes || instruction.mnemonic() == Mnemonic::Push {
            return Some(());
        }
        let framed = register == CfaRegister::Rbp;
        let constant = !matches!(instruction.op1_kind(), OpKind::Register | OpKind::Memory);
        match instruction.mnemonic() {
            Mnemonic::Add | Mnemonic::Sub if constant => Some(()),
            Mnemonic::Cmp | Mnemonic::Test => Some(()),
            // Only downwards, or back up to what the function had.
            Mnemonic::Sub | Mnemonic::And if framed => Some(()),
            Mnemonic::Mov | Mnemonic::Lea if framed => Some(()),
            Mnemonic::Lea if instruction.memory_base() == Register::RSP => Some(()),
            _ => None,
        }
    }

    /// Notes registers that get a copy of rsp or rbp.
    fn copy(
        &mut self,
        instruction: &Instruction,
        register: CfaRegister,
        offset: i64,
        depth: i64,
        next_is_rbp: bool,
    ) -> Option<()> {
        let reads_rsp = self.info.info(instruction).used_registers().iter().any(|used| {
            used.register().full_register() == Register::RSP
                && !matches!(used.access(), OpAccess::Write | OpAccess::CondWrite)
        });
        let explicit = (1..instruction.op_count()).any(|operand| {
            instruction.op_kind(operand) == OpKind::Register
                && instruction.op_register(operand).full_register() == Register::RSP
        });
        let below = if register == CfaRegister::Rsp { -offset } else { -depth };
        if reads_rsp && explicit {
            let into = instruction.op0_register();
            if instruction.mnemonic() == Mnemonic::Mov && instruction.op0_kind() == OpKind::Register
            {
                if into == Register::RBP && next_is_rbp {
                    return Some(());
                }
                self.note_copy(into, below);
            } else if !matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Mov) {
                return None;
            }
        }
        let copies_rbp = register == CfaRegister::Rbp
            && instruction.mnemonic() == Mnemonic::Mov
            && instruction.op0_kind() == OpKind::Register
            && instruction.op1_kind() == OpKind::Register
            && instruction.op1_register() == Register::RBP;
        if copies_rbp && instruction.op0_register() != Register::RSP {
            self.note_copy(instruction.op0_register(), -offset);
        }
        Some(())
    }

    fn note_copy(&mut self, register: Register, address: i64) {
        let highest = self.copies.entry(register).or_insert(address);
        *highest = (*highest).max(address);
    }

    /// An operand relative to rsp or the frame's rbp.
    fn memory(
        &mut self,
        instruction: &Instruction,
        register: CfaRegister,
        offset: i64,
        depth: i64,
    ) -> Option<()> {
        let has_memory = (0..instruction.op_count())
            .any(|operand| instruction.op_kind(operand) == OpKind::Memory);
        if !has_memory || instruction.mnemonic() == Mnemonic::Nop {
            return Some(());
        }
        let distance = match (instruction.memory_base(), register) {
            (Register::RSP, CfaRegister::Rsp) => offset,
            (Register::RSP, _) => depth,
            (Register::RBP, CfaRegister::Rbp) => offset,
            _ => {
                let frame_index = matches!(
                    (instruction.memory_index(), register),
                    (Register::RBP, CfaRegister::Rbp)
                );
                return (!frame_index).then_some(());
            }
        };
        let at = instruction.memory_displacement64().cast_signed().checked_sub(distance)?;
        if instruction.memory_index() != Register::None {
            return None; // the index may be anything
        }
        if instruction.mnemonic() == Mnemonic::Lea {
            if at >= 0 && instruction.op0_register() != Register::RSP {
                return None;
            }
            return Some(()); // of an object in the frame
        }
        let size = i64::try_from(instruction.memory_size().size()).ok()?;
        if size == 0 && at >= -8 {
            return None; // a save area of unknown size
        }
        self.reach(at + size)
    }

    /// Notes an access that ends at `end`, relative to the CFA.
    fn reach(&mut self, end: i64) -> Option<()> {
        if end > MAX_WORDS * 8 {
            return None;
        }
        let words = u32::try_from(end.max(0).unsigned_abs().div_ceil(8)).ok()?;
        self.max_words = self.max_words.max(words);
        Some(())
    }

    /// No register that ever holds a copy of rsp or rbp may be used to reach above it.
    fn through_copies(&mut self, region: &[Instruction]) -> Option<()> {
        for instruction in region {
            let Some(address) = self.copies.get(&instruction.memory_base()) else { continue };
            let displacement = instruction.memory_displacement64().cast_signed();
            let size = i64::try_from(instruction.memory_size().size()).ok()?;
            let is_lea = instruction.mnemonic() == Mnemonic::Lea;
            let end =
                address.checked_add(displacement)?.checked_add(if is_lea { 1 } else { size })?;
            if end > 0 {
                return None;
            }
        }
        Some(())
    }
}
