//! A place in another process's text, looked at from outside: how the bench knows, without
//! trusting what a tracer prints, that it has attached or is gone.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flea_fixtures::{Tool, require};

/// An address in the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddr(pub u64);

/// As many bytes as any way of attaching may replace.
pub type Text = [u8; 16];

/// x86's breakpoint: a patch in progress.
const INT3: u8 = 0xcc;
/// Stays where it is; what is replaced stands behind it.
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// The entry of a function in a process.
#[derive(Debug, Clone, Copy)]
pub struct Site {
    pid: u32,
    address: RemoteAddr,
}

impl Site {
    /// The site at `address` of process `pid`.
    pub fn new(pid: u32, address: RemoteAddr) -> Self {
        Self { pid, address }
    }

    /// Where it is.
    pub fn address(self) -> RemoteAddr {
        self.address
    }

    /// The bytes there now.
    pub fn text(self) -> Result<Text> {
        let path = format!("/proc/{}/mem", self.pid);
        let mut text = Text::default();
        File::open(&path)
            .and_then(|mem| mem.read_exact_at(&mut text, self.address.0))
            .with_context(|| format!("reading {path} at {:#x}", self.address.0))?;
        Ok(text)
    }

    /// Whether a finished patch is there that was not in `before`.
    pub fn is_patched_since(self, before: &Text) -> Result<bool> {
        let now = self.text()?;
        let first = if before.starts_with(&ENDBR64) { ENDBR64.len() } else { 0 };
        Ok(now != *before && now[first] != INT3)
    }
}

/// The addresses of functions of a running `program`, in the order of `names`.
pub fn sites_of(pid: u32, program: &Path, names: &[String]) -> Result<Vec<Site>> {
    let nm = require(Tool::Nm).context("nm is missing")?;
    let output = Command::new(nm).arg("--defined-only").arg(program).output()?;
    let symbols = String::from_utf8(output.stdout).context("nm's output")?;
    let table: std::collections::HashMap<&str, &str> = symbols
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let address = words.next()?;
            words.nth(1).map(|name| (name, address))
        })
        .collect();
    let bias = load_bias(pid, program)?;
    names
        .iter()
        .map(|name| {
            let address = table.get(name.as_str()).with_context(|| format!("no symbol {name}"))?;
            let svma = u64::from_str_radix(address, 16).context("an address of nm")?;
            Ok(Site::new(pid, RemoteAddr(bias + svma)))
        })
        .collect()
}

/// What to add to the addresses in `program`: 0 unless it is position independent.
fn load_bias(pid: u32, program: &Path) -> Result<u64> {
    const ET_DYN: [u8; 2] = [3, 0];
    let mut header = [0; 18];
    File::open(program)?.read_exact_at(&mut header, 0).context("reading the ELF header")?;
    if header[16..] != ET_DYN {
        return Ok(0);
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps
        .lines()
        .find(|line| Path::new(line.split_whitespace().last().unwrap_or_default()) == program)
        .with_context(|| format!("{} is not mapped", program.display()))?;
    let (start, _) = line.split_once('-').context("a line of maps")?;
    u64::from_str_radix(start, 16).context("an address in maps")
}

/// Polls `holds` until it is true.
///
/// # Errors
/// When it is not within `timeout`, or when asking fails.
pub fn wait_until(timeout: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let begun = Instant::now();
    loop {
        if holds()? {
            return Ok(begun.elapsed());
        }
        ensure!(begun.elapsed() < timeout, "nothing happened within {timeout:?}");
        thread::sleep(Duration::from_micros(200));
    }
}

/// Fails unless every site reads as in `original`.
pub fn ensure_restored(sites: &[Site], original: &[Text]) -> Result<()> {
    for (site, original) in sites.iter().zip(original) {
        let now = site.text()?;
        if now != *original {
            bail!("{:#x} was left as {now:02x?}, was {original:02x?}", site.address.0);
        }
    }
    Ok(())
}
