//! BPF maps in memory shared with the target: the controller's side.
//!
//! ```
//! use flea_layout::plan::ArenaPlan;
//! use flea_maps::{Arena, Update};
//! use flea_object::spec::{MapIdx, MapKind, MapSpec};
//!
//! let maps = [MapSpec {
//!     name: "counts".into(),
//!     kind: MapKind::Hash,
//!     key_size_bytes: 4,
//!     value_size_bytes: 8,
//!     max_entries: 100,
//!     flags: 0,
//!     init: None,
//!     read_only: false,
//!     ..MapSpec::default()
//! }];
//! let arena = Arena::create(&ArenaPlan::new(&maps, 1), &maps)?;
//! let counts = arena.hash(MapIdx(0))?;
//! counts.update(&1u32.to_le_bytes(), &7u64.to_le_bytes(), Update::Any)?;
//! assert_eq!(counts.lookup(&1u32.to_le_bytes())?, Some(7u64.to_le_bytes().to_vec()));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Start with [`Arena`]. The algorithms are `flea-runtime`'s, which the target runs too.
//!
//! **Invariant**: everything in the arena is untrusted, as the target can write it. Offsets
//! come from the [`ArenaPlan`](flea_layout::plan::ArenaPlan) alone; every access is an
//! atomic word inside the mapping; every loop is bounded by the plan. A target that
//! scribbles gets wrong values shown and nothing else.

mod arena;
mod array;
mod error;
mod hash;
mod inner;
mod ringbuf;

pub use arena::{Arena, Map};
pub use array::{ArrayMap, PerCpuArrayMap};
pub use error::{ArenaError, MapError};
pub use hash::{HashMap, Iter, PerCpuHashMap, PerCpuIter, Update};
pub use inner::{ArrayOfMaps, HashOfMaps};
pub use ringbuf::RingBuf;
