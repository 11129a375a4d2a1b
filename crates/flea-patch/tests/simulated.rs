//! Commits in a simulator: threads at every instruction boundary, CPUs that see writes late
//! and in any order until they are synchronised, signal handlers, and operations that fail.
//!
//! Property: each thread runs the old instructions or the new one, never a mixture; after a
//! failure every byte is as it was. A failing case prints its seed.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::time::Duration;

use flea_patch::{CommitError, PATCH_BYTES, Plan, Poke, Target, commit};
use flea_process::Trap;
use flea_symbols::addr::RemoteAddr;
use proptest::prelude::*;

/// Instruction lengths that a site may have: all sum up to at least five bytes, or to two.
const LAYOUTS: [&[usize]; 8] =
    [&[5], &[1, 1, 1, 1, 1], &[1, 3, 4], &[4, 3], &[2, 2, 2], &[7], &[2], &[1, 1]];
const STRIDE: u64 = 0x100;
const COPIES: u64 = 0x10_0000;

const INT3: u8 = 0xcc;

/// xorshift64*: small, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

struct Site {
    at: u64,
    layout: &'static [usize],
    old: Vec<u8>,
}

impl Site {
    /// Bytes that change.
    fn n_bytes(&self) -> usize {
        self.old.len().min(PATCH_BYTES)
    }

    /// Offsets of its instructions, and of the end.
    fn starts(&self) -> Vec<usize> {
        let mut at = 0;
        let ends = self.layout.iter().map(|n| {
            at += n;
            at
        });
        std::iter::once(0).chain(ends).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    /// At instruction `insn` of a site, in the original or in the copy.
    In {
        site: usize,
        insn: usize,
        copy: bool,
    },
    Trapped {
        site: usize,
    },
    NewCode {
        site: usize,
    },
    Outside,
}

struct Thread {
    place: Place,
    /// Steps left of a signal handler that interrupted it there.
    handler: u64,
    /// Bytes that it still sees as they were.
    stale: BTreeMap<u64, u8>,
}

#[derive(Debug, thiserror::Error)]
#[error("made to fail")]
struct Fault;

struct World {
    dice: Dice,
    sites: Vec<Site>,
    bytes: BTreeMap<u64, u8>,
    threads: Vec<Thread>,
    traps: BTreeMap<u64, u64>,
    /// Operations until one fails; and whether all fail from then on.
    fault_in: Option<u32>,
    fault_stays: bool,
    /// A CPU that is never synchronised: the simulator must notice.
    sync_is_broken: bool,
    /// The library has been closed, and its memory is no code any more.
    is_closed: bool,
    /// Nobody is moved: the simulator must notice that, too.
    evacuation_is_broken: bool,
    longest_handler: u64,
    sites_at_once: usize,
    torn: Option<String>,
}

impl World {
    fn new(seed: u64, n_sites: u64, n_threads: u64) -> Self {
        let mut dice = Dice(seed | 1);
        let mut bytes = BTreeMap::new();
        let sites: Vec<Site> = (0..n_sites)
            .map(|i| {
                let layout = LAYOUTS[usize::try_from(dice.below(LAYOUTS.len() as u64)).unwrap()];
                let size = layout.iter().sum::<usize>();
                let old: Vec<u8> = (0..size).map(|k| u8::try_from(0x10 + k).unwrap()).collect();
                let at = 0x1000 + i * STRIDE;
                bytes.extend((at..).zip(old.iter().copied()));
                Site { at, layout, old }
            })
            .collect();
        let threads = (0..n_threads)
            .map(|_| Thread { place: Place::Outside, handler: 0, stale: BTreeMap::new() })
            .collect();
        let mut world = Self {
            dice,
            sites,
            bytes,
            threads,
            traps: BTreeMap::new(),
            fault_in: None,
            fault_stays: false,
            sync_is_broken: false,
            is_closed: false,
            evacuation_is_broken: false,
            longest_handler: 4,
            sites_at_once: usize::MAX,
            torn: None,
        };
        if world.dice.one_in(2) {
            world.sites_at_once = 1 + usize::try_from(world.dice.below(3)).unwrap();
        }
        world.run(200);
        world
    }

