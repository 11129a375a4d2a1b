//! Attach verified eBPF programs to functions of live processes.
//!
//! The words are those of aya and libbpf: a [`Session`] is a target process, an [`Object`] a
//! set of maps and [`Program`]s loaded into it, a [`Link`] what is attached, a [`Map`] what
//! programs and reader share. A [`Patch`] replaces functions by those of a shared object.
//!
//! ```
//! # mod parts { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/parts/counter.rs")); }
//! # use parts::{counter, total};
//! // The object: from `clang -O2 -target bpf`, or made in code as `counter()` here.
//! // let spec = flea::parse_object(&std::fs::read("counter.bpf.o")?)?;
//! let spec = counter();
//!
//! #[unsafe(no_mangle)]
//! #[inline(never)]
//! extern "C" fn crate_example(x: u64) -> u64 {
//!     x + 1
//! }
//!
//! let session = flea::Session::this_process()?;
//! let function = &session.find("crate_example")?[0];
//! let object = session.load(spec)?;
//! let link = object.program("count").expect("it is in the object").attach(function)?;
//! for i in 0..100 {
//!     assert_eq!(crate_example(i), i + 1);
//! }
//! link.detach()?;
//! crate_example(0);
//! assert_eq!(total(&object), 100);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Start with [`Session`]; [`builtin`] has counting, histograms and traces ready to use.

pub mod attached;
pub mod builtin;
mod change;
mod compile;
mod error;
mod file_bytes;
mod fit;
mod follow;
pub mod frames_file;
mod function;
mod gate;
mod given;
mod host;
mod known_code;
mod link;
mod modules;
mod object;
mod own;
mod pages;
mod patch;
mod placement;
mod prepared;
mod program_array;
mod rebuild;
mod reclaim;
pub mod registry;
mod remote;
mod replace;
mod session;
#[cfg(feature = "simulate")]
#[doc(hidden)]
pub mod simulate;
mod sites;
mod slots;
mod system_calls;
mod transaction;
pub mod types;
mod unload;
mod unwinder;
mod vdso;

pub use flea_maps::{
    ArrayMap, ArrayOfMaps, HashMap, HashOfMaps, Map, MapError, PerCpuArrayMap, PerCpuHashMap,
    RingBuf, Update,
};
pub use flea_object::{
    ObjectError, asm,
    helper::Helper,
    insn::Insn,
    parse as parse_object,
    spec::{
        InnerMaps, MapIdx, MapKind, MapSpec, Object as ObjectSpec, Program as ProgramSpec,
        ProgramKind, ProgramSlot,
    },
};
pub use flea_process::{Exit, Pid};
pub use flea_symbols::{Refusal, SiteKind, addr::RemoteAddr, signature};
pub use flea_verifier::Permissions;

/// Why the verifier refused a program, as facts: see [`AttachError::Rejected`].
pub mod rejection {
    pub use flea_verifier::{Event, Known, Line, Place, Rejection, What};
}

pub use self::{
    error::{AttachError, FindError, LoadError, ProgramArrayError, RemoteError, SessionError},
    follow::{Followed, Following},
    function::Function,
    link::Link,
    modules::{Module, OpenError},
    object::{Attachment, Object, Program},
    patch::{Patch, PatchError, Replacement, ResolveError},
    program_array::ProgramArray,
    session::Session,
};
