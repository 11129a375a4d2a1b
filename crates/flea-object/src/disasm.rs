//! Instructions as text, in the words of Linux's verifier log (`kernel/bpf/disasm.c`, 6.18):
//! `r1 = *(u64 *)(r10 -8)`, `if r0 == 0x0 goto pc+3`, `call bpf_map_lookup_elem#1`. For
//! logs and tests only; prints something for every bit pattern and never fails.

use std::fmt;

use crate::helper::Helper;
use crate::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};
use crate::opcode as op;

/// One instruction as text; `second` is the other half of a `lddw`.
#[derive(Clone, Copy, Debug)]
pub struct Disasm {
    insn: Insn,
    second: Option<Insn>,
}

impl Disasm {
    /// The instruction at `insn_idx`; a `lddw` is shown with its second half.
    ///
    /// # Panics
    /// Where `insn_idx` is not in `insns`.
    #[must_use]
    pub fn at(insns: &[Insn], insn_idx: usize) -> Self {
        Self { insn: insns[insn_idx], second: insns.get(insn_idx + 1).copied() }
    }
}

/// A whole program, one `index: (opcode) text` line per instruction, as the verifier's log
/// has it.
#[must_use]
pub fn listing(insns: &[Insn]) -> String {
    use fmt::Write;
    let mut text = String::new();
    let mut i = 0;
    while i < insns.len() {
        let insn = insns[i];
        writeln!(text, "{i}: ({:02x}) {}", insn.opcode, Disasm::at(insns, i))
            .expect("writing to a String cannot fail");
        i += if insn.is_lddw() { 2 } else { 1 };
    }
    text
}

impl fmt::Display for Insn {
    /// As [`Disasm`], the second half of a `lddw` taken as 0.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Disasm { insn: *self, second: None }.fmt(f)
    }
}

impl fmt::Display for Disasm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let insn = &self.insn;
        match insn.class() {
            op::ALU | op::ALU64 => fmt_alu(insn, f),
            op::JMP | op::JMP32 => fmt_jump(insn, f),
            op::LDX => fmt_load(insn, f),
            op::ST | op::STX => fmt_store(insn, f),
            _ if insn.is_lddw() => fmt_lddw(insn, self.second.map_or(0, |second| second.imm), f),
            _ => fmt_unknown(insn, f),
        }
    }
}

fn fmt_unknown(insn: &Insn, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "BUG_{:02x}", insn.opcode)
}

fn fmt_alu(insn: &Insn, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let wide = insn.class() == op::ALU64;
    let r = if wide { 'r' } else { 'w' };
    let (dst, src, imm) = (insn.dst, insn.src, insn.imm);
    let signed = insn.off == 1;
    let operator = match insn.code() {
        op::MOV if insn.is_source_register() && insn.off != 0 => {
            return write!(f, "{r}{dst} = (s{}){r}{src}", insn.off);
        }
        op::NEG => return write!(f, "{r}{dst} = -{r}{dst}"),
        op::END => {
            let name = match (wide, insn.is_source_register()) {
                (true, _) => "bswap",
                (false, false) => "le",
                (false, true) => "be",
            };
            return write!(f, "r{dst} = {name}{imm} r{dst}");
        }
        code => match assignment(code, signed) {
            Some(operator) => operator,
            None => return fmt_unknown(insn, f),
        },
    };
    if insn.is_source_register() {
        write!(f, "{r}{dst} {operator} {r}{src}")
    } else {
        write!(f, "{r}{dst} {operator} {imm}")
    }
}

/// The operator of an arithmetic instruction with two operands, by [`Insn::code`]; `signed` ones
/// divide so.
#[must_use]
pub fn assignment(code: u8, signed: bool) -> Option<&'static str> {
    Some(match code {
        op::ADD => "+=",
        op::SUB => "-=",
        op::MUL => "*=",
        op::DIV if signed => "s/=",
        op::DIV => "/=",
        op::OR => "|=",
        op::AND => "&=",
        op::LSH => "<<=",
        op::RSH => ">>=",
        op::MOD if signed => "s%=",
        op::MOD => "%=",
        op::XOR => "^=",
        op::MOV => "=",
        op::ARSH => "s>>=",
        _ => return None,
    })
}

