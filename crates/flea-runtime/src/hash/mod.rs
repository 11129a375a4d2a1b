//! HASH and PERCPU_HASH. Both sides run this code: the target's trusts the map's header for
//! the geometry, the controller takes it from its own plan.
//!
//! ```text
//!   MapHeader.state   [0] free list: tag << 32 | link      [3] suspected lock word
//!                     [1] nodes ever used                  [4] suspected since, ns
//!                     [2] seed                             [5], [6] the same, of values' locks
//!   data              buckets  n x { first: link, lock }            (see lock.rs)
//!                     nodes    max_entries x { next: link, hash, next free: link,
//!                                              generation, key.., value.. }
//!   link              0: nothing; n + 1: node n; END | bucket: end of that bucket's chain
//!   generation        odd while the node is an element, one more at each change
//! ```
//! A PERCPU_HASH keeps its values in the slots, at the node's index.
//!
//! Protected: one chain. By: its bucket's lock for those who change it, by nothing for
//! those who read:
//! 1. An insert fills the node, makes its generation odd, links it at the front.
//! 2. A delete unlinks the node but leaves its `next`, so a reader on it goes on; then
//!    makes the generation even, then pushes it on the free list (a lock-free stack whose
//!    tag changes with each operation).
//! 3. A reader on a node that was reused lands in another chain. The chain's end names its
//!    bucket: the wrong name sends the reader back to the start.
//! 4. A key counts as found only if the generation was odd and the same before and after
//!    the comparison. After that, the element may be deleted and its node reused while a
//!    program holds the value's address, as in Linux: it stays an address of a value.
//!
//! Values of existing elements are overwritten in place, word by word. The lock in a value is
//! never written: whoever has the address of an element that was deleted may hold its lock.

pub mod change;
pub mod key;

use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed},
    fence,
};

use crate::mem::{Bytes, Shared};
use crate::shared::{
    HASH_BUCKET_BYTES, HASH_NODE_HEADER_BYTES, hash_bucket_count, hash_node_bytes,
};

/// `state` words.
pub mod state {
    /// Head of the free list.
    pub const FREE: u64 = 0;
    /// Nodes that were ever handed out.
    pub const USED: u64 = 1;
    /// Seed of the hash function; the controller draws it.
    pub const SEED: u64 = 2;
    /// See `lock.rs`.
    pub const SUSPECT: u64 = 3;
    /// See `lock.rs`.
    pub const SUSPECT_SINCE: u64 = 4;
    /// As `SUSPECT`, of the locks in values; arrays have these two as well.
    pub const VALUE_SUSPECT: u64 = 5;
    /// As `SUSPECT_SINCE`.
    pub const VALUE_SUSPECT_SINCE: u64 = 6;
}

/// Most elements a hash map can have: links have 31 bits.
pub const MAX_ENTRIES: u32 = 1 << 30;

const END: u32 = 1 << 31;
/// Times a reader starts again before it calls the key absent.
const RESTARTS: u32 = 1000;

/// The shape of a hash map: trusted numbers, from which all offsets are computed.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Bytes per key, not 0.
    pub key_size_bytes: u32,
    /// Bytes per value.
    pub value_size_bytes: u32,
    /// Bytes between values.
    pub value_stride: u32,
    /// Elements, at most [`MAX_ENTRIES`].
    pub max_entries: u32,
    /// Where values are.
    pub values: Values,
    /// Where in a value its lock is.
    pub lock_offset: Option<u32>,
}

/// Where a hash map's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// In the nodes.
    InNode,
    /// In every slot, at this offset.
    InSlots {
        /// From the slot's start.
        slot_offset: u64,
    },
}

/// A hash map.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    geometry: Geometry,
    state: Shared<'a>,
    buckets: Shared<'a>,
    nodes: Shared<'a>,
    node_bytes: u64,
}

/// An element's node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeIdx(pub u32);

/// A node's words.
struct Node<'a> {
    next: &'a AtomicU32,
    hash: &'a AtomicU32,
    next_free: &'a AtomicU32,
    generation: &'a AtomicU32,
}

/// A key and the bucket it belongs to.
#[derive(Clone, Copy)]
struct Wanted<'k> {
    key: Bytes<'k>,
    hash: u32,
    bucket: u32,
}

/// What one walk along a chain found.
enum Walk {
    Found(NodeIdx),
    Absent,
    /// The chain changed underfoot.
    Again,
}

impl<'a> Table<'a> {
    /// The table whose header's `state` words are `state` and whose data is `data`. `None`
    /// where `geometry` does not fit them.
    #[must_use]
    pub fn new(geometry: Geometry, state: Shared<'a>, data: Shared<'a>) -> Option<Self> {
        if geometry.key_size_bytes == 0 || !(1..=MAX_ENTRIES).contains(&geometry.max_entries) {
            return None;
        }
        let stride_in_node = match geometry.values {
            Values::InNode => geometry.value_stride,
            Values::InSlots { .. } => 0,
        };
        let node_bytes = hash_node_bytes(geometry.key_size_bytes, stride_in_node);
        let bucket_bytes = hash_bucket_count(geometry.max_entries) * HASH_BUCKET_BYTES;
        let nodes = data.part(bucket_bytes, node_bytes * u64::from(geometry.max_entries))?;
        Some(Self { geometry, state, buckets: data.part(0, bucket_bytes)?, nodes, node_bytes })
    }

