//! A small assembler for test programs, in the notation of Linux's verifier log.
//!
//! ```text
//! r1 = 5 | r1 = r2 | w1 = w2 | r1 = (s8)r2 | r1 = -r1 | r1 = be16 r1 | r1 = 0x123 ll
//! r1 = map 0 | r1 = value 0 8            r1 += r2 | w1 s/= 3 | r1 s>>= 4
//! r1 = *(u64 *)(r10 - 8) | r1 = *(s8 *)(r2 + 0) | *(u32 *)(r10 - 4) = r1
//! lock *(u64 *)(r1 + 0) += r2 | fetch *(u64 *)(r1 + 0) += r2 | xchg .. r2 | cmpxchg .. r2
//! if r1 == 0 goto out | if w1 s> w2 goto out | goto out | gotol out | out:
//! r1 = func label | callx r1
//! call bpf_ktime_get_ns | call #99 | call function | exit | .raw 0x07 1 0 0 5
//! ```

use std::collections::HashMap;

use flea_object::helper::Helper;
use flea_object::insn::{Insn, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP, PSEUDO_MAP_VALUE};

/// Assembles `lines`; panics with the line on a mistake.
pub fn assemble(lines: &[&str]) -> Vec<Insn> {
    let mut labels = HashMap::new();
    let mut n = 0;
    for line in lines {
        match line.strip_suffix(':') {
            Some(label) => {
                labels.insert(label.to_string(), n);
            }
            None => n += if line.contains(" = map ") || is_wide(line) { 2 } else { 1 },
        }
    }
    let mut out = Vec::new();
    for line in lines.iter().filter(|l| !l.ends_with(':')) {
        let insns =
            one(line, out.len() as i32, &labels).unwrap_or_else(|| panic!("syntax: {line}"));
        out.extend(insns);
    }
    out
}

fn is_wide(line: &str) -> bool {
    line.contains(" = value ") || line.contains(" = func ") || line.ends_with(" ll")
}

fn one(line: &str, at: i32, labels: &HashMap<String, i32>) -> Option<Vec<Insn>> {
    let w: Vec<&str> = line.split_whitespace().collect();
    let to = |label: &str| labels.get(label).map(|l| l - at - 1);
    let single = |opcode, dst, src, off, imm| Some(vec![Insn { opcode, dst, src, off, imm }]);
    match w.as_slice() {
        ["exit"] => single(0x95, 0, 0, 0, 0),
        ["goto", l] => single(0x05, 0, 0, to(l)? as i16, 0),
        ["gotol", l] => single(0x06, 0, 0, 0, to(l)?),
        ["call", name] => call(name, &to),
        [".raw", op, dst, src, off, imm] => single(
            int(op)? as u8,
            int(dst)? as u8,
            int(src)? as u8,
            int(off)? as i16,
            int(imm)? as i32,
        ),
        ["if", a, cond, b, "goto", l] => {
            let conds =
                [("==", 1), (">", 2), (">=", 3), ("&", 4), ("!=", 5), ("s>", 6), ("s>=", 7)];
            let more = [("<", 0xa), ("<=", 0xb), ("s<", 0xc), ("s<=", 0xd)];
            let code = conds.iter().chain(&more).find(|(s, _)| s == cond)?.1;
            let (wide, dst) = reg(a)?;
            let (src_bit, src, imm) = operand(b)?;
            let class = if wide { 5 } else { 6 };
            single(code << 4 | src_bit | class, dst, src, to(l)? as i16, imm)
        }
        ["lock" | "fetch" | "xchg" | "cmpxchg", ..] => atomic(line),
        _ if line.starts_with('*') => store(line),
        ["callx", r] => single(0x8d, reg(r)?.1, 0, 0, 0),
        [dst, "=", "func", l] => Some(vec![
            Insn { opcode: 0x18, dst: reg(dst)?.1, src: PSEUDO_FUNC, off: 0, imm: to(l)? },
            Insn::default(),
        ]),
        [dst, "=", rest @ ..] => assign(dst, rest, line),
        [dst, op, src] => {
            let ops = [
                ("+=", 0, 0),
                ("-=", 1, 0),
                ("*=", 2, 0),
                ("/=", 3, 0),
                ("s/=", 3, 1),
                ("|=", 4, 0),
                ("&=", 5, 0),
                ("<<=", 6, 0),
                (">>=", 7, 0),
                ("%=", 9, 0),
                ("s%=", 9, 1),
                ("^=", 0xa, 0),
                ("s>>=", 0xc, 0),
            ];
            let (_, code, off) = ops.iter().find(|(s, _, _)| s == op)?;
            let (wide, dst) = reg(dst)?;
            let (src_bit, src, imm) = operand(src)?;
            single(code << 4 | src_bit | if wide { 7 } else { 4 }, dst, src, *off, imm)
        }
        _ => None,
    }
}

