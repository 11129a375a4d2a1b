//! Position-independent machine code with the few addresses that are only known in the target.

use flea_layout::shared::RuntimeFn;

/// Length of `movabs reg, imm64`, the only instruction that carries a relocation.
const MOVABS_BYTES: usize = 10;

/// One compiled function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// Machine code, zeros where a relocation goes.
    pub bytes: Vec<u8>,
    /// Sorted by offset.
    pub relocs: Vec<Reloc>,
}

/// One place to fill in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reloc {
    /// Offset in [`Code::bytes`] of the 8-byte field.
    pub offset: u32,
    /// What to write.
    pub kind: RelocKind,
    /// Of what.
    pub target: RelocTarget,
}

/// What is written at a relocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelocKind {
    /// The target's address, 8 bytes.
    Abs8,
    /// `movabs reg, imm64` becomes `mov reg, fs:[0]; nop`: CLIF has no load by segment.
    ThreadPointer,
    /// `movabs reg, imm64` becomes `mov reg, [rbp]` and nops, where the body's own frame begins
    /// with the skeleton's rbp. A body without a frame of its own has `mov reg, rbp` instead
    /// and no relocation; see `x86_64::slim`.
    SkeletonFrame,
}

/// What a relocation refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelocTarget {
    /// The arena's base plus this (negative: the thread table).
    Arena {
        /// Bytes from the arena's base.
        addend: i64,
    },
    /// A function of the runtime blob.
    Runtime(RuntimeFn),
    /// The vDSO's `clock_gettime`, 0 where there is none.
    VdsoClockGettime,
    /// A number that is known already; see `clif::constant`.
    Constant(u64),
    /// The traced function's address, in bodies that many functions share.
    FunctionAddress,
    /// The attach cookie of [`crate::BodyRequest::programs`] number so-and-so, likewise.
    Cookie {
        /// Index of the program.
        program: u32,
    },
    /// The thread pointer: no address, see [`RelocKind::ThreadPointer`].
    ThreadPointer,
    /// The skeleton's rbp: no address, see [`RelocKind::SkeletonFrame`].
    SkeletonFrame,
}

impl Code {
    /// The bytes with every relocation applied. `address_of` is asked for all targets but
    /// [`RelocTarget::ThreadPointer`], [`RelocTarget::SkeletonFrame`] and
    /// [`RelocTarget::Constant`].
    ///
    /// # Panics
    /// If a relocation is not inside a `movabs`: [`Code`]s made by this crate were checked.
    #[must_use]
    pub fn resolve(&self, address_of: impl Fn(RelocTarget) -> u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for reloc in &self.relocs {
            let at = reloc.offset as usize;
            assert!(is_movabs_at(&bytes, at), "relocation at {at:#x} is not in a movabs");
            match reloc.kind {
                RelocKind::Abs8 => {
                    let value = match reloc.target {
                        RelocTarget::Constant(value) => value,
                        target => address_of(target),
                    };
                    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
                }
                RelocKind::ThreadPointer => {
                    let insn = load_thread_pointer(bytes[at - 2], bytes[at - 1]);
                    bytes[at - 2..at + 8].copy_from_slice(&insn);
                }
                RelocKind::SkeletonFrame => {
                    let insn = load_skeleton_frame(bytes[at - 2], bytes[at - 1]);
                    bytes[at - 2..at + 8].copy_from_slice(&insn);
                }
            }
        }
        bytes
    }
}

/// Are the 8 bytes at `field` the zeroed immediate of `movabs reg, imm64`?
pub(crate) fn is_movabs_at(bytes: &[u8], field: usize) -> bool {
    let Some(start) = field.checked_sub(2) else { return false };
    bytes.get(start..start + MOVABS_BYTES).is_some_and(|insn| {
        matches!(insn[0], 0x48 | 0x49) && insn[1] & 0xf8 == 0xb8 && insn[2..] == [0; 8]
    })
}

/// `mov reg, [rbp]` and a nop of six bytes for the register that `movabs` with these two bytes
/// loads.
///
/// ```text
///   48/49 b8+r imm64       ->   48/4c 8b modrm(01 reg 101) disp8=0   66 0f 1f 44 00 00
/// ```
fn load_skeleton_frame(rex: u8, opcode: u8) -> [u8; MOVABS_BYTES] {
    let (rex_r, reg) = modrm_register(rex, opcode);
    [rex_r, 0x8b, 0b0100_0101 | reg, 0, 0x66, 0x0f, 0x1f, 0x44, 0, 0]
}

/// `mov reg, fs:[0]; nop` for the register that `movabs` with these two bytes loads.
///
/// ```text
///   48/49 b8+r imm64       ->   64 48/4c 8b modrm(00 reg 100) sib(25) disp32=0   90
/// ```
fn load_thread_pointer(rex: u8, opcode: u8) -> [u8; MOVABS_BYTES] {
    let (rex_r, reg) = modrm_register(rex, opcode);
    [0x64, rex_r, 0x8b, 0b100 | reg, 0x25, 0, 0, 0, 0, 0x90]
}

/// The register moves from opcode (extended by REX.B) to ModRM.reg (extended by REX.R).
fn modrm_register(rex: u8, opcode: u8) -> (u8, u8) {
    (0x48 | ((rex & 1) << 2), (opcode & 7) << 3)
}
