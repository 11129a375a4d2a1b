//! Commits in a plug-in that is closed and opened again all the time. See `targets/reopened.c`.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../flea-process/tests/support/mod.rs"]
mod support;

use std::io::Write as _;
use std::path::PathBuf;

use flea_patch::{Gate, PATCH_BYTES, Plan, Poke, commit_behind};
use flea_process::{MapRequest, Tracer, seize};
use flea_symbols::addr::RemoteAddr;
use support::Target;

const N_ROUNDS: usize = 200;
/// Rounds that find the plug-in closed, or its bytes new again, change nothing.
const N_CHANGES: usize = 20;

struct Plugin(PathBuf);

impl Drop for Plugin {
    fn drop(&mut self) {
        let _unused = std::fs::remove_file(&self.0);
    }
}

fn rel32(from_end: RemoteAddr, to: RemoteAddr) -> [u8; 4] {
    i32::try_from(to.0.cast_signed() - from_end.0.cast_signed()).unwrap().to_le_bytes()
}

fn jump(from: RemoteAddr, to: RemoteAddr) -> [u8; PATCH_BYTES] {
    let [a, b, c, d] = rel32(from.offset(5), to);
    [0xe9, a, b, c, d]
}

/// What leads the function to a copy of its first instruction, and what takes that off.
fn plans(tracer: &mut Tracer, site: RemoteAddr) -> [Plan; 2] {
    let near = MapRequest {
        near: Some(site),
        size_bytes: 4096,
        prot: libc::PROT_READ | libc::PROT_EXEC,
        flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        fd: -1,
        offset: 0,
    };
    let copy = tracer.remote_map(near).unwrap();
    let old: [u8; PATCH_BYTES] =
        tracer.memory().read_vec(site, PATCH_BYTES).unwrap().try_into().unwrap();
    let mut code = old.to_vec();
    code.extend(jump(copy.offset(5), site.offset(5)));
    tracer.memory().write(copy, &code).unwrap();
    let on = jump(site, copy);
    [(old, on), (on, old)].map(|(expected, new)| {
        let expected = expected.to_vec();
        Plan { pokes: vec![Poke { site, expected, new, trap_to: copy, moves: Vec::new() }] }
    })
}

#[test]
fn a_plugin_that_is_closed_and_opened_again() {
    let plugin = Plugin(support::compile("reopened_plugin", &["-shared", "-fPIC"]));
    let mut target = Target::start("reopened", &[plugin.0.to_str().unwrap(), "2"]);
    let words = target.first_line.split(' ').map(|word| u64::from_str_radix(word, 16).unwrap());
    let words: Vec<RemoteAddr> = words.map(RemoteAddr).collect();
    let [site, r_debug, stop] = words[..] else { panic!("{}", target.first_line) };
    let gate = Some(Gate { stop, r_debug });
    let pid = target.pid();
    let plans = seize(pid, |tracer| plans(tracer, site)).unwrap();
    target.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    let (mut n_changes, mut n_others) = (0, 0);
    for round in 0.. {
        assert!(round < 50 * N_ROUNDS, "only {n_changes} changes");
        if round >= N_ROUNDS && n_changes >= N_CHANGES {
            break;
        }
        let plan = &plans[round % 2];
        match seize(pid, |tracer| commit_behind(tracer, plan, gate)).unwrap() {
            Ok(_) => n_changes += 1,
            // Not open, or opened since the last round.
            Err(error) if error.is_found_changed() => n_others += 1,
            Err(other) => panic!("round {round}: {other}"),
        }
    }
    println!("{n_changes} changes, {n_others} rounds without");
    println!("{}", target.finish());
}
