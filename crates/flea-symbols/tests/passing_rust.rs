//! Signatures against rustc's own callers: each type is passed to a function that keeps all
//! registers and the stack, and every word of the signature has to hold what belongs there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;

use std::collections::BTreeSet;

use compiled::{Said, parse_said, run_program};
use flea_symbols::signature::{ArgWord, RetWord, Signature, SignatureSource};
use flea_symbols::{Function, Module};

const HARNESS: &str = include_str!("passing/harness.rs");
/// `want`'s mark for a value that is passed by its address.
const BEHIND: u64 = 99;

struct Case<'s> {
    said: &'s Said,
    name: &'s str,
}

impl Case<'_> {
    fn get(&self, what: &str, index: usize) -> Option<&[u8]> {
        self.said.get(&(what.to_owned(), self.name.to_owned(), index)).map(Vec::as_slice)
    }

    fn number(&self, what: &str, index: usize) -> u64 {
        let bytes =
            self.get(what, index).unwrap_or_else(|| panic!("{}: no {what} {index}", self.name));
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    /// The value's words: what they hold, and how many bytes of it count.
    fn wanted(&self) -> Vec<(u64, u64)> {
        (0..)
            .take_while(|i| self.get("want", *i).is_some())
            .map(|i| (self.number("want", i), self.number("bytes", i)))
            .collect()
    }

    fn word(&self, word: ArgWord) -> u64 {
        match word {
            ArgWord::Gpr(i) => self.number("gpr", i.into()),
            ArgWord::Xmm(i) => self.number("xmm", i.into()),
            ArgWord::Stack(i) => self.number("stack", usize::try_from(i).unwrap()),
            ArgWord::XmmWord { .. } => panic!("{}: no such word in Rust", self.name),
        }
    }

    fn check_param(&self, words: &[ArgWord]) {
        let wanted = self.wanted();
        assert_eq!(words.len(), wanted.len(), "{}: {words:?}", self.name);
        for (word, (value, bytes)) in words.iter().zip(wanted) {
            if bytes == BEHIND {
                let at = match word {
                    ArgWord::Gpr(i) => usize::from(*i),
                    ArgWord::Stack(i) => 6 + usize::try_from(*i).unwrap(),
                    _ => panic!("{}: an address in {word:?}", self.name),
                };
                let raw = self.get("raw", 0).unwrap();
                let there =
                    self.get("behind", at).unwrap_or_else(|| panic!("{}: no pointer", self.name));
                assert_same(there, raw, value, self.name);
                continue;
            }
            assert_eq!(
                masked(self.word(*word), bytes),
                masked(value, bytes),
                "{}: {words:?}",
                self.name
            );
        }
    }

    fn check_result(&self, words: &[RetWord]) {
        let wanted = self.wanted();
        assert_eq!(words.len(), wanted.len(), "{}: {words:?}", self.name);
        for (word, (value, bytes)) in words.iter().zip(wanted) {
            if bytes == BEHIND {
                let raw = self.get("raw", 0).unwrap();
                // A heap pointer in the value is another's in the second call.
                if !["string", "vector"].contains(&self.name) {
                    assert_same(self.get("result", 0).unwrap(), raw, value, self.name);
                }
                continue;
            }
            let held = match word {
                RetWord::Rax => self.number("rax", 0),
                RetWord::Rdx => self.number("rax", 1),
                RetWord::Xmm0 => self.number("vector", 0),
                RetWord::Xmm1 => self.number("vector", 1),
                _ => panic!("{}: {word:?} in Rust", self.name),
            };
            assert_eq!(masked(held, bytes), masked(value, bytes), "{}: {words:?}", self.name);
        }
    }
}

/// The bytes of `there` that `mask` has bits for are those of `raw`.
fn assert_same(there: &[u8], raw: &[u8], mask: u64, name: &str) {
    for (i, (there, raw)) in there.iter().zip(raw).enumerate().filter(|(i, _)| mask >> i & 1 != 0) {
        assert_eq!(there, raw, "{name}: byte {i}");
    }
}

fn masked(word: u64, bytes: u64) -> u64 {
    if bytes >= 8 { word } else { word & ((1 << (8 * bytes)) - 1) }
}

