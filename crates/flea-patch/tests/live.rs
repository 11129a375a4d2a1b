//! Commits in real processes, thousands of times, beside threads that check what a tracer
//! could disturb. See `targets/hot.c` for what the letters mean.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

#[path = "../../flea-process/tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use flea_patch::{CommitError, PATCH_BYTES, Plan, Poke, Target as PatchTarget, commit};
use flea_process::{MapRequest, TraceError, Tracer, Trap, seize};
use flea_symbols::addr::RemoteAddr;
use support::Target;

/// Starts of the instructions that five bytes cover, for each function of the target.
const INNER: [&[usize]; 3] = [&[1, 2, 3, 4], &[], &[1, 4]];
const SLOT_BYTES: u64 = 64;

struct Hot {
    sites: [RemoteAddr; 3],
    counter: RemoteAddr,
    arena: RemoteAddr,
}

fn rel32(from_end: u64, to: u64) -> [u8; 4] {
    i32::try_from(to.cast_signed() - from_end.cast_signed()).unwrap().to_le_bytes()
}

impl Hot {
    fn new(tracer: &mut Tracer, line: &str) -> Self {
        let words: Vec<RemoteAddr> = line
            .split(' ')
            .map(|word| RemoteAddr(u64::from_str_radix(word, 16).unwrap()))
            .collect();
        let arena = tracer
            .remote_map(MapRequest {
                near: Some(words[0]),
                size_bytes: 4096,
                prot: libc::PROT_READ | libc::PROT_EXEC,
                flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                fd: -1,
                offset: 0,
            })
            .unwrap();
        let hot = Self { sites: [words[0], words[1], words[2]], counter: words[3], arena };
        for k in 0..3 {
            // f0 48 ff 05 rel32   lock inc qword [counter]
            // ...                 the five bytes that were at the site
            // e9 rel32            jmp site + 5
            let base = hot.slot(k);
            let mut code = vec![0xf0, 0x48, 0xff, 0x05];
            code.extend(rel32(base + 8, hot.counter.0));
            code.extend(tracer.memory().read_vec(hot.sites[k], PATCH_BYTES).unwrap());
            code.push(0xe9);
            code.extend(rel32(base + 18, hot.sites[k].0 + 5));
            tracer.memory().write(RemoteAddr(base), &code).unwrap();
        }
        hot
    }

    fn slot(&self, k: usize) -> u64 {
        self.arena.0 + SLOT_BYTES * k as u64
    }

    fn on(&self, tracer: &Tracer) -> Plan {
        let poke = |k: usize| {
            let site = self.sites[k];
            let mut new = [0xe9, 0, 0, 0, 0];
            new[1..].copy_from_slice(&rel32(site.0 + 5, self.slot(k)));
            let copy = RemoteAddr(self.slot(k) + 8);
            let at = |offset: usize| i64::try_from(offset).unwrap();
            let moves = INNER[k].iter().map(|&o| (site.offset(at(o)), copy.offset(at(o))));
            let expected = tracer.memory().read_vec(site, PATCH_BYTES).unwrap();
            Poke { site, expected, new, trap_to: copy, moves: moves.collect() }
        };
        Plan { pokes: (0..3).map(poke).collect() }
    }
}

fn reverse(plan: &Plan) -> Plan {
    let back = |poke: &Poke| Poke {
        site: poke.site,
        expected: poke.new.to_vec(),
        new: poke.expected[..].try_into().unwrap(),
        trap_to: poke.trap_to,
        moves: Vec::new(),
    };
    Plan { pokes: plan.pokes.iter().map(back).collect() }
}

/// Whether SIGTRAP is ignored, and whether it has a handler.
fn sigtrap_disposition(pid: i32) -> (bool, bool) {
    let status = flea_process::status(pid).unwrap();
    (status.ignored.contains(libc::SIGTRAP), status.caught.contains(libc::SIGTRAP))
}

/// Patches on and off `n_times` in one seizure after another, `per_seizure` in each.
/// FLEA_TEST_ROUNDS=20 does it twenty times as often.
fn exercise(threads: &str, letters: &str, n_times: usize, per_seizure: usize) -> String {
    let rounds = std::env::var("FLEA_TEST_ROUNDS").map_or(1, |text| text.parse().unwrap());
    let n_times = n_times * rounds;
    let target = Target::start("hot", &[threads, letters]);
    let line = target.first_line.clone();
    let pid = target.pid();
    let hot = seize(pid, |tracer| Hot::new(tracer, &line)).unwrap();
    let plan = seize(pid, |tracer| hot.on(tracer)).unwrap();
    let disposition = sigtrap_disposition(pid);
    let mut in_commit = Duration::ZERO;
    let mut longest = Duration::ZERO;
    let mut seizing = Duration::ZERO;
    let mut n_busy = 0;
    let mut traps = 0;
    let mut blocked = 0;
    for _ in 0..n_times / per_seizure {
        let asked = Instant::now();
        seize(pid, |tracer| {
            seizing += asked.elapsed();
            for _ in 0..per_seizure {
                for plan in [&plan, &reverse(&plan)] {
                    loop {
                        let outcome = commit(tracer, plan);
                        assert_eq!(sigtrap_disposition(pid), disposition, "after {outcome:?}");
                        match outcome {
                            Ok(report) => {
                                in_commit += report.elapsed;
                                longest = longest.max(report.window);
                                break;
                            }
                            Err(CommitError::Busy { .. }) => n_busy += 1,
                            Err(error) => panic!("{error}"),
                        }
                    }
                    tracer.wait_a_moment(Duration::from_micros(100)).unwrap();
                }
            }
            traps += tracer.counts().traps;
            blocked += tracer.counts().traps_blocked;
        })
        .unwrap();
    }
    let n = u32::try_from(n_times).unwrap();
    let rounds = u32::try_from(n_times / per_seizure).unwrap();
    let text = target.finish();
    println!(
        "{threads}{letters}: commit {:?}, longest window {longest:?}, seize {:?}, traps {traps} \
         ({blocked} blocked), busy {n_busy}: {text}",
        in_commit / (2 * n),
        seizing / rounds,
    );
    assert!(traps > 0, "no thread ever met a breakpoint");
    text
}

