//! What programs saw is what the function received and returned. Start at [`Seen::check`].

use flea::signature::{ArgWord, RetWord, Signature};

use crate::emit::{Places, passed};
use crate::generate::{Form, Function};
use crate::programs::{HEADER_WORDS, Shape, Side, session_cookie};
use crate::target::{Round, word};
use crate::types::{Eightbyte, Type};

/// What this test expects of one parameter's words.
struct Expected<'a> {
    what: String,
    ty: &'a Type,
    /// Bytes, and which of their bits mean something.
    bytes: &'a [u8],
    mask: Vec<u8>,
    /// Where the value is, if that is what is passed.
    address: Option<u64>,
}

/// One side's record of one function, and all there is to compare it with.
pub struct Seen<'a> {
    pub function: &'a Function,
    pub index: usize,
    pub places: &'a Places,
    pub round: &'a Round,
    pub signature: &'a Signature,
    pub shape: &'a Shape,
    pub address: u64,
    /// The type of `this`.
    pub this: &'a Type,
}

impl Seen<'_> {
    /// The words in `record` are those values.
    pub fn check(&self, side: Side, record: &[u8], say: &mut dyn FnMut(String)) {
        let header: [u64; HEADER_WORDS] = std::array::from_fn(|i| word(record, 8 * i));
        let is_session_exit = side.is_exit && side.kind == flea::ProgramKind::Fsession;
        let cookie = if is_session_exit { session_cookie(self.index) } else { 0 };
        let n_args = self.shape.n_args as u64;
        let expected = [1, n_args, self.address, cookie];
        if header != expected {
            let what = "count of runs, of arguments, function's address, session cookie";
            say(format!("{what}: expected {expected:x?}, found {header:x?}"));
        }
        self.check_arguments(record, say);
        if side.is_exit {
            self.check_result(record, say);
        }
    }

    fn expected(&self) -> Vec<Expected<'_>> {
        let mut expected = Vec::new();
        if self.function.form == Form::Method {
            let bytes = self.round.log(self.places.this, 8);
            let ty = self.this;
            let what = "this".to_owned();
            expected.push(Expected { what, ty, bytes, mask: ty.mask(), address: None });
        }
        for (i, param) in self.function.params.iter().enumerate() {
            let at = self.places.addresses[i];
            expected.push(Expected {
                what: format!("p{i} ({})", param.spelling()),
                ty: &param.ty,
                bytes: self.round.log(self.places.received[i], param.ty.size),
                mask: param.ty.mask(),
                address: param.is_address().then(|| self.round.word(at)),
            });
        }
        expected
    }

    fn check_arguments(&self, record: &[u8], say: &mut dyn FnMut(String)) {
        let expected = self.expected();
        let n_params = self.signature.params.len();
        if n_params != expected.len() {
            say(format!("{n_params} parameters in the signature, not {}", expected.len()));
            return;
        }
        let (mut slot, mut n_reads) = (0, 0);
        for (expected, param) in expected.iter().zip(&self.signature.params) {
            let first = HEADER_WORDS + slot;
            slot += param.words.len();
            if param.absent.is_some() {
                continue;
            }
            if let Some(address) = expected.address {
                let seen = word(record, 8 * first);
                if param.words.len() != 1 || seen != address {
                    say(format!(
                        "{}: expected address {address:#x}, found {seen:#x}",
                        expected.what
                    ));
                }
                let at = 8 * self.shape.read_at(n_reads);
                let seen = &record[at..at + expected.bytes.len()];
                masked(&format!("{} in memory", expected.what), expected, 0, seen, say);
                n_reads += 1;
            } else {
                value(expected, &param.words, record, first, say);
            }
        }
    }

    fn check_result(&self, record: &[u8], say: &mut dyn FnMut(String)) {
        let words = &self.signature.ret.words;
        if self.signature.ret.absent.is_some() {
            return;
        }
        let Some(ty) = &self.function.ret else {
            if !words.is_empty() {
                say(format!("void, but its result is in {words:?}"));
            }
            return;
        };
        let given = self.round.log(self.places.returned, ty.size);
        let (what, mask) = ("result".to_owned(), ty.mask());
        let expected = Expected { what, ty, bytes: given, mask, address: None };
        if ty.is_returned_in_memory() {
            if words != &[RetWord::Rax] {
                say(format!("its result is in memory, not in {words:?}"));
                return;
            }
            let at = 8 * self.shape.result_memory_at();
            masked("result in memory", &expected, 0, &record[at..at + ty.size], say);
            return;
        }
        let eightbytes = in_registers(ty);
        if words.len() != eightbytes.len() {
            say(format!("its result takes {} words, not {words:?}", eightbytes.len()));
        }
        let first = self.shape.result_at();
        for (n, &eightbyte) in eightbytes.iter().enumerate().take(self.shape.n_results) {
            let seen = &record[8 * (first + n)..][..8];
            masked(&format!("result, slot {n}"), &expected, eightbyte, seen, say);
        }
    }
}

