//! What is particular to x86-64: the proof of a site, and System V's places for arguments.

pub(crate) mod classify;
pub(crate) mod door;
pub(crate) mod jumps;
pub(crate) mod live_in;
pub(crate) mod nops;
pub(crate) mod returns;
pub(crate) mod site;
pub(crate) mod stack_words;
pub(crate) mod sweep;
