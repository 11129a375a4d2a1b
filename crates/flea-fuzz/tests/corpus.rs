//! Programs as tracing tools have them: what the kernel's verifier accepts of them, ours does.
//!
//! The C files of `corpus/` are compiled for each version of the instruction set, so that bounds
//! are found in 32 bits and in 64, and each program is shown to both verifiers. What only the
//! kernel accepts is in `corpus/only_kernel.txt`, by cause; `UPDATE_EXPECT=1` writes it anew.
//! Skipped, with the reason, where there is no clang or no right to load programs.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use expect_test::expect_file;
use flea_fixtures::{Tool, require};
use flea_fuzz::kernel::{Kernel, KernelMaps, LogLevel};
use flea_object::spec::{MapSpec, Program, ProgramKind};
use flea_verifier::{Context, verify};

const FILES: [&str; 5] = ["ints", "loops", "stack", "strings", "tools"];
const VERSIONS: [&str; 4] = ["v1", "v2", "v3", "v4"];
/// A RAW_TRACEPOINT program's.
const CONTEXT: Context = Context::Tracing { n_args: 12, n_results: 0, session: false };
/// Of what the kernel accepts, we accept so many at least.
const WANTED_PERCENT: usize = 97;
/// Fewer programs would not be a corpus.
const FEWEST_PROGRAMS: usize = 150;

struct Verdicts {
    name: String,
    /// Our reason to refuse it.
    ours: Option<String>,
    /// The kernel's.
    kernels: Option<String>,
}

fn directory() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "corpus"].iter().collect()
}

fn compile(clang: &Path, file: &str, version: &str) -> Vec<u8> {
    let output = Command::new(clang)
        .current_dir(directory())
        .args(["-target", "bpf", "-O2", "-Wall", "-Werror", "-Wno-unused", "-g", "-c", "-o", "-"])
        .arg(format!("-mcpu={version}"))
        .arg(format!("{file}.bpf.c"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn judge(kernel: &Kernel, name: String, program: &Program, maps: &[MapSpec]) -> Verdicts {
    let ours = verify(program, maps, CONTEXT).err().map(|e| e.message);
    let kernel_maps = KernelMaps::create(maps).unwrap();
    let loaded = kernel.load(&program.insns, &kernel_maps, LogLevel::Silent).unwrap();
    let kernels = loaded.err().map(|_| {
        let refused = kernel.load(&program.insns, &kernel_maps, LogLevel::Branches).unwrap();
        refused.err().map_or_else(|| "nothing, the second time".into(), |r| r.reason())
    });
    Verdicts { name, ours, kernels }
}

fn judge_all(clang: &Path, kernel: &Kernel) -> Vec<Verdicts> {
    let mut all = Vec::new();
    for file in FILES {
        for version in VERSIONS {
            let object = flea_object::parse(&compile(clang, file, version)).unwrap();
            for program in object.programs.iter().filter(|p| p.kind == ProgramKind::Fentry) {
                let name = format!("{file} {version} {}", program.name);
                all.push(judge(kernel, name, program, &object.maps));
            }
        }
    }
    all
}

/// The programs that one of the two refuses, by its reason.
fn by_cause(verdicts: &[(&str, &str)]) -> String {
    let mut causes: Vec<&str> = verdicts.iter().map(|(_, cause)| *cause).collect();
    causes.sort_unstable();
    causes.dedup();
    let mut text = String::new();
    for cause in causes {
        let _ = writeln!(text, "{cause}");
        for (name, _) in verdicts.iter().filter(|(_, c)| *c == cause) {
            let _ = writeln!(text, "    {name}");
        }
    }
    text
}

#[test]
fn what_the_kernel_accepts_is_accepted() {
    let Some(clang) = require(Tool::Clang19) else { return };
    let kernel = match Kernel::open() {
        Ok(kernel) => kernel,
        Err(e) => return println!("skipped: {e}"),
    };
    let all = judge_all(&clang, &kernel);
    let kernel_accepts: Vec<_> = all.iter().filter(|v| v.kernels.is_none()).collect();
    let only_kernel: Vec<_> =
        kernel_accepts.iter().filter_map(|v| Some((v.name.as_str(), v.ours.as_deref()?))).collect();
    let only_we: Vec<_> = all
        .iter()
        .filter(|v| v.ours.is_none())
        .filter_map(|v| Some((v.name.as_str(), v.kernels.as_deref()?)))
        .collect();
    let (n, n_refused) = (kernel_accepts.len(), only_kernel.len());
    println!("{n} of {} accepted by the kernel, {n_refused} of these not by us", all.len());
    println!("only we accept:\n{}", by_cause(&only_we));
    expect_file!["corpus/only_kernel.txt"].assert_eq(&by_cause(&only_kernel));
    assert!(n >= FEWEST_PROGRAMS, "the kernel accepts {n} programs only");
    assert!(
        100 * (n - n_refused) >= WANTED_PERCENT * n,
        "{n_refused} of {n} programs are refused:\n{}",
        by_cause(&only_kernel)
    );
}
