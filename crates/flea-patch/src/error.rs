//! Why a commit was not made.

use flea_symbols::addr::RemoteAddr;

use crate::plan::PlanError;

/// The step in which sites are found to be other ones than expected, or gone.
pub(crate) const COMPARING: &str = "looking at functions whose library may just have been closed";

/// Why a commit was not made. Unless it says otherwise, the text is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum CommitError<E: std::error::Error + 'static> {
    /// The plan makes no sense.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Other bytes than expected: another tool is there, or another version of the file.
    /// Nothing has been written.
    #[error(
        "at {site} stands {found:02x?}, not {expected:02x?}: another tool may have changed it; nothing was changed"
    )]
    Mismatch {
        /// The site.
        site: RemoteAddr,
        /// Bytes expected.
        expected: Vec<u8>,
        /// Bytes there.
        found: Vec<u8>,
    },
    /// There is no code any more: the process has closed the library since. Nothing has been
    /// written there.
    #[error(
        "at {site} is no code any more: its library was just closed; nothing was changed; try again"
    )]
    Closed {
        /// The site.
        site: RemoteAddr,
    },
    /// A thread stays between the replaced instructions (in a signal handler that
    /// interrupted it there). Everything has been put back.
    #[error(
        "a thread was interrupted inside the bytes at {site} by a signal handler that does not return; nothing was changed; try again"
    )]
    Busy {
        /// The site.
        site: RemoteAddr,
    },
    /// The target's loader is at work for longer than we wait. Everything has been put back.
    #[error(
        "the process is loading or unloading a library, and does not come to an end with it; nothing was changed; try again"
    )]
    Loading,
    /// An operation on the process failed; everything has been put back.
    #[error("{step}: {source}; everything was put back")]
    Failed {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: E,
    },
    /// An operation failed, and then putting things back as well. If the process lives, it
    /// may meet a breakpoint that nobody answers.
    #[error("{step}: {source}; and putting the old bytes back failed: {undo}")]
    Broken {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: E,
        /// Why putting back failed.
        undo: E,
    },
    /// As [`CommitError::Busy`], [`CommitError::Loading`] or [`CommitError::Mismatch`], but then
    /// putting things back failed.
    #[error("{step} at {site} failed, and putting the old bytes back as well: {undo}")]
    Stranded {
        /// What was being done.
        step: &'static str,
        /// The site.
        site: RemoteAddr,
        /// Why putting back failed.
        undo: E,
    },
    /// Something failed when new bytes were live already, and a thread stays inside those of one
    /// site: in a signal handler, that is, which interrupted it there.
    #[error(
        "{step} failed, and a thread was interrupted inside the new bytes at {site} by a signal handler that does not return: they stay; everything else was put back"
    )]
    Kept {
        /// What was being done.
        step: &'static str,
        /// The site.
        site: RemoteAddr,
    },
    /// The bytes read back are not the ones written: somebody else patches as well.
    #[error(
        "at {site} stands {found:02x?} right after {written:02x?} was written there: somebody else is patching this process"
    )]
    ReadBack {
        /// The site.
        site: RemoteAddr,
        /// Bytes written.
        written: Vec<u8>,
        /// Bytes there.
        found: Vec<u8>,
    },
}

impl<E: std::error::Error + 'static> CommitError<E> {
    /// Whether sites were found to be other ones than the plan says, or not to be there.
    #[must_use]
    pub fn is_found_changed(&self) -> bool {
        matches!(
            self,
            Self::Mismatch { .. } | Self::Closed { .. } | Self::Failed { step: COMPARING, .. }
        )
    }

    /// Whether every site is as it was before.
    #[must_use]
    pub fn is_undone(&self) -> bool {
        match self {
            Self::Plan(_)
            | Self::Mismatch { .. }
            | Self::Closed { .. }
            | Self::Busy { .. }
            | Self::Loading
            | Self::Failed { .. } => true,
            Self::Broken { .. }
            | Self::Stranded { .. }
            | Self::Kept { .. }
            | Self::ReadBack { .. } => false,
        }
    }
}
