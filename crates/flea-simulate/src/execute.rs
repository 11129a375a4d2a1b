//! One instruction, executed: the few that skeletons, bodies and our functions consist of.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use crate::context::{Context, Doing, HANDLER, OUTSIDE, RBP, RSP};
use crate::machine::Machine;
use crate::text::INT3;

/// A body is a nop that names it, and `ret`: the nop's displacement is this, and twice its number,
/// and 1 at exit.
const BODY: u32 = 0x0100_0000;

/// The code of a body.
#[must_use]
pub fn body_code(key: u32, at_exit: bool) -> Vec<u8> {
    let name = BODY | key << 1 | u32::from(at_exit);
    let mut code = vec![0x0f, 0x1f, 0x80];
    code.extend(name.to_le_bytes());
    code.push(0xc3);
    code
}

/// The number of the body whose code that is.
#[must_use]
pub fn body_key(code: &[u8]) -> Option<u32> {
    let name = u32::from_le_bytes(code.get(3..7)?.try_into().ok()?);
    (name & BODY != 0).then_some((name & !BODY) >> 1)
}

impl Machine {
    /// Thread `i` executes what its CPU sees.
    pub fn execute(&mut self, i: usize) {
        let (at, cpu) = (self.threads[i].context.rip, self.threads[i].cpu);
        let Some((seen, n_bytes)) = self.text.fetch(cpu, at) else {
            return self.violate(format!("thread {i} executes {at:#x}, where nothing is"));
        };
        let is_ours = self.text.arenas.iter().any(|arena| arena.range().contains(&at));
        if is_ours && !self.live.iter().any(|live| live.contains(&at)) {
            return self.violate(format!("thread {i} executes freed code at {at:#x}"));
        }
        let insn = Decoder::with_ip(64, &seen[..n_bytes], at, DecoderOptions::NONE).decode();
        let len = insn.len();
        if !self.text.is_whole(at, &seen, len) {
            return self.violate(format!(
                "thread {i} executes a mixture at {at:#x}: {:02x?}",
                &seen[..len]
            ));
        }
        self.note(|| format!("thread {i} executes {at:#x}: {insn}"));
        if seen[0] == INT3 {
            self.threads[i].context.rip = at + 1;
            self.threads[i].context.doing = Doing::Trapped;
            return;
        }
        self.threads[i].context.rip = insn.next_ip();
        if self.perform(i, &insn).is_none() {
            self.violate(format!("thread {i} cannot execute {insn} at {at:#x}"));
        }
    }

    fn perform(&mut self, i: usize, insn: &Instruction) -> Option<()> {
        let context = &mut self.threads[i].context;
        match insn.mnemonic() {
            Mnemonic::Nop => {
                let name = u32::try_from(insn.memory_displacement64()).unwrap_or(0);
                if insn.op0_kind() == OpKind::Memory && name & 0xff00_0000 == BODY {
                    self.hit(i, (name & !BODY) >> 1, name & 1 != 0);
                }
            }
            Mnemonic::Endbr64 => {}
            Mnemonic::Pause => context.doing = Doing::Sleeps(self.dice.below(30)),
            Mnemonic::Push => {
                let word = value(context, insn, 0)?;
                context.push(word).then_some(())?;
            }
            Mnemonic::Pop => {
                let word = context.pop()?;
                set(context, insn, word)?;
            }
            Mnemonic::Mov => {
                let word = value(context, insn, 1)?;
                set(context, insn, word)?;
            }
            Mnemonic::Lea => {
                let address = address(context, insn)?;
                set(context, insn, address)?;
            }
            Mnemonic::Add => {
                let sum = value(context, insn, 0)?.wrapping_add(value(context, insn, 1)?);
                set(context, insn, sum)?;
            }
            Mnemonic::Sub => {
                let rest = value(context, insn, 0)?.wrapping_sub(value(context, insn, 1)?);
                set(context, insn, rest)?;
            }
            Mnemonic::Jmp => context.rip = near(insn)?,
            Mnemonic::Call => context.call(near(insn)?, insn.next_ip()).then_some(())?,
            Mnemonic::Leave => {
                context.regs[RSP] = context.regs[RBP];
                context.regs[RBP] = context.pop()?;
            }
            Mnemonic::Ret => return self.return_from(i),
            _ => return None,
        }
        Some(())
    }

    fn return_from(&mut self, i: usize) -> Option<()> {
        let context = &mut self.threads[i].context;
        let from = context.regs[RSP];
        let to = context.pop()?;
        // Through another word than the call's, or to elsewhere.
        (context.returns.pop() == Some((from, to))).then_some(())?;
        context.rip = to;
        if to == OUTSIDE || to == HANDLER {
            self.returned(i);
        }
        Some(())
    }
}

fn near(insn: &Instruction) -> Option<u64> {
    matches!(insn.op0_kind(), OpKind::NearBranch64).then(|| insn.near_branch_target())
}

fn number(register: Register) -> Option<usize> {
    (register.is_gpr64() || register.is_gpr32()).then(|| register.full_register().number())
}

fn address(context: &Context, insn: &Instruction) -> Option<u64> {
    if insn.memory_index() != Register::None {
        return None;
    }
    let base = context.regs[number(insn.memory_base())?];
    Some(base.wrapping_add(insn.memory_displacement64()))
}

fn value(context: &Context, insn: &Instruction, operand: u32) -> Option<u64> {
    match insn.op_kind(operand) {
        OpKind::Register => Some(context.regs[number(insn.op_register(operand))?]),
        OpKind::Memory => context.load(address(context, insn)?),
        _ => insn.try_immediate(operand).ok(),
    }
}

fn set(context: &mut Context, insn: &Instruction, word: u64) -> Option<()> {
    match insn.op0_kind() {
        OpKind::Register => context.regs[number(insn.op0_register())?] = word,
        OpKind::Memory => {
            let at = address(context, insn)?;
            context.save(at, word).then_some(())?;
        }
        _ => return None,
    }
    Some(())
}
