//! The proof of a site. Start at [`find`].

use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use object::Object as _;

use crate::addr::Svma;
use crate::function::{Function, FunctionKind};
use crate::module::Module;
use crate::site::{ReferenceKind, Refusal, Site, SiteKind};
use crate::x86_64::door;
use crate::x86_64::nops::{ENDBR64, PATCH_BYTES, is_nop, leading_nops};

/// What would be replaced, before it is known that it may be.
struct Candidate {
    kind: SiteKind,
    len: usize,
    boundaries: Vec<u8>,
    /// Its last instruction, where that is a call.
    call: Option<Svma>,
}

/// Where `function` can be patched, or why not.
pub(crate) fn find(module: &Module<'_>, function: &Function) -> Result<Site, Refusal> {
    let entry = function.address;
    if function.kind == FunctionKind::Ifunc {
        return Err(Refusal::Ifunc { address: entry });
    }
    if function.is_cold_part() {
        return Err(Refusal::ColdPart);
    }
    if module.elf.sections().next().is_none() {
        return Err(Refusal::NoSectionHeaders);
    }
    let not_in_file = Refusal::NotInFile { address: entry };
    let range = module.code_range(entry.0).ok_or_else(|| not_in_file.clone())?;
    let code = module.bytes_of(entry.0..range.end).ok_or(not_in_file)?;
    let skipped = if code.starts_with(&ENDBR64) { ENDBR64.len() } else { 0 };
    let (address, code) = (entry.offset(if skipped > 0 { 4 } else { 0 }), &code[skipped..]);
    at_entry(module, function, address, code)
        .or_else(|refusal| door::find(module, function, address, code).ok_or(refusal))
}

/// The site in the first bytes from `address` on, which are `code`.
fn at_entry(
    module: &Module<'_>,
    function: &Function,
    address: Svma,
    code: &[u8],
) -> Result<Site, Refusal> {
    let candidate = match leading_nops(code) {
        Some((len, boundaries)) => Candidate { kind: SiteKind::Nop5, len, boundaries, call: None },
        None => relocatable_prologue(code, address)?,
    };
    let site = Site {
        kind: candidate.kind,
        function: function.address,
        address,
        door: None,
        original: code[..candidate.len].to_vec(),
        boundaries: candidate.boundaries,
    };
    nothing_leads_into(module, site.address.0 + 1..site.resume().0)?;
    if site.boundaries.len() > 1 {
        own_jumps_are_known(module, function)?;
    }
    no_loop_to_entry(module, function, site.address)?;
    match candidate.call {
        Some(at) => Err(Refusal::CallInPrologue { at, if_pushed: Some(Box::new(site)) }),
        None => Ok(site),
    }
}

/// Takes whole instructions until the patch fits. Behind the function's last instruction,
/// padding is taken.
fn relocatable_prologue(code: &[u8], address: Svma) -> Result<Candidate, Refusal> {
    let mut decoder = Decoder::with_ip(64, code, address.0, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut boundaries = Vec::new();
    let mut len = 0;
    let mut ended = false;
    let mut call = None;
    while len < PATCH_BYTES {
        let at = Svma(decoder.ip());
        if !decoder.can_decode() {
            return Err(Refusal::TooShort { len_bytes: len, next: at });
        }
        decoder.decode_out(&mut instruction);
        if ended {
            if !is_nop(&instruction) && instruction.mnemonic() != Mnemonic::Int3 {
                return Err(Refusal::TooShort { len_bytes: len, next: at });
            }
        } else {
            if let Some(at) = call {
                // The call returns to an instruction that is replaced, too.
                return Err(Refusal::CallInPrologue { at, if_pushed: None });
            }
            may_move(&instruction, at)?;
            if matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall) {
                call = Some(at);
            }
            boundaries.push(u8::try_from(len).unwrap_or(u8::MAX));
            ended = matches!(
                instruction.flow_control(),
                FlowControl::Return
                    | FlowControl::UnconditionalBranch
                    | FlowControl::IndirectBranch
            );
        }
        len += instruction.len();
    }
    Ok(Candidate { kind: SiteKind::Relocated, len, boundaries, call })
}