fn number(text: &str, name: &str) -> u64 {
    let mut words = text.split_whitespace();
    words.find(|word| *word == name).unwrap();
    words.next().unwrap().parse().unwrap()
}

#[test]
fn eight_hot_threads() {
    let text = exercise("8", "", 20, 10);
    assert!(number(&text, "counted") > 0);
}

#[test]
fn threads_that_block_every_signal() {
    exercise("4", "b", 20, 10);
}

#[test]
fn a_sigtrap_handler_beside_blocked_threads() {
    exercise("3", "bh", 10, 5);
    exercise("3", "h", 10, 5);
}

#[test]
fn sigtrap_ignored() {
    exercise("3", "i", 10, 5);
    exercise("3", "bi", 10, 5);
    exercise("2", "fi", 10, 5);
}

#[test]
fn a_sigtrap_of_its_own_is_pending() {
    exercise("3", "bp", 10, 5);
    exercise("3", "bph", 10, 5);
}

#[test]
fn sigtraps_of_its_own_everywhere() {
    exercise("3", "ti", 20, 10);
    // Breakpoints reset the disposition in threads that block SIGTRAP, while others that do not
    // are about to act on one.
    let text = exercise("4", "tho", 20, 10);
    assert!(number(&text, "handled") > 0);
    exercise("4", "tio", 20, 10);
}

#[test]
fn handlers_interrupt_everywhere() {
    let text = exercise("4", "u", 10, 5);
    assert!(number(&text, "handled") > 0);
    exercise("4", "ua", 10, 5);
}

#[test]
fn threads_come_and_go() {
    let text = exercise("2", "c", 10, 5);
    assert!(number(&text, "births") > 0);
    exercise("2", "cbh", 10, 5);
}

#[test]
fn children_come_and_go() {
    let text = exercise("2", "f", 10, 5);
    assert!(number(&text, "forks") > 0);
    exercise("2", "v", 10, 5);
}

/// What a controller makes of batches.
struct Batches<'a> {
    tracer: &'a mut Tracer,
    sites_at_once: usize,
    /// Writes of text until one fails.
    fails_in: Option<usize>,
}

impl PatchTarget for Batches<'_> {
    type Error = TraceError;

    fn read(&mut self, at: RemoteAddr, into: &mut [u8]) -> Result<(), TraceError> {
        PatchTarget::read(self.tracer, at, into)
    }

    fn sites_at_once(&self) -> usize {
        self.sites_at_once
    }

    fn look(&mut self, places: &[RemoteAddr]) -> Result<Vec<RemoteAddr>, TraceError> {
        PatchTarget::look(self.tracer, places)
    }

    fn release(&mut self) -> Result<(), TraceError> {
        self.tracer.release()
    }

    fn write_text(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        self.fails_in = match self.fails_in {
            Some(0) => {
                self.fails_in = None;
                return Err(TraceError::Stuck { tid: 0, waited_ms: 0 });
            }
            n => n.map(|n| n - 1),
        };
        self.tracer.write_text(at, bytes)
    }

    fn sync_core(&mut self) -> Result<(), TraceError> {
        self.tracer.sync_core()
    }

    fn arm(&mut self, traps: &[Trap]) -> Result<(), TraceError> {
        self.tracer.arm(traps)
    }

    fn disarm(&mut self) -> Result<(), TraceError> {
        self.tracer.disarm()
    }

    fn evacuate(
        &mut self,
        moves: &[(RemoteAddr, RemoteAddr)],
    ) -> Result<Vec<RemoteAddr>, TraceError> {
        PatchTarget::evacuate(self.tracer, moves)
    }

    fn wait_a_moment(&mut self, duration: Duration) -> Result<(), TraceError> {
        self.tracer.wait_a_moment(duration)
    }

    fn drain(&mut self) -> Result<(), TraceError> {
        self.tracer.drain()
    }
}

