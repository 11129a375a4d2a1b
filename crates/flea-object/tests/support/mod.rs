//! Compiles the C files of `tests/c` with whatever clang there is.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::PathBuf;
use std::process::Command;

/// Compilers to be tested with; what they emit differs.
const COMPILERS: [&str; 3] = ["clang-19", "clang-16", "clang-14"];

/// The compilers on this machine. Without one there is nothing to test: says so, and panics
/// in CI, where there must be one.
pub fn compilers() -> Vec<&'static str> {
    let mut found: Vec<_> = COMPILERS.into_iter().filter(|c| works(c)).collect();
    if found.is_empty() && works("clang") {
        found.push("clang");
    }
    if found.is_empty() {
        let reason = "no clang that can compile for BPF (install clang): objects not tested";
        assert!(std::env::var_os("CI").is_none(), "{reason}");
        eprintln!("skipped: {reason}");
    }
    found
}

fn works(compiler: &str) -> bool {
    let output = Command::new(compiler).arg("--print-targets").output();
    output.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("bpf"))
}

/// The object file of `tests/c/FILE`, compiled with these flags besides `-O2`.
pub fn compile(compiler: &str, file: &str, flags: &[&str]) -> Vec<u8> {
    let directory: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "c"].iter().collect();
    let output = Command::new(compiler)
        .current_dir(directory)
        .args(["-target", "bpf", "-O2", "-Wall", "-Wno-unused", "-c", file, "-o", "-"])
        .args(flags)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{compiler} {file} {flags:?}:\n{errors}");
    output.stdout
}
