//! The verdicts on the programs in `cases/*.txt`.
//!
//! ```text
//! == name
//! ctx 2 result session      (a "result" per result word; or: regs; or: mem 16;
//!                            default: ctx 2)
//! map array 4 8 1 ro        (kind, key bytes, value bytes, entries; "lock 4": offset of the
//!                            value's lock; "template"; "of 2": index of its template)
//! allow write               (bpf_probe_write_user, stores to the words below)
//! change 0 2                (words of the context that can be changed)
//! slots *foo -              (types of the context's words; see graph/mod.rs. The lines that
//!                            declare them are the file's, before its first case)
//! ...instructions, see asm/mod.rs...
//! => ok                     or: => @3 R1 invalid mem access 'scalar'
//! ```
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test's assembler: a wrong number or a mistake in a case fails the test"
)]

mod asm;
mod graph;

use flea_object::spec::{InnerMaps, MapIdx, MapKind, MapSpec, Program, ProgramKind};
use flea_object::types::TypeId;
use flea_verifier::{Changeable, Context, Permissions, Target, Verifier};
use graph::Graph;

struct Case {
    name: String,
    context: Context,
    graph: Graph,
    slots: Vec<Option<TypeId>>,
    permissions: Permissions,
    changeable: Changeable,
    maps: Vec<MapSpec>,
    lines: Vec<String>,
    expected: String,
}

fn parse(file: &str, text: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut current: Option<Case> = None;
    let is_type = |l: &&str| ["struct ", "union ", "opaque "].iter().any(|w| l.starts_with(w));
    let graph = Graph::parse(text.lines().map(str::trim).filter(is_type));
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("//")) {
        if is_type(&line) {
            continue;
        }
        if let Some(name) = line.strip_prefix("== ") {
            assert!(current.is_none(), "{file}: no verdict before {name}");
            current = Some(Case {
                name: format!("{file}: {name}"),
                context: Context::Tracing { n_args: 2, n_results: 0, session: false },
                graph: graph.clone(),
                slots: Vec::new(),
                permissions: Permissions::default(),
                changeable: Changeable::NONE,
                maps: Vec::new(),
                lines: Vec::new(),
                expected: String::new(),
            });
            continue;
        }
        let case = current.as_mut().unwrap_or_else(|| panic!("{file}: {line} outside a case"));
        if let Some(expected) = line.strip_prefix("=> ") {
            case.expected = expected.to_string();
            cases.extend(current.take());
        } else if let Some(rest) = line.strip_prefix("ctx ") {
            let n_args = rest.split(' ').next().unwrap_or("").parse().unwrap();
            let n_results = u8::try_from(rest.matches("result").count()).unwrap();
            let session = rest.contains("session");
            case.context = Context::Tracing { n_args, n_results, session };
        } else if line == "regs" {
            case.context = Context::PtRegs;
        } else if let Some(rest) = line.strip_prefix("mem ") {
            case.context = Context::Memory { size_bytes: rest.parse().unwrap() };
        } else if let Some(rest) = line.strip_prefix("slots ") {
            case.slots = case.graph.slots(rest);
        } else if line == "allow write" {
            case.permissions.write_target = true;
        } else if let Some(rest) = line.strip_prefix("change ") {
            case.changeable = Changeable::of(rest.split(' ').map(|word| word.parse().unwrap()));
        } else if let Some(rest) = line.strip_prefix("map ") {
            case.maps.push(map(rest));
        } else {
            case.lines.push(line.to_string());
        }
    }
    assert!(current.is_none(), "{file}: no verdict at the end");
    cases
}

fn map(text: &str) -> MapSpec {
    let w: Vec<&str> = text.split(' ').collect();
    let kind = match w[0] {
        "hash" => MapKind::Hash,
        "array" => MapKind::Array,
        "percpu_hash" => MapKind::PerCpuHash,
        "percpu_array" => MapKind::PerCpuArray,
        "array_of_maps" => MapKind::ArrayOfMaps,
        "hash_of_maps" => MapKind::HashOfMaps,
        "ringbuf" => MapKind::RingBuf,
        "prog_array" => MapKind::ProgArray,
        other => panic!("map kind {other}"),
    };
    let number = |word: &str| {
        let at = w.iter().position(|found| *found == word)?;
        Some(w[at + 1].parse().unwrap())
    };
    MapSpec {
        lock_offset: number("lock"),
        template: w.contains(&"template"),
        inner: number("of").map(|t| InnerMaps { template: MapIdx(t), init: Vec::new() }),
        name: w[0].to_string(),
        kind,
        key_size_bytes: w[1].parse().unwrap(),
        value_size_bytes: w[2].parse().unwrap(),
        max_entries: w[3].parse().unwrap(),
        read_only: w.contains(&"ro"),
        ..MapSpec::default()
    }
}

fn run(case: &Case) -> Result<(), String> {
    let lines: Vec<&str> = case.lines.iter().map(String::as_str).collect();
    let program = Program {
        name: "test".into(),
        section: "fentry/test".into(),
        kind: ProgramKind::Fentry,
        target: None,
        insns: asm::assemble(&lines),
        lines: Vec::new(),
        ..Program::default()
    };
    let target = Target { types: &case.graph.types, slots: &case.slots };
    let verifier = Verifier::new(&program, &case.maps, case.context)
        .target(target)
        .permit(case.permissions)
        .changeable(case.changeable);
    let (found, log) = match verifier.verify() {
        Ok(verified) => {
            assert_eq!(verified.facts().len(), program.insns.len());
            ("ok".to_string(), String::new())
        }
        Err(e) => {
            assert_eq!(e.log.last(), Some(&e.message), "the message ends the log");
            (format!("@{} {}", e.insn_idx, e.message), e.log.join("\n"))
        }
    };
    if found == case.expected {
        return Ok(());
    }
    Err(format!("{}\n  expected {}\n  found    {found}\n{log}\n", case.name, case.expected))
}

#[test]
fn every_case_gets_its_verdict() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases");
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    let mut n = 0;
    let mut failures = Vec::new();
    for path in paths {
        let file = path.file_stem().unwrap().to_string_lossy().into_owned();
        for case in parse(&file, &std::fs::read_to_string(&path).unwrap()) {
            n += 1;
            failures.extend(run(&case).err());
        }
    }
    assert!(n >= 120, "only {n} cases were found");
    assert!(failures.is_empty(), "{} of {n} cases:\n{}", failures.len(), failures.join("\n"));
}
