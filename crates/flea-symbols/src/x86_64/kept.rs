//! Callers that rely on more than the ABI promises. gcc's -fipa-ra (part of -O2) knows which
//! registers a function of the same file leaves alone, and keeps values in them across its
//! calls. A replacement that follows the ABI would destroy those. LLVM does no such thing.
//!
//! Behind each direct call from the same file (any, where no debug information tells files
//! apart) the code is followed until every such register was written: one
//! that is read before has a value from before the call. Behind a `ret` the caller's callers
//! are followed in the same way. Not seen: what link-time optimisation knows across files.

use std::collections::HashMap;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register,
};

use crate::addr::Svma;
use crate::dwarf::signature::is_compiled_by_llvm;
use crate::function::Function;
use crate::module::Module;
use crate::signature::{RetWord, Signature};
use crate::site::ReferenceKind;
use crate::x86_64::returns::never_returns;
use crate::x86_64::sweep::is_near_branch;

/// Registers that a function may change: bit n is general register n, bit 16 + n is xmm n.
type Set = u32;

/// rax, rcx, rdx, rsi, rdi, r8 to r11 and all vector registers.
const CHANGED_BY_CALLS: Set = 0xffff_0fc7;
/// Where results of unknown calls are: rax, rdx, xmm0, xmm1.
const RESULTS: Set = 0x0003_0005;
/// `call rel32`
const CALL: u8 = 0xe8;
const CALL_BYTES: usize = 5;
/// What is followed at most. Whoever keeps a value in a register reads it soon.
const MAX_INSTRUCTIONS: usize = 20_000;

/// These write the low part of a vector register, and what remains of the rest is nobody's.
const MERGES: [Mnemonic; 16] = [
    Mnemonic::Cvtsi2sd,
    Mnemonic::Cvtsi2ss,
    Mnemonic::Cvtsd2ss,
    Mnemonic::Cvtss2sd,
    Mnemonic::Movhpd,
    Mnemonic::Movhps,
    Mnemonic::Movlpd,
    Mnemonic::Movlps,
    Mnemonic::Movsd,
    Mnemonic::Movss,
    Mnemonic::Pinsrd,
    Mnemonic::Pinsrq,
    Mnemonic::Roundsd,
    Mnemonic::Roundss,
    Mnemonic::Sqrtsd,
    Mnemonic::Sqrtss,
];

impl Module<'_> {
    /// A direct call of `function`, with `signature`, whose caller reads a register afterwards
    /// that the ABI lets the function change and that this one does not.
    #[must_use]
    pub fn caller_relying_on_registers(
        &self,
        function: &Function,
        signature: &Signature,
    ) -> Option<Svma> {
        let info = self.debug_info();
        let subprogram = info.subprogram_at(function.address);
        if subprogram.is_some_and(|subprogram| is_compiled_by_llvm(&info.dwarf(), &subprogram)) {
            return None;
        }
        let results = signature.ret.words.iter().fold(0, |set, word| match word {
            RetWord::Rax => set | 1,
            RetWord::Rdx => set | 1 << 2,
            word => set | vector_result(*word),
        });
        let mut walk = Walk {
            module: self,
            unit: subprogram.map(|subprogram| subprogram.unit),
            calls: direct_calls(self),
            returns: HashMap::new(),
            seen: HashMap::new(),
            left: MAX_INSTRUCTIONS,
            info: InstructionInfoFactory::new(),
        };
        walk.callers(function.address.0, CHANGED_BY_CALLS & !results)
    }
}

/// The vector registers among results. (What is not one of those that are told apart is x87.)
fn vector_result(word: RetWord) -> Set {
    match word {
        RetWord::Xmm0 => 1 << 16,
        RetWord::Xmm1 => 1 << 17,
        _ => 0,
    }
}

struct Walk<'m, 'data> {
    module: &'m Module<'data>,
    /// The source file of the function. Nobody outside knows what it changes.
    unit: Option<usize>,
    /// (target, place), sorted.
    calls: Vec<(u64, u64)>,
    /// Of functions that are called: whether they ever return.
    returns: HashMap<u64, bool>,
    /// What was followed from an address on already.
    seen: HashMap<u64, Set>,
    left: usize,
    info: InstructionInfoFactory,
}

impl Walk<'_, '_> {
    /// The first direct call of the function at `entry` behind which a register of `kept` is
    /// read.
    fn callers(&mut self, entry: u64, kept: Set) -> Option<Svma> {
        let jumps = self.module.sweep().references(entry, entry + 1).iter();
        let jumps = jumps.filter(|jump| jump.kind == ReferenceKind::Branch).map(|jump| jump.from);
        let first = self.calls.partition_point(|(target, _)| *target < entry);
        let calls = self.calls[first..].iter().take_while(|(target, _)| *target == entry);
        let places = jumps.chain(calls.map(|(_, at)| *at));
        let places: Vec<u64> = places.filter(|at| self.is_insider(*at)).collect();
        places.into_iter().find_map(|at| {
            let call = self.decode(at)?;
            let is_call = call.flow_control() == FlowControl::Call;
            let relies = if is_call {
                self.follow(call.next_ip(), kept)
            } else {
                // A tail call: it returns to the callers of who makes it.
                self.behind_return(at, kept)
            };
            relies.then_some(Svma(at))
        })
    }

