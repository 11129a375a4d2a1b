//! What the counting programs print about their own calls.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Functions by the name a demangler prints (without the hash of old Rust names).
pub type Functions = BTreeMap<String, Tally>;

/// The JSON line of a counting program.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Report {
    /// How many threads made the calls.
    #[serde(default)]
    pub threads: u64,
    /// How many rounds each of them made.
    #[serde(default)]
    pub calls: u64,
    /// How many results were not what the caller expects. Anything but 0 means that a
    /// tracer changed what the program computes.
    #[serde(default)]
    pub errors: u64,
    /// What was called, as the callers counted it.
    pub functions: Functions,
}

/// What happened to one function. Sums are modulo 2^64: of values, of addresses for
/// pointers, of the integral value for floating point; 0 where there is no such thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Tally {
    /// Number of calls.
    pub count: u64,
    /// Sum of the first argument.
    #[serde(default)]
    pub arg0_sum: i64,
    /// Sum of the return value.
    #[serde(default)]
    pub retval_sum: i64,
}
