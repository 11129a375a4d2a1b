//! Functions, sites and signatures of an ELF module.
#![forbid(unsafe_code)]

pub mod addr;
pub mod signature;
