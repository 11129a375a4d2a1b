//! The process as `flea_patch::commit` sees it, and where most faults are planted.

use std::time::Duration;

use flea_patch::{Plan, Target};
use flea_process::{TraceError, Trap};
use flea_symbols::addr::RemoteAddr;

use crate::context::Doing;
use crate::fault::Fault;
use crate::host::Hold;
use crate::loader::{R_DEBUG, R_DEBUG_BYTES};
use crate::text::INT3;
use crate::trouble::{Op, trace_error};

/// The process during one commit.
pub struct Patcher<'h, 'w> {
    hold: &'h Hold<'w>,
    plan: &'h Plan,
    sites_at_once: usize,
    n_syncs: u32,
    has_written: bool,
    has_failed: bool,
    /// What [`Fault::ArmLate`] keeps back.
    late: Vec<Trap>,
}

impl<'h, 'w> Patcher<'h, 'w> {
    /// For one commit of `plan`.
    pub fn new(hold: &'h Hold<'w>, plan: &'h Plan) -> Self {
        let sites_at_once = 1 + hold.machine().dice.index(4);
        let late = Vec::new();
        Self { hold, plan, sites_at_once, n_syncs: 0, has_written: false, has_failed: false, late }
    }

    fn op(&mut self, op: Op) -> Result<(), TraceError> {
        self.hold.op(op).map_err(|denied| {
            self.has_failed = true;
            trace_error(denied)
        })
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let mut machine = self.hold.machine();
        for (at, &byte) in (at..).zip(bytes) {
            if !machine.text.write(at, byte) {
                machine.violate(format!("text is written at {at:#x}, where nothing is"));
            }
            let n_steps = machine.dice.below(4);
            machine.run(n_steps);
        }
    }

    fn poke_around(&self, at: u64) -> Option<&flea_patch::Poke> {
        let inside = |p: &&flea_patch::Poke| p.site.0 <= at && at < p.site.0 + p.n_bytes() as u64;
        self.plan.pokes.iter().find(inside)
    }

    fn put_tails(&self) {
        for poke in &self.plan.pokes {
            self.put(poke.site.0 + 1, &poke.new[1..poke.n_bytes()]);
        }
    }
}

impl Target for Patcher<'_, '_> {
    type Error = TraceError;

    fn read(&mut self, at: RemoteAddr, into: &mut [u8]) -> Result<(), TraceError> {
        self.op(Op::Read)?;
        if self.hold.has(Fault::NoCompare)
            && !self.has_written
            && let Some(poke) = self.plan.pokes.iter().find(|poke| poke.site == at)
            && poke.expected.len() == into.len()
        {
            into.copy_from_slice(&poke.expected);
            return Ok(());
        }
        let machine = self.hold.machine();
        if let Some(at) = at.0.checked_sub(R_DEBUG).filter(|at| *at < R_DEBUG_BYTES) {
            let r_debug = machine.loader.r_debug();
            let place = usize::try_from(at).expect("a few bytes");
            into.copy_from_slice(&r_debug[place..][..into.len()]);
            return Ok(());
        }
        let bytes = machine.text.from(at.0).and_then(|bytes| bytes.get(..into.len()));
        let bytes = bytes.ok_or_else(|| trace_error(crate::trouble::Denied { gone: false }))?;
        into.copy_from_slice(bytes);
        Ok(())
    }

    fn write_text(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        self.op(Op::WriteText)?;
        self.has_written = true;
        let fault = self.hold.fault();
        let is_breakpoint = bytes == [INT3] && self.poke_around(at.0).is_some_and(|p| p.site == at);
        match fault {
            Some(Fault::NoBreakpoints) if is_breakpoint => return Ok(()),
            Some(Fault::NoUndo) if self.has_failed => return Ok(()),
            Some(Fault::FirstBytesFirst) if !is_breakpoint => {
                if let Some(poke) = self.poke_around(at.0).filter(|poke| poke.site != at) {
                    self.put(poke.site.0, &poke.new[..1]);
                }
            }
            _ => {}
        }
        self.put(at.0, bytes);
        Ok(())
    }

    fn sites_at_once(&self) -> usize {
        self.sites_at_once
    }

    fn look(&mut self, places: &[RemoteAddr]) -> Result<Vec<RemoteAddr>, TraceError> {
        self.op(Op::Look)?;
        let machine = self.hold.machine();
        let contexts = machine.threads.iter().map(|thread| &thread.context);
        let leads = |place: &RemoteAddr| {
            contexts.clone().any(|context| context.leads_into(&(place.0..place.0 + 1)))
        };
        Ok(places.iter().copied().filter(leads).collect())
    }

