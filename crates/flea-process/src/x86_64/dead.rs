//! Whether the code behind a system call still reads an argument's register.
//!
//! The kernel keeps those registers, and a compiler that inlines the instruction knows it: a loop
//! may set its timeout once. So a changed argument must not be seen by anybody. Wrappers in
//! libraries return right behind the call, and no caller expects anything of these registers.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register,
};

use flea_symbols::addr::RemoteAddr;

use super::Argument;
use crate::memory::Memory;

/// Behind a wrapper's call there are a comparison, errno, and the end of cancellation.
const MOST_INSTRUCTIONS: usize = 64;
const LONGEST_INSTRUCTION_BYTES: usize = 15;
const CHUNK_BYTES: usize = 64;

/// What an instruction means for the register.
enum Fate {
    Read,
    Gone,
    Kept,
}

/// Whether no path from `pc` reads the register of `argument` before it is written. A function's
/// return and a call end a path: both may leave anything in an argument's register.
pub(crate) fn is_dead_behind(memory: &Memory, pc: RemoteAddr, argument: Argument) -> bool {
    let read = |at: u64| {
        let mut bytes = vec![0; CHUNK_BYTES];
        let n = memory.read_prefix(RemoteAddr(at), &mut bytes);
        bytes.truncate(n);
        bytes
    };
    is_dead(read, pc.0, register_of(argument))
}

fn register_of(argument: Argument) -> Register {
    match argument {
        Argument::Third => Register::RDX,
        Argument::Fourth => Register::R10,
        Argument::Fifth => Register::R8,
        Argument::Sixth => Register::R9,
    }
}

fn is_dead(read: impl Fn(u64) -> Vec<u8>, pc: u64, register: Register) -> bool {
    let mut to_do = vec![pc];
    let mut seen = Vec::new();
    let mut info = InstructionInfoFactory::new();
    while let Some(start) = to_do.pop() {
        let mut at = start;
        let mut bytes = read(at);
        let mut offset = 0;
        while !seen.contains(&at) {
            if seen.len() == MOST_INSTRUCTIONS {
                return false;
            }
            seen.push(at);
            if bytes.len() - offset < LONGEST_INSTRUCTION_BYTES {
                bytes = read(at);
                offset = 0;
            }
            let mut decoder = Decoder::with_ip(64, &bytes[offset..], at, DecoderOptions::NONE);
            let instruction = decoder.decode();
            match fate(&instruction, &mut info, register) {
                Fate::Read => return false,
                Fate::Gone => break,
                Fate::Kept => {}
            }
            match instruction.flow_control() {
                FlowControl::Next => {}
                FlowControl::ConditionalBranch => to_do.push(instruction.near_branch_target()),
                FlowControl::UnconditionalBranch => {
                    to_do.push(instruction.near_branch_target());
                    break;
                }
                _ => return false,
            }
            at = instruction.next_ip();
            offset += instruction.len();
        }
    }
    true
}

fn fate(instruction: &Instruction, info: &mut InstructionInfoFactory, register: Register) -> Fate {
    let leaves = matches!(
        instruction.flow_control(),
        FlowControl::Return | FlowControl::Call | FlowControl::IndirectCall
    );
    if instruction.is_invalid() || instruction.mnemonic() == Mnemonic::Syscall {
        return Fate::Read;
    }
    let mut is_written = false;
    for used in info.info(instruction).used_registers() {
        if used.register().full_register() != register {
            continue;
        }
        match used.access() {
            // A write to the lower half clears the upper one; to less, it keeps the rest.
            OpAccess::Write if used.register().size() >= 4 => is_written = true,
            OpAccess::NoMemAccess | OpAccess::None => {}
            _ => return Fate::Read,
        }
    }
    if is_written || leaves { Fate::Gone } else { Fate::Kept }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r10_is_dead(code: &[u8]) -> bool {
        let read =
            |at: u64| code.get(usize::try_from(at).expect("small")..).unwrap_or(&[]).to_vec();
        is_dead(read, 0, Register::R10)
    }

    #[test]
    fn a_wrapper_is_done_with_its_arguments() {
        // cmp rax, -4096; ja +1; ret; neg eax; call; ret
        let wrapper =
            [0x48, 0x3d, 0, 0xf0, 0xff, 0xff, 0x77, 1, 0xc3, 0xf7, 0xd8, 0xe8, 0, 0, 0, 0, 0xc3];
        assert!(r10_is_dead(&wrapper));
        // mov r10d, 1; mov rax, r10; ret
        assert!(r10_is_dead(&[0x41, 0xba, 1, 0, 0, 0, 0x4c, 0x89, 0xd0, 0xc3]));
    }

    #[test]
    fn a_loop_is_not() {
        // test eax, eax; js -6 (to a syscall before it that is not shown: to itself); ret
        assert!(r10_is_dead(&[0x85, 0xc0, 0x78, 0xfc, 0xc3]));
        // mov eax, 232; syscall
        assert!(!r10_is_dead(&[0xb8, 0xe8, 0, 0, 0, 0x0f, 0x05, 0xc3]));
        // mov rax, r10
        assert!(!r10_is_dead(&[0x4c, 0x89, 0xd0, 0xc3]));
        // jmp rax; nothing; mov r10b, 1 and then its use
        assert!(!r10_is_dead(&[0xff, 0xe0]));
        assert!(!r10_is_dead(&[]));
        assert!(!r10_is_dead(&[0x41, 0xb2, 1, 0x4c, 0x89, 0xd0, 0xc3]));
    }
}
