//! Fixtures are compiled when the test runs, so that each compiler's own code is what is
//! tested.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::PathBuf;
use std::process::Command;

use flea_symbols::{Function, Module};

/// Writes `source` and compiles it with `compiler` to a shared library (unless `flags` say
/// otherwise); its bytes. `None`, and a line on stderr, where the compiler is not installed
/// (a failure on CI).
pub fn compile(name: &str, compiler: &str, source: &str, flags: &[&str]) -> Option<Vec<u8>> {
    let extension = match compiler {
        "g++" | "clang++" => "cpp",
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
