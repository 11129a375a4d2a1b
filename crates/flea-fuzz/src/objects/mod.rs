//! Damaged object files: each gives an object or an error, in finite time, in memory in
//! proportion, without a panic; and the programs of an object get a verdict.

pub mod handmade;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use flea_generate::Random;
use flea_verifier::Context;

use crate::allocated::peak_bytes;
use crate::campaign::{Failure, Fuzzer, Kind, Outcome};
use crate::cpu::thread_time;

/// Compilers whose objects are damaged; what they write differs.
const COMPILERS: [&str; 4] = ["clang-19", "clang-16", "clang-14", "clang"];
/// C files of the crate flea-object's tests.
const SOURCES: [&str; 2] = ["programs.bpf.c", "session.bpf.c"];
/// CPU time: more than reading a file takes, by far.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory that a file may take: its global data and some more, and so much for each of its bytes.
const PEAK_BYTES: usize = (64 + 16) << 20;
const PEAK_BYTES_PER_BYTE: usize = 64;

/// The fuzzer.
pub struct Objects {
    whole: Vec<Vec<u8>>,
    n_compiled: usize,
    slowest: Duration,
    largest: usize,
}

impl Objects {
    /// Compiles what is damaged later; without clang there is one object made by hand.
    ///
    /// # Errors
    /// The program's allocator does not count ([`crate::allocated::Counting`]), or clang fails.
    pub fn new() -> Result<Self> {
        peak_bytes(|| ()).context("the allocator of this program does not count")?;
        let mut whole = vec![handmade::object().bytes];
        for compiler in COMPILERS.into_iter().filter(|c| works(c)) {
            for source in SOURCES {
                whole.push(compile(compiler, source)?);
            }
        }
        let n_compiled = whole.len() - 1;
        Ok(Self { whole, n_compiled, slowest: Duration::ZERO, largest: 0 })
    }

    fn damaged(&self, seed: u64) -> Vec<u8> {
        let mut random = Random::new(seed);
        let mut bytes = self.whole[random.index(self.whole.len())].clone();
        for _ in 0..1 + random.below(6) {
            damage(&mut bytes, &mut random);
        }
        bytes
    }
}

fn works(compiler: &str) -> bool {
    let output = Command::new(compiler).arg("--print-targets").output();
    output.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("bpf"))
}

fn compile(compiler: &str, source: &str) -> Result<Vec<u8>> {
    let directory: PathBuf =
        [env!("CARGO_MANIFEST_DIR"), "..", "flea-object", "tests", "c"].iter().collect();
    let output = Command::new(compiler)
        .current_dir(directory)
        .args(["-target", "bpf", "-O2", "-g", "-c", source, "-o", "-"])
        .output()
        .with_context(|| compiler.to_owned())?;
    let errors = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{compiler} {source}:\n{errors}");
    Ok(output.stdout)
}

/// One change somewhere; headers are more often hit than their share.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let at = place(bytes, random);
    match random.below(10) {
        0 => bytes.truncate(at),
        1 => bytes[at] ^= 1 << random.below(8),
        2 | 3 => bytes[at] = random.byte(),
        4 => {
            let to = random.index(bytes.len());
            let n = random.index(64).min(bytes.len() - at.max(to));
            bytes.copy_within(at..at + n, to);
        }
        5 => {
            let n = random.index(32).min(bytes.len() - at);
            bytes[at..at + n].fill(random.pick(&[0, 0xff]));
        }
        _ => {
            let at = at & !3;
            let width = random.pick(&[2, 4, 8]).min(bytes.len() - at);
            let number = match random.below(3) {
                0 => random.number(),
                1 => random.below(2 * bytes.len() as u64),
                _ => random.below(64),
            };
            bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
    }
}

fn place(bytes: &[u8], random: &mut Random) -> usize {
    let header = || Some(u64::from_le_bytes(*bytes.get(0x28..0x30)?.first_chunk()?));
    let sections = header().and_then(|at| usize::try_from(at).ok()).unwrap_or(0);
    match random.below(4) {
        0 => random.index(bytes.len().min(64)),
        1 if sections < bytes.len() => sections + random.index(bytes.len() - sections),
        _ => random.index(bytes.len()),
    }
}

/// Reads a file and asks for a verdict on each of its programs; whether it was one.
fn read(bytes: &[u8]) -> bool {
    let Ok(object) = flea_object::parse(bytes) else { return false };
    for program in &object.programs {
        let context = Context::Tracing { n_args: 6, n_results: 1, session: true };
        // Any verdict will do.
        let _ = flea_verifier::verify(program, &object.maps, context);
    }
    true
}

impl Fuzzer for Objects {
    fn name(&self) -> &'static str {
        "elf"
    }

    fn judge(&mut self, seed: u64) -> Result<Outcome> {
        let bytes = self.damaged(seed);
        let begun = thread_time();
        let parse = || catch_unwind(AssertUnwindSafe(|| flea_object::parse(&bytes).is_ok()));
        let (parsed, peak) = peak_bytes(parse).context("the allocator does not count")?;
        let judged = parsed.and_then(|_| catch_unwind(AssertUnwindSafe(|| read(&bytes))));
        let took = thread_time().saturating_sub(begun);
        self.slowest = self.slowest.max(took);
        self.largest = self.largest.max(peak);
        let failed = |seen: String| {
            let input: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            Outcome::Failed(Failure { kind: Kind::Misbehaviour, seen, input })
        };
        Ok(match judged {
            Err(_) => failed("panicked".to_owned()),
            Ok(_) if peak > PEAK_BYTES + PEAK_BYTES_PER_BYTE * bytes.len() => {
                failed(format!("{peak} bytes of memory for a file of {}", bytes.len()))
            }
            Ok(_) if took > PATIENCE => failed(format!("took {} s", took.as_secs())),
            Ok(true) => Outcome::Accepted,
            Ok(false) => Outcome::Refused,
        })
    }

    fn summary(&self) -> String {
        format!(
            "from {} objects of clang's and one made by hand; at most {} KiB and {:.3} s each\n",
            self.n_compiled,
            self.largest / 1024,
            self.slowest.as_secs_f64()
        )
    }
}
