//! The repository's rules, as a test: layers, sizes, module docs, nothing half done, nothing
//! that names the machine it was written on. Each rule collects all its findings; a rule
//! that should have an exception gets it here, with its reason.
#![allow(clippy::unwrap_used, reason = "all of this file is a test, its helpers too")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which crates are in which layer. An edge goes to the same layer or down.
const LAYERS: &[(Layer, &[&str])] = &[
    (
        Layer::Pure,
        &[
            "flea-object",
            "flea-layout",
            "flea-verifier",
            "flea-symbols",
            "flea-image",
            "flea-load",
            "flea-script",
        ],
    ),
    (Layer::Effects, &["flea-process", "flea-patch", "flea-maps", "flea-runtime"]),
    (Layer::Faces, &["flea", "flea-cli"]),
    (
        Layer::Development,
        &["flea-fixtures", "flea-fuzz", "flea-generate", "flea-simulate", "flea-vectors", "xtask"],
    ),
];

/// From the lowest to the highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    Pure,
    Effects,
    Faces,
    Development,
}

const MAX_FILE_LINES: usize = 800;
const MAX_ARCHITECTURE_LINES: usize = 300;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// A file of the repository, read once.
struct File {
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// The module docs and comments that the file opens with.
    fn header(&self) -> impl Iterator<Item = &str> {
        self.text.lines().take_while(|line| line.starts_with("//") || line.is_empty())
    }
}

/// What git tracks or would track; where there is no git, everything but build output.
fn paths() -> Vec<String> {
    let git = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    match git {
        Ok(output) if output.status.success() => {
            String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
        }
        _ => walk(&root()),
    }
}

fn walk(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_symlink() || name == "target" || name == ".git" {
            continue;
        }
        if path.is_dir() {
            found.extend(walk(&path));
        } else {
            found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
        }
    }
    found
}

/// All text files. Binaries (not UTF-8) have no lines to judge; a deleted file that git
/// still tracks has none either.
fn files() -> Vec<File> {
    let read = |path: String| {
        let text = String::from_utf8(fs::read(root().join(&path)).ok()?).ok()?;
        Some(File { path, text })
    };
    let files: Vec<File> = paths().into_iter().filter_map(read).collect();
    assert!(files.iter().any(|f| f.path == "Cargo.toml"), "the walk found no repository");
    files
}

fn report(rule: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

fn layer_of(name: &str) -> Option<Layer> {
    LAYERS.iter().find(|(_, names)| names.contains(&name)).map(|(layer, _)| *layer)
}

/// Every package of the workspace and its dependencies, as (name, is for tests only).
fn packages() -> BTreeMap<String, BTreeSet<(String, bool)>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let edges = |package: &Value| {
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        dependencies
            .map(|d| (d["name"].as_str().unwrap().to_owned(), d["kind"].as_str() == Some("dev")))
            .collect()
    };
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages.map(|p| (p["name"].as_str().unwrap().to_owned(), edges(p))).collect()
}

#[test]
fn edges_go_down() {
    let packages = packages();
    let mut findings = Vec::new();
    for (name, edges) in &packages {
        let Some(layer) = layer_of(name) else {
            findings.push(format!("{name} has no layer: put it into the table of this test"));
            continue;
        };
        for (to, is_dev) in edges.iter().filter(|(to, _)| packages.contains_key(to)) {
            match layer_of(to) {
                // A test may use what helps it, but an upward edge would be a cycle in words.
                Some(Layer::Development) if *is_dev => {}
                Some(lower) if lower <= layer => {}
                other => findings.push(format!("{name} ({layer:?}) uses {to} ({other:?})")),
            }
        }
    }
    report("edges between crates only go down", &findings);
}

#[test]
fn errors_of_libraries_have_types() {
    let mut findings = Vec::new();
    for (name, edges) in packages() {
        let is_library = matches!(layer_of(&name), Some(Layer::Pure | Layer::Effects));
        if is_library && edges.contains(&("anyhow".to_owned(), false)) {
            findings.push(name);
        }
    }
    report("anyhow is for the faces, xtask and tests", &findings);
}

#[test]
fn pure_crates_forbid_unsafe() {
    let mut findings = Vec::new();
    for file in files() {
        let parts: Vec<&str> = file.path.split('/').collect();
        let ["crates", name, "src", "lib.rs"] = parts[..] else {
            continue;
        };
        let is_pure = layer_of(name) == Some(Layer::Pure);
        if is_pure && !file.text.contains("#![forbid(unsafe_code)]") {
            findings.push(file.path.clone());
        }
    }
    report("a pure crate has #![forbid(unsafe_code)]", &findings);
}

