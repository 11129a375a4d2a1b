//! The registry that Flea keeps in a target, which the target can write: whatever stands there,
//! reading it, attaching, detaching and settling end, with what was asked for or an error.
//!
//! A program with one counted function is the target. Its registry is taken as it was written,
//! changed in its text (with a right sum, so that the text is believed), in its bytes or in its
//! header, and put back. What Flea then does to the target, the target has asked for: it may die of
//! it, and a new one is started.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use flea::RemoteAddr;
use flea::builtin::Count;
use flea::{Pid, Session, attached};
use flea_fixtures::{Fixture, Running, build};
use flea_generate::Random;
use flea_process::Memory;
use serde_json::Value;

use crate::campaign::{Failure, Fuzzer, Kind, Outcome};
use crate::watchdog::Watchdog;

const MAPS_PATH: &str = "/memfd:flea";
const HEADER_BYTES: u64 = 4096;
const HALF_BYTES: u64 = 64 << 20;
const FUNCTIONS: [&str; 2] = ["nap", "doze"];
/// The names that most of a registry's numbers go by, to be put where they are not expected.
const EDGES: [u64; 9] = [0, 1, 8, 4096, 1 << 20, 1 << 31, 1 << 47, i64::MAX as u64, u64::MAX];

/// The fuzzer.
pub struct Registry {
    watchdog: Watchdog,
    target: Option<Target>,
    n_read: u64,
    n_changed: u64,
    n_targets: u64,
}

/// A process with something attached, by this one.
struct Target {
    /// Held for as long as its functions are to be counted. Before the process, which must not end
    /// before it is detached.
    _count: Count,
    running: Running,
    storage: RemoteAddr,
    /// As it was written: header and text of the current half.
    header: [u64; 4],
    text: Vec<u8>,
}

impl Registry {
    /// A new one.
    ///
    /// # Errors
    /// There is no compiler to make the target with.
    pub fn new() -> Result<Self> {
        if build(Fixture::Naps).is_none() {
            bail!("the target's program cannot be compiled here");
        }
        let watchdog = Watchdog::new("registry");
        Ok(Self { watchdog, target: None, n_read: 0, n_changed: 0, n_targets: 0 })
    }
}

impl Target {
    fn start() -> Result<Self> {
        let program = build(Fixture::Naps).context("the target's program")?;
        let mut running = Running::start(Command::new(program).arg("2"))?;
        running.expect_line("ready")?;
        let pid = pid_of(&running)?;
        let session = Session::attach(pid)?;
        let count = Count::start(&session, &session.find(FUNCTIONS[0])?)?;
        let maps = flea_process::maps(pid)?;
        let mapping = maps.iter().find(|m| m.path == MAPS_PATH).context("it has no registry")?;
        let (storage, memory) = (mapping.start, Memory::open(pid)?);
        let mut header = [0; 4];
        for (i, word) in header.iter_mut().enumerate() {
            *word = memory.read_u64(storage.offset(8 * i64::try_from(i)?))?;
        }
        let size_bytes = usize::try_from(header[2])?;
        let text = memory.read_vec(half(storage, header[1]), size_bytes)?;
        Ok(Self { _count: count, running, storage, header, text })
    }

    fn pid(&self) -> Result<Pid> {
        pid_of(&self.running)
    }

    /// Makes this its registry.
    fn write(&self, header: [u64; 4], text: &[u8]) -> Result<()> {
        let memory = Memory::open(self.pid()?)?;
        let room = usize::try_from(HALF_BYTES)?;
        memory.write(half(self.storage, self.header[1]), &text[..text.len().min(room)])?;
        memory.write(self.storage, &header.map(u64::to_le_bytes).concat())?;
        Ok(())
    }

    /// What a target may have made of it.
    fn damage(&self, random: &mut Random) -> ([u64; 4], Vec<u8>) {
        let mut text = self.text.clone();
        let mut header = self.header;
        match random.below(8) {
            0 => header[random.index(4)] = random.number(),
            1 => {
                let at = random.index(text.len());
                text[at] = random.byte();
            }
            2 => {
                let at = random.index(text.len());
                text[at] = random.byte();
                text.truncate(1 + random.index(text.len()));
                header = self.header_of(&text);
            }
            _ => {
                text = lie(&text, random);
                header = self.header_of(&text);
            }
        }
        (header, text)
    }

    fn header_of(&self, text: &[u8]) -> [u64; 4] {
        [self.header[0], self.header[1], text.len() as u64, checksum(text)]
    }
}

fn pid_of(running: &Running) -> Result<Pid> {
    Ok(Pid::try_from(running.pid())?)
}

fn half(storage: RemoteAddr, which: u64) -> RemoteAddr {
    let offset = HEADER_BYTES + (which & 1) * HALF_BYTES;
    storage.offset(offset.cast_signed())
}

