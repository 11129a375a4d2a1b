//! Limits of the target's, and of the group that it is in.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use crate::{
    confined::{Confined, is_root},
    permission::Nobody,
};

#[test]
fn address_space_data_and_files() -> Result<()> {
    for restriction in ["as=0", "as=4096", "as=4000000", "data=4096"] {
        let Some(mut target) = Confined::start(&[restriction])? else { return Ok(()) };
        target.refuses(&["mmap", "ENOMEM", "prlimit --as --data", "nothing was attached"])?;
        target.end()?;
    }
    let Some(mut target) = Confined::start(&["nofile"])? else { return Ok(()) };
    target.refuses(&["memfd_create", "EMFILE", "prlimit --nofile", "nothing was attached"])?;
    target.end()?;
    let Some(mut target) = Confined::start(&["as=300000000"])? else { return Ok(()) };
    target.counts()?;
    target.end()
}

/// A file that grows past the limit would bring SIGXFSZ, which kills.
#[test]
fn the_size_of_files() -> Result<()> {
    for restriction in ["fsize=0", "fsize=4096"] {
        let Some(mut target) = Confined::start(&[restriction])? else { return Ok(()) };
        target.counts()?;
        target.end()?;
    }
    Ok(())
}

/// All that it maps is locked, and memory for every page of it is there at once.
#[test]
fn a_process_that_locks_its_memory() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let Some(mut target) = Confined::start(&["locked"])? else { return Ok(()) };
    let resident = || -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", target.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        Ok(line.context("VmRSS")?.trim_end_matches("kB").trim().parse()?)
    };
    let before_kib = resident()?;
    let tracing = target.attach("count", "confined_step")?;
    let more_kib = resident()?.saturating_sub(before_kib);
    assert!(more_kib < 2048, "attaching took {more_kib} KiB of memory");
    target.go(10)?;
    assert_eq!(tracing.stop()?[0]["count"], 10);
    target.counts()?;
    target.end()?;
    // Without the right to lock more it is refused.
    let nobody = Nobody::new()?;
    let Some(mut target) = Nobody::confined(Some(&nobody), "locked=65536")? else { return Ok(()) };
    target.refuses(&["mmap", "EAGAIN", "prlimit --memlock", "nothing was attached"])?;
    target.end()
}

/// A control group of this test alone; whoever is in it when it goes is put back.
struct Group(PathBuf);

impl Group {
    /// `None`, with the reason printed, where there is no such controller to be had.
    fn new(controller: &str) -> Option<Self> {
        let number = std::process::id();
        let v1 = PathBuf::from(format!("/sys/fs/cgroup/{controller}"));
        let path = v1.join(format!("flea-hazards-{number}"));
        if !is_root() || !v1.join("cgroup.procs").exists() || fs::create_dir(&path).is_err() {
            eprintln!("skipped: no control group for `{controller}` of version 1 here");
            return None;
        }
        Some(Self(path))
    }

    fn set(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let pids = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines() {
            let _ = fs::write(self.0.with_file_name("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// What is added to a target that is near its limit makes the kernel kill it.
#[test]
fn a_memory_limit_of_its_group() -> Result<()> {
    let Some(group) = Group::new("memory") else { return Ok(()) };
    let Some(mut target) = Confined::start(&[])? else { return Ok(()) };
    group.set("cgroup.procs", &target.pid.to_string());
    group.set("memory.limit_in_bytes", "262144");
    target.refuses(&[
        "memory limit of its control group",
        "flea-hazards",
        "nothing was attached",
    ])?;
    group.set("memory.limit_in_bytes", "67108864");
    target.counts()?;
    let killed = fs::read_to_string(group.0.join("memory.oom_control"))?;
    assert!(killed.contains("oom_kill 0\n"), "{killed}");
    target.end()
}

#[test]
fn a_frozen_group() -> Result<()> {
    let Some(group) = Group::new("freezer") else { return Ok(()) };
    let Some(mut target) = Confined::start(&["hot"])? else { return Ok(()) };
    group.set("cgroup.procs", &target.pid.to_string());
    group.set("freezer.state", "FROZEN");
    while fs::read_to_string(group.0.join("freezer.state"))? != "FROZEN\n" {
        std::thread::yield_now();
    }
    let mut flea = crate::support::flea();
    let output =
        flea.args(["count", "confined_step", "-p"]).arg(target.pid.to_string()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("sleeps uninterruptibly") && said.contains("nothing was"), "{said}");
    group.set("freezer.state", "THAWED");
    target.go(5)?;
    target.assert_left_alone()?;
    // What was attached before is not lost by it.
    let tracing = target.attach("count", "confined_step")?;
    group.set("freezer.state", "FROZEN");
    group.set("freezer.state", "THAWED");
    target.go(30)?;
    let records = tracing.stop()?;
    assert_eq!(records[0]["count"], 30, "{records:?}");
    target.running.signal(Signal::SIGCONT)?;
    target.go(1)?;
    target.assert_left_alone()?;
    target.end()
}