/// Words that the rules below look for are put together here, or this file would be found.
#[test]
fn nothing_is_half_done() {
    let marks = ["TO\u{44}O", "FIX\u{4d}E", "XX\u{58}", "todo\u{21}(", "unimplemented\u{21}("];
    let ignored = "#[ignor\u{65}";
    let code = [".rs", ".c", ".h", ".cpp", ".S", ".sh", ".toml", "/run"];
    let mut findings = Vec::new();
    for file in files() {
        if !code.iter().any(|end| file.path.ends_with(end)) {
            continue;
        }
        for (i, line) in file.text.lines().enumerate() {
            if marks.iter().any(|mark| line.contains(mark)) || line.contains(ignored) {
                findings.push(format!("{}:{}: {}", file.path, i + 1, line.trim()));
            }
        }
    }
    report("nothing is half done or skipped in silence", &findings);
}

#[test]
fn every_rust_file_opens_with_module_docs() {
    // Parts of examples are included into other files, where `//!` may not stand.
    let is_part = |file: &File| file.path.contains("/examples/parts/");
    let opens = |file: &File| file.text.starts_with("//!") || is_part(file);
    let findings: Vec<String> =
        files().into_iter().filter(|f| f.is_rust() && !opens(f)).map(|f| f.path).collect();
    report("every file opens with //!", &findings);
}

/// Golden texts and recorded vectors may be as long as they are.
#[test]
fn files_are_small() {
    let mut findings = Vec::new();
    let code = [".rs", ".c", ".h", ".cpp", ".S"];
    for file in files().iter().filter(|f| code.iter().any(|end| f.path.ends_with(end))) {
        let n_lines = file.text.lines().count();
        let excused = file.header().any(|line| line.contains("800 lines"));
        if n_lines > MAX_FILE_LINES && !excused {
            findings.push(format!("{}: {n_lines} lines", file.path));
        }
    }
    report("over 800 lines need a split, or a header that says why with \"800 lines\"", &findings);
}

#[test]
fn architecture_is_a_map_not_a_book() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    assert!(text.lines().count() <= MAX_ARCHITECTURE_LINES, "ARCHITECTURE.md is too long");
}

#[test]
fn no_machine_paths() {
    let mut findings = Vec::new();
    // Cut in two, or this file would be found.
    for machine in [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")] {
        for file in files() {
            for (i, line) in file.text.lines().enumerate().filter(|(_, l)| l.contains(machine)) {
                findings.push(format!("{}:{}: {}", file.path, i + 1, line.trim()));
            }
        }
    }
    report("no path of one machine", &findings);
}

/// A comment stands above a group: it speaks for the lines below it up to an empty line or
/// the next comment. Our own crates need no reason.
#[test]
fn every_dependency_has_its_reason() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let mut findings = Vec::new();
    let (mut inside, mut has_reason) = (false, false);
    for line in manifest.lines() {
        match line {
            _ if line.starts_with('[') => {
                inside = line == "[workspace.dependencies]";
                has_reason = false;
            }
            "" => has_reason = false,
            _ if line.starts_with('#') => has_reason = true,
            _ if inside && !line.contains("path = ") && !has_reason && line.contains(" = ") => {
                findings.push(line.to_owned());
            }
            _ => {}
        }
    }
    report("a dependency has its reason beside it", &findings);
}

/// A crate that takes a version of its own escapes the list of reasons.
#[test]
fn dependencies_come_from_the_root() {
    let mut findings = Vec::new();
    for file in files().iter().filter(|f| f.path.ends_with("/Cargo.toml")) {
        // Fuzz targets are a workspace of their own, as cargo-fuzz wants it.
        if file.path.starts_with("fuzz/") {
            continue;
        }
        let mut inside = false;
        for line in file.text.lines() {
            if line.starts_with('[') {
                inside = line.trim_end_matches(']').ends_with("dependencies");
            } else if inside && line.contains('=') && !line.contains("workspace") {
                findings.push(format!("{}: {line}", file.path));
            }
        }
    }
    report("dependencies are declared in the root Cargo.toml", &findings);
}

#[test]
fn no_drawers_for_odds_and_ends() {
    let names = ["utils", "util", "common", "misc"];
    let is_drawer =
        |path: &str| path.split('/').any(|part| names.contains(&part.trim_end_matches(".rs")));
    let findings: Vec<String> = files()
        .into_iter()
        .map(|f| f.path)
        .filter(|path| (path.ends_with(".rs") || path.ends_with("Cargo.toml")) && is_drawer(path))
        .collect();
    report("a module is named for what it holds", &findings);
}
