//! Fixtures are compiled when the test runs, so that each compiler's own code is what is
//! tested.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;

use flea_symbols::{Function, Module};

/// Writes `source` and compiles it with `compiler` to a shared library (unless `flags` say
/// otherwise); its bytes. `None`, and a line on stderr, where the compiler is not installed
/// (a failure on CI).
pub fn compile(name: &str, compiler: &str, source: &str, flags: &[&str]) -> Option<Vec<u8>> {
    let extension = match compiler {
        "g++" | "clang++" | "clang++-19" => "cpp",
        "rustc" => "rs",
        _ if source.trim_start().starts_with(".text") => "s",
        _ => "c",
    };
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(&directory).unwrap();
    let unique = format!("{name}-{}", std::process::id());
    let input = directory.join(format!("{unique}.{extension}"));
    let output = directory.join(&unique);
    std::fs::write(&input, source).unwrap();
    let mut command = Command::new(compiler);
    if compiler != "rustc" && !flags.contains(&"-no-pie") && !flags.contains(&"-pie") {
        command.args(["-shared", "-fPIC"]);
    }
    let result = command.args(flags).arg(&input).arg("-o").arg(&output).output();
    let result = match result {
        Ok(result) => result,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            assert!(std::env::var_os("CI").is_none(), "{compiler} is missing on CI");
            eprintln!("skipped {name}: {compiler} is not installed");
            return None;
        }
        Err(error) => panic!("{compiler}: {error}"),
    };
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let bytes = std::fs::read(&output).unwrap();
    for file in [&input, &output] {
        std::fs::remove_file(file).unwrap();
    }
    Some(bytes)
}

/// Compiles `source` to a program and runs it; the program's bytes and its output. `None` as
/// for [`compile`].
pub fn run_program(
    name: &str,
    compiler: &str,
    source: &str,
    flags: &[&str],
) -> Option<(Vec<u8>, String)> {
    let bytes = compile(name, compiler, source, flags)?;
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("{name}-{}.run", std::process::id()));
    std::fs::write(&path, &bytes).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let output = Command::new(&path).output();
    std::fs::remove_file(&path).unwrap();
    let output = output.unwrap();
    assert!(output.status.success(), "{name}: {}", output.status);
    Some((bytes, String::from_utf8(output.stdout).unwrap()))
}

/// As [`compile`] with gcc, which is always there.
pub fn gcc(name: &str, source: &str, flags: &[&str]) -> Vec<u8> {
    compile(name, "gcc", source, flags).expect("gcc is installed")
}

pub fn function<'m>(module: &'m Module<'_>, name: &str) -> &'m Function {
    let found = module
        .functions()
        .iter()
        .find(|function| function.name == name || function.aliases.iter().any(|a| a == name));
    found.unwrap_or_else(|| panic!("no function {name}"))
}

/// What a program of `tests/passing` said: (what, function, index) to bytes.
pub type Said = HashMap<(String, String, usize), Vec<u8>>;

/// Lines of `what function index bytes-in-hex`.
pub fn parse_said(output: &str) -> Said {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let line = |line: &str| {
        let mut parts = line.split(' ');
        let (what, name) = (parts.next().unwrap().to_owned(), parts.next().unwrap().to_owned());
        let index = parts.next().unwrap().parse().unwrap();
        let hex = parts.next().unwrap_or_default();
        ((what, name, index), hex.as_bytes().chunks(2).map(byte).collect())
    };
    output.lines().map(line).collect()
}
