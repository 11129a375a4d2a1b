//! The life of one process, from its seed: controllers come one after the other, attach and take
//! off, and meet trouble. In the end somebody takes everything off, and nothing may be left.

use flea::AttachError;
use flea::registry::{Controller, DataArena, Registry};
use flea::simulate::{self, Body as NewBody, Host as _};
use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_patch::CommitError;
use flea_symbols::addr::RemoteAddr;

use crate::execute::{body_code, body_key};
use crate::fault::Fault;
use crate::functions::Function;
use crate::host::{Hold, REGISTRY, RegistryMemory, World};
use crate::machine::{Body, Machine, Size};
use crate::trouble::{Trouble, What};

/// Where data arenas are, and how far apart.
const DATA: u64 = 0x8000_0000;
const DATA_STRIDE: u64 = 0x100_0000;
/// What another tool writes: `mov eax, 1`.
pub(crate) const FOREIGN: [u8; 5] = [0xb8, 1, 0, 0, 0];
/// Looks at whether everything has come to its end.
const MAX_LAST_SESSIONS: usize = 64;

/// What came of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// What happened that must not.
    pub violation: Option<String>,
    /// What happened at all, if that was asked for.
    pub trace: Vec<String>,
    /// Steps that threads made.
    pub n_steps: u64,
    /// Sessions of controllers.
    pub n_sessions: u64,
}

/// Lives through seed `seed`.
#[must_use]
pub fn run(seed: u64, fault: Option<Fault>, size: Size, traced: bool) -> Outcome {
    let machine = Machine::new(seed, size, traced);
    let world = World { machine, registry: RegistryMemory::new(false), dead: Vec::new() };
    let mut case = Case { world, fault, foreign: None, n_sessions: 0, began: 0 };
    let n_sessions = (2 + case.world.machine.dice.index(7)).min(size.sessions);
    let mut goes_on = true;
    for _ in 0..n_sessions {
        let n_steps = case.world.machine.dice.below(150);
        case.world.machine.run(n_steps);
        goes_on = case.session();
        if !goes_on || case.world.machine.violation.is_some() {
            break;
        }
    }
    if goes_on && case.world.machine.violation.is_none() {
        case.end();
    }
    let machine = case.world.machine;
    Outcome {
        violation: machine.violation,
        trace: machine.trace.unwrap_or_default(),
        n_steps: machine.now,
        n_sessions: case.n_sessions,
    }
}

struct Case {
    world: World,
    fault: Option<Fault>,
    /// The function that another tool has changed.
    foreign: Option<usize>,
    n_sessions: u64,
    /// When the last one began.
    began: u64,
}

/// What a controller comes for.
enum Intent {
    Attach(Vec<(usize, u32)>),
    TakeOff(Vec<u32>),
}

impl Case {
    /// One controller comes and goes. Whether there is a process that goes on.
    fn session(&mut self) -> bool {
        self.another_tool();
        let trouble = Trouble::roll(&mut self.world.machine.dice);
        let intent = match self.world.machine.dice.below(5) {
            0..=2 => self.roll_bodies(),
            3 => Intent::TakeOff(self.roll_ids(2)),
            _ => Intent::TakeOff(self.roll_ids(1)),
        };
        self.come(intent, trouble)
    }

    /// Changes a function that nothing is attached to, or takes that back.
    fn another_tool(&mut self) {
        if let Some(function) = self.foreign.take() {
            let site = self.world.machine.functions[function].site;
            self.put(site, &self.world.machine.functions[function].original()[..5]);
            return;
        }
        if !self.world.machine.dice.one_in(6) {
            return;
        }
        let function = self.world.machine.dice.index(self.world.machine.functions.len());
        let Function { site, layout } = self.world.machine.functions[function];
        let now = self.world.machine.text.from(site).map(|now| now[..5].to_vec());
        let has_one_nop = layout.lens == [5] && now.as_deref() == Some(&layout.bytes[..5]);
        if has_one_nop
            && !self.world.machine.loader.is_closed(function)
            && self.registry().is_some_and(|r| r.functions.iter().all(|f| f.site.0 != site))
        {
            self.world.machine.text.allow(site, &FOREIGN, &FOREIGN);
            self.put(site, &FOREIGN);
            self.foreign = Some(function);
            self.world.machine.note(|| format!("another tool changes function {function}"));
        }
    }

    /// Writes text while nobody looks: it is not what is simulated.
    fn put(&mut self, site: u64, bytes: &[u8]) {
        let text = &mut self.world.machine.text;
        for (at, &byte) in (site..).zip(bytes) {
            let written = text.write(at, byte);
            assert!(written, "a function is there as long as the process");
        }
        (0..text.n_cpus()).for_each(|cpu| text.serialise(cpu));
    }

