//! The system calls that attached code makes in the target, long after the controller has gone:
//! to be judged by the target's seccomp filters before the code is put there.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use flea_image::{Body, RelocTarget};
use flea_layout::shared::RuntimeFn;
use flea_process::SystemCall;

const ANY: Option<u64> = None;

const fn call(name: &'static str, number: i64, args: [Option<u64>; 6]) -> SystemCall {
    SystemCall { name, number, args }
}

/// The signal 0, which asks whether there is such a thread and does nothing.
const NO_SIGNAL: Option<u64> = Some(0);
const PR_GET_NAME: Option<u64> = Some(16);

const GETPID: SystemCall = call("getpid", libc::SYS_getpid, [ANY; 6]);
const GETTID: SystemCall = call("gettid", libc::SYS_gettid, [ANY; 6]);
const GETUID: SystemCall = call("getuid", libc::SYS_getuid, [ANY; 6]);
const GETGID: SystemCall = call("getgid", libc::SYS_getgid, [ANY; 6]);
const GETCPU: SystemCall = call("getcpu", libc::SYS_getcpu, [ANY; 6]);
const YIELD: SystemCall = call("sched_yield", libc::SYS_sched_yield, [ANY; 6]);
const CLOCK: SystemCall = call("clock_gettime", libc::SYS_clock_gettime, [ANY; 6]);
const KILL: SystemCall = call("kill", libc::SYS_kill, [ANY, NO_SIGNAL, ANY, ANY, ANY, ANY]);
const TKILL: SystemCall = call("tkill", libc::SYS_tkill, [ANY, NO_SIGNAL, ANY, ANY, ANY, ANY]);
const TGKILL: SystemCall = call("tgkill", libc::SYS_tgkill, [ANY, ANY, NO_SIGNAL, ANY, ANY, ANY]);
const NAME: SystemCall = call("prctl", libc::SYS_prctl, [PR_GET_NAME, ANY, ANY, ANY, ANY, ANY]);
const ONE: Option<u64> = Some(1);
const COPY_ARGS: [Option<u64>; 6] = [ANY, ANY, ONE, ANY, ONE, Some(0)];
const READ: SystemCall = call("process_vm_readv", libc::SYS_process_vm_readv, COPY_ARGS);
const WRITE: SystemCall = call("process_vm_writev", libc::SYS_process_vm_writev, COPY_ARGS);

/// What waiting for a lock takes, and finding out whether its owner lives.
const LOCK: &[SystemCall] = &[CLOCK, YIELD, TKILL, KILL];

/// What a function of the runtime asks of the kernel; a test reads the runtime's code again.
fn made_by(function: RuntimeFn) -> &'static [SystemCall] {
    match function {
        RuntimeFn::ThreadSlot => &[GETPID, GETTID, CLOCK, KILL, TGKILL],
        RuntimeFn::ClockNs => &[CLOCK],
        RuntimeFn::MapUpdate | RuntimeFn::SpinLock => LOCK,
        // It has no slot as a parameter.
        RuntimeFn::MapDelete => &[CLOCK, YIELD, TKILL, KILL, GETPID, GETTID, TGKILL],
        RuntimeFn::ProbeReadUser | RuntimeFn::ProbeReadUserStr | RuntimeFn::Printk => {
            &[GETPID, READ]
        }
        RuntimeFn::ProbeWriteUser => &[GETPID, WRITE],
        RuntimeFn::PidTgid => &[GETPID, GETTID],
        RuntimeFn::UidGid => &[GETUID, GETGID],
        RuntimeFn::Comm => &[NAME],
        RuntimeFn::ProcessorId => &[GETCPU],
        RuntimeFn::Prandom => &[CLOCK],
        RuntimeFn::SpinUnlock
        | RuntimeFn::HashLookup
        | RuntimeFn::HashNext
        | RuntimeFn::InnerMap
        | RuntimeFn::RingbufReserve
        | RuntimeFn::RingbufSubmit
        | RuntimeFn::RingbufDiscard
        | RuntimeFn::RingbufOutput
        | RuntimeFn::RingbufQuery => &[],
    }
}

