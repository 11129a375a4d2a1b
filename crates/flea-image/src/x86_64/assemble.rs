//! A list of instructions with places to jump to, encoded at once by iced-x86's block encoder.
//!
//! Every instruction gets a made-up address in the non-canonical half of the address space;
//! jumps inside the list go to those, jumps out of it to real addresses, and the two cannot
//! meet.

use flea_symbols::addr::RemoteAddr;
use iced_x86::{BlockEncoder, BlockEncoderOptions, Code, Instruction, InstructionBlock};

/// First made-up address.
const PLACES: u64 = 0x4000_0000_0000_0000;
/// Made-up addresses step by this, more than any instruction's length.
const STEP: u64 = 16;

/// A position in an [`Assembly`], perhaps not reached yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place(u64);

impl Place {
    /// The address under which jumps inside the list refer to it.
    pub fn address(self) -> u64 {
        PLACES + self.0 * STEP
    }

    /// `n` instructions further on.
    pub fn later(self, n: usize) -> Self {
        Self(self.0 + n as u64)
    }
}

/// Instructions in order.
#[derive(Default)]
pub(crate) struct Assembly {
    insns: Vec<Instruction>,
}

/// An encoded [`Assembly`].
pub(crate) struct Encoded {
    pub bytes: Vec<u8>,
    offsets: Vec<u32>,
}

impl Encoded {
    /// Offset of the instruction at `place`; `None` where the encoder had to take it apart.
    pub fn offset(&self, place: Place) -> Option<u32> {
        let index = usize::try_from(place.0).ok()?;
        if index == self.offsets.len() {
            return u32::try_from(self.bytes.len()).ok();
        }
        self.offsets.get(index).copied().filter(|o| *o != u32::MAX)
    }
}

impl Assembly {
    /// Where the next instruction goes.
    pub fn here(&self) -> Place {
        Place(self.insns.len() as u64)
    }

    /// Where the instruction after the next `n` goes.
    pub fn after(&self, n: usize) -> Place {
        Place((self.insns.len() + n) as u64)
    }

    /// Appends one instruction.
    pub fn push(&mut self, mut insn: Instruction) {
        insn.set_ip(self.here().address());
        self.insns.push(insn);
    }

    /// Appends a jump or call to an absolute address.
    pub fn branch(&mut self, code: Code, target: u64) -> Result<(), iced_x86::IcedError> {
        self.push(Instruction::with_branch(code, target)?);
        Ok(())
    }

    /// Makes the branch at `place` go to `target`.
    pub fn retarget(&mut self, place: Place, target: u64) {
        let index = usize::try_from(place.0).unwrap_or(usize::MAX);
        if let Some(insn) = self.insns.get_mut(index) {
            insn.set_near_branch64(target);
        }
    }

    /// Encodes everything for `at`.
    pub fn encode(&self, at: RemoteAddr) -> Result<Encoded, iced_x86::IcedError> {
        let block = InstructionBlock::new(&self.insns, at.0);
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let result = BlockEncoder::encode(64, block, options)?;
        Ok(Encoded { bytes: result.code_buffer, offsets: result.new_instruction_offsets })
    }
}
