//! The JSON records, a line each: the schema that scripts rely on. Numbers are numbers,
//! addresses strings.

use std::collections::BTreeMap;

use flea::rejection::Rejection;
use serde::Serialize;
use serde_json::Value;

/// One line of output.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Record<'a> {
    /// A function that a pattern matched.
    Function {
        /// Path of its module.
        module: &'a str,
        /// Its name.
        function: &'a str,
        /// In the target, or in the file where there is no target.
        address: String,
        /// Bytes.
        size: u64,
        /// `nop5`, `relocated` or `refused`.
        site: &'static str,
        /// Why it was refused.
        reason: Option<String>,
        /// As C declares it.
        signature: Option<String>,
        /// Where that is from: `dwarf` or `btf`.
        signature_source: Option<&'static str>,
    },
    /// Calls of one function.
    Count {
        /// Path of its module.
        module: &'a str,
        /// Its name.
        function: &'a str,
        /// How often.
        count: u64,
    },
    /// A histogram.
    Histogram {
        /// Path of its module.
        module: &'a str,
        /// Its name.
        function: &'a str,
        /// `duration_ns`, `argN`, `retval`.
        value: &'a str,
        /// Number of values.
        count: u64,
        /// Their sum.
        sum: i128,
        /// The smallest.
        min: Option<i128>,
        /// The largest.
        max: Option<i128>,
        /// Non-empty ones.
        buckets: Vec<BucketRecord>,
    },
    /// One call.
    Call {
        /// CLOCK_MONOTONIC at entry.
        time_ns: u64,
        /// Process.
        pid: u32,
        /// Thread.
        tid: u32,
        /// Path of its module.
        module: &'a str,
        /// Its name.
        function: &'a str,
        /// By name, or `argN`.
        args: BTreeMap<String, Value>,
        /// The result, null for `void`.
        retval: Option<Value>,
        /// From entry to exit.
        duration_ns: u64,
    },
    /// A line of `bpf_printk`.
    Printk {
        /// The text.
        message: String,
    },
    /// An element of a map at the end of `flea run`.
    Map {
        /// The map's name.
        map: &'a str,
        /// Hex bytes, or a number for arrays.
        key: Value,
        /// Hex bytes; one per thread for per-CPU maps.
        value: Value,
    },
    /// A program that the verifier refused: the facts of the report on standard error.
    Rejected {
        /// The program.
        program: &'a str,
        /// The function that it was to be attached to.
        function: &'a str,
        /// What is wrong, where, and how it came to that.
        #[serde(flatten)]
        rejection: &'a Rejection,
    },
    /// A function that `flea replace` has replaced.
    Replaced {
        /// `PID.N`
        id: String,
        /// The process.
        pid: i32,
        /// Path of the module.
        module: &'a str,
        /// The function.
        function: &'a str,
        /// Its replacement's name.
        symbol: &'a str,
        /// The shared object's path, as given.
        object: String,
    },
    /// A line of `flea ps`.
    Attached {
        /// `PID.N`
        id: String,
        /// The process.
        pid: i32,
        /// Path of the module.
        module: &'a str,
        /// The function.
        function: &'a str,
        /// Program kinds and names, newest first.
        programs: Vec<String>,
        /// They can change the target's memory.
        writes_target: bool,
        /// Registers with arguments or results that they change.
        changes: &'a [&'static str],
        /// Process id of the `flea` that attached it.
        controller: i32,
        /// Whether that one still runs.
        controller_alive: bool,
        /// Seconds since the epoch.
        since: u64,
    },
    /// The last line of every tracing command.
    Summary {
        /// Functions attached.
        attached: usize,
        /// Functions that matched and could not be.
        refused: usize,
        /// Program runs skipped by the recursion guard or for want of a slot.
        missed: u64,
        /// Records dropped because a buffer was full.
        lost: u64,
    },
}

/// One bucket.
#[derive(Debug, Serialize)]
pub struct BucketRecord {
    /// Smallest value in it.
    pub min: i128,
    /// Largest.
    pub max: i128,
    /// How many.
    pub count: u64,
}
