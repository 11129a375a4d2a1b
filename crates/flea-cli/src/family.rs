//! The programs that a command has attached to: the target's, and with `--follow` those that it
//! and its children execute, each with results of its own until they are added up.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result};
use flea::{
    AttachError, Followed, Following, Function, Pid, Session,
    builtin::{Count, Histograms, Trace},
};

use crate::{
    output::n_functions,
    plain,
    target::{Target, find_all},
};

/// What a command attaches to one program.
pub trait Probe {
    /// Functions attached to.
    fn n_attached(&self) -> usize;
    /// Functions that could not be.
    fn n_refused(&self) -> usize;
    /// Why those could not; `most` of them.
    fn reasons(&self, most: usize) -> Vec<String>;
    /// Program runs that were skipped.
    fn missed(&self) -> u64;
    /// Records for which there was no room.
    fn lost(&self) -> u64;
    /// Takes the programs off.
    fn detach(&mut self) -> Result<(), AttachError>;
}

macro_rules! probe {
    ($name:ident) => {
        impl Probe for $name {
            fn n_attached(&self) -> usize {
                self.functions().len()
            }
            fn n_refused(&self) -> usize {
                self.refused().len()
            }
            fn reasons(&self, most: usize) -> Vec<String> {
                self.refused().iter().take(most).map(|refused| refused.reason.to_string()).collect()
            }
            fn missed(&self) -> u64 {
                self.missed()
            }
            fn lost(&self) -> u64 {
                self.lost()
            }
            fn detach(&mut self) -> Result<(), AttachError> {
                self.detach()
            }
        }
    };
}
probe!(Count);
probe!(Histograms);
probe!(Trace);

/// What is attached to one program, and the processes that have it: the one that executed it and
/// those forked from it share its maps.
struct Image<P> {
    probe: P,
    /// The one that executed it.
    pid: Pid,
    members: BTreeSet<Pid>,
}

/// Sums for the last line.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    pub attached: usize,
    pub refused: usize,
    pub missed: u64,
    pub lost: u64,
}

/// How a command attaches to a program.
enum Way<'a, P> {
    /// What an object names; `None` where a program has nothing of it.
    Object(Again<'a, P>),
    /// To the functions of these patterns.
    Functions { patterns: &'a [String], start: Start<'a, P>, may_wait: bool },
}

type Again<'a, P> = Box<dyn Fn(&Session) -> Result<Option<P>> + 'a>;
type Start<'a, P> = Box<dyn Fn(&Session, &[Function]) -> Result<P> + 'a>;

/// Patterns of which a program has nothing yet.
struct Waiting {
    session: Session,
    patterns: Vec<String>,
}

/// All of them. Those that have ended have been handed to `finish`.
pub struct Family<'a, P> {
    way: Way<'a, P>,
    images: Vec<Image<P>>,
    waiting: Vec<Waiting>,
    totals: Totals,
}

impl<'a, P: Probe> Family<'a, P> {
    /// `probe` is attached to the target's own program, `again` attaches to others.
    pub fn of_object(
        target: &Target,
        probe: P,
        again: impl Fn(&Session) -> Result<Option<P>> + 'a,
    ) -> Self {
        let image = Image::new(probe, &target.session);
        let way = Way::Object(Box::new(again));
        Self { way, images: vec![image], waiting: vec![], totals: Totals::default() }
    }

    /// Attaches to the target's own program what `start` attaches to the functions of others. With
    /// `may_wait`, what is not there need not be: a library may be loaded that has it.
    pub fn of_functions(
        target: &Target,
        patterns: &'a [String],
        may_wait: bool,
        start: impl Fn(&Session, &[Function]) -> Result<P> + 'a,
    ) -> Result<Self> {
        let (functions, missing) = target.find(patterns, may_wait)?;
        let mut images = Vec::new();
        if !functions.is_empty() {
            images.push(Image::new(start(&target.session, &functions)?, &target.session));
        }
        let mut family = Self {
            way: Way::Functions { patterns, start: Box::new(start), may_wait },
            images,
            waiting: vec![],
            totals: Totals::default(),
        };
        family.wait_for(&target.session, missing);
        Ok(family)
    }

    /// Looks whether libraries have been loaded that programs wait for, and attaches to them.
    ///
    /// This is asked now and then: calls that the library has made before are not seen.
    pub fn look(&mut self) -> Result<()> {
        for mut waiting in std::mem::take(&mut self.waiting) {
            // One that has ended or become another program has nothing to wait for.
            let Ok(has_changed) = waiting.session.refresh_changed() else { continue };
            if has_changed {
                self.attach_waiting(&mut waiting)?;
            }
            if !waiting.patterns.is_empty() {
                self.waiting.push(waiting);
            }
        }
        Ok(())
    }

    fn attach_waiting(&mut self, waiting: &mut Waiting) -> Result<()> {
        let Way::Functions { start, .. } = &self.way else { return Ok(()) };
        let session = &waiting.session;
        let (functions, missing) = find_all(session, &waiting.patterns);
        if functions.is_empty() {
            return Ok(());
        }
        waiting.patterns = missing.into_iter().map(|(pattern, _)| pattern).collect();
        let (probe, pid) = (start(session, &functions)?, session.pid());
        let n = probe.n_attached();
        let more = probe.reasons(1).pop().map(|reason| format!("; not attached: {reason}"));
        eprintln!(
            "flea: process {pid} has loaded a library: attached to {}{}",
            n_functions(n),
            more.unwrap_or_default()
        );
        self.images.push(Image::new(probe, session));
        Ok(())
    }