    fn roll_bodies(&mut self) -> Intent {
        let machine = &mut self.world.machine;
        let n_functions = machine.functions.len();
        let first = machine.dice.index(n_functions);
        let n_bodies = 1 + machine.dice.index(n_functions);
        let mapping = DATA + DATA_STRIDE * self.n_sessions;
        let mut wanted = Vec::new();
        for k in 0..n_bodies {
            let function = (first + k) % n_functions;
            let sides = machine.dice.below(4);
            let (at_entry, at_exit) = (sides != 1, sides % 2 == 1);
            let key = u32::try_from(machine.bodies.len()).expect("a few bodies");
            let (born, firm_since, gone_since) = (machine.now, None, None);
            let body = Body { function, at_entry, at_exit, mapping, born, firm_since, gone_since };
            machine.bodies.push(body);
            wanted.push((function, key));
        }
        machine.note(|| format!("controller: comes to attach {wanted:?} (function, body)"));
        Intent::Attach(wanted)
    }

    /// One body in `one_in`.
    fn roll_ids(&mut self, one_in: u64) -> Vec<u32> {
        let Some(registry) = self.registry() else { return Vec::new() };
        let mut ids = Vec::new();
        for body in registry.functions.iter().flat_map(|f| &f.bodies) {
            if self.world.machine.dice.one_in(one_in) {
                ids.push(body.id);
            }
        }
        self.world.machine.note(|| format!("controller: comes to take off {ids:?}"));
        ids
    }

    /// What is in the registry; none where it cannot be read or there is no process.
    fn registry(&mut self) -> Option<Registry> {
        if self.world.machine.is_gone {
            return None;
        }
        if !self.world.registry.is_mapped {
            return Some(Registry::default());
        }
        let mut none = Trouble::none();
        let hold = Hold::new(&mut self.world, &mut none, None);
        match simulate::load(&hold, RemoteAddr(REGISTRY)) {
            Ok(registry) => Some(registry),
            Err(error) => {
                hold.machine().violate(format!("the registry cannot be read: {error}"));
                None
            }
        }
    }

    /// A controller does what it came for. Whether there is a process that goes on.
    fn come(&mut self, intent: Intent, mut trouble: Trouble) -> bool {
        self.n_sessions += 1;
        self.began = self.world.machine.now;
        let pid = i32::try_from(self.n_sessions).expect("a few sessions");
        if let Intent::TakeOff(ids) = &intent {
            self.doubt(ids);
        }
        self.world.machine.note(|| format!("controller {pid}: {:?}", trouble.what));
        let outcome = {
            let mut hold = Hold::new(&mut self.world, &mut trouble, self.fault);
            work(&mut hold, &intent, pid).and_then(|()| match &intent {
                Intent::TakeOff(ids) => simulate::take_off(hold, ids),
                Intent::Attach(_) => Ok(()),
            })
        };
        self.world.machine.note(|| format!("controller {pid}: {outcome:?}"));
        if trouble.what == What::Killed && trouble.has_struck {
            self.world.dead.push(pid);
        }
        if self.world.machine.is_gone {
            return false;
        }
        if let Err(error) = &outcome
            && !self.explains(error, &trouble)
        {
            self.world.machine.violate(format!("for no reason: {error}"));
        }
        let is_open = matches!(
            outcome,
            Err(AttachError::Commit(CommitError::Broken { .. } | CommitError::Stranded { .. }))
        );
        if is_open {
            return false;
        }
        if !self.world.machine.traps.is_empty() {
            self.world.machine.violate("the tracer lets go in the middle of a commit".to_owned());
        }
        if outcome.is_ok() && self.world.machine.violation.is_none() {
            self.compare();
        }
        true
    }

    /// Those that are about to be taken off may run for a last time, or not.
    fn doubt(&mut self, ids: &[u32]) {
        let Some(registry) = self.registry() else { return };
        for (id, key) in self.keys(&registry) {
            if ids.contains(&id) {
                self.world.machine.bodies[key].firm_since = None;
            }
        }
    }

    /// Numbers in the registry and here.
    fn keys(&self, registry: &Registry) -> Vec<(u32, usize)> {
        let bodies = registry.functions.iter().flat_map(|f| &f.bodies);
        let key = |body: &flea::registry::BodyState| {
            let at = body.entry.or(body.exit)?.at.0;
            let key = body_key(self.world.machine.text.from(at)?)?;
            Some((body.id, usize::try_from(key).ok()?))
        };
        bodies.filter_map(key).collect()
    }

    /// Whether something was the matter that a controller may fail of.
    fn explains(&self, error: &AttachError, trouble: &Trouble) -> bool {
        let has_reopened = self.world.machine.loader.has_reopened_any(self.began);
        let lasts = matches!(trouble.what, What::Fails { for_ever: true, .. });
        match error {
            AttachError::Commit(CommitError::Busy { .. } | CommitError::Kept { .. }) => true,
            AttachError::Commit(CommitError::Mismatch { .. }) => {
                self.foreign.is_some() || has_reopened
            }
            // The loader is a reason for a first failure, and the trouble for the second.
            AttachError::Commit(CommitError::Stranded { .. }) if has_reopened => trouble.has_struck,
            AttachError::Commit(CommitError::Broken { .. } | CommitError::Stranded { .. }) => {
                trouble.has_struck && lasts
            }
            _ => trouble.has_struck,
        }
    }