/// Whether `instruction` does the same elsewhere, and no thread can be *in* it.
fn may_move(instruction: &Instruction, at: Svma) -> Result<(), Refusal> {
    let name = || format!("{:?}", instruction.mnemonic()).to_lowercase();
    if instruction.is_invalid() {
        return Err(Refusal::Undecodable { at });
    }
    match instruction.mnemonic() {
        Mnemonic::Syscall | Mnemonic::Sysenter | Mnemonic::Int => {
            return Err(Refusal::SystemCall { at });
        }
        Mnemonic::Int3
        | Mnemonic::Int1
        | Mnemonic::Hlt
        | Mnemonic::Ud0
        | Mnemonic::Ud1
        | Mnemonic::Ud2 => return Err(Refusal::Trap { at, instruction: name() }),
        _ => {}
    }
    match instruction.flow_control() {
        FlowControl::Next | FlowControl::Return | FlowControl::ConditionalBranch => {}
        FlowControl::UnconditionalBranch
        | FlowControl::IndirectBranch
        | FlowControl::Call
        | FlowControl::IndirectCall
            if !is_far(instruction) => {}
        _ => return Err(Refusal::NotRelocatable { at, instruction: name() }),
    }
    let far_return = matches!(instruction.code(), Code::Retfq | Code::Retfd | Code::Retfw)
        || matches!(instruction.mnemonic(), Mnemonic::Iretq | Mnemonic::Iretd | Mnemonic::Iret);
    // 32-bit RIP-relative addresses cannot be re-encoded.
    if far_return || instruction.memory_base() == iced_x86::Register::EIP {
        return Err(Refusal::NotRelocatable { at, instruction: name() });
    }
    Ok(())
}

fn is_far(instruction: &Instruction) -> bool {
    instruction.is_jmp_far()
        || instruction.is_jmp_far_indirect()
        || instruction.is_call_far()
        || instruction.is_call_far_indirect()
}

pub(super) fn nothing_leads_into(module: &Module<'_>, bytes: Range<u64>) -> Result<(), Refusal> {
    let inside = module.sweep().references(bytes.start, bytes.end);
    match inside.first() {
        None => Ok(()),
        Some(reference) => Err(Refusal::EnteredInside {
            target: Svma(reference.target),
            from: Svma(reference.from),
            kind: reference.kind,
        }),
    }
}

/// The stretches of code that belong to `function`: its own, its unwind entry's, and those
/// of its cold parts.
fn own_ranges(module: &Module<'_>, function: &Function) -> Vec<(u64, u64)> {
    let start = function.address.0;
    let mut end = function.end().0.max(start + 1);
    if let Some(fde) = module.unwind().entry_at(start).filter(|fde| fde.start == start) {
        end = end.max(fde.end);
    }
    let mut ranges = vec![(start, end)];
    for name in std::iter::once(&function.name).chain(&function.aliases) {
        if let Some(part) = module.cold_part_of(name) {
            ranges.push((part.address.0, part.end().0));
        }
    }
    ranges
}

pub(super) fn own_jumps_are_known(module: &Module<'_>, function: &Function) -> Result<(), Refusal> {
    let sweep = module.sweep();
    for (start, end) in own_ranges(module, function) {
        if let Some(at) = sweep.undecodable(start, end) {
            return Err(Refusal::Undecodable { at: Svma(at) });
        }
        if let Some(at) = sweep.unproven_jump(start, end) {
            return Err(Refusal::UnprovenJump { at: Svma(at) });
        }
    }
    Ok(())
}

/// A branch of the function to its own start is a loop (or a tail call to itself, which looks
/// the same). Every round would count as a call, and an exit program's image would take a
/// new frame for each: a long loop would overflow the target's stack.
pub(super) fn no_loop_to_entry(
    module: &Module<'_>,
    function: &Function,
    behind_endbr: Svma,
) -> Result<(), Refusal> {
    let to_entry = module.sweep().references(function.address.0, behind_endbr.0 + 1);
    let own = own_ranges(module, function);
    let looping = to_entry.iter().find(|reference| {
        matches!(reference.kind, ReferenceKind::Branch | ReferenceKind::JumpTable)
            && own.iter().any(|(start, end)| (*start..*end).contains(&reference.from))
    });
    match looping {
        Some(reference) => Err(Refusal::LoopsToEntry { from: Svma(reference.from) }),
        None => Ok(()),
    }
}