    fn wait_for(&mut self, session: &Session, patterns: Vec<String>) {
        if !patterns.is_empty() {
            for pattern in &patterns {
                eprintln!("flea: `{pattern}` waits for a library that has it");
            }
            self.waiting.push(Waiting { session: session.clone(), patterns });
        }
    }

    /// What is attached to the target's own program; `None` while it only waits.
    pub fn first(&self) -> Option<&P> {
        self.images.first().map(|image| &image.probe)
    }

    /// What is attached to each of them.
    pub fn probes(&mut self) -> impl Iterator<Item = &mut P> {
        self.images.iter_mut().map(|image| &mut image.probe)
    }

    /// Does what has to be done for somebody who comes or goes.
    pub fn meet(
        &mut self,
        following: &Following,
        event: Followed,
        mut finish: impl FnMut(&mut P) -> Result<()>,
    ) -> Result<()> {
        match event {
            Followed::Born { pid, parent } => {
                for image in self.images.iter_mut().filter(|i| i.members.contains(&parent)) {
                    image.members.insert(pid);
                }
            }
            Followed::Ended { pid } => self.part(pid, &mut finish)?,
            Followed::Executed { pid, .. } => {
                self.part(pid, &mut finish)?;
                let outcome = self.attach(following, pid);
                following.release(pid);
                let told = match outcome {
                    Ok(what) => format!("has executed {what}"),
                    Err(error) => format!("is not traced: {error:#}"),
                };
                eprintln!("flea: process {pid} {}", plain::text(&told));
            }
        }
        Ok(())
    }

    /// Attaches to a program that waits before it begins; what to say of it.
    fn attach(&mut self, following: &Following, pid: Pid) -> Result<String> {
        let session = following.session(pid)?;
        let path = session.program();
        let mut missing = Vec::new();
        let probe = match &self.way {
            Way::Object(again) => again(&session)?,
            Way::Functions { patterns, start, may_wait } => {
                let (functions, not_found) = find_all(&session, patterns);
                if *may_wait {
                    missing = not_found.into_iter().map(|(pattern, _)| pattern).collect();
                }
                if functions.is_empty() { None } else { Some(start(&session, &functions)?) }
            }
        };
        self.wait_for(&session, missing);
        let Some(probe) = probe else {
            return Ok(format!("{path}, which has none of the functions"));
        };
        let n = probe.n_attached();
        if let (0, Some(reason)) = (n, probe.reasons(1).pop()) {
            return Ok(format!("{path}: not attached: {reason}"));
        }
        self.images.push(Image::new(probe, &session));
        Ok(format!("{path}: attached to {}", n_functions(n)))
    }

    /// A process has no part in any of them any more.
    fn part(&mut self, pid: Pid, finish: &mut impl FnMut(&mut P) -> Result<()>) -> Result<()> {
        for image in &mut self.images {
            image.members.remove(&pid);
        }
        let (gone, stay) = std::mem::take(&mut self.images)
            .into_iter()
            .partition::<Vec<_>, _>(|image| image.members.is_empty());
        self.images = stay;
        for mut image in gone {
            image.probe.detach()?;
            finish(&mut image.probe)?;
            self.totals.add(&image.probe);
        }
        Ok(())
    }

    /// Takes everything off and hands what is left to `finish`. The second result is whether all
    /// could be taken off: what was found out is printed also where not, since a debugger may
    /// have come meanwhile.
    pub fn close(
        mut self,
        following: Option<&Following>,
        mut finish: impl FnMut(&mut P) -> Result<()>,
    ) -> Result<(Totals, Result<()>)> {
        let mut all_off = Ok(());
        for image in &mut self.images {
            let detached = image.probe.detach();
            all_off = all_off.and(detached.with_context(still_there(image.pid)));
        }
        if let Some(following) = following {
            all_off = all_off.and(leave_all(following));
        }
        for mut image in std::mem::take(&mut self.images) {
            finish(&mut image.probe)?;
            self.totals.add(&image.probe);
        }
        Ok((self.totals, all_off))
    }
}

/// Takes off what forked children have from their parents.
fn leave_all(following: &Following) -> Result<()> {
    let mut left = BTreeSet::new();
    loop {
        // The work on one is done after all that are known by then have been told of, so a round
        // that finds nobody new is the last: who is born behind it has nothing of ours.
        while let Some(event) = following.next_within(Duration::ZERO) {
            if let Followed::Executed { pid, .. } = event {
                following.release(pid);
            }
        }
        let new: Vec<Pid> =
            following.processes().into_iter().filter(|pid| left.insert(*pid)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for pid in new {
            following.leave(pid).with_context(still_there(pid))?;
        }
    }
}

impl<P> Image<P> {
    fn new(probe: P, session: &Session) -> Self {
        Self { probe, pid: session.pid(), members: BTreeSet::from([session.pid()]) }
    }
}

fn still_there(pid: Pid) -> impl FnOnce() -> String {
    move || format!("what was attached is still there, and `flea detach {pid}` takes it off")
}

impl Totals {
    fn add(&mut self, probe: &impl Probe) {
        self.attached += probe.n_attached();
        self.refused += probe.n_refused();
        self.missed += probe.missed();
        self.lost += probe.lost();
    }
}
