//! flea
