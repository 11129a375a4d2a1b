//! The eBPF instruction, as RFC 9669 lays it out: the one type that the decoder, the
//! verifier, the compiler and the interpreter share.

/// One 8-byte instruction. A 64-bit immediate load (`lddw`) takes two in a row, the second
/// with opcode 0 and the upper half of the constant in `imm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Insn {
    /// Class, operation, source or size and mode.
    pub opcode: u8,
    /// Destination register, 0..=15 as encoded.
    pub dst: u8,
    /// Source register, or a pseudo kind.
    pub src: u8,
    /// Signed offset.
    pub off: i16,
    /// Signed immediate.
    pub imm: i32,
}

/// Bytes of an instruction.
pub const INSN_BYTES: u64 = 8;

impl Insn {
    /// Decodes 8 little-endian bytes.
    #[must_use]
    pub const fn decode(b: [u8; 8]) -> Self {
        Self {
            opcode: b[0],
            dst: b[1] & 0xf,
            src: b[1] >> 4,
            off: i16::from_le_bytes([b[2], b[3]]),
            imm: i32::from_le_bytes([b[4], b[5], b[6], b[7]]),
        }
    }

    /// Encodes to 8 little-endian bytes.
    #[must_use]
    pub const fn encode(self) -> [u8; 8] {
        let off = self.off.to_le_bytes();
        let imm = self.imm.to_le_bytes();
        let regs = (self.dst & 0xf) | (self.src << 4);
        [self.opcode, regs, off[0], off[1], imm[0], imm[1], imm[2], imm[3]]
    }
}

/// `src` of a `lddw` whose `imm` is an index into the object's maps: the map itself.
/// (Linux: `BPF_PSEUDO_MAP_FD`, with an index in place of a file descriptor.)
pub const PSEUDO_MAP: u8 = 1;
/// `src` of a `lddw`: the address of element 0 of map `imm`, plus the second half's `imm`.
/// (Linux: `BPF_PSEUDO_MAP_VALUE`.)
pub const PSEUDO_MAP_VALUE: u8 = 2;
/// `src` of a `lddw`: a function of this program, `imm` as for [`PSEUDO_CALL`], for callbacks.
pub const PSEUDO_FUNC: u8 = 4;
/// `src` of a `call`: another function of this program, `imm` instructions after the next one.
pub const PSEUDO_CALL: u8 = 1;