/// The function received what was passed, and its caller got what it returned.
pub fn received(
    function: &Function,
    places: &Places,
    inputs: &[u8],
    round: &Round,
    say: &mut dyn FnMut(String),
) {
    for (i, ty) in passed(function).enumerate() {
        let given = &inputs[places.inputs[i]..][..ty.size];
        differ(&format!("received p{i}"), ty, given, round.log(places.received[i], ty.size), say);
    }
    if let Some(ty) = &function.ret {
        let given = &inputs[places.result..][..ty.size];
        differ("returned", ty, given, round.log(places.returned, ty.size), say);
    }
}

/// The words of a value, which are in registers or on the stack.
fn value(
    expected: &Expected<'_>,
    words: &[ArgWord],
    record: &[u8],
    first: usize,
    say: &mut dyn FnMut(String),
) {
    // A whole eightbyte of padding has no register, but its place on the stack.
    let on_stack = matches!(words.first(), Some(ArgWord::Stack(_)));
    let eightbytes =
        if on_stack { (0..expected.ty.n_words()).collect() } else { in_registers(expected.ty) };
    if words.len() != eightbytes.len() {
        say(format!("{}: expected {} words, not {words:?}", expected.what, eightbytes.len()));
        return;
    }
    for (n, (&eightbyte, place)) in eightbytes.iter().zip(words).enumerate() {
        let seen = &record[8 * (first + n)..][..8];
        let what =
            format!("{}, word {n} in {place:?} (slot {})", expected.what, first + n - HEADER_WORDS);
        masked(&what, expected, eightbyte, seen, say);
    }
}

/// The eightbytes that have a register, or a part of one.
fn in_registers(ty: &Type) -> Vec<usize> {
    match ty.classes() {
        Some(classes) => {
            let classes = classes.iter().enumerate();
            classes.filter(|(_, class)| **class != Eightbyte::None).map(|(i, _)| i).collect()
        }
        None => (0..ty.n_words()).collect(),
    }
}

/// Compares `seen` with the expected bytes from `eightbyte` on.
fn masked(
    what: &str,
    expected: &Expected<'_>,
    eightbyte: usize,
    seen: &[u8],
    say: &mut dyn FnMut(String),
) {
    let bytes = &expected.bytes[8 * eightbyte..];
    let mask = &expected.mask[8 * eightbyte..];
    let same = bytes.iter().zip(mask).zip(seen).all(|((a, m), b)| a & m == b & m);
    if !same {
        let n = seen.len().min(bytes.len());
        say(format!(
            "{what}: expected {:02x?}, found {:02x?}, of which {:02x?} count",
            &bytes[..n],
            &seen[..n],
            &mask[..n]
        ));
    }
}

fn differ(what: &str, ty: &Type, a: &[u8], b: &[u8], say: &mut dyn FnMut(String)) {
    let mask = ty.mask();
    if !a.iter().zip(&mask).zip(b).all(|((a, m), b)| a & m == b & m) {
        say(format!("{what} ({}): expected {a:02x?}, found {b:02x?}", ty.spelling));
    }
}
