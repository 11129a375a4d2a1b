//! The vDSO's `clock_gettime` in the target: the time without a system call.

use std::collections::HashSet;

use flea_process::{Memory, Pid};
use flea_symbols::addr::RemoteAddr;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, Register};
use object::{Object as _, ObjectSymbol as _};

const SYMBOL: &str = "__vdso_clock_gettime";

/// Its address, if the target has one that keeps to general registers. Images call it where
/// vector registers still hold arguments, so one that touched them would change what the
/// traced function is called with; the kernel builds its vDSO without them, and this checks
/// that it is so. `None` means: use the system call.
pub(crate) fn clock_gettime(pid: Pid) -> Option<RemoteAddr> {
    let maps = flea_process::maps(pid).ok()?;
    let mapping = maps.iter().find(|m| m.path == "[vdso]")?;
    let memory = Memory::open(pid).ok()?;
    let size_bytes = usize::try_from(mapping.size_bytes()).ok()?;
    let image = memory.read_vec(mapping.start, size_bytes).ok()?;
    let file = object::File::parse(&*image).ok()?;
    let symbol = file.dynamic_symbols().find(|s| s.name() == Ok(SYMBOL))?;
    keeps_vector_registers(&image, symbol.address())
        .then(|| mapping.start.offset(symbol.address().cast_signed()))
}

/// No instruction that can be reached from `entry` touches a vector, mask or x87 register, and
/// none leads out of `image` or to where cannot be told.
fn keeps_vector_registers(image: &[u8], entry: u64) -> bool {
    let mut info = InstructionInfoFactory::new();
    let mut seen = HashSet::new();
    let mut open = vec![entry];
    while let Some(start) = open.pop() {
        let Some(code) = usize::try_from(start).ok().and_then(|at| image.get(at..)) else {
            return false;
        };
        let mut decoder = Decoder::with_ip(64, code, start, DecoderOptions::NONE);
        while decoder.can_decode() {
            let insn = decoder.decode();
            if !seen.insert(insn.ip()) {
                break;
            }
            let general = info.info(&insn).used_registers().iter().all(|used| {
                let register: Register = used.register();
                !register.is_vector_register() && !register.is_st() && !register.is_k()
            });
            if insn.is_invalid() || !general {
                return false;
            }
            match insn.flow_control() {
                FlowControl::Next => {}
                FlowControl::ConditionalBranch | FlowControl::Call => {
                    // A system call counts as a call, and leads nowhere.
                    if insn.code() != Code::Syscall {
                        open.push(insn.near_branch_target());
                    }
                }
                FlowControl::UnconditionalBranch => {
                    open.push(insn.near_branch_target());
                    break;
                }
                FlowControl::Return => break,
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
    fn calls_are_followed_and_must_stay_inside() {
        assert!(!keeps_vector_registers(&[0xe8, 0x00, 0x10, 0x00, 0x00, 0xc3], 0), "elsewhere");
        assert!(!keeps_vector_registers(&[0xff, 0xd0, 0xc3], 0), "call rax");
        let callee = |insn: [u8; 4]| [&[0xe8, 1, 0, 0, 0, 0xc3][..], &insn].concat();
        assert!(keeps_vector_registers(&callee([0x48, 0x89, 0xc1, 0xc3]), 0));
        assert!(!keeps_vector_registers(&callee([0x0f, 0x57, 0xc0, 0xc3]), 0), "xorps");
    }
}
