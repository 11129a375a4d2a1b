//! An interpreter that checks every access, for tests and fuzzing: it says what a program
//! means, so that compiled code can be compared with it. Slow on purpose, never on a hot
//! path, and knows nothing of real addresses: all memory is a [`Memory`] of byte vectors at
//! made-up addresses.
//!
//! Meaning is RFC 9669's, all conformance groups but packet access; `callx` calls a function
//! that the program refers to. Beyond it, to bring out mistakes: `r1` to `r5` are overwritten after every call, and a frame's stack
//! starts out filled with [`Interpreter::stack_fill`].
//!
//! ```
//! use flea_object::asm::{Asm, Reg::*};
//! use flea_object::interp::{Interpreter, Memory, NoHost};
//!
//! let mut asm = Asm::new();
//! asm.mov64_reg(R0, R1).add64_imm(R0, 1).exit();
//! let insns = asm.finish()?;
//! let interpreter = Interpreter::new(&insns)?;
//! assert_eq!(interpreter.run([41, 0, 0, 0, 0], &mut Memory::new(), &mut NoHost)?, 42);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod alu;
mod callback;
mod memory;

use crate::helper::{Helper, MAX_TAIL_CALLS};
use crate::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use crate::opcode as op;
use crate::spec::MapIdx;
use crate::validate::{EncodingError, validate};

pub use callback::MAX_LOOPS;
pub use memory::{BadAccess, Memory, Protection};

/// Frames that may be on the stack at a time (Linux: `MAX_CALL_FRAMES`).
pub const MAX_CALL_FRAMES: usize = 8;

/// What `r1` to `r5` hold after a call: no program may rely on them.
pub const CLOBBERED: u64 = 0xdead_c0de_dead_c0de;

/// The value of a reference to the function at instruction 0; the one at `n` has `n` more.
pub const FUNCTION_BASE: u64 = 0xf00d_0000_0000_0000;

/// Why a run ended without a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trap {
    /// A load, store or atomic outside the memory.
    #[error("insn {insn_idx}: {access}")]
    BadAccess {
        /// The instruction.
        insn_idx: usize,
        /// What it tried.
        access: BadAccess,
    },
    /// The host refused a helper call.
    #[error("insn {insn_idx}: helper {helper}: {reason}")]
    HelperFailed {
        /// The call.
        insn_idx: usize,
        /// The helper's number.
        helper: i32,
        /// The host's words.
        reason: String,
    },
    /// The host knows no such map.
    #[error("insn {insn_idx}: there is no map {map}")]
    NoSuchMap {
        /// The `lddw`.
        insn_idx: usize,
        /// Index of the map.
        map: u32,
    },
    /// A call through a value that refers to no function.
    #[error("insn {insn_idx}: call through {value:#x}, which is no function of the program")]
    NoFunction {
        /// The call.
        insn_idx: usize,
        /// The value.
        value: u64,
    },
    /// More than [`MAX_CALL_FRAMES`] calls deep.
    #[error("insn {insn_idx}: more than {MAX_CALL_FRAMES} calls deep")]
    CallDepth {
        /// The call.
        insn_idx: usize,
    },
    /// The program is still running after as many steps as were allowed.
    #[error("insn {insn_idx}: still running after {max_steps} steps")]
    StepLimit {
        /// Where it was.
        insn_idx: usize,
        /// The limit.
        max_steps: u64,
    },
}

/// What is outside the program: helpers and maps.
pub trait Host {
    /// Runs helper `helper` on `r1` to `r5`, and returns `r0`.
    ///
    /// # Errors
    /// A reason, which ends the program with [`Trap::HelperFailed`].
    fn call(&mut self, helper: i32, args: [u64; 5], memory: &mut Memory) -> Result<u64, String>;

    /// What a reference to a map looks like to the program: any number by which
    /// [`Host::call`] knows it again.
    fn map_handle(&self, map: MapIdx) -> Option<u64>;

