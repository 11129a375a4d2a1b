//! Faults that are planted: an engine that leaves something out, or does it in another order. The
//! simulator has to find each of them, or its silence means nothing.

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The sync with this number in each commit is left out.
    NoSync(u32),
    /// Tails are written before the breakpoints.
    TailsFirst,
    /// First bytes are written before the tails.
    FirstBytesFirst,
    /// The loader is not kept from what it does while sites change.
    NoGate,
    /// Breakpoints are not written.
    NoBreakpoints,
    /// Nobody is looked for inside the bytes that change.
    NoEvacuation,
    /// Nobody is waited for who will come back from a handler.
    NoHandlers,
    /// What is there is not compared with what is expected.
    NoCompare,
    /// The tracer lets go before the last trap has been answered.
    DisarmFirst,
    /// The last traps are not waited for.
    NoDrain,
    /// Breakpoints are written before there is an answer to them.
    ArmLate,
    /// Who runs into a breakpoint goes on behind it.
    TrapStays,
    /// Who runs into a breakpoint misses what is attached.
    TrapSkips,
    /// What has been done is not taken back where a step failed.
    NoUndo,
    /// The registry is not written before the sites are swapped.
    NoAnnouncement,
    /// The registry's header is written before what it names.
    HeaderFirst,
    /// Nobody is looked for in code that is freed.
    BlindToThreads,
    /// Switched-away stacks are not searched for who comes back to code that is freed.
    BlindToMemory,
    /// What a dead controller announced is not looked at.
    NoSettling,
}

/// All of them, by name.
pub const FAULTS: [(&str, Fault); 21] = [
    ("no-first-sync", Fault::NoSync(0)),
    ("no-second-sync", Fault::NoSync(1)),
    ("no-third-sync", Fault::NoSync(2)),
    ("tails-first", Fault::TailsFirst),
    ("first-bytes-first", Fault::FirstBytesFirst),
    ("no-gate", Fault::NoGate),
    ("no-breakpoints", Fault::NoBreakpoints),
    ("no-evacuation", Fault::NoEvacuation),
    ("no-handlers", Fault::NoHandlers),
    ("no-compare", Fault::NoCompare),
    ("disarm-first", Fault::DisarmFirst),
    ("no-drain", Fault::NoDrain),
    ("arm-late", Fault::ArmLate),
    ("trap-stays", Fault::TrapStays),
    ("trap-skips", Fault::TrapSkips),
    ("no-undo", Fault::NoUndo),
    ("no-announcement", Fault::NoAnnouncement),
    ("header-first", Fault::HeaderFirst),
    ("blind-to-threads", Fault::BlindToThreads),
    ("blind-to-memory", Fault::BlindToMemory),
    ("no-settling", Fault::NoSettling),
];

/// The fault of that name.
#[must_use]
pub fn named(name: &str) -> Option<Fault> {
    FAULTS.iter().find(|(known, _)| *known == name).map(|(_, fault)| *fault)
}