/// The comparison of a conditional jump, by [`Insn::code`].
#[must_use]
pub fn condition(code: u8) -> Option<&'static str> {
    Some(match code {
        op::JEQ => "==",
        op::JGT => ">",
        op::JGE => ">=",
        op::JSET => "&",
        op::JNE => "!=",
        op::JSGT => "s>",
        op::JSGE => "s>=",
        op::JLT => "<",
        op::JLE => "<=",
        op::JSLT => "s<",
        op::JSLE => "s<=",
        _ => return None,
    })
}

fn fmt_jump(insn: &Insn, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let r = if insn.class() == op::JMP { 'r' } else { 'w' };
    let Some(operator) = condition(insn.code()) else { return fmt_unconditional(insn, f) };
    let (dst, src, off) = (insn.dst, insn.src, insn.off);
    if insn.is_source_register() {
        write!(f, "if {r}{dst} {operator} {r}{src} goto pc{off:+}")
    } else {
        write!(f, "if {r}{dst} {operator} {:#x} goto pc{off:+}", insn.imm)
    }
}

fn fmt_unconditional(insn: &Insn, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match insn.opcode {
        op::JA_OP => write!(f, "goto pc{:+}", insn.off),
        op::GOTOL_OP => write!(f, "gotol pc{:+}", insn.imm),
        op::EXIT_OP => f.write_str("exit"),
        op::CALLX_OP => match insn.callx() {
            Some(register) => write!(f, "callx r{register}"),
            None => fmt_unknown(insn, f),
        },
        op::CALL_OP if insn.src == PSEUDO_CALL => write!(f, "call pc{:+}", insn.imm),
        op::CALL_OP => {
            let name = Helper::from_id(insn.imm).map_or("unknown", Helper::name);
            write!(f, "call {name}#{}", insn.imm)
        }
        _ => fmt_unknown(insn, f),
    }
}

fn fmt_load(insn: &Insn, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let sign = match insn.mode() {
        op::MEM => 'u',
        op::MEMSX => 's',
        _ => return fmt_unknown(insn, f),
    };
    let bits = insn.access_bytes() * 8;
    write!(f, "r{} = *({sign}{bits} *)(r{} {:+})", insn.dst, insn.src, insn.off)
}

fn fmt_store(insn: &Insn, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let bits = insn.access_bytes() * 8;
    let (dst, src, off, imm) = (insn.dst, insn.src, insn.off, insn.imm);
    match (insn.class(), insn.mode()) {
        (op::ST, op::MEM) => write!(f, "*(u{bits} *)(r{dst} {off:+}) = {imm}"),
        (op::STX, op::MEM) => write!(f, "*(u{bits} *)(r{dst} {off:+}) = r{src}"),
        (op::STX, op::ATOMIC) => fmt_atomic(insn, f),
        _ => fmt_unknown(insn, f),
    }
}

fn fmt_atomic(insn: &Insn, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let bits = insn.access_bytes() * 8;
    let width = if bits == 64 { "64" } else { "" };
    let src = insn.src;
    let place = format_args!("(u{bits} *)(r{} {:+})", insn.dst, insn.off).to_string();
    let (operator, name) = match insn.imm & !op::ATOMIC_FETCH {
        op::ATOMIC_ADD => ("+=", "add"),
        op::ATOMIC_OR => ("|=", "or"),
        op::ATOMIC_AND => ("&=", "and"),
        op::ATOMIC_XOR => ("^=", "xor"),
        _ if insn.imm == op::ATOMIC_XCHG => {
            return write!(f, "r{src} = atomic{width}_xchg({place}, r{src})");
        }
        _ if insn.imm == op::ATOMIC_CMPXCHG => {
            return write!(f, "r0 = atomic{width}_cmpxchg({place}, r0, r{src})");
        }
        _ => return fmt_unknown(insn, f),
    };
    if insn.imm & op::ATOMIC_FETCH != 0 {
        write!(f, "r{src} = atomic{width}_fetch_{name}({place}, r{src})")
    } else {
        write!(f, "lock *{place} {operator} r{src}")
    }
}