    fn release(&mut self) -> Result<(), TraceError> {
        self.op(Op::Release)
    }

    fn open_gate(&mut self) -> Result<(), TraceError> {
        self.op(Op::Release)?;
        self.hold.machine().loader.let_go();
        Ok(())
    }

    fn is_gate_taken(&mut self) -> Result<bool, TraceError> {
        self.op(Op::Look)?;
        Ok(self.hold.machine().loader.is_waiting())
    }

    fn sync_core(&mut self) -> Result<(), TraceError> {
        self.op(Op::Sync)?;
        self.n_syncs += 1;
        // One with the gate, then three for each batch.
        let which = self.n_syncs.checked_sub(2).map(|behind| behind % 3);
        if which.is_some_and(|which| self.hold.has(Fault::NoSync(which))) {
            return Ok(());
        }
        let mut machine = self.hold.machine();
        // One CPU after the other.
        for cpu in 0..machine.text.n_cpus() {
            machine.text.serialise(cpu);
            machine.run_a_little();
        }
        machine.traps.append(&mut self.late);
        Ok(())
    }

    fn arm(&mut self, traps: &[Trap]) -> Result<(), TraceError> {
        self.op(Op::Arm)?;
        if self.hold.has(Fault::TailsFirst) {
            self.put_tails();
        }
        let mut traps = traps.to_vec();
        for trap in &mut traps {
            let behind = self.poke_around(trap.site.0).map_or(0, |poke| poke.expected.len());
            match self.hold.fault() {
                Some(Fault::TrapStays) => trap.goes_to = trap.site.offset(1),
                Some(Fault::TrapSkips) => {
                    trap.goes_to = trap.site.offset(i64::try_from(behind).unwrap_or(0));
                }
                _ => {}
            }
        }
        match self.hold.has(Fault::ArmLate) {
            true => self.late = traps,
            false => self.hold.machine().traps.append(&mut traps),
        }
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), TraceError> {
        self.op(Op::Disarm)?;
        let mut machine = self.hold.machine();
        machine.traps.clear();
        machine.loader.let_go();
        Ok(())
    }

    fn evacuate(
        &mut self,
        moves: &[(RemoteAddr, RemoteAddr)],
    ) -> Result<Vec<RemoteAddr>, TraceError> {
        self.op(Op::Evacuate)?;
        let mut inside = Vec::new();
        if self.hold.has(Fault::NoEvacuation) {
            return Ok(inside);
        }
        let mut machine = self.hold.machine();
        for i in 0..machine.threads.len() {
            machine.run_a_little();
            if machine.threads[i].context.doing == Doing::Trapped {
                machine.answer(i);
            }
            let cpu = machine.threads[i].cpu;
            let context = &mut machine.threads[i].context;
            let is_from = |at: u64| moves.iter().find(|(from, _)| from.0 == at);
            if let Some((from, to)) = is_from(context.rip) {
                if from == to {
                    inside.push(*from);
                    continue;
                }
                context.rip = to.0;
                // It was stopped, and goes on by `iret`.
                machine.text.serialise(cpu);
                machine.note(|| format!("thread {i} is moved from {from} to {to}"));
            }
            let context = &machine.threads[i].context;
            let frames = context.handlers.iter().filter(|handler| is_from(handler.rip).is_some());
            inside.extend(frames.map(|handler| RemoteAddr(handler.rip)));
        }
        if self.hold.has(Fault::NoHandlers) {
            inside.clear();
        }
        Ok(inside)
    }

    fn wait_a_moment(&mut self, _duration: Duration) -> Result<(), TraceError> {
        self.op(Op::Wait)?;
        self.hold.machine().run(40);
        Ok(())
    }

    fn drain(&mut self) -> Result<(), TraceError> {
        self.op(Op::Drain)?;
        let mut machine = self.hold.machine();
        match self.hold.fault() {
            Some(Fault::NoDrain) => return Ok(()),
            Some(Fault::DisarmFirst) => machine.traps.clear(),
            _ => {}
        }
        for i in 0..machine.threads.len() {
            if machine.threads[i].context.doing == Doing::Trapped {
                machine.answer(i);
            }
        }
        Ok(())
    }
}
