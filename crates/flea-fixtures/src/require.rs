//! Tools that tests need: find, else install (as root, with apt-get), else say why not.
//!
//! Installing never starts a service: Debian's maintainer scripts ask `policy-rc.d`, which
//! says no for as long as the installation runs.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use nix::unistd::Uid;

/// A program (or header) that some test needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Tool {
    /// The C compiler.
    Gcc,
    /// The C++ compiler.
    Gxx,
    /// clang of any version, the newest found.
    Clang,
    /// clang++ of any version.
    Clangxx,
    /// clang 19 or newer: the BPF back end with ISA v4.
    Clang19,
    /// The wrapper of gcc for musl.
    MuslGcc,
    /// The Rust compiler; never installed from here.
    Rustc,
    /// `bpf/bpf_helpers.h` of libbpf.
    LibbpfHeaders,
    /// nm of binutils.
    Nm,
    /// redis-server.
    RedisServer,
    /// redis-cli.
    RedisCli,
    /// redis-benchmark.
    RedisBenchmark,
    /// python3.
    Python3,
    /// git.
    Git,
    /// The server program `postgres`.
    Postgres,
    /// `initdb` of postgres.
    Initdb,
    /// gdb.
    Gdb,
    /// valgrind.
    Valgrind,
    /// perf of the kernel's tools.
    Perf,
    /// node.
    Node,
}

impl Tool {
    /// Its names, best first, and the Debian package with it (none: not installed here).
    fn facts(self) -> (&'static [&'static str], Option<&'static str>) {
        match self {
            Self::Gcc => (&["gcc"], Some("gcc libc6-dev")),
            Self::Gxx => (&["g++"], Some("g++")),
            Self::Clang => (&["clang-20", "clang-19", "clang"], Some("clang")),
            Self::Clangxx => (&["clang++-20", "clang++-19", "clang++"], Some("clang")),
            Self::Clang19 => (&["clang-20", "clang-19"], Some("clang-19")),
            Self::MuslGcc => (&["musl-gcc"], Some("musl-tools")),
            Self::Rustc => (&["rustc"], None),
            Self::LibbpfHeaders => (&["/usr/include/bpf/bpf_helpers.h"], Some("libbpf-dev")),
            Self::Nm => (&["nm"], Some("binutils")),
            Self::RedisServer => (&["redis-server"], Some("redis-server")),
            Self::RedisCli => (&["redis-cli"], Some("redis-tools")),
            Self::RedisBenchmark => (&["redis-benchmark"], Some("redis-tools")),
            Self::Python3 => (&["python3"], Some("python3")),
            Self::Git => (&["git"], Some("git")),
            Self::Postgres => (&["postgres"], Some("postgresql")),
            Self::Initdb => (&["initdb"], Some("postgresql")),
            Self::Gdb => (&["gdb"], Some("gdb")),
            Self::Valgrind => (&["valgrind"], Some("valgrind")),
            Self::Perf => (&["perf"], Some("linux-perf")),
            Self::Node => (&["node"], Some("nodejs")),
        }
    }

    /// The name that people know it by.
    pub fn name(self) -> &'static str {
        let (names, _) = self.facts();
        names.last().copied().unwrap_or_default()
    }
}

/// Where `tool` is. `None`, with the reason on stderr, when it is missing and could not be
/// installed: the test that asked returns at once.
///
/// # Panics
/// When it is missing and the environment says `CI=true`: there, nothing is skipped.
pub fn require(tool: Tool) -> Option<PathBuf> {
    static FOUND: Mutex<Option<HashMap<Tool, Option<PathBuf>>>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    let path = found
        .get_or_insert_default()
        .entry(tool)
        .or_insert_with(|| find(tool).or_else(|| install(tool)))
        .clone();
    // A panic must not poison what other tests find.
    drop(found);
    if path.is_none() && std::env::var("CI").is_ok_and(|ci| ci == "true") {
        panic!("{} is missing, and CI=true allows no skipped test", tool.name());
    }
    path
}

/// Looks through PATH and where Debian hides servers.
fn find(tool: Tool) -> Option<PathBuf> {
    let (names, _) = tool.facts();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/bin", "/usr/sbin", "/usr/local/bin"].map(PathBuf::from));
    dirs.extend(postgres_dirs());
    names.iter().find_map(|name| {
        // Joining an absolute name gives that name.
        dirs.iter().map(|dir| dir.join(name)).find(|candidate| candidate.is_file())
    })
}

fn postgres_dirs() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|entries| entries.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    dirs.sort();
    dirs.reverse();
    dirs
}

fn install(tool: Tool) -> Option<PathBuf> {
    let say = |reason: &str| eprintln!("skipped: {} is missing: {reason}", tool.name());
    let (_, Some(packages)) = tool.facts() else {
        say("install it by hand");
        return None;
    };
    if !Uid::effective().is_root() {
        say(&format!("as root, apt-get install {packages}"));
        return None;
    }
    if !Path::new("/usr/bin/apt-get").is_file() {
        say("there is no apt-get here to install it with");
        return None;
    }
    // One installer at a time, over all test processes.
    let lock = File::create(std::env::temp_dir().join("flea-fixtures-apt.lock")).ok()?;
    lock.lock().ok()?;
    if let Some(path) = find(tool) {
        return Some(path);
    }
    let _no_services = NoServices::begin();
    let args = ["install", "--yes", "--quiet", "--no-install-recommends"];
    let args: Vec<&str> = args.into_iter().chain(packages.split(' ')).collect();
    let installed = apt_get(&args) || (apt_get(&["update", "--quiet"]) && apt_get(&args));
    if !installed {
        say(&format!("apt-get install {packages} failed"));
        return None;
    }
    let path = find(tool);
    if path.is_none() {
        say(&format!("the package {packages} did not bring it"));
    }
    path
}

fn apt_get(args: &[&str]) -> bool {
    Command::new("/usr/bin/apt-get")
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// A `policy-rc.d` that forbids to start services, taken away again. One that is there
/// already is the administrator's and stays as it is.
struct NoServices {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn begin() -> Self {
        let written =
            OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY).and_then(
                |mut file| {
                    file.write_all(b"#!/bin/sh\nexit 101\n")?;
                    // The umask may have taken the execute bits.
                    file.set_permissions(fs::Permissions::from_mode(0o755))
                },
            );
        Self { ours: written.is_ok() }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours {
            // Nothing to do about a failure: the next installation finds it and leaves it.
            let _ = fs::remove_file(POLICY);
        }
    }
}