    /// Whether code from `at` on reads a register of `kept` that it has not written.
    fn follow(&mut self, at: u64, kept: Set) -> bool {
        let mut todo = vec![(at, kept)];
        while let Some((mut at, mut kept)) = todo.pop() {
            loop {
                let seen = self.seen.entry(at).or_default();
                if kept & !*seen == 0 || self.left == 0 {
                    break;
                }
                *seen |= kept;
                self.left -= 1;
                let Some(insn) = self.decode(at) else { break };
                let (read, written) = self.accesses(&insn);
                if read & kept != 0 {
                    return true;
                }
                kept &= !written;
                match insn.flow_control() {
                    FlowControl::Next => {}
                    FlowControl::Call if self.may_keep(&insn) => kept &= !RESULTS,
                    FlowControl::ConditionalBranch if is_near_branch(&insn) => {
                        todo.push((insn.near_branch_target(), kept));
                    }
                    FlowControl::UnconditionalBranch if is_near_branch(&insn) => {
                        at = insn.near_branch_target();
                        continue;
                    }
                    FlowControl::Return if self.behind_return(at, kept) => return true,
                    _ => break,
                }
                at = insn.next_ip();
            }
        }
        false
    }

    /// Whether the code at `at` was compiled together with the function, as far as is known.
    fn is_insider(&self, at: u64) -> bool {
        let Some(unit) = self.unit else { return true };
        let function = self.module.function_at(Svma(at));
        let info = self.module.debug_info();
        function.and_then(|f| info.subprogram_at(f.address)).is_some_and(|s| s.unit == unit)
    }

    /// Whether what is behind a call may rely on registers from before it: not where the
    /// compiler cannot have known what is called, and not where nothing comes back from it.
    fn may_keep(&mut self, call: &Instruction) -> bool {
        let target = call.near_branch_target();
        if !is_near_branch(call) || self.unit.is_none() || !self.is_insider(target) {
            return false;
        }
        let module = self.module;
        *self.returns.entry(target).or_insert_with(|| {
            let function = module.function_at(Svma(target));
            function.is_some_and(|function| !never_returns(module, function))
        })
    }

    /// Whether callers of the function that has the instruction at `at` read one of `kept`.
    fn behind_return(&mut self, at: u64, kept: Set) -> bool {
        let entry = self.module.function_at(Svma(at)).map(|f| f.address.0);
        // Each function's callers are followed once for each register.
        let Some(entry) = entry.filter(|_| self.left > 0 && self.unit.is_some()) else {
            return false;
        };
        let seen = self.seen.entry(!entry).or_default();
        let new = kept & !*seen;
        *seen |= kept;
        new != 0 && self.callers(entry, new).is_some()
    }

    fn decode(&self, at: u64) -> Option<Instruction> {
        let range = self.module.code_range(at).filter(|range| !range.is_plt)?;
        let bytes = self.module.bytes_of(at..range.end)?;
        let mut decoder = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE);
        Some(decoder.decode()).filter(|insn| !insn.is_invalid())
    }

    /// What an instruction reads and writes. A part that is written counts for the whole.
    fn accesses(&mut self, insn: &Instruction) -> (Set, Set) {
        let (mut read, mut written) = (0, 0);
        for used in self.info.info(insn).used_registers() {
            let bit = bit(used.register());
            match used.access() {
                OpAccess::Read | OpAccess::CondRead => read |= bit,
                OpAccess::Write => written |= bit,
                OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
                    let merges = bit > 0xffff && MERGES.contains(&insn.mnemonic());
                    read |= if merges { 0 } else { bit };
                    written |= bit;
                }
                _ => {}
            }
        }
        // Pushed for the room that it takes, as a rule.
        let no_value = [Mnemonic::Push, Mnemonic::Vzeroupper, Mnemonic::Vzeroall];
        (if no_value.contains(&insn.mnemonic()) { 0 } else { read }, written)
    }
}

/// Everything that looks like `call rel32` to a place in the module's code. One that is no
/// instruction (four bytes of something else that happen to fit) does no harm.
fn direct_calls(module: &Module<'_>) -> Vec<(u64, u64)> {
    let mut calls = Vec::new();
    for range in module.code.iter().filter(|range| !range.is_plt) {
        let bytes = module.bytes_of(range.start..range.end).unwrap_or_default();
        for (at, window) in (range.start..).zip(bytes.windows(CALL_BYTES)) {
            let &[CALL, a, b, c, d] = window else { continue };
            let distance = i64::from(i32::from_le_bytes([a, b, c, d]));
            let target = at.wrapping_add(CALL_BYTES as u64).wrapping_add_signed(distance);
            if module.code_range(target).is_some() {
                calls.push((target, at));
            }
        }
    }
    calls.sort_unstable();
    calls
}

fn bit(register: Register) -> Set {
    let number = register.number();
    if register.is_gpr() {
        1 << number
    } else if register.is_vector_register() && number < 16 {
        1 << (16 + number)
    } else {
        0
    }
}
