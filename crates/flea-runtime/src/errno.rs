//! Linux's error numbers, as far as helpers return them.

/// A positive error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// No such element.
    pub const ENOENT: Self = Self(2);
    /// No such process or thread.
    pub const ESRCH: Self = Self(3);
    /// More than fits: the map is full, or the index is past its end.
    pub const E2BIG: Self = Self(7);
    /// No room in the ring buffer.
    pub const EAGAIN: Self = Self(11);
    /// Bad address.
    pub const EFAULT: Self = Self(14);
    /// Somebody else is changing this part of the map, or this very thread is, further up.
    pub const EBUSY: Self = Self(16);
    /// There is such an element already.
    pub const EEXIST: Self = Self(17);
    /// A flag or size that has no meaning here.
    pub const EINVAL: Self = Self(22);

    /// What a helper returns: `-errno`.
    #[must_use]
    pub const fn to_return(self) -> i64 {
        -(self.0 as i64)
    }
}

/// What a helper returns: 0 or `-errno`.
#[must_use]
pub fn status(result: Result<(), Errno>) -> i64 {
    match result {
        Ok(()) => 0,
        Err(errno) => errno.to_return(),
    }
}
