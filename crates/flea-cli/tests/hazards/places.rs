//! Targets in other namespaces and roots, and code that is not where files say.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result};
use flea_fixtures::{Fixture, Running, Tool, build, require};

use crate::{
    confined::{Confined, is_root, program},
    scratch::Scratch,
};

/// Containers are made of these.
const NAMESPACES: &[&[&str]] = &[
    &["--fork", "--pid"],
    &["--mount"],
    &["--user"],
    &["--user", "--map-root-user", "--pid", "--fork", "--mount", "--mount-proc"],
    &["--fork", "--pid", "--mount", "--net", "--uts", "--ipc", "--cgroup"],
];

#[test]
fn other_namespaces() -> Result<()> {
    let Some(program) = program() else { return Ok(()) };
    if !is_root() {
        return Ok(());
    }
    for words in NAMESPACES {
        let mut command = Command::new("unshare");
        command.args(*words).arg(&program);
        let mut target = match words.contains(&"--fork") {
            true => Confined::start_below(&mut command)?,
            false => Confined::start_as(&mut command)?,
        };
        target.counts().with_context(|| format!("{words:?}"))?;
        // Reading its memory and asking for its number, it has to ask by its own number.
        let tracing = target.attach("trace", "confined_step")?;
        target.go(3)?;
        let records = tracing.stop()?;
        let calls: Vec<_> = records.iter().filter(|r| r["type"] == "call").collect();
        assert_eq!(calls.len(), 3, "{words:?}: {records:?}");
        // The target's numbers are those of its own namespace, as the target would tell them.
        let status = fs::read_to_string(format!("/proc/{}/status", target.pid))?;
        let numbers = status.lines().find_map(|l| l.strip_prefix("NSpid:")).context("NSpid")?;
        let own = numbers.split_whitespace().last().context("a number")?;
        assert_eq!(calls[0]["tid"].to_string(), own, "{words:?}: {}", calls[0]);
        target.end().with_context(|| format!("{words:?}"))?;
    }
    Ok(())
}

/// Copies what `ldd` names, and the program as `/confined`.
fn make_root(root: &Path, program: &Path) -> Result<()> {
    let listed = Command::new("ldd").arg(program).output()?;
    let listed = String::from_utf8(listed.stdout)?;
    for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a directory")?)?;
        fs::copy(library, to)?;
    }
    fs::copy(program, root.join("confined"))?;
    Ok(())
}

#[test]
fn another_root() -> Result<()> {
    let Some(program) = program() else { return Ok(()) };
    if !is_root() {
        return Ok(());
    }
    let root = Scratch::new("root");
    make_root(root.path(), &program)?;
    let mut command = Command::new("chroot");
    let mut target = Confined::start_as(command.arg(root.path()).arg("/confined"))?;
    target.counts()?;
    // A library's functions too, from the root's own copy.
    let tracing = target.attach("count", "libc.so.6:write")?;
    target.go(3)?;
    assert!(tracing.stop()?[0]["count"].as_u64() >= Some(1));
    target.end()
}

/// Addresses that are the same in every run, from the bottom up, and all memory executable.
#[test]
fn other_layouts_of_memory() -> Result<()> {
    let Some(program) = program() else { return Ok(()) };
    for flag in ["--addr-no-randomize", "--addr-compat-layout", "--read-implies-exec"] {
        let mut command = Command::new("setarch");
        let mut target = Confined::start_as(command.arg(flag).arg(&program))?;
        target.counts().with_context(|| flag)?;
        target.end()?;
    }
    Ok(())
}

/// Its file is deleted, or another one has its name: what is mapped counts.
#[test]
fn deleted_and_replaced_programs() -> Result<()> {
    let Some(program) = program() else { return Ok(()) };
    for replacement in [None, Some("/bin/true")] {
        let scratch = Scratch::new("deleted");
        let copy = scratch.path().join("confined");
        fs::copy(&program, &copy)?;
        let mut target = Confined::start_as(&mut Command::new(&copy))?;
        fs::remove_file(&copy)?;
        if let Some(other) = replacement {
            fs::copy(other, &copy)?;
        }
        target.counts()?;
        target.end()?;
    }
    Ok(())
}

#[test]
fn a_program_in_a_memfd() -> Result<()> {
    let (Some(program), Some(python)) = (program(), require(Tool::Python3)) else {
        return Ok(());
    };
    let script = "import os, sys\n\
        fd = os.memfd_create('a program')\n\
        os.write(fd, open(sys.argv[1], 'rb').read())\n\
        os.execve(fd, ['confined', 'hot'], os.environ)";
    let mut command = Command::new(python);
    let mut target = Confined::start_as(command.args(["-c", script]).arg(program))?;
    target.counts()?;
    target.attach("latency", "hot_step")?.stop()?;
    target.assert_left_alone()?;
    target.end()
}

/// Text in anonymous memory, in a huge page, and next to one. Where there is no huge page to be
/// had the program says so.
#[test]
fn text_that_was_moved() -> Result<()> {
    let Some(program) = build(Fixture::ConfinedHuge) else { return Ok(()) };
    for kind in ["copied", "huge"] {
        let mut command = Command::new(&program);
        let mut target = match Confined::start_as(command.args([kind, "hot"])) {
            Ok(target) => target,
            Err(error) if kind == "huge" && format!("{error:#}").contains("MADV_COLLAPSE") => {
                eprintln!("skipped: no huge page for text: {error:#}");
                continue;
            }
            Err(error) => return Err(error),
        };
        target.counts()?;
        target.attach("latency", "hot_step")?.stop()?;
        target.assert_left_alone()?;
        target.end()?;
    }
    Ok(())
}

/// A name that a terminal would obey.
#[test]
fn names_that_a_terminal_would_obey() -> Result<()> {
    let Some(program) = program() else { return Ok(()) };
    let scratch = Scratch::new("escape");
    let copy = scratch.path().join("con\u{1b}]0;owned\u{7}fined");
    fs::copy(&program, &copy)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    let target = Confined::start_as(&mut Command::new(&copy))?;
    let pid = target.pid.to_string();
    let mut counting =
        Running::start(crate::support::flea().args(["count", "confined_step", "-p", &pid]))?;
    while !counting.stderr_line_within(std::time::Duration::from_secs(60))?.contains("attached") {}
    let ps = crate::support::flea().args(["ps", "-p", &pid]).output()?;
    counting.signal(nix::sys::signal::Signal::SIGINT)?;
    let counted = counting.rest()?.join("\n");
    let ps = String::from_utf8(ps.stdout)?;
    for text in [&ps, &counted] {
        assert!(text.contains("con\\u{1b}]0;owned\\u{7}fined:confined_step"), "{text:?}");
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    }
    target.end()
}