fn call(name: &str, to: &dyn Fn(&str) -> Option<i32>) -> Option<Vec<Insn>> {
    let helper = Helper::ALL.iter().find(|h| h.name() == name);
    let (src, imm) = match (helper, name.strip_prefix('#')) {
        (Some(h), _) => (0, *h as u32 as i32),
        (None, Some(n)) => (0, int(n)? as i32),
        (None, None) => (PSEUDO_CALL, to(name)?),
    };
    Some(vec![Insn { opcode: 0x85, dst: 0, src, off: 0, imm }])
}

fn assign(dst: &str, rest: &[&str], line: &str) -> Option<Vec<Insn>> {
    let (wide, dst) = reg(dst)?;
    let single = |opcode, src, off, imm| Some(vec![Insn { opcode, dst, src, off, imm }]);
    let pair = |src, low: u64, high: u64| {
        let first = Insn { opcode: 0x18, dst, src, off: 0, imm: low as u32 as i32 };
        Some(vec![first, Insn { imm: high as u32 as i32, ..Insn::default() }])
    };
    let class = if wide { 7 } else { 4 };
    match rest {
        ["map", n] => pair(PSEUDO_MAP, int(n)? as u64, 0),
        ["value", n, off] => pair(PSEUDO_MAP_VALUE, int(n)? as u64, int(off)? as u64),
        [n, "ll"] => {
            let n = int(n)? as u64;
            pair(0, n, n >> 32)
        }
        [kind, _] if kind.starts_with("be") => single(0xdc, 0, 0, kind[2..].parse().ok()?),
        [kind, _] if kind.starts_with("le") => single(0xd4, 0, 0, kind[2..].parse().ok()?),
        [kind, _] if kind.starts_with("bswap") => single(0xd7, 0, 0, kind[5..].parse().ok()?),
        [r] if r.starts_with("-r") || r.starts_with("-w") => single(0x80 | class, 0, 0, 0),
        [r] if r.starts_with("(s") => {
            let (bits, src) = r[2..].split_once(')')?;
            single(0xb8 | class, reg(src)?.1, bits.parse().ok()?, 0)
        }
        [r] if !r.starts_with('*') => {
            let (src_bit, src, imm) = operand(r)?;
            single(0xb0 | src_bit | class, src, 0, imm)
        }
        _ => {
            let (size, signed, base, off, _) = place(line.split_once('=')?.1)?;
            single(size | if signed { 0x81 } else { 0x61 }, base, off, 0)
        }
    }
}

fn store(line: &str) -> Option<Vec<Insn>> {
    let (size, _, dst, off, rest) = place(line)?;
    let (src_bit, src, imm) = operand(rest.trim().strip_prefix('=')?.trim())?;
    let class = if src_bit == 0 { 0x62 } else { 0x63 };
    Some(vec![Insn { opcode: size | class, dst, src, off, imm }])
}

fn atomic(line: &str) -> Option<Vec<Insn>> {
    let (kind, rest) = line.split_once(' ')?;
    let (size, _, dst, off, rest) = place(rest)?;
    let words: Vec<&str> = rest.split_whitespace().collect();
    let src = reg(words.last()?)?.1;
    let imm = match (kind, words[0]) {
        ("xchg", _) => 0xe1,
        ("cmpxchg", _) => 0xf1,
        (_, op) => {
            let code = match op {
                "+=" => 0x00,
                "|=" => 0x40,
                "&=" => 0x50,
                "^=" => 0xa0,
                _ => return None,
            };
            code | i32::from(kind == "fetch")
        }
    };
    Some(vec![Insn { opcode: size | 0xc3, dst, src, off, imm }])
}

/// `*(u32 *)(r10 - 4) REST`: size bits, signed, base, offset, rest.
fn place(text: &str) -> Option<(u8, bool, u8, i16, &str)> {
    let text = text.trim().strip_prefix("*(")?;
    let (ty, text) = text.split_once(" *)(")?;
    let (address, rest) = text.split_once(')')?;
    let size = match &ty[1..] {
        "8" => 0x10,
        "16" => 0x08,
        "32" => 0x00,
        "64" => 0x18,
        _ => return None,
    };
    let w: Vec<&str> = address.split_whitespace().collect();
    let off: i64 = int(w.get(2)?)?;
    let off = if w[1] == "-" { -off } else { off };
    Some((size, ty.starts_with('s'), reg(w[0])?.1, off as i16, rest))
}

fn operand(text: &str) -> Option<(u8, u8, i32)> {
    if let Some((_, r)) = reg(text) {
        return Some((8, r, 0));
    }
    Some((0, 0, int(text)? as i32))
}

fn reg(text: &str) -> Option<(bool, u8)> {
    let wide = text.starts_with('r');
    let n = text.strip_prefix(['r', 'w'])?.parse().ok()?;
    Some((wide, n))
}

fn int(text: &str) -> Option<i64> {
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |d| (-1, d));
    match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok().map(|n| sign * n as i64),
        None => digits.parse::<i64>().ok().map(|n| sign * n),
    }
}