/// All that these bodies may make. Those that are called with stack arguments whose number is
/// not known have them read by the runtime.
pub(crate) fn of(bodies: &[Arc<Body>], may_read_stack: bool) -> Vec<SystemCall> {
    // Of ten thousand, most are the same one.
    let mut seen = HashSet::new();
    let distinct = bodies.iter().filter(|body| seen.insert(Arc::as_ptr(body)));
    let codes = distinct.flat_map(|b| [&b.entry, &b.session, &b.modify, &b.exit]).flatten();
    let called = codes.flat_map(|code| &code.relocs).filter_map(|reloc| match reloc.target {
        RelocTarget::Runtime(function) => Some(function),
        _ => None,
    });
    let called: BTreeSet<u32> = called.map(|function| function as u32).collect();
    let reads = may_read_stack.then_some(RuntimeFn::ProbeReadUser);
    let called = RuntimeFn::ALL.into_iter().filter(|f| called.contains(&(*f as u32)));
    let mut calls: Vec<SystemCall> = called.chain(reads).flat_map(made_by).copied().collect();
    calls.sort_by_key(|call| call.number);
    calls.dedup();
    calls
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashSet};

    use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, Register};

    use super::*;

    fn at(ip: u64) -> Instruction {
        let code = &flea_runtime::BLOB[usize::try_from(ip).unwrap()..];
        Decoder::with_ip(64, code, ip, DecoderOptions::NONE).decode()
    }

    /// What is known of a register: a path ends where one is not, and it makes a system call.
    #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
    struct Known {
        registers: Vec<(Register, u64)>,
        pushed: Option<u64>,
    }

    impl Known {
        fn get(&self, register: Register) -> Option<u64> {
            let full = register.full_register();
            self.registers.iter().find(|(r, _)| *r == full).map(|(_, value)| *value)
        }

        fn set(&mut self, register: Register, value: Option<u64>) {
            let full = register.full_register();
            self.registers.retain(|(r, _)| *r != full);
            self.registers.extend(value.map(|value| (full, value)));
            self.registers.sort_unstable();
        }

        fn step(&mut self, insn: &Instruction) {
            let pushed = self.pushed.take();
            let to = insn.op0_register();
            let value = match insn.code() {
                Code::Mov_r32_imm32 | Code::Mov_r64_imm64 => Some(insn.immediate(1)),
                Code::Mov_rm64_imm32 if to != Register::None => Some(insn.immediate(1)),
                Code::Xor_rm32_r32 | Code::Xor_r32_rm32 if to == insn.op1_register() => Some(0),
                Code::Mov_rm32_r32
                | Code::Mov_rm64_r64
                | Code::Mov_r32_rm32
                | Code::Mov_r64_rm64 => self.get(insn.op1_register()),
                Code::Pushq_imm8 | Code::Pushq_imm32 => {
                    self.pushed = Some(insn.immediate(0));
                    return;
                }
                Code::Pop_r64 => pushed,
                _ => None,
            };
            let mut info = iced_x86::InstructionInfoFactory::new();
            for used in info.info(insn).used_registers() {
                use iced_x86::OpAccess::{CondRead, NoMemAccess, None, Read, ReadCondWrite};
                let reads = [None, Read, CondRead, NoMemAccess];
                let _ = ReadCondWrite;
                if !reads.contains(&used.access()) && used.register().is_gpr() {
                    self.set(used.register(), Option::None);
                }
            }
            if to != Register::None && to.is_gpr() && value.is_some() {
                self.set(to, value);
            }
        }
    }

    /// The numbers of all system calls that the code from `start` on can come to.
    fn reached_from(start: u64) -> BTreeSet<u64> {
        let mut numbers = BTreeSet::new();
        let mut seen = HashSet::new();
        let mut todo = vec![(start, Known::default())];
        while let Some((ip, mut known)) = todo.pop() {
            if !seen.insert((ip, known.clone())) {
                continue;
            }
            assert!(seen.len() < 2_000_000, "the walk from {start:#x} does not end");
            let insn = at(ip);
            if insn.mnemonic() == Mnemonic::Syscall {
                let number = known.get(Register::RAX);
                numbers.insert(number.unwrap_or_else(|| panic!("which call at {ip:#x}?")));
            }
            known.step(&insn);
            match insn.flow_control() {
                FlowControl::Return | FlowControl::Exception => {}
                FlowControl::UnconditionalBranch => todo.push((insn.near_branch_target(), known)),
                FlowControl::ConditionalBranch => {
                    todo.push((insn.near_branch_target(), known.clone()));
                    todo.push((insn.next_ip(), known));
                }
                FlowControl::Call if insn.mnemonic() == Mnemonic::Call => {
                    todo.push((insn.near_branch_target(), known));
                    // What it returns with is not known, but for nothing.
                    todo.push((insn.next_ip(), Known::default()));
                }
                _ => todo.push((insn.next_ip(), known)),
            }
        }
        numbers
    }

    #[test]
    fn the_runtime_makes_these_and_no_others() {
        let mut wrong = Vec::new();
        for function in RuntimeFn::ALL {
            let stated: BTreeSet<u64> =
                made_by(function).iter().map(|c| u64::try_from(c.number).unwrap()).collect();
            let found = reached_from(flea_runtime::offset_of(function).into());
            if found != stated {
                wrong.push(format!("{}: {stated:?} is stated, {found:?} found", function.symbol()));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}
