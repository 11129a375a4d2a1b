//! `bpf_trace_printk`: formats a line into a record of a ring buffer. Knows C's integer
//! formats, strings and pointers; no floating point, no precision, as in Linux.

use crate::errno::Errno;
use crate::mem::{Bytes, low_half};
use crate::probe;
use crate::ringbuf::Ring;

/// Longest text; what is longer is cut.
pub const MAX_BYTES: usize = 512;
const MAX_PADDING: u32 = 512;

/// The text is on the stack already: strings are read in small pieces.
const STRING_CHUNK: usize = 32;

/// Writes the text of `format`, a C string, with `args` (u64 each) to `ring`. Returns its
/// length in bytes.
///
/// # Errors
/// EINVAL: a conversion that is not known, or has no argument; EAGAIN: the ring is full.
pub fn print(ring: &Ring<'_>, format: Bytes<'_>, args: Bytes<'_>) -> Result<u32, Errno> {
    let mut text = Text { bytes: [0; MAX_BYTES], len: 0 };
    write(&mut text, format, args)?;
    let bytes = text.bytes.get(..text.len).unwrap_or_default();
    ring.output(Bytes::from(bytes))?;
    Ok(low_half(text.len as u64))
}

/// The text so far.
struct Text {
    bytes: [u8; MAX_BYTES],
    len: usize,
}

/// One conversion: `%[flags][width][length]letter`.
#[derive(Clone, Copy, Default)]
struct Spec {
    flags: u8,
    width: u32,
    /// Bytes of the integer argument.
    size_bytes: u32,
    letter: u8,
}

mod flag {
    pub const LEFT: u8 = 1;
    pub const ZERO: u8 = 2;
    pub const PLUS: u8 = 4;
    pub const SPACE: u8 = 8;
    pub const PREFIX: u8 = 16;
}

fn write(text: &mut Text, format: Bytes<'_>, args: Bytes<'_>) -> Result<(), Errno> {
    let mut at = 0;
    let mut arg_at = 0;
    while let Some(byte) = format.byte(at) {
        at += 1;
        match byte {
            0 => break,
            b'%' => {}
            _ => {
                text.push(byte);
                continue;
            }
        }
        let spec = Spec::parse(format, &mut at).ok_or(Errno::EINVAL)?;
        if spec.letter == b'%' {
            text.push(b'%');
            continue;
        }
        if arg_at + 8 > args.len() {
            return Err(Errno::EINVAL);
        }
        text.convert(spec, args.word(arg_at));
        arg_at += 8;
    }
    Ok(())
}

impl Spec {
    fn parse(format: Bytes<'_>, at: &mut u64) -> Option<Self> {
        let mut spec = Self { size_bytes: 4, ..Self::default() };
        loop {
            let flag = match format.byte(*at)? {
                b'-' => flag::LEFT,
                b'0' => flag::ZERO,
                b'+' => flag::PLUS,
                b' ' => flag::SPACE,
                b'#' => flag::PREFIX,
                _ => break,
            };
            spec.flags |= flag;
            *at += 1;
        }
        while let digit @ b'0'..=b'9' = format.byte(*at)? {
            spec.width = spec.width.saturating_mul(10).saturating_add(u32::from(digit - b'0'));
            *at += 1;
        }
        loop {
            spec.size_bytes = match format.byte(*at)? {
                b'l' | b'z' | b'j' | b't' => 8,
                b'h' if spec.size_bytes == 2 => 1,
                b'h' => 2,
                _ => break,
            };
            *at += 1;
        }
        spec.letter = format.byte(*at)?;
        *at += 1;
        match spec.letter {
            // %pks and %pus are strings, %px is a plain address.
            b'p' => match format.byte(*at) {
                Some(b'k' | b'u') if format.byte(*at + 1) == Some(b's') => {
                    *at += 2;
                    spec.letter = b's';
                }
                Some(b'x') => *at += 1,
                _ => {}
            },
            b'd' | b'i' | b'u' | b'x' | b'X' | b'o' | b'c' | b's' | b'%' => {}
            _ => return None,
        }
        Some(spec)
    }
}