fn find<'m>(module: &'m Module<'_>, name: &str) -> &'m Function {
    let is_it = |f: &&Function| {
        f.demangled_short().is_some_and(|demangled| {
            demangled.ends_with(&format!("::{name}")) && demangled.matches("::").count() == 1
        })
    };
    module.functions().iter().find(is_it).unwrap_or_else(|| panic!("no function {name}"))
}

fn check(level: &str) -> BTreeSet<String> {
    let flags = ["-g", "--edition=2024", "-Cpanic=abort", "-pie", level, "-Cmetadata=x"];
    let flags: Vec<&str> = flags.into_iter().filter(|flag| *flag != "-pie").collect();
    let name = format!("passing{}", level.replace("=", "_"));
    let Some((bytes, output)) = run_program(&name, "rustc", HARNESS, &flags) else {
        return BTreeSet::new();
    };
    let said = parse_said(&output);
    let module = Module::parse(&bytes, None).unwrap();
    let names: BTreeSet<&str> =
        said.keys().filter(|(what, ..)| what == "raw").map(|(_, name, _)| name.as_str()).collect();
    assert!(names.len() > 50);
    let mut refused = BTreeSet::new();
    for name in names {
        let case = Case { said: &said, name };
        let signature = module.signature(find(&module, name));
        assert_eq!(signature.source, SignatureSource::Dwarf, "{name}: {:?}", signature.doubt);
        let [z, a, b] = signature.params.as_slice() else { panic!("{name}: {signature:?}") };
        for (param, value, bytes) in [(z, 0x5a, 1), (b, 0x1122_3344_5566_7788, 8)] {
            if let [word] = param.words.as_slice() {
                assert_eq!(masked(case.word(*word), bytes), value, "{name}: {:?}", signature);
            } else {
                refused.insert(format!("{name}.{}", param.name.as_deref().unwrap()));
            }
        }
        match &a.absent {
            None => case.check_param(&a.words),
            Some(_) => drop(refused.insert(format!("{name}.a"))),
        }
        match &signature.ret.absent {
            None => case.check_result(&signature.ret.words),
            Some(_) => drop(refused.insert(format!("{name}()"))),
        }
    }
    check_crowded(&said, &module.signature(find(&module, "crowded")));
    refused
}

fn check_crowded(said: &Said, signature: &Signature) {
    let case = Case { said, name: "crowded" };
    let text = case.number("text", 0);
    let wanted: [(&str, &[u64]); 11] = [
        ("a", &[1]),
        ("b", &[2]),
        ("c", &[3]),
        ("d", &[4]),
        ("e", &[5]),
        ("s", &[text, 9]),
        ("p", &[6, 7]),
        ("x", &[0.5_f64.to_bits()]),
        ("w", &[8, 0]),
        ("l", &[]),
        ("z", &[12]),
    ];
    for (param, (name, values)) in signature.params.iter().zip(wanted) {
        assert_eq!(param.name.as_deref(), Some(name));
        assert_eq!(param.absent, None, "{name}");
        if name == "l" {
            assert_eq!(param.words.len(), 1);
            continue;
        }
        let bytes = match name {
            "p" => 4,
            "z" => 1,
            _ => 8,
        };
        let held: Vec<u64> =
            param.words.iter().map(|word| masked(case.word(*word), bytes)).collect();
        assert_eq!(held, values, "{name} in {:?}", param.words);
    }
}

#[test]
fn unoptimized() {
    assert_eq!(check("-Copt-level=0"), BTreeSet::new());
}

/// LLVM does not return the address of a result in memory to callers that it knows.
#[test]
fn optimized() {
    let in_memory = [
        "e4",
        "infallible_large",
        "inclusive",
        "large",
        "result_io",
        "result_sizes",
        "slice_and",
        "string",
        "twelve",
        "two_doubles",
        "vector",
    ];
    let refused = check("-Copt-level=3");
    let expected: BTreeSet<String> = in_memory.iter().map(|name| format!("{name}()")).collect();
    assert!(refused.is_empty() || refused == expected, "{refused:?}");
}
