//! The vDSO's `clock_gettime` in the target: the time without a system call.

use std::collections::HashSet;

use flea_process::{Memory, Pid};
use flea_symbols::addr::RemoteAddr;
use iced_x86::{Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, Mnemonic, Register};
use object::{Object as _, ObjectSymbol as _};

const SYMBOL: &str = "__vdso_clock_gettime";

/// Its address, if the target has one that keeps to general registers. Images call it where
/// vector registers still hold arguments, so one that touched them would change what the
/// traced function is called with; the kernel builds its vDSO without them, and this checks
/// that it is so. `None` means: use the system call.
pub(crate) fn clock_gettime(pid: Pid) -> Option<RemoteAddr> {
    let maps = flea_process::maps(pid).ok()?;
    let mapping = maps.iter().find(|m| m.path == "[vdso]")?;
    let memory = Memory::open(flea_process::stand_in(pid)).ok()?;
    let size_bytes = usize::try_from(mapping.size_bytes()).ok()?;
    let image = memory.read_vec(mapping.start, size_bytes).ok()?;
    let file = object::File::parse(&*image).ok()?;
    let symbol = file.dynamic_symbols().find(|s| s.name() == Ok(SYMBOL))?;
    keeps_vector_registers(&image, symbol.address())
        .then(|| mapping.start.offset(symbol.address().cast_signed()))
}

/// No instruction that is reached from `start` touches a vector, mask or x87 register. Calls
/// and jumps are followed; those whose target only shows when they run are not known to be fit.
fn keeps_vector_registers(image: &[u8], start: u64) -> bool {
    let mut info = InstructionInfoFactory::new();
    let mut seen = HashSet::new();
    let mut todo = vec![start];
    while let Some(at) = todo.pop() {
        let code = usize::try_from(at).ok().and_then(|at| image.get(at..));
        let mut decoder = Decoder::with_ip(64, code.unwrap_or_default(), at, DecoderOptions::NONE);
        loop {
            // Behind the end of `image` there is an invalid instruction as well.
            let insn = decoder.decode();
            if insn.is_invalid() {
                return false;
            }
            if !seen.insert(insn.ip()) {
                break;
            }
            let registers = info.info(&insn).used_registers();
            let general = registers.iter().all(|used| {
                let register: Register = used.register();
                !register.is_vector_register() && !register.is_st() && !register.is_k()
            });
            let target = insn.near_branch_target();
            match insn.flow_control() {
                _ if !general => return false,
                FlowControl::Next => {}
                FlowControl::ConditionalBranch => todo.push(target),
                // A system call keeps all of them, and has no target.
                FlowControl::Call if insn.mnemonic() == Mnemonic::Syscall => {}
                FlowControl::Call => todo.push(target),
                FlowControl::UnconditionalBranch => {
                    todo.push(target);
                    break;
                }
                FlowControl::Return | FlowControl::Exception => break,
                _ => return false,
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernels_vdso_is_fit() {
        let pid = std::process::id().cast_signed();
        assert!(clock_gettime(pid).is_some(), "bpf_ktime_get_ns would take the system call");
    }

    #[test]
    fn a_vector_register_is_noticed() {
        assert!(keeps_vector_registers(&[0x48, 0x89, 0xc1, 0xc3], 0));
        assert!(!keeps_vector_registers(&[0x0f, 0x57, 0xc0, 0xc3], 0), "xorps xmm0, xmm0");
    }

    #[test]
    fn calls_are_followed() {
        // call +1; ret; CALLED
        let calling = |called: &[u8]| [&[0xe8, 1, 0, 0, 0, 0xc3], called].concat();
        assert!(keeps_vector_registers(&calling(&[0xc3]), 0));
        assert!(!keeps_vector_registers(&calling(&[0x0f, 0x57, 0xc0, 0xc3]), 0), "xorps");
        assert!(!keeps_vector_registers(&calling(&[]), 0), "behind the end");
        assert!(keeps_vector_registers(&[0x0f, 0x05, 0xeb, 0xfc], 0), "syscall; jmp -4");
        assert!(!keeps_vector_registers(&[0xff, 0xe0], 0), "jmp *rax");
        assert!(!keeps_vector_registers(&[0xff, 0xd0, 0xc3], 0), "call *rax");
    }
}
