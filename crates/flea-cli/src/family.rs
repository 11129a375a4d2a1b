//! The programs that a command has attached to: the target's, and with `--follow` those that it
//! and its children execute, each with results of its own until they are added up.

use std::collections::BTreeSet;

use anyhow::Result;
use flea::{
    AttachError, Followed, Following, Function, Pid, Session,
    builtin::{Count, Histograms, Refused, Trace},
};

use crate::target::Target;

/// What a command attaches to one program.
pub trait Probe {
    /// Functions attached to.
    fn functions(&self) -> &[Function];
    /// Functions that could not be.
    fn refused(&self) -> &[Refused];
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
            fn functions(&self) -> &[Function] {
                self.functions()
            }
            fn refused(&self) -> &[Refused] {
                self.refused()
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
    session: Session,
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

/// All of them. Those that have ended have been handed to `finish`.
pub struct Family<'a, P> {
    patterns: &'a [String],
    start: Box<dyn Fn(&Session, &[Function]) -> Result<P> + 'a>,
    images: Vec<Image<P>>,
    totals: Totals,
}

impl<'a, P: Probe> Family<'a, P> {
    /// Attaches to the target's program.
    pub fn start(
        target: &Target,
        patterns: &'a [String],
        start: impl Fn(&Session, &[Function]) -> Result<P> + 'a,
    ) -> Result<Self> {
        let probe = start(&target.session, &target.find(patterns)?)?;
        let members = BTreeSet::from([target.session.pid()]);
        let image = Image { probe, session: target.session.clone(), members };
        Ok(Self {
            patterns,
            start: Box::new(start),
            images: vec![image],
            totals: Totals::default(),
        })
    }

    /// What is attached to the target's own program.
    pub fn first(&self) -> &P {
        &self.images[0].probe
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
                if let Some(image) = self.images.iter_mut().find(|i| i.members.contains(&parent)) {
                    image.members.insert(pid);
                }
            }
            Followed::Ended { pid } => self.part(pid, &mut finish)?,
            Followed::Executed { pid, .. } => {
                self.part(pid, &mut finish)?;
                let outcome = self.attach(following, pid);
                following.release(pid);
                match outcome {
                    Ok(what) => eprintln!("flea: process {pid} has executed {what}"),
                    Err(error) => eprintln!("flea: process {pid} is not traced: {error:#}"),
                }
            }
        }
        Ok(())
    }

    /// Attaches to a program that waits before it begins; what to say of it.
    fn attach(&mut self, following: &Following, pid: Pid) -> Result<String> {
        let session = following.session(pid)?;
        let path = session.program().to_owned();
        let mut functions: Vec<Function> = Vec::new();
        for pattern in self.patterns {
            // What is not there, is not; that is for the first program to complain about.
            for function in session.find(pattern).unwrap_or_default() {
                if !functions.iter().any(|known| known.address() == function.address()) {
                    functions.push(function);
                }
            }
        }
        if functions.is_empty() {
            return Ok(format!("{path}, which has none of the functions"));
        }
        let probe = (self.start)(&session, &functions)?;
        let n = probe.functions().len();
        if let (0, Some(refused)) = (n, probe.refused().first()) {
            return Ok(format!("{path}: not attached: {}", refused.reason));
        }
        self.images.push(Image { probe, session, members: BTreeSet::from([pid]) });
        let plural = if n == 1 { "" } else { "s" };
        Ok(format!("{path}: attached to {n} function{plural}"))
    }

    /// A process has no part in any of them any more.
    fn part(&mut self, pid: Pid, finish: &mut impl FnMut(&mut P) -> Result<()>) -> Result<()> {
        let Some(at) = self.images.iter().position(|image| image.members.contains(&pid)) else {
            return Ok(());
        };
        self.images[at].members.remove(&pid);
        // The first one is what everything is asked of at the end.
        if at > 0 && self.images[at].members.is_empty() {
            let mut image = self.images.remove(at);
            image.probe.detach()?;
            finish(&mut image.probe)?;
            self.totals.add(&image.probe);
        }
        Ok(())
    }

    /// Takes everything off and hands what is left to `finish`, the first program's last.
    pub fn close(
        mut self,
        following: Option<&Following>,
        mut finish: impl FnMut(&mut P) -> Result<()>,
    ) -> Result<Totals> {
        for image in &mut self.images {
            image.probe.detach()?;
            let Some(following) = following else { continue };
            // A child of which we have not heard yet has the same attached.
            for &pid in image.members.iter().filter(|&&pid| pid != image.session.pid()) {
                following.leave(pid)?;
            }
        }
        while let Some(mut image) = self.images.pop() {
            finish(&mut image.probe)?;
            self.totals.add(&image.probe);
        }
        Ok(self.totals)
    }
}

impl Totals {
    fn add(&mut self, probe: &impl Probe) {
        self.attached += probe.functions().len();
        self.refused += probe.refused().len();
        self.missed += probe.missed();
        self.lost += probe.lost();
    }
}