/// Changes one site at a time, to and fro, `n_times`; each time a later write fails first.
fn exercise_batches(threads: &str, letters: &str, n_times: usize) -> String {
    let target = Target::start("hot", &[threads, letters]);
    let pid = target.pid();
    let disposition = sigtrap_disposition(pid);
    seize(pid, |tracer| {
        let hot = Hot::new(tracer, &target.first_line);
        let plan = hot.on(tracer);
        for n in 0..n_times {
            for plan in [&plan, &reverse(&plan)] {
                // Nine writes make the change.
                let fails_in = Some(n % 9);
                let mut batches = Batches { tracer, sites_at_once: 1, fails_in };
                let failed = commit(&mut batches, plan).unwrap_err();
                assert!(matches!(failed, CommitError::Failed { .. }), "{failed}");
                for poke in &plan.pokes {
                    let text = tracer.memory().read_vec(poke.site, PATCH_BYTES).unwrap();
                    assert_eq!(text, poke.expected[..PATCH_BYTES], "{n}: {}", poke.site);
                }
                let mut batches = Batches { tracer, sites_at_once: 1, fails_in: None };
                assert_eq!(commit(&mut batches, plan).unwrap().n_batches, 3);
                assert_eq!(sigtrap_disposition(pid), disposition, "{letters}: after a commit");
            }
        }
    })
    .unwrap();
    target.finish()
}

#[test]
fn a_batch_that_fails_takes_back_those_before() {
    exercise_batches("4", "", 9);
    exercise_batches("3", "fv", 9);
    let text = exercise_batches("4", "u", 9);
    assert!(number(&text, "handled") > 0);
}

#[test]
fn each_sigtrap_of_its_own_is_handled_once() {
    for letters in ["he", "heo"] {
        let text = exercise_batches("4", letters, 9);
        assert!(number(&text, "handled") > 0, "{letters}");
    }
}

#[test]
fn who_meets_one_breakpoint_again_and_again_gets_on() {
    let target = Target::start("hot", &["1", ""]);
    seize(target.pid(), |tracer| {
        let plan = Hot::new(tracer, &target.first_line).on(tracer);
        let poke = &plan.pokes[1];
        let first = poke.expected[0];
        tracer
            .arm(&[Trap { site: poke.site, goes_to: poke.trap_to, starts_behind: false }])
            .unwrap();
        tracer.write_text(poke.site, &[0xcc]).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while tracer.counts().traps < 50 {
            assert!(Instant::now() < until, "{:?}", tracer.counts());
            tracer.wait_a_moment(Duration::from_millis(1)).unwrap();
        }
        tracer.write_text(poke.site, &[first]).unwrap();
        tracer.sync_core().unwrap();
        tracer.drain().unwrap();
        tracer.disarm().unwrap();
    })
    .unwrap();
    target.finish();
}

/// A controller that is given no CPU for long after each step, on a machine that is not busy:
/// everything that may happen while breakpoints are there has the time to.
struct Slow<'a>(&'a mut Tracer);

const SLOW_STEP: Duration = Duration::from_millis(150);

impl PatchTarget for Slow<'_> {
    type Error = TraceError;

    fn read(&mut self, at: RemoteAddr, into: &mut [u8]) -> Result<(), TraceError> {
        PatchTarget::read(self.0, at, into)
    }

    fn write_text(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        self.0.write_text(at, bytes)
    }

    fn sync_core(&mut self) -> Result<(), TraceError> {
        self.0.sync_core()?;
        self.0.wait_a_moment(SLOW_STEP)
    }

    fn arm(&mut self, traps: &[Trap]) -> Result<(), TraceError> {
        self.0.arm(traps)
    }

    fn disarm(&mut self) -> Result<(), TraceError> {
        self.0.disarm()
    }

    fn evacuate(
        &mut self,
        moves: &[(RemoteAddr, RemoteAddr)],
    ) -> Result<Vec<RemoteAddr>, TraceError> {
        PatchTarget::evacuate(self.0, moves)
    }

    fn wait_a_moment(&mut self, duration: Duration) -> Result<(), TraceError> {
        self.0.wait_a_moment(duration)
    }

    fn drain(&mut self) -> Result<(), TraceError> {
        self.0.drain()
    }
}

/// One commit and its reverse by a slow controller.
fn exercise_slowly(letters: &str) -> String {
    let target = Target::start("hot", &["4", letters]);
    let pid = target.pid();
    let disposition = sigtrap_disposition(pid);
    seize(pid, |tracer| {
        let hot = Hot::new(tracer, &target.first_line);
        let plan = hot.on(tracer);
        for plan in [&plan, &reverse(&plan)] {
            commit(&mut Slow(tracer), plan).unwrap();
            assert_eq!(sigtrap_disposition(pid), disposition, "{letters}: after a commit");
        }
        assert!(tracer.counts().traps > 0, "no thread ever met a breakpoint");
    })
    .unwrap();
    target.finish()
}

#[test]
fn sigtrap_ignored_in_a_long_window() {
    let text = exercise_slowly("fi");
    assert!(number(&text, "forks") > 0);
    exercise_slowly("tio");
}

#[test]
fn a_sigtrap_handler_in_a_long_window() {
    let text = exercise_slowly("tho");
    assert!(number(&text, "handled") > 0);
}
