//! The vDSO's `clock_gettime` in the target: the time without a system call.

use flea_process::{Memory, Pid};
use flea_symbols::addr::RemoteAddr;
use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, Register};
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
    let start = usize::try_from(symbol.address()).ok()?;
    let code = image.get(start..start + usize::try_from(symbol.size()).ok()?)?;
    keeps_vector_registers(code).then(|| mapping.start.offset(symbol.address().cast_signed()))
}

/// No instruction of `code` writes a vector, mask or x87 register, and none leads out of it:
/// what is called from elsewhere could.
fn keeps_vector_registers(code: &[u8]) -> bool {
    let mut info = InstructionInfoFactory::new();
    let end = code.len() as u64;
    Decoder::new(64, code, DecoderOptions::NONE).iter().all(|insn| {
        let inside = match insn.near_branch_target() {
            0 if !insn.is_jmp_near_indirect() && !insn.is_call_near_indirect() => true,
            0 => false,
            target => target < end,
        };
        let registers = info.info(&insn).used_registers();
        let general = registers.iter().all(|used| {
            let register: Register = used.register();
            !register.is_vector_register() && !register.is_st() && !register.is_k()
        });
        inside && general
    })
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
        assert!(keeps_vector_registers(&[0x48, 0x89, 0xc1, 0xc3]));
        assert!(!keeps_vector_registers(&[0x0f, 0x57, 0xc0, 0xc3]), "xorps xmm0, xmm0");
    }

    #[test]
    fn a_call_to_elsewhere_is_noticed() {
        assert!(!keeps_vector_registers(&[0xe8, 0x00, 0x10, 0x00, 0x00, 0xc3]));
    }
}
