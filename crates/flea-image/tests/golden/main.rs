//! What bodies, skeletons and frames look like, and what they do: each file beside this one is
//! a case. Its upper part states it, its lower part, from `---` on, is what Flea makes of it.
//!
//! ```text
//! # what is shown
//! function: u64 f(u64 a, double b)      types: see `case::ty`
//! site: nop                             or plain, rip, branch: see `case::Site`
//! map percpu_array 4 8 1                kind, key bytes, value bytes, entries
//! struct s 16 n:u64@0 next:*s@8         types of the target: see flea-verifier's tests/graph
//! slots *s -                            types of the context's words
//! flags: stack_words=3 stack_align_bytes=16 unwinder allow_write
//! controller inline                     or called, direct: its programs follow, newest first
//! program fentry                        or fexit, fsession, fmod_ret, uprobe, uretprobe
//!   r0 = *(u64 *)(r1 + 0)               in the notation of flea-verifier's tests/asm
//!   exit
//! held 1 3                              a program at index 3 of map 1, for tail calls
//!   exit
//! run: rdi=5 xmm0=0x10                  all other registers are the rig's pattern
//! ---
//! ```
//!
//! A new case is a new file with an upper part and `---`; a new kind of program is a line in
//! `case::kind`. `UPDATE_EXPECT=1 cargo test -p flea-image --test golden` writes the lower parts:
//! look at the difference before it is committed. Programs go through the real verifier, and
//! each run is executed; what it changes for the caller fails the test, blessed or not.
#![cfg(target_arch = "x86_64")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test; a mistake in a case fails it"
)]

#[path = "../../../flea-verifier/tests/asm/mod.rs"]
mod asm;
mod case;
#[path = "../../../flea-verifier/tests/graph/mod.rs"]
mod graph;
mod made;
mod picture;
mod run;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::path::PathBuf;

use expect_test::expect_file;
use flea_image::{BODY_FRAMES_OFFSET, Body, BodyRequest, Cpu, ProgramUse, compile_body};
use flea_object::spec::{MapKind, MapSpec, Program, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_verifier::{Context, Verified, verify};
use support::programs::{counter, ints, map, plan, record};

const RULE: &str = "---\n";

#[test]
fn golden() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let paths = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|e| e == "txt")).collect();
    paths.sort();
    assert!(paths.len() > 10, "cases are missing from {}", dir.display());
    for path in paths {
        println!("{}", path.display());
        let text = fs::read_to_string(&path).unwrap();
        let upper = text.split_once(RULE).map_or(text.as_str(), |(upper, _)| upper);
        let case = case::Case::parse(upper);
        let runs = run::runs(&case);
        assert!(!runs.is_empty(), "a case has to run");
        let made = format!("{upper}{RULE}{}\nruns:\n{runs}", picture::picture(&case));
        expect_file![&path].assert_eq(&made);
    }
}

fn compile(maps: &[MapSpec], verified: &Verified, kind: ProgramKind) -> Body {
    compile_body(&BodyRequest {
        signature: &ints(2),
        programs: &[ProgramUse { verified, kind, cookie: 7, state_index: 0 }],
        maps,
        plan: &plan(maps),
        function_address: RemoteAddr(0x40_1000),
        frame_offset: BODY_FRAMES_OFFSET,
        printk_map: None,
        cpu: Cpu::default(),
    })
    .unwrap()
}

/// Many tests write facts by hand: they are those that the verifier finds.
#[test]
fn the_verifier_leads_to_the_same_code() {
    let maps = [map(MapKind::PerCpuArray, 8, 1), map(MapKind::Array, 64, 1)];
    for (by_hand, kind) in [(counter(0), ProgramKind::Fentry), (record(1, 3), ProgramKind::Fexit)] {
        let program = Program {
            name: "p".into(),
            section: String::new(),
            kind,
            target: None,
            insns: by_hand.insns().to_vec(),
            lines: vec![],
            ..Program::default()
        };
        let n_results = u8::from(kind == ProgramKind::Fexit);
        let context = Context::Tracing { n_args: 2, n_results, session: false };
        let verified = verify(&program, &maps, context).unwrap();
        let compile = |v| compile(&maps, v, kind);
        assert_eq!(compile(&verified), compile(&by_hand));
    }
}
