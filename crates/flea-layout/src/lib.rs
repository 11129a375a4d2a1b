//! The memory that programs, runtime and controller share: offsets and constants. Knows
//! nothing of processes or machine code. Start with [`shared`]'s picture.
#![forbid(unsafe_code)]

pub mod plan;
pub mod shared;