    /// All went well: registry and text agree, and it is known what is attached.
    fn compare(&mut self) {
        let Some(registry) = self.registry() else { return };
        for (i, function) in self.world.machine.functions.clone().into_iter().enumerate() {
            // Whoever comes next finds that out.
            if self.world.machine.loader.has_reopened(i, self.began) {
                continue;
            }
            let known = registry.functions.iter().find(|f| f.site.0 == function.site);
            let expected = match (known, self.foreign) {
                (Some(f), _) => f.patched.to_vec(),
                (None, Some(i)) if self.world.machine.functions[i].site == function.site => {
                    FOREIGN.to_vec()
                }
                (None, _) => function.original().to_vec(),
            };
            let now = self.world.machine.text.from(function.site).unwrap_or_default();
            if now.get(..expected.len()) != Some(&expected[..]) {
                let now = now[..expected.len()].to_vec();
                let what = format!("{:#x} is {now:02x?}, not {expected:02x?}", function.site);
                self.world.machine.violate(what);
            }
        }
        let present: Vec<usize> = self.keys(&registry).iter().map(|(_, key)| *key).collect();
        let now = self.world.machine.now;
        let machine = &mut self.world.machine;
        for (key, body) in machine.bodies.iter_mut().enumerate() {
            let has_reopened = machine.loader.has_reopened(body.function, self.began);
            match present.contains(&key) {
                true if has_reopened => {}
                true => body.firm_since = body.firm_since.or(Some(now)),
                false => body.gone_since = body.gone_since.or(Some(now)),
            }
        }
    }

    /// Everything is taken off, and comes to its end.
    fn end(&mut self) {
        if self.foreign.is_some() {
            self.another_tool();
        }
        for _ in 0..MAX_LAST_SESSIONS {
            self.world.machine.note(|| "the end: everything is taken off".to_owned());
            let Some(registry) = self.registry() else { return };
            let ids = registry.functions.iter().flat_map(|f| &f.bodies).map(|b| b.id).collect();
            self.release(registry);
            self.come(Intent::TakeOff(ids), Trouble::none());
            if self.world.machine.violation.is_some() {
                return;
            }
            self.world.machine.is_quiet = true;
            self.world.machine.run(300);
            let machine = &mut self.world.machine;
            if machine.is_idle() && !self.world.registry.is_mapped {
                return self.compare();
            }
            if machine.is_idle() {
                // What is left on dead stacks looks like somebody who comes back.
                let threads = machine.threads.iter_mut().map(|thread| &mut thread.context);
                threads.chain(&mut machine.switched_away).for_each(crate::context::Context::scrub);
            }
        }
        let left = self.registry();
        self.world.machine.violate(format!("in the end there is still {left:x?}"));
    }

    /// Its owners have no more use for the memory.
    fn release(&mut self, mut registry: Registry) {
        if !self.world.registry.is_mapped {
            return;
        }
        registry.data.iter_mut().for_each(|arena| arena.released = true);
        let mut none = Trouble::none();
        let hold = Hold::new(&mut self.world, &mut none, None);
        if let Err(error) = simulate::store(&hold, RemoteAddr(REGISTRY), &registry) {
            hold.machine().violate(format!("the registry cannot be written: {error}"));
        }
    }
}

/// All but the taking off, which ends the hold.
fn work(hold: &mut Hold<'_>, intent: &Intent, pid: i32) -> Result<(), AttachError> {
    let small = hold.machine().dice.one_in(3);
    hold.open(if small { 0x400 } else { 0x2000 })?;
    if hold.fault() != Some(Fault::NoSettling) {
        simulate::settle(hold)?;
    }
    let Intent::Attach(wanted) = intent else { return Ok(()) };
    let owner = Controller { pid, started: 1 };
    let mut bodies = Vec::with_capacity(wanted.len());
    for &(function, key) in wanted {
        let machine = hold.machine();
        let fresh = machine.functions[function].fresh();
        let body = &machine.bodies[usize::try_from(key).expect("a few bodies")];
        let new = NewBody {
            entry: body.at_entry.then(|| body_code(key, false)),
            exit: body.at_exit.then(|| body_code(key, true)),
            owner,
            mapping: RemoteAddr(body.mapping),
        };
        bodies.push((fresh, new));
    }
    let mapping = bodies[0].1.mapping;
    hold.map_data(mapping.0)?;
    let size_bytes = THREAD_TABLE_BYTES as u64 + 4096;
    hold.registry_mut().data.push(DataArena { mapping, size_bytes, owner, released: false });
    hold.store()?;
    simulate::attach(hold, &bodies).map(drop)
}
