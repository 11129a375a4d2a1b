//! Programs in another process: interpreted with every access checked, and compiled and called.
//! Whatever a program does to that process, this one goes on.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use flea_object::insn::Insn;
use flea_object::spec::MapSpec;
use flea_vectors::worker::Pool;
use flea_vectors::{Answer, Verdict};
use serde_json::{Value, json};

/// What one program may take: accepted ones end after a million instructions at most.
const PATIENCE: Duration = Duration::from_secs(20);
/// `BPF_F_RDONLY_PROG`
const RDONLY_PROG: u32 = 1 << 7;

/// A process that runs programs.
pub struct Runner {
    pool: Pool,
    maps: Value,
}

/// The results of a program that was accepted there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ran {
    /// Both results.
    Both {
        /// The interpreter's.
        interpreted: u64,
        /// The compiled code's.
        compiled: u64,
    },
    /// One of them did not end as it should: why.
    Lost(String),
    /// The verifier refuses it.
    Refused,
}

impl Runner {
    /// `command` starts a process that calls [`flea_vectors::worker::serve`].
    #[must_use]
    pub fn new(command: fn() -> Result<Command>, maps: &[MapSpec]) -> Self {
        Self { pool: Pool::new(command, PATIENCE), maps: maps.iter().map(map).collect() }
    }

    /// Verifies, interprets, compiles and calls a program.
    ///
    /// # Errors
    /// The process could not be started.
    pub fn run(&mut self, insns: &[Insn]) -> Result<Ran> {
        let code: Vec<u8> = insns.iter().flat_map(|insn| insn.encode()).collect();
        let line = json!({"id": 0, "insns": hex(&code), "maps": self.maps}).to_string();
        ran(&self.pool.answer(&line)?)
    }
}

fn ran(answer: &Answer) -> Result<Ran> {
    Ok(match (answer.verdict, &answer.r0_interpreted, &answer.r0_compiled) {
        (Verdict::Skipped, ..) => bail!("the worker took no program: {}", answer.message),
        (Verdict::Reject, ..) => Ran::Refused,
        (Verdict::Accept, Some(interpreted), Some(compiled)) => {
            Ran::Both { interpreted: number(interpreted)?, compiled: number(compiled)? }
        }
        (Verdict::Accept, ..) => Ran::Lost(answer.message.clone()),
    })
}

fn number(text: &str) -> Result<u64> {
    Ok(u64::from_str_radix(text.trim_start_matches("0x"), 16)?)
}

fn map(spec: &MapSpec) -> Value {
    let read_only = if spec.read_only { RDONLY_PROG } else { 0 };
    json!({
        "type": spec.kind as u32,
        "key": spec.key_size_bytes,
        "value": spec.value_size_bytes,
        "max": spec.max_entries,
        "flags": spec.flags | read_only,
        "init": spec.init.as_deref().map(hex),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
