//! Programs to be traced by tests and benches, and what those tests need around them.
//!
//! - [`build`] compiles a [`Fixture`] once per content and returns its path.
//! - [`Running`] is a child process that never outlives its guard, with line-wise input and
//!   output under timeouts; [`spawn_waiting`] starts a fixture that waits to be attached to.
//! - [`Report`] is what the counting programs say about their own calls.
//! - [`require`] finds a tool that a test needs, or says why the test is skipped.
//!
//! ```no_run
//! use flea_fixtures::{CBuild, Fixture, Report, spawn_waiting};
//! # fn main() -> anyhow::Result<()> {
//! let Some(mut target) = spawn_waiting(Fixture::CountsC(CBuild::O2), 4, 1000)? else {
//!     return Ok(()); // the compiler is missing, which was printed
//! };
//! // ... attach to target.pid() here ...
//! let report: Report = target.run_counts()?;
//! assert_eq!(report.functions["leaf"].count, 4 * (1000 + 125));
//! target.finish_counts()?;
//! # Ok(())
//! # }
//! ```
//!
//! Must not know anything of Flea: the same programs serve to compare with other tracers.
#![forbid(unsafe_code)]

mod cache;
mod entries;
mod fixture;
mod recipe;
mod report;
mod require;
mod running;
mod variadic;

pub use cache::{build, try_build};
pub use fixture::{CBuild, Fixture, RustBuild};
pub use report::{Functions, Report, Tally};
pub use require::{Tool, require};
pub use running::{Running, spawn_waiting};