    fn plan(&self) -> Plan {
        let poke = |site: &Site| {
            let copy = |offset: usize| RemoteAddr(COPIES + site.at + offset as u64);
            let moves = site.starts().into_iter().filter(|&s| s > 0 && s < site.old.len());
            Poke {
                site: RemoteAddr(site.at),
                expected: site.old.clone(),
                new: new_bytes(),
                trap_to: copy(0),
                moves: moves.map(|s| (RemoteAddr(site.at + s as u64), copy(s))).collect(),
            }
        };
        Plan { pokes: self.sites.iter().map(poke).collect() }
    }

    /// Some steps of some threads, then perhaps the fault.
    fn operation(&mut self) -> Result<(), Fault> {
        let n_steps = self.dice.below(40);
        self.run(n_steps);
        match &mut self.fault_in {
            Some(0) => {
                if !self.fault_stays {
                    self.fault_in = None;
                }
                Err(Fault)
            }
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn run(&mut self, n_steps: u64) {
        for _ in 0..n_steps {
            let n_threads = self.threads.len() as u64;
            let i = usize::try_from(self.dice.below(n_threads)).unwrap();
            self.step(i);
        }
    }

    fn step(&mut self, i: usize) {
        // A write may arrive at this CPU at any time.
        if self.dice.one_in(4) {
            let n = self.threads[i].stale.len() as u64;
            if n > 0 {
                let skip = usize::try_from(self.dice.below(n)).unwrap();
                let key = *self.threads[i].stale.keys().nth(skip).unwrap();
                self.threads[i].stale.remove(&key);
            }
        }
        if self.threads[i].handler > 0 {
            self.threads[i].handler -= 1;
            return;
        }
        if self.dice.one_in(10) {
            self.threads[i].handler = self.dice.below(self.longest_handler);
            return;
        }
        self.threads[i].place = match self.threads[i].place {
            Place::Outside => {
                let site = usize::try_from(self.dice.below(self.sites.len() as u64)).unwrap();
                Place::In { site, insn: 0, copy: false }
            }
            Place::In { site, insn, copy } => self.execute(i, site, insn, copy),
            Place::Trapped { site } => self.answer(site),
            Place::NewCode { site } if self.dice.one_in(2) => {
                Place::In { site, insn: 0, copy: true }
            }
            place @ Place::NewCode { .. } => place,
        };
    }

    /// The tracer's answer to a trap.
    fn answer(&mut self, site: usize) -> Place {
        if self.traps.contains_key(&self.sites[site].at) {
            Place::In { site, insn: 0, copy: true }
        } else {
            self.torn = Some(format!("a trap at site {site} that nobody answers"));
            Place::Outside
        }
    }

    fn execute(&mut self, i: usize, site: usize, insn: usize, copy: bool) -> Place {
        let here = &self.sites[site];
        let starts = here.starts();
        let next = if insn + 2 == starts.len() {
            Place::Outside
        } else {
            Place::In { site, insn: insn + 1, copy }
        };
        if copy {
            return next;
        }
        let (from, to) = (starts[insn], starts[insn + 1]);
        let seen: Vec<u8> = (from..to.max(here.n_bytes()))
            .map(|k| here.at + k as u64)
            .map(|at| *self.threads[i].stale.get(&at).unwrap_or(&self.bytes[&at]))
            .collect();
        if insn == 0 && seen[0] == INT3 {
            return Place::Trapped { site };
        }
        if seen[..to - from] == here.old[from..to] {
            return next;
        }
        if insn == 0 && seen[..here.n_bytes()] == new_bytes()[..here.n_bytes()] {
            return Place::NewCode { site };
        }
        self.torn = Some(format!("thread {i} at site {site}, instruction {insn}: {seen:02x?}"));
        Place::Outside
    }
}

fn new_bytes() -> [u8; PATCH_BYTES] {
    [0xe9, 0xa1, 0xa2, 0xa3, 0xa4]
}

impl Target for World {
    type Error = Fault;

    fn are_executable(&mut self, _: &[RemoteAddr]) -> Result<bool, Fault> {
        Ok(!self.is_closed)
    }

    fn read(&mut self, at: RemoteAddr, into: &mut [u8]) -> Result<(), Fault> {
        self.run(3);
        for (at, byte) in (at.0..).zip(into) {
            *byte = self.bytes[&at];
        }
        Ok(())
    }

    fn sites_at_once(&self) -> usize {
        self.sites_at_once
    }

    fn release(&mut self) -> Result<(), Fault> {
        self.operation()
    }

    fn write_text(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), Fault> {
        self.operation()?;
        for (at, &byte) in (at.0..).zip(bytes) {
            let before = self.bytes.insert(at, byte).unwrap();
            for thread in &mut self.threads {
                thread.stale.entry(at).or_insert(before);
            }
            self.run(2);
        }
        Ok(())
    }

    fn sync_core(&mut self) -> Result<(), Fault> {
        self.operation()?;
        if !self.sync_is_broken {
            self.threads.iter_mut().for_each(|thread| thread.stale.clear());
        }
        Ok(())
    }

    fn arm(&mut self, traps: &[Trap]) -> Result<(), Fault> {
        self.operation()?;
        self.traps.extend(traps.iter().map(|trap| (trap.site.0, trap.goes_to.0)));
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), Fault> {
        self.traps.clear();
        Ok(())
    }

    fn evacuate(&mut self, moves: &[(RemoteAddr, RemoteAddr)]) -> Result<Vec<RemoteAddr>, Fault> {
        self.operation()?;
        let moves: BTreeMap<u64, u64> = moves.iter().map(|(a, b)| (a.0, b.0)).collect();
        let mut inside = Vec::new();
        if self.evacuation_is_broken {
            return Ok(inside);
        }
        for i in 0..self.threads.len() {
            self.run(3);
            let Place::In { site, insn, copy: false } = self.threads[i].place else {
                continue;
            };
            let at = self.sites[site].at + self.sites[site].starts()[insn] as u64;
            let Some(&to) = moves.get(&at) else { continue };
            if self.threads[i].handler > 0 || to == at {
                inside.push(RemoteAddr(at));
            } else {
                assert_eq!(to, at + COPIES);
                self.threads[i].place = Place::In { site, insn, copy: true };
            }
        }
        Ok(inside)
    }

    fn wait_a_moment(&mut self, _duration: Duration) -> Result<(), Fault> {
        self.run(100);
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Fault> {
        self.run(3);
        for i in 0..self.threads.len() {
            if let Place::Trapped { site } = self.threads[i].place {
                self.threads[i].place = self.answer(site);
            }
        }
        Ok(())
    }
}

fn check_committed(world: &World) {
    for site in &world.sites {
        for (k, byte) in new_bytes().into_iter().take(site.n_bytes()).enumerate() {
            assert_eq!(world.bytes[&(site.at + k as u64)], byte);
        }
    }
}

fn check_untouched(world: &World) {
    for site in &world.sites {
        for (k, &byte) in site.old.iter().enumerate() {
            assert_eq!(world.bytes[&(site.at + k as u64)], byte, "site {:#x}", site.at);
        }
    }
}

/// The plan that takes `plan` off again.
fn reverse(plan: &Plan) -> Plan {
    let back = |poke: &Poke| {
        let mut new = [0; PATCH_BYTES];
        new[..poke.n_bytes()].copy_from_slice(&poke.expected[..poke.n_bytes()]);
        let (site, trap_to, moves) = (poke.site, poke.trap_to, Vec::new());
        Poke { site, expected: poke.new[..poke.n_bytes()].to_vec(), new, trap_to, moves }
    };
    Plan { pokes: plan.pokes.iter().map(back).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn on_and_off_again(seed: u64, n_sites in 1u64..6, n_threads in 1u64..9) {
        let mut world = World::new(seed, n_sites, n_threads);
        let plan = world.plan();
        for _ in 0..3 {
            let report = commit(&mut world, &plan).unwrap();
            prop_assert_eq!(report.n_sites as u64, n_sites);
            check_committed(&world);
            world.run(100);
            commit(&mut world, &reverse(&plan)).unwrap();
            check_untouched(&world);
            world.run(100);
        }
        prop_assert_eq!(&world.torn, &None);
    }

    #[test]
    fn the_nth_operation_fails(seed: u64, n_sites in 1u64..7, nth in 0u32..60, stays: bool) {
        let mut world = World::new(seed, n_sites, 4);
        let plan = world.plan();
        world.fault_in = Some(nth);
        world.fault_stays = stays;
        match commit(&mut world, &plan) {
            Ok(_) => check_committed(&world),
            Err(CommitError::Failed { .. }) => check_untouched(&world),
            // Breakpoints stay; a target whose every operation fails is beyond help.
            Err(CommitError::Broken { .. }) => prop_assert!(stays),
            Err(other) => prop_assert!(false, "{}", other),
        }
        world.run(200);
        prop_assert_eq!(&world.torn, &None);
    }

    /// What comes back then are instructions in whose midst threads may stand.
    #[test]
    fn the_nth_operation_of_taking_it_off_fails(seed: u64, n_sites in 1u64..7, nth in 0u32..60) {
        let mut world = World::new(seed, n_sites, 4);
        let plan = world.plan();
        commit(&mut world, &plan).unwrap();
        // One that lasts keeps its thread inside.
        world.longest_handler = 300;
        world.run(100);
        world.fault_in = Some(nth);
        match commit(&mut world, &reverse(&plan)) {
            Ok(_) => check_untouched(&world),
            Err(CommitError::Failed { .. }) => check_committed(&world),
            Err(other) => prop_assert!(false, "{}", other),
        }
        world.run(200);
        prop_assert_eq!(&world.torn, &None);
    }

    /// One who is in a handler for good, inside what has come back: its site keeps that, the
    /// others are put back.
    #[test]
    fn a_handler_inside_what_came_back(seed: u64, nth in 0u32..60) {
        let mut world = World::new(seed, 3, 6);
        let plan = world.plan();
        commit(&mut world, &plan).unwrap();
        world.run(100);
        world.longest_handler = 1 << 40;
        world.fault_in = Some(nth);
        match commit(&mut world, &reverse(&plan)) {
            Ok(_) => check_untouched(&world),
            Err(CommitError::Failed { .. }) => check_committed(&world),
            Err(CommitError::Kept { site, .. }) => {
                let index = world.sites.iter().position(|s| s.at == site.0).unwrap();
                let kept = &world.sites[index];
                for (k, &byte) in kept.old.iter().enumerate() {
                    prop_assert_eq!(world.bytes[&(kept.at + k as u64)], byte);
                }
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
        prop_assert!(world.bytes.values().all(|&byte| byte != INT3), "a breakpoint is left");
        world.run(200);
        prop_assert_eq!(&world.torn, &None);
    }

    #[test]
    fn a_handler_that_does_not_return(seed: u64) {
        let mut world = World::new(seed, 3, 6);
        world.longest_handler = 1 << 40;
        world.run(300);
        let plan = world.plan();
        match commit(&mut world, &plan) {
            Ok(_) => check_committed(&world),
            Err(CommitError::Busy { .. }) => check_untouched(&world),
            Err(other) => prop_assert!(false, "{}", other),
        }
        world.run(200);
        prop_assert_eq!(&world.torn, &None);
    }
}

#[test]
fn other_bytes_are_left_alone() {
    let mut world = World::new(7, 4, 3);
    let plan = world.plan();
    let last = plan.pokes[3].site;
    *world.bytes.get_mut(&(last.0 + 4)).unwrap() = 0x77;
    let before = world.bytes.clone();
    let error = commit(&mut world, &plan).unwrap_err();
    let CommitError::Mismatch { site, expected, found } = error else { panic!("{error}") };
    assert_eq!((site, found[4]), (last, 0x77));
    assert_eq!(expected.len(), found.len());
    assert_eq!(world.bytes, before);

    world.is_closed = true;
    let error = commit(&mut world, &plan).unwrap_err();
    assert!(matches!(error, CommitError::Closed { site } if site == last), "{error}");
    assert!(error.is_found_changed() && error.is_undone());
    assert_eq!(world.bytes, before);
}

#[test]
fn the_simulator_notices_what_is_left_out() {
    let n_torn = |leave_out: fn(&mut World)| {
        let torn = (1..200).filter(|&seed| {
            let mut world = World::new(seed * 0x9e37_79b9, 3, 6);
            leave_out(&mut world);
            // Handlers that outlast the commit keep threads inside the replaced bytes.
            world.longest_handler = 300;
            world.run(300);
            let plan = world.plan();
            let _any = commit(&mut world, &plan);
            world.run(5000);
            world.torn.is_some()
        });
        torn.count()
    };
    assert!(n_torn(|world| world.sync_is_broken = true) > 10);
    assert!(n_torn(|world| world.evacuation_is_broken = true) > 10);
    assert_eq!(n_torn(|_| {}), 0);
}
