//! Live patches in the registry: shared objects of ours, and which function of them stands in
//! for which.

use flea_symbols::addr::RemoteAddr;
use serde::{Deserialize, Serialize};

use super::Controller;

/// A shared object that was loaded for its replacements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedObject {
    /// Its first page.
    pub base: RemoteAddr,
    /// Whole pages.
    pub size_bytes: u64,
    /// It has handed out addresses of itself that nobody can find again, so that it stays.
    pub pinned: bool,
}

/// A function of a loaded object that takes another one's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplacementState {
    /// Unique in this process, and among bodies.
    pub id: u32,
    /// Who attached it.
    pub owner: Controller,
    /// Seconds since the epoch.
    pub since: u64,
    /// The object that it is in, by its base.
    pub object: RemoteAddr,
    /// Its name there.
    pub name: String,
    /// Its first byte.
    pub entry: RemoteAddr,
}
