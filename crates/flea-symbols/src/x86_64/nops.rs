//! The nops that compilers leave at function entries for tracers. Knows nothing of modules.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};

/// `endbr64`: the only place an indirect call may go to under IBT, so it stays.
pub(crate) const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// LLVM XRay's entry sled, while off: `jmp .+11`, then a 9-byte nop that is never run
/// (compiler-rt/lib/xray/xray_x86_64.cpp).
const XRAY_SLED: [u8; 11] = [0xeb, 0x09, 0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x02, 0x00, 0x00];

/// Bytes of a jump or call with a 32-bit displacement.
pub(crate) const PATCH_BYTES: usize = 5;

/// Droppable nops at the start of `code`, at least [`PATCH_BYTES`] of them: total length and
/// the offsets where a thread can stand.
pub(crate) fn leading_nops(code: &[u8]) -> Option<(usize, Vec<u8>)> {
    if code.starts_with(&XRAY_SLED) {
        return Some((XRAY_SLED.len(), vec![0]));
    }
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let mut boundaries = Vec::new();
    let mut instruction = Instruction::default();
    let mut len = 0;
    while len < PATCH_BYTES {
        if !decoder.can_decode() {
            return None;
        }
        decoder.decode_out(&mut instruction);
        if !is_nop(&instruction) {
            return None;
        }
        boundaries.push(u8::try_from(len).ok()?);
        len += instruction.len();
    }
    Some((len, boundaries))
}

/// Does nothing at all: no register, no memory, no hint that some CPU obeys.
pub(crate) fn is_nop(instruction: &Instruction) -> bool {
    // `f3 90` is Mnemonic::Pause, so it is not among them.
    instruction.mnemonic() == Mnemonic::Nop
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        type Case = (&'static [u8], Option<(usize, &'static [u8])>);
        let cases: [Case; 9] = [
            (&[0x0f, 0x1f, 0x44, 0x00, 0x00], Some((5, &[0]))),
            (&[0x0f, 0x1f, 0x44, 0x00, 0x08], Some((5, &[0]))),
            (&[0x90; 5], Some((5, &[0, 1, 2, 3, 4]))),
            (&[0x66, 0x90, 0x66, 0x90, 0x90], Some((5, &[0, 2, 4]))),
            (&[0x66, 0x90, 0x0f, 0x1f, 0x40, 0x00], Some((6, &[0, 2]))),
            (&XRAY_SLED, Some((11, &[0]))),
            (&[0x90; 4], None),
            (&[0x90, 0x90, 0x90, 0x90, 0xc3], None),
            (&[0xf3, 0x90, 0x90, 0x90, 0x90], None),
        ];
        for (code, expect) in cases {
            let found = leading_nops(code);
            let found = found.as_ref().map(|(len, at)| (*len, at.as_slice()));
            assert_eq!(found, expect, "{code:02x?}");
        }
    }
}