fn fmt_lddw(insn: &Insn, high: i32, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let (dst, imm) = (insn.dst, insn.imm);
    match insn.src {
        0 => {
            let value = u64::from(high.cast_unsigned()) << 32 | u64::from(imm.cast_unsigned());
            write!(f, "r{dst} = {value:#x}")
        }
        PSEUDO_MAP => write!(f, "r{dst} = map[idx:{imm}]"),
        PSEUDO_MAP_VALUE => write!(f, "r{dst} = map[idx:{imm}][0]{high:+}"),
        PSEUDO_FUNC => write!(f, "r{dst} = subprog[{imm:+}]"),
        _ => fmt_unknown(insn, f),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::{AluOp, Asm, JmpOp, Reg::*, Size};
    use crate::spec::MapIdx;
    use expect_test::expect;

    #[test]
    fn listing_in_the_kernels_words() {
        let mut asm = Asm::new();
        let (out, function) = (asm.new_label(), asm.new_label());
        asm.mov64_imm(R0, -1).mov64_reg(R6, R1).alu32(AluOp::Arsh, R0, 3).neg64(R0);
        asm.sdiv64(R0, R6).alu64(AluOp::Mod, R0, 7).alu32(AluOp::Mov, R0, R1);
        asm.raw(Insn { opcode: 0xbf, dst: 1, src: 2, off: 8, imm: 0 });
        asm.raw(Insn { opcode: 0xdc, dst: 1, src: 0, off: 0, imm: 16 });
        asm.raw(Insn { opcode: 0xd4, dst: 1, src: 0, off: 0, imm: 32 });
        asm.raw(Insn { opcode: 0xd7, dst: 1, src: 0, off: 0, imm: 64 });
        asm.load(Size::DW, R1, R10, -8).raw(Insn { opcode: 0x91, dst: 1, src: 2, off: 0, imm: 0 });
        asm.store(Size::B, R10, -1, R1).store_imm(Size::H, R10, -2, -5);
        asm.atomic_add(Size::W, R10, -4, R1).atomic(op::ATOMIC_OR | 1, Size::DW, R10, -8, R1);
        asm.atomic(op::ATOMIC_XCHG, Size::W, R10, -4, R1);
        asm.atomic(op::ATOMIC_CMPXCHG, Size::DW, R10, -8, R1);
        asm.lddw(R1, 0x1_0000_0002).map_ref(R1, MapIdx(2)).map_value(R1, MapIdx(0), 8);
        asm.function_ref(R2, function).call(Helper::MapLookupElem);
        asm.jump_if(JmpOp::Eq, R0, 0, out).jump32_if(JmpOp::Sgt, R0, R1, out).jump(out);
        asm.raw(Insn { opcode: op::GOTOL_OP, dst: 0, src: 0, off: 0, imm: -70_000 });
        asm.call_local(function).bind(out).exit().bind(function).exit();
        asm.raw(Insn { opcode: 0xff, dst: 0, src: 0, off: 0, imm: 0 });
        expect![[r#"
            0: (b7) r0 = -1
            1: (bf) r6 = r1
            2: (c4) w0 s>>= 3
            3: (87) r0 = -r0
            4: (3f) r0 s/= r6
            5: (97) r0 %= 7
            6: (bc) w0 = w1
            7: (bf) r1 = (s8)r2
            8: (dc) r1 = be16 r1
            9: (d4) r1 = le32 r1
            10: (d7) r1 = bswap64 r1
            11: (79) r1 = *(u64 *)(r10 -8)
            12: (91) r1 = *(s8 *)(r2 +0)
            13: (73) *(u8 *)(r10 -1) = r1
            14: (6a) *(u16 *)(r10 -2) = -5
            15: (c3) lock *(u32 *)(r10 -4) += r1
            16: (db) r1 = atomic64_fetch_or((u64 *)(r10 -8), r1)
            17: (c3) r1 = atomic_xchg((u32 *)(r10 -4), r1)
            18: (db) r0 = atomic64_cmpxchg((u64 *)(r10 -8), r0, r1)
            19: (18) r1 = 0x100000002
            21: (18) r1 = map[idx:2]
            23: (18) r1 = map[idx:0][0]+8
            25: (18) r2 = subprog[+8]
            27: (85) call bpf_map_lookup_elem#1
            28: (15) if r0 == 0x0 goto pc+4
            29: (6e) if w0 s> w1 goto pc+3
            30: (05) goto pc+2
            31: (06) gotol pc-70000
            32: (85) call pc+1
            33: (95) exit
            34: (95) exit
            35: (ff) BUG_ff
        "#]]
        .assert_eq(&listing(&asm.finish().unwrap()));
    }

    #[test]
    fn prints_something_for_every_opcode() {
        for opcode in 0..=u8::MAX {
            let insn = Insn { opcode, dst: 15, src: 15, off: i16::MIN, imm: i32::MIN };
            assert!(!insn.to_string().is_empty());
        }
    }
}
