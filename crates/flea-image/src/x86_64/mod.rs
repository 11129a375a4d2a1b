//! x86-64: skeletons, relocated instructions, listings, and the checker of emitted code.

mod assemble;
pub mod check;
pub mod find_fde;
pub mod image_check;
pub mod listing;
pub mod personality;
pub(crate) mod relocate;
mod saves;
pub mod skeleton;
pub(crate) mod slim;
pub mod stack_copy;
