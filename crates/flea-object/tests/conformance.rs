//! RFC 9669's conformance programs (vectors/, from Alan-Jowett/bpf_conformance), run by the
//! interpreter; and programs with a reserved field set, all of which must be refused.
#![allow(clippy::unwrap_used, reason = "a test panics where its input is not as expected")]

use flea_object::insn::Insn;
use flea_object::interp::{Host, Interpreter, Memory, Protection};
use flea_object::spec::MapIdx;
use flea_object::validate::validate;

const CONFORMANCE: &str = include_str!("vectors/conformance.tsv");
const UNUSED_FIELDS: &str = include_str!("vectors/negative_unused_fields.tsv");

/// Rows of a table as columns, comments left out.
fn rows(table: &str) -> impl Iterator<Item = Vec<&str>> {
    table.lines().filter(|line| !line.starts_with('#')).map(|line| line.split('\t').collect())
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digit_pairs = hex.as_bytes().chunks(2);
    digit_pairs
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn insns_of(hex: &str) -> Vec<Insn> {
    bytes_of(hex).chunks(8).map(|insn| Insn::decode(insn.try_into().unwrap())).collect()
}

/// One program calls helper 5 and drops the result.
struct OnlyHelper5;

impl Host for OnlyHelper5 {
    fn call(&mut self, helper: i32, _: [u64; 5], _: &mut Memory) -> Result<u64, String> {
        if helper == 5 { Ok(u64::MAX) } else { Err("there is helper 5 alone".to_owned()) }
    }

    fn map_handle(&self, _: MapIdx) -> Option<u64> {
        None
    }

    fn map_value_address(&self, _: MapIdx) -> Option<u64> {
        None
    }
}

fn run(insns: &[Insn], memory_bytes: Vec<u8>) -> Result<u64, String> {
    let interpreter = Interpreter::new(insns).map_err(|e| e.what.to_string())?;
    let mut memory = Memory::new();
    let size = memory_bytes.len() as u64;
    let address = if size == 0 { 0 } else { memory.add(memory_bytes, Protection::ReadWrite) };
    let args = [address, size, 0, 0, 0];
    interpreter.run(args, &mut memory, &mut OnlyHelper5).map_err(|e| e.to_string())
}

#[test]
fn conformance() {
    let (mut n_right, mut n_refused) = (0, 0);
    for row in rows(CONFORMANCE) {
        let [name, _, _, memory, program, expected, linux] = row[..] else {
            panic!("seven columns expected: {row:?}");
        };
        let memory = if memory == "-" { vec![] } else { bytes_of(memory) };
        let got = run(&insns_of(program), memory);
        if let Some(reason) = linux.strip_prefix("reject: ") {
            // Linux has no callx at all; we have those that lead to a function of the program.
            let callx = "insn 2: call through 0x5, which is no function of the program";
            let reason = if name == "callx" { callx } else { reason };
            assert_eq!(got, Err(reason.to_owned()), "{name}");
            n_refused += 1;
        } else {
            let expected = u64::from_str_radix(expected.trim_start_matches("0x"), 16).unwrap();
            assert_eq!(got, Ok(expected), "{name}");
            n_right += 1;
        }
    }
    assert_eq!((n_right, n_refused), (300, 13));
}

#[test]
fn unused_fields_are_refused() {
    let mut n_refused = 0;
    for row in rows(UNUSED_FIELDS) {
        let insns = insns_of(row[1]);
        let error = validate(&insns).expect_err(row[0]);
        assert_eq!(error.insn_idx, 0, "{}", row[0]);
        assert!(error.to_string().contains("reserved fields"), "{}: {error}", row[0]);
        n_refused += 1;
    }
    assert_eq!(n_refused, 45);
}

/// The encoder is the decoder's inverse on every program here.
#[test]
fn encoding_round_trips() {
    for row in rows(CONFORMANCE) {
        let bytes: Vec<u8> = insns_of(row[4]).iter().flat_map(|insn| insn.encode()).collect();
        assert_eq!(bytes, bytes_of(row[4]), "{}", row[0]);
    }
}