    /// The address of element 0 of a map.
    fn map_value_address(&self, map: MapIdx) -> Option<u64>;

    /// The key after `last` (`None`: the first one) in the map that a program knows as `map`, in
    /// any order that stays the same while elements come and go. For `bpf_for_each_map_elem`.
    ///
    /// # Errors
    /// A reason, which ends the program with [`Trap::HelperFailed`].
    fn next_key(&self, map: u64, last: Option<&[u8]>) -> Result<Option<Vec<u8>>, String> {
        let _ = last;
        Err(format!("{map:#x} is no map with elements"))
    }

    /// What stands at `index` of the program array that looks like `map` to the program: an
    /// index into [`Interpreter::targets`], or nothing. (Linux takes the low 32 bits of r3.)
    ///
    /// # Errors
    /// A reason, which ends the program with [`Trap::HelperFailed`].
    fn tail_target(&self, map: u64, index: u32) -> Result<Option<usize>, String> {
        let _ = index;
        Err(format!("{map:#x} is no program array"))
    }
}

/// A [`Host`] without helpers and maps.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHost;

impl Host for NoHost {
    fn call(&mut self, _: i32, _: [u64; 5], _: &mut Memory) -> Result<u64, String> {
        Err("there are no helpers here".to_owned())
    }

    fn map_handle(&self, _: MapIdx) -> Option<u64> {
        None
    }

    fn map_value_address(&self, _: MapIdx) -> Option<u64> {
        None
    }
}

/// A program ready to run, any number of times.
#[derive(Clone, Copy, Debug)]
pub struct Interpreter<'a> {
    insns: &'a [Insn],
    targets: &'a [&'a [Insn]],
    /// Steps after which a run ends with [`Trap::StepLimit`].
    pub max_steps: u64,
    /// What a frame's stack is filled with when the function starts.
    pub stack_fill: u8,
}

impl<'a> Interpreter<'a> {
    /// Steps allowed unless [`Interpreter::max_steps`] is set.
    pub const DEFAULT_MAX_STEPS: u64 = 10_000_000;

    /// Takes a well-formed program.
    ///
    /// # Errors
    /// [`validate`]'s.
    pub fn new(insns: &'a [Insn]) -> Result<Self, EncodingError> {
        validate(insns)?;
        Ok(Self { insns, targets: &[], max_steps: Self::DEFAULT_MAX_STEPS, stack_fill: 0 })
    }

    /// The same, with programs that tail calls may lead to: [`Host::tail_target`] says which.
    ///
    /// # Errors
    /// [`validate`]'s, of the first that is not well-formed.
    pub fn targets(self, targets: &'a [&'a [Insn]]) -> Result<Self, EncodingError> {
        targets.iter().try_for_each(|insns| validate(insns))?;
        Ok(Self { targets, ..self })
    }

    /// Runs it with `args` in `r1` to `r5`, and returns `r0`. The stack of `memory` is made
    /// anew; everything else in it stays as the program leaves it.
    ///
    /// # Errors
    /// [`Trap`].
    pub fn run(
        &self,
        args: [u64; 5],
        memory: &mut Memory,
        host: &mut impl Host,
    ) -> Result<u64, Trap> {
        memory.start_stack(self.stack_fill);
        let mut regs = [0; op::N_REGISTERS as usize];
        regs[1..6].copy_from_slice(&args);
        regs[FP] = memory.stack_top();
        let mut state = State {
            insns: self.insns,
            targets: self.targets,
            stack_fill: self.stack_fill,
            n_tail_calls: 0,
            regs,
            pc: 0,
            frames: Vec::new(),
            memory,
            host,
        };
        for _ in 0..self.max_steps {
            if let Some(result) = state.step()? {
                return Ok(result);
            }
        }
        Err(Trap::StepLimit { insn_idx: state.pc, max_steps: self.max_steps })
    }
}

const FP: usize = op::FRAME_POINTER as usize;