impl Text {
    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = byte;
            self.len += 1;
        }
    }

    fn repeat(&mut self, byte: u8, n: u32) {
        for _ in 0..n.min(MAX_PADDING) {
            self.push(byte);
        }
    }

    fn convert(&mut self, spec: Spec, arg: u64) {
        match spec.letter {
            b's' => self.string(spec, arg),
            b'c' => {
                let [byte, ..] = arg.to_le_bytes();
                let padding = spec.width.saturating_sub(1);
                if spec.flags & flag::LEFT == 0 {
                    self.repeat(b' ', padding);
                }
                self.push(byte);
                if spec.flags & flag::LEFT != 0 {
                    self.repeat(b' ', padding);
                }
            }
            _ => self.integer(spec, arg),
        }
    }

    fn integer(&mut self, spec: Spec, arg: u64) {
        let unused_bits = if spec.letter == b'p' { 0 } else { 64 - 8 * spec.size_bytes };
        let mut number = (arg << unused_bits) >> unused_bits;
        let (mut sign, mut prefix): (Option<u8>, &[u8; 2]) = (None, &[0, 0]);
        let base = match spec.letter {
            b'd' | b'i' => {
                let signed = (arg << unused_bits).cast_signed() >> unused_bits;
                number = signed.unsigned_abs();
                sign = match spec.flags {
                    _ if signed < 0 => Some(b'-'),
                    f if f & flag::PLUS != 0 => Some(b'+'),
                    f if f & flag::SPACE != 0 => Some(b' '),
                    _ => None,
                };
                10
            }
            b'u' => 10,
            b'o' => 8,
            b'p' => {
                prefix = b"0x";
                16
            }
            letter => {
                if spec.flags & flag::PREFIX != 0 && number != 0 {
                    prefix = if letter == b'X' { b"0X" } else { b"0x" };
                }
                16
            }
        };
        let digits = Digits::new(number, base, spec.letter == b'X');
        let length = digits.len + u32::from(sign.is_some()) + if prefix[0] != 0 { 2 } else { 0 };
        let padding = spec.width.saturating_sub(length);
        let left = spec.flags & flag::LEFT != 0;
        let zeros = !left && spec.flags & flag::ZERO != 0;
        if !left && !zeros {
            self.repeat(b' ', padding);
        }
        for byte in sign.into_iter().chain(prefix.iter().copied().filter(|b| *b != 0)) {
            self.push(byte);
        }
        if zeros {
            self.repeat(b'0', padding);
        }
        for at in (0..digits.len).rev() {
            self.push(digits.reversed.get(at as usize).copied().unwrap_or(b'?'));
        }
        if left {
            self.repeat(b' ', padding);
        }
    }

    /// The string is read right into the text, then moved to the right where its width asks
    /// for it. One that cannot be read is empty, as in Linux.
    fn string(&mut self, spec: Spec, from: u64) {
        let start = self.len;
        let Some(room) = self.bytes.get_mut(start..) else { return };
        let size = low_half(room.len() as u64);
        // SAFETY: `room` is this many bytes.
        let with_nul =
            unsafe { probe::read_str::<STRING_CHUNK>(room.as_mut_ptr(), size, from) }.unwrap_or(0);
        let length = with_nul.saturating_sub(1);
        let padding = spec.width.saturating_sub(length);
        if spec.flags & flag::LEFT != 0 {
            self.len = start + length as usize;
            self.repeat(b' ', padding);
            return;
        }
        let shift = padding.min(size) as usize;
        for at in (0..length as usize).rev() {
            let byte = self.bytes.get(start + at).copied().unwrap_or(b'?');
            if let Some(place) = self.bytes.get_mut(start + at + shift) {
                *place = byte;
            }
        }
        self.repeat(b' ', padding);
        self.len = (self.len + length as usize).min(MAX_BYTES);
    }
}

/// A number's digits, the lowest first.
struct Digits {
    reversed: [u8; 24],
    len: u32,
}

impl Digits {
    fn new(mut number: u64, base: u64, upper: bool) -> Self {
        let mut digits = Self { reversed: [b'0'; 24], len: 0 };
        let ten = if upper { b'A' } else { b'a' };
        for place in &mut digits.reversed {
            let [digit, ..] = (number % base).to_le_bytes();
            *place = if digit < 10 { b'0' + digit } else { ten + (digit - 10) };
            number /= base;
            digits.len += 1;
            if number == 0 {
                break;
            }
        }
        digits
    }
}