    /// Its shape.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The node of `key`, which has the map's key size. Takes no lock.
    #[must_use]
    pub fn find(&self, key: Bytes<'_>) -> Option<NodeIdx> {
        let wanted = self.wanted(key)?;
        for _ in 0..RESTARTS {
            match self.walk(&wanted)? {
                Walk::Found(node) => return Some(node),
                Walk::Absent => return None,
                Walk::Again => {}
            }
        }
        None
    }

    /// The address of a node's value, for maps that keep it there.
    #[must_use]
    pub fn value_address(&self, node: NodeIdx) -> u64 {
        self.nodes.address(self.value_offset(node))
    }

    /// The first 4 bytes of a node's value: all of a map of maps' value.
    #[must_use]
    pub fn value_half(&self, node: NodeIdx) -> Option<&'a AtomicU32> {
        self.nodes.half(self.value_offset(node))
    }

    /// Copies an element by its number, `0..max_entries`: key, then value where it is in the
    /// node. `None` where there is no element; `Some(false)` where it kept changing.
    #[must_use]
    pub fn snapshot(&self, node: NodeIdx, key: &mut [u8], value: &mut [u8]) -> Option<bool> {
        if node.0 >= self.geometry.max_entries {
            return None;
        }
        let words = self.node(node)?;
        for _ in 0..RESTARTS {
            let generation = words.generation.load(Acquire);
            if generation & 1 == 0 {
                return None;
            }
            self.nodes.load(self.key_offset(node), key)?;
            if self.geometry.values == Values::InNode {
                self.nodes.load(self.value_offset(node), value)?;
            }
            fence(Acquire);
            if words.generation.load(Relaxed) == generation {
                return Some(true);
            }
        }
        Some(false)
    }

    /// The first element whose number is `from` or more, its key copied to `key`. Elements that
    /// come and go meanwhile are found or not; each number is looked at once, so whoever goes on
    /// behind what was found comes to an end. Takes no lock.
    #[must_use]
    pub fn next(&self, from: u32, key: &mut [u8]) -> Option<NodeIdx> {
        // Nodes from here on were never an element.
        let used = self.word(state::USED)?.load(Acquire).min(u64::from(self.geometry.max_entries));
        (from..crate::mem::low_half(used))
            .map(NodeIdx)
            .find(|node| self.snapshot(*node, key, &mut []) == Some(true))
    }

    fn wanted<'k>(&self, key: Bytes<'k>) -> Option<Wanted<'k>> {
        let hash = key::hash(self.word(state::SEED)?.load(Relaxed), key);
        let mask = crate::mem::low_half(self.buckets.size_bytes() / HASH_BUCKET_BYTES - 1);
        Some(Wanted { key, hash, bucket: hash & mask })
    }

    /// Once along the chain of `wanted`. `None`: memory that is no hash map.
    fn walk(&self, wanted: &Wanted<'_>) -> Option<Walk> {
        let mut link = self.first(wanted.bucket)?.load(Acquire);
        // A chain has at most every node in it; more is a cycle of scribbled links.
        for _ in 0..=self.geometry.max_entries {
            if link == 0 || link == END | wanted.bucket {
                return Some(Walk::Absent);
            }
            if link & END != 0 {
                return Some(Walk::Again);
            }
            let index = NodeIdx(link - 1);
            let node = self.node(index)?;
            let generation = node.generation.load(Acquire);
            link = node.next.load(Acquire);
            if generation & 1 == 1
                && node.hash.load(Relaxed) == wanted.hash
                && self.nodes.equals(self.key_offset(index), wanted.key)
            {
                fence(Acquire);
                let same = node.generation.load(Relaxed) == generation;
                return Some(if same { Walk::Found(index) } else { Walk::Again });
            }
        }
        None
    }

    fn first(&self, bucket: u32) -> Option<&'a AtomicU32> {
        self.buckets.half(u64::from(bucket) * HASH_BUCKET_BYTES)
    }

    fn lock_word(&self, bucket: u32) -> Option<&'a AtomicU32> {
        self.buckets.half(u64::from(bucket) * HASH_BUCKET_BYTES + 4)
    }

    fn node(&self, index: NodeIdx) -> Option<Node<'a>> {
        let at = self.nodes.part(u64::from(index.0) * self.node_bytes, HASH_NODE_HEADER_BYTES)?;
        Some(Node {
            next: at.half(0)?,
            hash: at.half(4)?,
            next_free: at.half(8)?,
            generation: at.half(12)?,
        })
    }

    fn key_offset(&self, node: NodeIdx) -> u64 {
        u64::from(node.0) * self.node_bytes + HASH_NODE_HEADER_BYTES
    }

    fn value_offset(&self, node: NodeIdx) -> u64 {
        self.key_offset(node) + crate::mem::round_up_8(u64::from(self.geometry.key_size_bytes))
    }

    fn word(&self, index: u64) -> Option<&'a AtomicU64> {
        self.state.word(index * 8)
    }
}