/// What a call keeps for its caller.
struct Frame<'a> {
    /// The caller's program: a tail call changes that of the callee.
    insns: &'a [Insn],
    return_pc: usize,
    saved: [u64; 5],
    waiting: Waiting,
}

/// Who waits for a frame's function to return.
enum Waiting {
    /// The function that called it.
    Caller,
    /// A helper, which may call it again.
    Helper(callback::Rounds),
}

struct State<'a, H> {
    insns: &'a [Insn],
    targets: &'a [&'a [Insn]],
    stack_fill: u8,
    n_tail_calls: u32,
    regs: [u64; op::N_REGISTERS as usize],
    pc: usize,
    frames: Vec<Frame<'a>>,
    memory: &'a mut Memory,
    host: &'a mut H,
}

impl<'a, H: Host> State<'a, H> {
    /// One instruction; the result where it is the main function's `exit`.
    fn step(&mut self) -> Result<Option<u64>, Trap> {
        let insn = self.insns[self.pc];
        let mut next_pc = self.pc + 1;
        match insn.class() {
            op::ALU => {
                let (a, b) = self.operands(insn);
                self.set(insn.dst, alu::alu32(insn, a, b));
            }
            op::ALU64 => {
                let (a, b) = self.operands(insn);
                self.set(insn.dst, alu::alu64(insn, a, b));
            }
            op::LD => {
                let value = self.load_imm64(insn)?;
                self.set(insn.dst, value);
                next_pc += 1;
            }
            op::LDX => {
                let value = self.load(insn)?;
                self.set(insn.dst, value);
            }
            op::ST | op::STX => self.store(insn)?,
            _ => match insn.opcode {
                op::EXIT_OP => match self.frames.pop() {
                    None => return Ok(Some(self.regs[0])),
                    Some(frame) => next_pc = self.return_from(frame)?,
                },
                op::CALLX_OP => {
                    let register = insn.callx().expect("validated");
                    let function = self.function(self.get(register))?;
                    self.enter(next_pc)?;
                    next_pc = function;
                }
                op::CALL_OP if insn.src == PSEUDO_CALL => {
                    self.enter(next_pc)?;
                    next_pc = offset_pc(next_pc, insn.imm);
                }
                op::CALL_OP if insn.imm == Helper::TailCall as i32 => {
                    next_pc = self.tail_call()?.unwrap_or(next_pc);
                }
                op::CALL_OP => match Helper::from_id(insn.imm) {
                    Some(helper) if helper.takes_callback() => {
                        next_pc = self.start_rounds(helper)?;
                    }
                    _ => self.call_helper(insn.imm)?,
                },
                _ => {
                    let (a, b) = self.operands(insn);
                    if alu::is_taken(insn, a, b) {
                        let offset = insn.jump_offset().expect("the only jumps left");
                        next_pc = offset_pc(next_pc, offset);
                    }
                }
            },
        }
        self.pc = next_pc;
        Ok(None)
    }

    fn get(&self, register: u8) -> u64 {
        self.regs[usize::from(register)]
    }

    fn set(&mut self, register: u8, value: u64) {
        self.regs[usize::from(register)] = value;
    }

    fn operands(&self, insn: Insn) -> (u64, u64) {
        let second = if insn.is_source_register() {
            self.get(insn.src)
        } else {
            i64::from(insn.imm).cast_unsigned()
        };
        (self.get(insn.dst), second)
    }

    fn load_imm64(&self, insn: Insn) -> Result<u64, Trap> {
        let high = self.insns[self.pc + 1].imm.cast_unsigned();
        let low = insn.imm.cast_unsigned();
        let no_such_map = Trap::NoSuchMap { insn_idx: self.pc, map: low };
        match insn.src {
            PSEUDO_MAP => self.host.map_handle(MapIdx(low)).ok_or(no_such_map),
            PSEUDO_MAP_VALUE => {
                let base = self.host.map_value_address(MapIdx(low)).ok_or(no_such_map)?;
                Ok(base.wrapping_add(u64::from(high)))
            }
            PSEUDO_FUNC => Ok(FUNCTION_BASE + offset_pc(self.pc + 1, insn.imm) as u64),
            _ => Ok(u64::from(high) << 32 | u64::from(low)),
        }
    }

