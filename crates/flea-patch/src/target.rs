//! What a commit needs of a process.

use std::time::Duration;

use flea_process::Trap;
use flea_symbols::addr::RemoteAddr;

/// A process that runs while its text is changed.
pub trait Target {
    /// Why an operation failed.
    type Error: std::error::Error + 'static;

    /// Fills `into` from `at`, or fails.
    fn read(&mut self, at: RemoteAddr, into: &mut [u8]) -> Result<(), Self::Error>;

    /// Writes text that may be executed at the same time.
    fn write_text(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Returns once no CPU can execute bytes of the target that it fetched before.
    fn sync_core(&mut self) -> Result<(), Self::Error>;

    /// From now on a thread that executes `int3` at one of these sites goes on elsewhere.
    fn arm(&mut self, traps: &[Trap]) -> Result<(), Self::Error>;

    /// No more.
    fn disarm(&mut self) -> Result<(), Self::Error>;

    /// Moves threads that stand at the first address of a pair to the second one. Returns
    /// the addresses that some thread will come back to (from a signal handler), or stands at
    /// and could not be moved from.
    fn evacuate(
        &mut self,
        moves: &[(RemoteAddr, RemoteAddr)],
    ) -> Result<Vec<RemoteAddr>, Self::Error>;

    /// Lets the target run for a moment.
    fn wait_a_moment(&mut self, duration: Duration) -> Result<(), Self::Error>;

    /// Returns once no thread is on its way into a breakpoint that has been overwritten.
    fn drain(&mut self) -> Result<(), Self::Error>;
}
