//! What a user who is not root may do, and may see: what ptrace lets him, and nothing.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::PathBuf,
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    confined::{Confined, is_root, program},
    scratch::Scratch,
    support,
};

const NOBODY: u32 = 65534;

/// A user with nothing but a copy of `flea`, where he can execute it.
pub struct Nobody {
    scratch: Scratch,
}

impl Nobody {
    /// To be asked for by root.
    pub fn new() -> Result<Self> {
        let scratch = Scratch::new("nobody");
        fs::copy(env!("CARGO_BIN_EXE_flea"), scratch.path().join("flea"))?;
        Ok(Self { scratch })
    }

    /// `flea`, as he starts it.
    pub fn flea(&self) -> Command {
        as_nobody(Command::new(self.scratch.path().join("flea")))
    }

    /// The fixture, started by such a user; by ourselves where we are none to begin with.
    pub fn confined(user: Option<&Self>, restriction: &str) -> Result<Option<Confined>> {
        let Some(nobody) = user else { return Confined::start(&[restriction]) };
        let Some(program) = nobody.copy(0o755)? else { return Ok(None) };
        Confined::start_as(as_nobody(Command::new(program)).arg(restriction)).map(Some)
    }

    /// A copy of the fixture, with this mode.
    fn copy(&self, mode: u32) -> Result<Option<PathBuf>> {
        let Some(program) = program() else { return Ok(None) };
        let copy = self.scratch.path().join(format!("confined-{mode:o}"));
        fs::copy(program, &copy)?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(mode))?;
        Ok(Some(copy))
    }
}

fn as_nobody(mut command: Command) -> Command {
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    command
}

#[test]
fn a_user_and_his_own_process() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let nobody = Nobody::new()?;
    let Some(program) = nobody.copy(0o755)? else { return Ok(()) };
    let mut target = Confined::start_as(as_nobody(Command::new(&program)).arg("hot"))?;
    target.counts_by(nobody.flea())?;
    target.end()?;
    // Also where it may never get more rights, and in a user namespace of its own.
    for words in [&["setpriv", "--no-new-privs"][..], &["unshare", "--user", "--map-root-user"]] {
        let mut command = as_nobody(Command::new(words[0]));
        let mut target = Confined::start_as(command.args(&words[1..]).arg(&program))?;
        target.counts_by(nobody.flea()).with_context(|| format!("{words:?}"))?;
        target.end()?;
    }
    Ok(())
}

#[test]
fn a_user_and_processes_that_are_not_his() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let nobody = Nobody::new()?;
    let Some(program) = nobody.copy(0o755)? else { return Ok(()) };
    let mut roots = Confined::start_as(&mut Command::new(&program))?;
    roots.refuses_by(nobody.flea(), "count", &["ermission denied", "or as root"])?;
    // What root has attached there he does not see, nor can he take it off.
    let tracing = roots.attach("count", "confined_step")?;
    let pid = roots.pid.to_string();
    for args in [&["ps", "-p", &pid][..], &["detach", &pid]] {
        let output = nobody.flea().args(args).output()?;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    for file in ["maps", "mem", "fd", "map_files"] {
        let path = format!("/proc/{pid}/{file}");
        let looked = as_nobody(Command::new("cat")).arg(&path).output()?;
        let listed = as_nobody(Command::new("ls")).arg(format!("{path}/")).output()?;
        assert!(!looked.status.success() && !listed.status.success(), "{path} is open to him");
    }
    let everywhere = nobody.flea().arg("ps").output()?;
    assert!(everywhere.status.success());
    assert!(!String::from_utf8(everywhere.stdout)?.contains(&pid));
    roots.go(4)?;
    assert_eq!(tracing.stop()?[0]["count"], 4);
    roots.end()
}

/// With the rights of another user, or closed to its own.
#[test]
fn a_user_and_programs_with_more_rights() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let nobody = Nobody::new()?;
    let Some(program) = nobody.copy(0o755)? else { return Ok(()) };
    let mut closed = Confined::start_as(as_nobody(Command::new(&program)).arg("undumpable"))?;
    closed.refuses_by(nobody.flea(), "count", &["undumpable", "run as root"])?;
    closed.counts()?;
    closed.end()?;

    let Some(setuid) = nobody.copy(0o4755)? else { return Ok(()) };
    let mut target = Confined::start_as(&mut as_nobody(Command::new(&setuid)))?;
    let uids = |pid| -> Result<String> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find(|line| line.starts_with("Uid:")).context("Uid")?;
        Ok(line.replace("Uid:\t", ""))
    };
    if !uids(target.pid)?.starts_with("65534\t0\t0\t0") {
        eprintln!("skipped: the temporary directory gives no rights to setuid programs");
        return Ok(());
    }
    target.refuses_by(nobody.flea(), "count", &["undumpable", "run as root"])?;
    target.counts()?;
    target.end()?;
    // Started by his Flea it runs without those rights, as under any tracer.
    let mut traced = nobody.flea();
    traced.args(["count", "confined_step", "--"]).arg(&setuid);
    let mut running = Confined::start_below(&mut traced)?;
    assert_eq!(uids(running.pid)?, "65534\t65534\t65534\t65534");
    running.go(3)?;
    running.running.send("end")?;
    assert_eq!(running.running.wait()?.code(), Some(7));
    Ok(())
}

/// Nothing of it has a name that others could open, nor stays open in the target.
#[test]
fn what_is_attached_has_no_name() -> Result<()> {
    let Some(target) = Confined::start(&[])? else { return Ok(()) };
    let files = |pid: u32| -> Result<Vec<PathBuf>> {
        let mut links = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            links.push(fs::read_link(entry?.path())?);
        }
        links.sort();
        Ok(links)
    };
    let shared = || -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir("/dev/shm")?.flatten().map(|entry| entry.path());
        Ok(entries.filter(|path| path.to_string_lossy().contains("flea")).collect())
    };
    let (files_before, shared_before) = (files(target.pid)?, shared()?);
    let tracing = target.attach("latency", "confined_step")?;
    assert_eq!(files(target.pid)?, files_before);
    assert_eq!(shared()?, shared_before);
    tracing.stop()?;
    support::assert_clean(target.pid)?;
    target.end()
}