    fn load(&self, insn: Insn) -> Result<u64, Trap> {
        let address = offset_address(self.get(insn.src), insn.off);
        let size = insn.access_bytes();
        let value = self.memory.load(address, size).map_err(|a| self.bad_access(a))?;
        Ok(if insn.mode() == op::MEMSX { alu::sign_extend(value, size * 8) } else { value })
    }

    fn store(&mut self, insn: Insn) -> Result<(), Trap> {
        let address = offset_address(self.get(insn.dst), insn.off);
        let size = insn.access_bytes();
        if insn.mode() == op::ATOMIC {
            return self.atomic(insn, address, size);
        }
        let value = if insn.class() == op::ST {
            i64::from(insn.imm).cast_unsigned()
        } else {
            self.get(insn.src)
        };
        self.memory.store(address, size, value).map_err(|a| self.bad_access(a))
    }

    fn atomic(&mut self, insn: Insn, address: u64, size: u32) -> Result<(), Trap> {
        let old = self.memory.load(address, size).map_err(|a| self.bad_access(a))?;
        let operand = self.get(insn.src);
        let mask = u64::MAX >> (64 - size * 8);
        let new = match insn.imm & !op::ATOMIC_FETCH {
            op::ATOMIC_ADD => old.wrapping_add(operand),
            op::ATOMIC_OR => old | operand,
            op::ATOMIC_AND => old & operand,
            op::ATOMIC_XOR => old ^ operand,
            _ if insn.imm == op::ATOMIC_CMPXCHG && old != self.get(0) & mask => old,
            _ => operand,
        };
        self.memory.store(address, size, new).map_err(|a| self.bad_access(a))?;
        if insn.imm == op::ATOMIC_CMPXCHG {
            self.set(0, old);
        } else if insn.imm & op::ATOMIC_FETCH != 0 {
            self.set(insn.src, old);
        }
        Ok(())
    }

    fn enter(&mut self, return_pc: usize) -> Result<(), Trap> {
        if self.frames.len() + 1 >= MAX_CALL_FRAMES {
            return Err(Trap::CallDepth { insn_idx: self.pc });
        }
        let mut saved = [0; 5];
        saved.copy_from_slice(&self.regs[6..=FP]);
        let waiting = Waiting::Caller;
        self.frames.push(Frame { insns: self.insns, return_pc, saved, waiting });
        self.regs[FP] = self.memory.push_frame(self.stack_fill);
        Ok(())
    }

    fn return_from(&mut self, mut frame: Frame<'a>) -> Result<usize, Trap> {
        match std::mem::replace(&mut frame.waiting, Waiting::Caller) {
            Waiting::Caller => Ok(self.leave(&frame)),
            Waiting::Helper(rounds) => self.next_round(&frame, rounds),
        }
    }

    fn leave(&mut self, frame: &Frame<'a>) -> usize {
        self.insns = frame.insns;
        self.memory.pop_frame();
        self.regs[6..=FP].copy_from_slice(&frame.saved);
        self.regs[1..6].fill(CLOBBERED);
        frame.return_pc
    }

    fn call_helper(&mut self, helper: i32) -> Result<(), Trap> {
        let mut args = [0; 5];
        args.copy_from_slice(&self.regs[1..6]);
        let insn_idx = self.pc;
        self.regs[0] = self
            .host
            .call(helper, args, self.memory)
            .map_err(|reason| Trap::HelperFailed { insn_idx, helper, reason })?;
        self.regs[1..6].fill(CLOBBERED);
        Ok(())
    }

