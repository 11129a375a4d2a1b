//! Compiles verified programs and their trampoline into one function's image. Bytes out,
//! nothing is ever executed or placed here; knows nothing of processes.
//!
//! Two steps, made by different parties (ARCHITECTURE.md, "Bodies and skeletons"):
//!
//! 1. [`compile_body`]: signature + programs -> up to four *bodies*, each a leaf-like piece
//!    of code that keeps every register (modules `body`, `translate`).
//! 2. [`link_skeleton`]: site + bodies of all controllers -> the few instructions that run
//!    them around the original ([`x86_64::skeleton`]).
//!
//! [`check_body`] walks emitted code again, without trust in the compiler that made it;
//! [`check_image`] does so for a linked image, without trust in anything above.
#![forbid(unsafe_code)]

mod body;
mod changes;
mod clif;
mod code;
mod frame;
pub mod frames_file;
mod guard;
mod plain;
mod request;
mod session;
mod sides;
mod skip;
mod translate;
pub mod unwind;
pub mod x86_64;

pub use body::{compile_body, compile_shared_body};
pub use changes::{Changes, changeable};
pub use code::{Code, Reloc, RelocKind, RelocTarget};
pub use plain::{PlainRequest, compile_function, compile_plain};
pub use request::{
    BODY_FRAMES_OFFSET, Body, BodyRequest, CompileError, Cpu, ProgramUse, Reads, Save, Saved, When,
};
pub use sides::needs_frame;
pub use skip::{NoSkip, SkipResult, skip_result};
pub use x86_64::check::{CheckError, check_body};
pub use x86_64::find_fde::{FrameArena, Question};
pub use x86_64::image_check::{ImageError, ImageUnderCheck, check_image};
pub use x86_64::listing::listing;
pub use x86_64::relocate::RelocateError;
pub use x86_64::skeleton::{
    BodyRef, Changer, Draft, LinkError, Linker, PATCH_BYTES, SiteKind, Skeleton, SkeletonBody,
    SkeletonRequest, Switch, UnwindRow, UnwindRule, call_patch, link_skeleton,
    link_unwinder_skeleton,
};
pub use x86_64::stack_copy::StackCopy;
