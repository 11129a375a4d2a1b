//! Swaps code of a running process: a [`Plan`] says which bytes, [`commit`] does it, all or
//! nothing, while every thread runs on.
//!
//! The process is behind a trait, [`Target`]: `flea_process::Tracer` in life, a simulator of
//! threads and bytes in tests.
//!
//! **Invariant**: nothing here knows what the bytes mean. Which instructions may be replaced,
//! and what the new ones do, was decided (and proved) by whoever made the plan.

mod commit;
mod error;
mod gate;
mod live;
mod plan;
mod target;

pub use commit::{Report, commit, commit_behind};
pub use error::CommitError;
pub use gate::Gate;
pub use plan::{PATCH_BYTES, Plan, PlanError, Poke, SHORT_PATCH_BYTES};
pub use target::Target;