    /// Where the target begins: it takes the place of the function that calls, whose caller it
    /// returns to. `None` where the call misses and the program goes on.
    fn tail_call(&mut self) -> Result<Option<usize>, Trap> {
        let (ctx, map, index) = (self.regs[1], self.regs[2], self.regs[3]);
        let failed = |reason| {
            let helper = Helper::TailCall as i32;
            Trap::HelperFailed { insn_idx: self.pc, helper, reason }
        };
        let index = u32::try_from(index & 0xffff_ffff).expect("32 bits");
        let target = self.host.tail_target(map, index).map_err(failed)?;
        self.regs[..6].fill(CLOBBERED);
        let target = target.filter(|_| self.n_tail_calls < MAX_TAIL_CALLS);
        let Some(target) = target else { return Ok(None) };
        self.insns = self.targets.get(target).copied().ok_or_else(|| {
            let (insn_idx, helper) = (self.pc, Helper::TailCall as i32);
            Trap::HelperFailed { insn_idx, helper, reason: format!("there is no program {target}") }
        })?;
        self.n_tail_calls += 1;
        self.regs.fill(CLOBBERED);
        self.regs[1] = ctx;
        self.memory.pop_frame();
        self.regs[FP] = self.memory.push_frame(self.stack_fill);
        Ok(Some(0))
    }

    fn bad_access(&self, access: BadAccess) -> Trap {
        Trap::BadAccess { insn_idx: self.pc, access }
    }
}

fn offset_address(base: u64, off: i16) -> u64 {
    base.wrapping_add(i64::from(off).cast_unsigned())
}

