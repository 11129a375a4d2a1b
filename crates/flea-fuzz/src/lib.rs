//! Fuzzers of the verifier, the compiler and the object reader. In development only.
//!
//! [`kernel`] asks the running kernel what it thinks of a program.

pub mod kernel;
