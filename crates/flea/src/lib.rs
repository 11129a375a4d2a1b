//! Attach verified eBPF programs to functions of live processes.
//!
//! The words are those of aya and libbpf: a [`Session`] is a target process, an [`Object`] a
//! set of maps and [`Program`]s loaded into it, a [`Link`] what is attached, a [`Map`] what
//! programs and reader share.
//!
//! Start with [`Session`].

pub mod attached;
pub mod builtin;
mod change;
mod error;
mod function;
mod link;
mod modules;
mod object;
mod own;
mod placement;
mod reclaim;
pub mod registry;
mod remote;
mod session;
mod transaction;
mod unwinder;
mod vdso;

pub use flea_maps::{
    ArrayMap, HashMap, Map, MapError, PerCpuArrayMap, PerCpuHashMap, RingBuf, Update,
};
pub use flea_object::{
    ObjectError, asm,
    helper::Helper,
    parse as parse_object,
    spec::{MapIdx, MapKind, MapSpec, Object as ObjectSpec, Program as ProgramSpec, ProgramKind},
};
pub use flea_process::{Exit, Pid};
pub use flea_symbols::{Refusal, SiteKind, addr::RemoteAddr, signature};

pub use self::{
    error::{AttachError, FindError, LoadError, RemoteError, SessionError},
    function::Function,
    link::Link,
    modules::{Module, OpenError},
    object::{Attachment, Object, Program},
    session::Session,
};
