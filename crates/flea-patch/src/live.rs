//! A seized process as a [`Target`].

use std::time::Duration;

use flea_process::{TraceError, Tracer, Trap};
use flea_symbols::addr::RemoteAddr;

use crate::target::Target;

impl Target for Tracer {
    type Error = TraceError;

    fn read(&mut self, at: RemoteAddr, into: &mut [u8]) -> Result<(), TraceError> {
        Ok(self.memory().read(at, into)?)
    }

    fn read_each(&mut self, parts: &[(RemoteAddr, usize)]) -> Vec<Result<Vec<u8>, TraceError>> {
        let found = self.memory().read_each(parts);
        found.into_iter().map(|bytes| Ok(bytes?)).collect()
    }

    fn sites_at_once(&self) -> usize {
        Self::sites_at_once(self)
    }

    fn look(&mut self, places: &[RemoteAddr]) -> Result<Vec<RemoteAddr>, TraceError> {
        Ok(Self::look(self, places)?.into_iter().map(|word| word.value).collect())
    }

    fn release(&mut self) -> Result<(), TraceError> {
        Self::release(self)
    }

    fn write_text(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        Self::write_text(self, at, bytes)
    }

    fn sync_core(&mut self) -> Result<(), TraceError> {
        Self::sync_core(self)
    }

    fn arm(&mut self, traps: &[Trap]) -> Result<(), TraceError> {
        Self::arm(self, traps)
    }

    fn disarm(&mut self) -> Result<(), TraceError> {
        Self::disarm(self)
    }

    fn evacuate(
        &mut self,
        moves: &[(RemoteAddr, RemoteAddr)],
    ) -> Result<Vec<RemoteAddr>, TraceError> {
        Ok(Self::evacuate(self, moves)?.into_iter().map(|word| word.value).collect())
    }

    fn open_gate(&mut self) -> Result<(), TraceError> {
        Self::open_gate(self)
    }

    fn is_gate_taken(&mut self) -> Result<bool, TraceError> {
        self.pump()?;
        Ok(Self::is_gate_taken(self))
    }

    fn are_executable(&mut self, sites: &[RemoteAddr]) -> Result<bool, TraceError> {
        let maps = flea_process::maps(self.pid())?;
        let is_code = |site: &RemoteAddr| {
            let behind = maps.partition_point(|mapping| mapping.end <= *site);
            maps.get(behind).is_some_and(|m| m.contains(*site) && m.perms.execute)
        };
        Ok(sites.iter().all(is_code))
    }

    fn wait_a_moment(&mut self, duration: Duration) -> Result<(), TraceError> {
        Self::wait_a_moment(self, duration)
    }

    fn drain(&mut self) -> Result<(), TraceError> {
        Self::drain(self)
    }
}