/// `validate` has shown that the target is in the program.
fn offset_pc(next_pc: usize, offset: i32) -> usize {
    next_pc.wrapping_add_signed(offset as isize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::{Asm, JmpOp, Reg::*, Size};
    use crate::helper::Helper;

    fn run(asm: &Asm, memory: &mut Memory) -> Result<u64, Trap> {
        let insns = asm.finish().unwrap();
        Interpreter::new(&insns).unwrap().run([0; 5], memory, &mut NoHost)
    }

    #[test]
    fn stack_bounds() {
        for (off, ok) in [(-512, true), (-8, true), (-513, false), (-7, false), (0, false)] {
            let mut asm = Asm::new();
            asm.mov64_imm(R0, 0).store(Size::DW, R10, off, R0).exit();
            assert_eq!(run(&asm, &mut Memory::new()).is_ok(), ok, "{off}");
        }
    }

    #[test]
    fn a_callee_sees_its_callers_stack_and_keeps_its_registers() {
        let mut asm = Asm::new();
        let callee = asm.new_label();
        asm.store_imm(Size::DW, R10, -8, 5).mov64_reg(R1, R10).mov64_imm(R6, 100);
        asm.call_local(callee).load(Size::DW, R1, R10, -8).add64_reg(R0, R1).add64_reg(R0, R6);
        asm.exit();
        asm.bind(callee).load(Size::DW, R0, R1, -8).add64_imm(R0, 1).mov64_imm(R6, 7);
        asm.store(Size::DW, R10, -8, R0).store_imm(Size::DW, R1, -8, 50).exit();
        assert_eq!(run(&asm, &mut Memory::new()), Ok(6 + 50 + 100));
    }

    #[test]
    fn a_returned_frame_is_gone() {
        let mut asm = Asm::new();
        let callee = asm.new_label();
        asm.call_local(callee).load(Size::DW, R0, R0, -8).exit();
        asm.bind(callee).store_imm(Size::DW, R10, -8, 1).mov64_reg(R0, R10).exit();
        assert!(matches!(run(&asm, &mut Memory::new()), Err(Trap::BadAccess { insn_idx: 1, .. })));
    }

    #[test]
    fn endless_programs_end() {
        let mut asm = Asm::new();
        let top = asm.new_label();
        asm.bind(top).jump(top);
        let insns = asm.finish().unwrap();
        let mut interpreter = Interpreter::new(&insns).unwrap();
        interpreter.max_steps = 1000;
        let got = interpreter.run([0; 5], &mut Memory::new(), &mut NoHost);
        assert_eq!(got, Err(Trap::StepLimit { insn_idx: 0, max_steps: 1000 }));

        let mut asm = Asm::new();
        let top = asm.new_label();
        asm.bind(top).call_local(top).exit();
        assert_eq!(run(&asm, &mut Memory::new()), Err(Trap::CallDepth { insn_idx: 0 }));
    }

    struct OneMap(u64);

    impl Host for OneMap {
        fn call(&mut self, helper: i32, args: [u64; 5], m: &mut Memory) -> Result<u64, String> {
            if helper != Helper::MapLookupElem as i32 || args[0] != 77 {
                return Err("not here".to_owned());
            }
            let key = m.load(args[1], 4).map_err(|e| e.to_string())?;
            Ok(if key == 0 { self.0 } else { 0 })
        }

        fn map_handle(&self, map: MapIdx) -> Option<u64> {
            (map.0 == 0).then_some(77)
        }

        fn map_value_address(&self, map: MapIdx) -> Option<u64> {
            (map.0 == 0).then_some(self.0)
        }
    }

    /// Program 0 at index 0 of every array, and nothing else.
    struct Itself;

    impl Host for Itself {
        fn call(&mut self, _: i32, _: [u64; 5], _: &mut Memory) -> Result<u64, String> {
            Err("no helpers".to_owned())
        }

        fn map_handle(&self, _: MapIdx) -> Option<u64> {
            Some(1)
        }

        fn map_value_address(&self, _: MapIdx) -> Option<u64> {
            None
        }

        fn tail_target(&self, _: u64, index: u32) -> Result<Option<usize>, String> {
            Ok((index == 0).then_some(0))
        }
    }

    /// `*r1 += 1; bpf_tail_call(r1, map, index); return *r1`, in memory that r1 points at.
    fn counts_runs(index: u64) -> u64 {
        let mut asm = Asm::new();
        asm.mov64_reg(R6, R1).mov64_imm(R2, 1).atomic_add(Size::DW, R6, 0, R2);
        asm.map_ref(R2, MapIdx(0)).lddw(R3, index).call(Helper::TailCall);
        asm.load(Size::DW, R0, R6, 0).exit();
        let insns = asm.finish().unwrap();
        let mut memory = Memory::new();
        let at = memory.add(vec![0; 8], Protection::ReadWrite);
        let programs = [insns.as_slice()];
        let interpreter = Interpreter::new(&insns).unwrap().targets(&programs).unwrap();
        interpreter.run([at, 0, 0, 0, 0], &mut memory, &mut Itself).unwrap()
    }

    #[test]
    fn tail_calls_end_after_33() {
        assert_eq!(counts_runs(0), 34);
        assert_eq!(counts_runs(1), 1);
        // Linux looks at the low half.
        assert_eq!(counts_runs(7 << 32), 34);
    }

    #[test]
    fn maps_and_helpers() {
        let mut asm = Asm::new();
        let out = asm.new_label();
        asm.store_imm(Size::W, R10, -4, 0).map_ref(R1, MapIdx(0)).mov64_reg(R2, R10);
        asm.add64_imm(R2, -4).call(Helper::MapLookupElem).jump_if(JmpOp::Eq, R0, 0, out);
        asm.mov64_imm(R1, 2).atomic_add(Size::DW, R0, 8, R1).map_value(R1, MapIdx(0), 8);
        asm.load(Size::DW, R0, R1, 0).bind(out).exit();
        let insns = asm.finish().unwrap();
        let mut memory = Memory::new();
        let mut host = OneMap(memory.add(vec![1; 16], Protection::ReadWrite));
        let interpreter = Interpreter::new(&insns).unwrap();
        let got = interpreter.run([0; 5], &mut memory, &mut host);
        assert_eq!(got, Ok(0x0101_0101_0101_0103));
        assert_eq!(memory.bytes(host.0).unwrap()[8], 3);
        assert!(matches!(
            interpreter.run([0; 5], &mut memory, &mut NoHost),
            Err(Trap::NoSuchMap { insn_idx: 1, map: 0 })
        ));
    }
}
