//! Proves that an eBPF program cannot harm the process it runs in.
#![forbid(unsafe_code)]

pub mod facts;
mod number;
mod opcode;

use flea_object::spec::{MapSpec, Program};

pub use facts::Verified;

/// What a program is given in `r1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Context {
    /// `u64 ctx[n_args]`, then the result in the next slot where the kind sees one; `ctx[-1]`
    /// and `ctx[-2]` as in Linux.
    Tracing {
        /// Argument words.
        n_args: u8,
        /// The slot after the arguments holds the result (fexit; fsession may read it at
        /// entry too, where it is 0).
        has_result: bool,
        /// `bpf_session_is_return` and `bpf_session_cookie` may be called.
        session: bool,
    },
    /// Writable bytes: `r1` their address, `r2` their number. For tests and vectors.
    Memory {
        /// How many.
        size_bytes: u32,
    },
}

/// Why a program was refused: the report that a person reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .log.last().map_or("rejected", |l| l.as_str()))]
pub struct Rejection {
    /// The instruction at fault.
    pub insn_idx: u32,
    /// Linux's words for it (`R1 invalid mem access 'scalar'`).
    pub message: String,
    /// The way there, as Linux's verifier log prints it, the message last.
    pub log: Vec<String>,
    /// What to change.
    pub hint: Option<String>,
}

/// Proves `program` safe against `maps` and `context`, or says why not.
///
/// # Errors
/// [`Rejection`] with the first fault found.
pub fn verify(
    program: &Program,
    maps: &[MapSpec],
    context: Context,
) -> Result<Verified, Rejection> {
    let _ = (program, maps, context);
    Err(Rejection { insn_idx: 0, message: "not written yet".into(), log: vec![], hint: None })
}