/// FNV-1a over words, as the registry has it.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A registry's text with a few things changed that leave it a text of that kind.
fn lie(text: &[u8], random: &mut Random) -> Vec<u8> {
    let Ok(mut whole) = serde_json::from_slice::<Value>(text) else { return text.to_vec() };
    for _ in 0..1 + random.below(4) {
        let n_values = count(&whole);
        let mut left = random.below(n_values);
        change(&mut whole, &mut left, random);
    }
    serde_json::to_vec(&whole).unwrap_or_default()
}

fn count(value: &Value) -> u64 {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum::<u64>(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Changes the value that `left` others stand before. Whether that was done.
fn change(value: &mut Value, left: &mut u64, random: &mut Random) -> bool {
    if *left == 0 {
        change_this(value, random);
        return true;
    }
    *left -= 1;
    match value {
        Value::Array(items) => items.iter_mut().any(|item| change(item, left, random)),
        Value::Object(fields) => fields.values_mut().any(|field| change(field, left, random)),
        _ => false,
    }
}

fn change_this(value: &mut Value, random: &mut Random) {
    match value {
        Value::Number(number) => {
            let old = number.as_u64().unwrap_or(0);
            let near = old.wrapping_add(random.below(64)).wrapping_sub(32);
            let shifted = old ^ 1 << random.below(64);
            let edge = random.pick(&EDGES);
            *value = Value::from(random.pick(&[
                near,
                shifted,
                edge,
                old & !4095,
                old.wrapping_mul(2) % (1 << 47),
            ]));
        }
        Value::Bool(flag) => *flag = !*flag,
        Value::String(text) => match random.below(3) {
            0 => text.clear(),
            1 => text.push_str("00"),
            _ => *text = "\u{1b}[2J\u{202e}\n\0".to_owned(),
        },
        Value::Array(items) => match random.below(4) {
            0 => items.clear(),
            1 => items.reverse(),
            2 => {
                let copies = random.pick(&[1, 2, 1000]);
                let again: Vec<Value> =
                    items.iter().cycle().take(items.len() * copies).cloned().collect();
                items.extend(again);
            }
            _ => drop(items.pop()),
        },
        Value::Object(fields) => {
            let names: Vec<String> = fields.keys().cloned().collect();
            if !names.is_empty() {
                fields.remove(&names[random.index(names.len())]);
            }
        }
        Value::Null => *value = Value::from(random.pick(&EDGES)),
    }
}

/// Every way in which Flea looks at it or changes it. Errors are right.
fn use_it(pid: Pid, changes: bool, random: &mut Random) {
    let found = attached::in_process(pid).unwrap_or_default();
    if !changes {
        return;
    }
    let ids: Vec<u32> = found.iter().map(|body| body.id).collect();
    if random.chance(50) {
        let _ = attached::detach(pid, &ids);
    }
    let Ok(session) = Session::attach(pid) else { return };
    let Ok(functions) = session.find(FUNCTIONS[1]) else { return };
    if let Ok(mut count) = Count::start(&session, &functions) {
        let _ = count.read();
        let _ = count.detach();
    }
    let _ = attached::detach(pid, &ids);
}

impl Fuzzer for Registry {
    fn name(&self) -> &'static str {
        "registry"
    }

    fn judge(&mut self, seed: u64) -> Result<Outcome> {
        let mut random = Random::new(seed);
        let target = match self.target.take() {
            Some(target) => target,
            None => {
                self.n_targets += 1;
                Target::start()?
            }
        };
        let (header, text) = target.damage(&mut random);
        let changes = random.chance(25);
        let pid = target.pid()?;
        target.write(header, &text)?;
        let work = || use_it(pid, changes, &mut random);
        let outcome = self.watchdog.watch(seed, || catch_unwind(AssertUnwindSafe(work)));
        if changes {
            // Whatever became of it, it is no target for the next one.
            self.n_changed += 1;
            self.watchdog.watch(seed, || drop(target));
        } else {
            self.n_read += 1;
            target.write(target.header, &target.text)?;
            self.target = Some(target);
        }
        Ok(match outcome {
            Ok(()) => Outcome::Accepted,
            Err(panic) => {
                let seen = panic.downcast_ref::<String>().cloned();
                let seen = seen.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                let seen = format!("panicked: {}", seen.unwrap_or_default());
                let input = format!("{header:x?}\n{}", String::from_utf8_lossy(&text));
                Outcome::Failed(Failure { kind: Kind::Misbehaviour, seen, input })
            }
        })
    }

    fn summary(&self) -> String {
        format!(
            "{} registries were read, {} changed; {} targets\n",
            self.n_read, self.n_changed, self.n_targets
        )
    }
}
