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

    /// Reads from each of these addresses that many bytes. As [`Target::read`] on each, for a
    /// process where reading them together is faster.
    fn read_each(&mut self, parts: &[(RemoteAddr, usize)]) -> Vec<Result<Vec<u8>, Self::Error>> {
        let read = |&(at, n_bytes): &(RemoteAddr, usize)| {
            let mut bytes = vec![0; n_bytes];
            self.read(at, &mut bytes).map(|()| bytes)
        };
        parts.iter().map(read).collect()
    }

    /// How many sites may have their breakpoints at the same time: threads that run into one
    /// wait, or are slow, until the last byte of the last of these sites is written.
    fn sites_at_once(&self) -> usize {
        usize::MAX
    }

    /// Which of these addresses some thread stands at or will come back to, as far as that can be
    /// told without stopping one. Nothing rests on the answer but how long it takes when
    /// [`Target::evacuate`] is asked for some of them later.
    fn look(&mut self, places: &[RemoteAddr]) -> Result<Vec<RemoteAddr>, Self::Error> {
        let _ = places;
        Ok(Vec::new())
    }

    /// Writes text that may be executed at the same time.
    fn write_text(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Returns once no CPU can execute bytes of the target that it fetched before.
    fn sync_core(&mut self) -> Result<(), Self::Error>;

    /// From now on a thread that executes `int3` at one of these sites goes on elsewhere, as one
    /// does at those of earlier calls since [`Target::disarm`].
    fn arm(&mut self, traps: &[Trap]) -> Result<(), Self::Error>;

    /// No breakpoint but a gate's is in the text, and every CPU has seen that: threads that were
    /// kept waiting because of the others go on. There may be others soon.
    fn release(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// No thread is sent elsewhere any more.
    fn disarm(&mut self) -> Result<(), Self::Error>;

    /// Moves threads that stand at the first address of a pair to the second one. Returns
    /// the addresses that some thread will come back to (from a signal handler), or stands at
    /// and could not be moved from. Where both addresses of a pair are the same, nobody is moved,
    /// and who stands there is in the answer.
    fn evacuate(
        &mut self,
        moves: &[(RemoteAddr, RemoteAddr)],
    ) -> Result<Vec<RemoteAddr>, Self::Error>;

    /// The gate's breakpoint has gone, and every CPU has seen that: threads that waited there, or
    /// because of it, go on.
    fn open_gate(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Whether a thread waits at a gate, a breakpoint that leads to where it stands. It does so
    /// until [`Target::open_gate`].
    fn is_gate_taken(&mut self) -> Result<bool, Self::Error> {
        Ok(false)
    }

    /// Whether the memory at all of these addresses may be executed.
    fn are_executable(&mut self, sites: &[RemoteAddr]) -> Result<bool, Self::Error> {
        let _ = sites;
        Ok(true)
    }

    /// Lets the target run for a moment.
    fn wait_a_moment(&mut self, duration: Duration) -> Result<(), Self::Error>;

    /// Returns once no thread is on its way into a breakpoint that has been overwritten.
    fn drain(&mut self) -> Result<(), Self::Error>;
}
