//! What can go wrong, with the facts.

use std::io;

use flea_object::spec::{MapIdx, MapKind};

/// Why an arena could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// A system call failed.
    #[error("cannot {action} the maps' shared memory: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The maps together are larger than what Flea is ready to map.
    #[error(
        "the maps need {size_bytes} bytes, more than the {limit_bytes} that can be mapped: lower max_entries"
    )]
    TooLarge {
        /// Bytes of the arena.
        size_bytes: u64,
        /// The bound.
        limit_bytes: u64,
    },
    /// The file is smaller or larger than the plan says.
    #[error("the maps' shared memory has {found_bytes} bytes where the plan says {expected_bytes}")]
    WrongSize {
        /// By the plan.
        expected_bytes: u64,
        /// By the file.
        found_bytes: u64,
    },
    /// The file could be cut short under our feet, which would kill the controller.
    #[error(
        "the maps' shared memory cannot be sealed against shrinking: make it with MFD_ALLOW_SEALING"
    )]
    NotSealable,
    /// A map's sizes make no sense for its kind.
    #[error("map {index} (`{name}`) is no valid {kind:?}: {reason}")]
    BadMap {
        /// Which.
        index: usize,
        /// Its name.
        name: String,
        /// Its kind.
        kind: MapKind,
        /// What is wrong.
        reason: &'static str,
    },
    /// The plan was made for other maps.
    #[error("the plan was not made from these maps")]
    WrongPlan,
    /// What was opened is no initialised arena of this plan.
    #[error("this shared memory does not hold these maps")]
    NotAnArena,
}

/// Why an operation on a map failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The plan has fewer maps.
    #[error("there is no map {index:?}: there are {n_maps}")]
    NoSuchMap {
        /// What was asked for.
        index: MapIdx,
        /// How many there are.
        n_maps: usize,
    },
    /// The map is of another kind.
    #[error("map {index:?} is a {found:?}, not a {wanted:?}")]
    WrongKind {
        /// Which.
        index: MapIdx,
        /// What was asked for.
        wanted: MapKind,
        /// What it is.
        found: MapKind,
    },
    /// A program array, which has no memory.
    #[error(
        "map {index:?} is a program array: its elements are programs, to be set and cleared \
         through the object that it belongs to"
    )]
    HoldsPrograms {
        /// Which.
        index: MapIdx,
    },
    /// The key has another size than the map's keys.
    #[error("the key has {found_bytes} bytes, the map's keys have {expected_bytes}")]
    KeySize {
        /// The map's.
        expected_bytes: u32,
        /// The key's.
        found_bytes: usize,
    },
    /// The value has another size than the map's values.
    #[error("the value has {found_bytes} bytes, the map's values have {expected_bytes}")]
    ValueSize {
        /// The map's.
        expected_bytes: u32,
        /// The value's.
        found_bytes: usize,
    },
    /// The index is past the array's end.
    #[error("index {index} is past the array's {max_entries} elements")]
    OutOfRange {
        /// What was asked for.
        index: u32,
        /// How many there are.
        max_entries: u32,
    },
    /// There is such an element already (`Update::NoExist`).
    #[error("the key exists already")]
    Exists,
    /// There is no such element.
    #[error("there is no such key")]
    NotFound,
    /// All elements are taken.
    #[error("the map is full: its max_entries is {max_entries}")]
    Full {
        /// How many fit.
        max_entries: u32,
    },
    /// Somebody kept this part of the map locked; a dead owner's lock is given up after a
    /// second.
    #[error("this part of the map is locked by another thread: try again")]
    Busy,
    /// The map only says what others are like.
    #[error(
        "map {index:?} is the template of a map of maps and has no elements: ask for one of the maps in there"
    )]
    Template {
        /// Which.
        index: MapIdx,
    },
    /// A map of another shape than the template of a map of maps.
    #[error(
        "map {index:?} cannot be put into this map of maps: type, key_size, value_size, map_flags and the place of a lock must be those of its template, and an array's max_entries unless map_flags have BPF_F_INNER_MAP"
    )]
    WrongShape {
        /// Which.
        index: MapIdx,
    },
    /// A map that is not part of the object: shared memory does not grow once it is laid out.
    #[error(
        "map {index:?} is none of the {n_maps} maps that this object was loaded with, and no other can be put into a map of maps: declare as many maps as will be needed before it is loaded"
    )]
    NotLoaded {
        /// What was asked for.
        index: MapIdx,
        /// How many there are.
        n_maps: usize,
    },
    /// Values without a lock.
    #[error("the map's values have no struct bpf_spin_lock to be held meanwhile")]
    NoLock,
    /// The map's memory was overwritten by something else.
    #[error("the map's memory is damaged: the target has overwritten it")]
    Damaged,
}
