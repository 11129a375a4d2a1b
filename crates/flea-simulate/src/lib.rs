//! The patch engine in a made-up process: the registry's protocol (`flea`'s `transaction` and
//! `reclaim`) and the commit (`flea-patch`) as they are, over threads that execute the bytes that
//! are there, on CPUs that see writes late and in any order.
//!
//! Each seed is one process with its threads, and the controllers that come to it one after the
//! other: any step of a controller may fail, once or for ever, it may be killed at any step, the
//! process may end. What must hold:
//! - no thread executes a mixture of old and new bytes, a breakpoint that nobody answers, or code
//!   that was freed;
//! - programs run exactly once for each call between their attaching and their taking off;
//! - a commit that fails leaves the text as it was;
//! - registry and text agree behind every controller that had no trouble;
//! - when all is taken off, the text is the original one, and all memory is given back.
//!
//! Not in here: what ptrace itself does (`flea-process`), forks, exec, exceptions.
//!
//! Start at [`case::run`]. [`fault`] has the faults that show that it would notice.
#![forbid(unsafe_code)]

pub mod campaign;
pub mod case;
mod context;
mod dice;
mod execute;
pub mod fault;
mod functions;
mod host;
mod loader;
pub mod machine;
mod patcher;
mod text;
mod trouble;
