//! Objects made by every clang on this machine: what they declare is read right, and what is
//! linked computes what the C says, as the interpreter tells.
#![allow(clippy::unwrap_used, reason = "a test panics where its input is not as expected")]

mod support;

use std::collections::HashMap;
use std::process::Command;
use std::sync::LazyLock;

use flea_object::helper::Helper;
use flea_object::insn::Insn;
use flea_object::interp::{Host, Interpreter, Memory, Protection};
use flea_object::parse;
use flea_object::spec::{InnerMaps, MapIdx, MapKind, MapSpec, Object, Program, ProgramKind};
use flea_object::validate::validate;
use support::{compile, compilers};

static PROGRAMS: LazyLock<Vec<(String, Object)>> = LazyLock::new(|| objects("programs.bpf.c"));

/// The object of one C file by every compiler and ISA version that there is.
fn objects(file: &str) -> Vec<(String, Object)> {
    let mut objects = Vec::new();
    for compiler in compilers() {
        let versions: &[&str] =
            if compiler == "clang-19" { &["v1", "v2", "v3", "v4"] } else { &["v1", "v2", "v3"] };
        for version in versions {
            let bytes = compile(compiler, file, &["-g", &format!("-mcpu={version}")]);
            let what = format!("{compiler} {version} {file}");
            let object = parse(&bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
            objects.push((what, object));
        }
    }
    objects
}

fn program<'a>(object: &'a Object, name: &str) -> &'a Program {
    object.programs.iter().find(|p| p.name == name).unwrap()
}

fn map_named(object: &Object, name: &str) -> Option<usize> {
    object.maps.iter().position(|m| m.name == name)
}

/// Element 0 of every array map as a region, and helpers that note their calls.
struct TestHost {
    /// Address of element 0, by map.
    values: Vec<u64>,
    calls: Vec<(i32, [u64; 5])>,
    results: HashMap<i32, u64>,
}

const HANDLE: u64 = 0x6000_0000;

impl TestHost {
    fn new(object: &Object, memory: &mut Memory) -> Self {
        let values = object.maps.iter().map(|m| {
            let zeros = || vec![0; m.value_size_bytes as usize];
            let protection = if m.read_only { Protection::ReadOnly } else { Protection::ReadWrite };
            memory.add(m.init.clone().unwrap_or_else(zeros), protection)
        });
        Self { values: values.collect(), calls: Vec::new(), results: HashMap::new() }
    }
}

impl Host for TestHost {
    fn call(&mut self, helper: i32, args: [u64; 5], _: &mut Memory) -> Result<u64, String> {
        self.calls.push((helper, args));
        if helper == Helper::MapLookupElem as i32 {
            let map = usize::try_from(args[0] - HANDLE).unwrap();
            return Ok(self.values[map]);
        }
        Ok(self.results.get(&helper).copied().unwrap_or(0))
    }

    fn map_handle(&self, map: MapIdx) -> Option<u64> {
        self.values.get(map.0 as usize).map(|_| HANDLE + u64::from(map.0))
    }

    fn map_value_address(&self, map: MapIdx) -> Option<u64> {
        self.values.get(map.0 as usize).copied()
    }
}

/// Runs a program on these argument words.
fn run(object: &Object, name: &str, ctx: &[u64]) -> (u64, Memory, TestHost) {
    let mut memory = Memory::new();
    let mut host = TestHost::new(object, &mut memory);
    let bytes = ctx.iter().flat_map(|word| word.to_le_bytes()).collect();
    let ctx = memory.add(bytes, Protection::ReadOnly);
    let interpreter = Interpreter::new(&program(object, name).insns).unwrap();
    let result = interpreter.run([ctx, 0, 0, 0, 0], &mut memory, &mut host);
    (result.unwrap_or_else(|e| panic!("{name}: {e}")), memory, host)
}

fn map(name: &str, kind: MapKind, sizes: [u32; 3], flags: u32) -> MapSpec {
    MapSpec {
        name: name.to_owned(),
        kind,
        key_size_bytes: sizes[0],
        value_size_bytes: sizes[1],
        max_entries: sizes[2],
        flags,
        init: None,
        read_only: flags == 1 << 7,
        ..MapSpec::default()
    }
}

#[test]
fn maps_are_declared_by_types() {
    for (what, object) in PROGRAMS.iter() {
        let expected = [
            map("by_address", MapKind::Hash, [8, 16, 100], 0),
            map("events", MapKind::RingBuf, [0, 0, 1 << 16], 0),
            map("counts", MapKind::PerCpuArray, [4, 24, 3], 0),
            map("settings", MapKind::Array, [4, 6, 5], 1 << 7),
        ];
        let mut declared = object.maps[..4].to_vec();
        declared.sort_by_key(|m| expected.iter().position(|e| e.name == m.name));
        assert_eq!(declared, expected, "{what}");
        assert_eq!(object.license.as_deref(), Some("Dual MIT/GPL"));
    }
}

#[test]
fn global_data_becomes_maps() {
    for (what, object) in PROGRAMS.iter() {
        let data = |name: &str| {
            let map = map_named(object, name).unwrap_or_else(|| panic!("{what}: {name}"));
            let m = &object.maps[map];
            assert_eq!((m.kind, m.key_size_bytes, m.max_entries), (MapKind::Array, 4, 1));
            (m.init.clone().unwrap(), m.read_only)
        };
        assert_eq!(data(".bss"), (vec![0; 8], false));
        assert_eq!(data(".data.elsewhere"), (vec![11, 0, 0, 0, 0, 0, 0, 0], false));
        assert_eq!(data(".rodata"), (vec![7, 0, 0, 0], true));
        assert_eq!(data(".rodata.str1.1"), (b"freed %d\n\0".to_vec(), true));
        assert_eq!(data(".data").0.len(), 24);
        assert_eq!(map_named(object, ".data.unused"), None, "{what}: nobody refers to it");
    }
}

#[test]
fn programs_have_their_sections() {
    for (what, object) in PROGRAMS.iter() {
        let mut got: Vec<_> = object
            .programs
            .iter()
            .map(|p| (p.name.as_str(), p.kind, p.target.as_deref(), p.autoload))
            .collect();
        got.sort_unstable_by_key(|p| p.0);
        let expected = [
            ("anywhere", ProgramKind::Fentry, None, true),
            ("on_free", ProgramKind::Fentry, Some("free"), false),
            ("on_free_too", ProgramKind::Fentry, Some("free"), true),
            ("on_malloc", ProgramKind::Fentry, Some("malloc"), true),
            ("on_malloc_return", ProgramKind::Fexit, Some("libc.so.6:malloc"), true),
        ];
        assert_eq!(got, expected, "{what}");
        assert_eq!(program(object, "on_free").section, "?fentry/free");
        for p in &object.programs {
            validate(&p.insns).unwrap_or_else(|e| panic!("{what} {}: {e}", p.name));
        }
    }
}

#[test]
fn linked_programs_compute_what_the_source_says() {
    for (what, object) in PROGRAMS.iter() {
        let index = |name| map_named(object, name).unwrap();

        // twice(6) = 2 * 6 + total; seen_twice[6 & 3] was 3.
        let (result, memory, host) = run(object, "on_free", &[6]);
        assert_eq!(result, 52, "{what}");
        let data = memory.bytes(host.values[index(".data")]).unwrap();
        let seen: Vec<u8> = [8, 12, 16, 20].into_iter().map(|i| data[i]).collect();
        assert_eq!(seen, [1, 2, 4, 4], "{what}");

        // thrice(5) = twice(5) + 5 + limit, in element 0 of counts.
        let (result, memory, host) = run(object, "on_malloc_return", &[0, 5]);
        assert_eq!(result, 11, "{what}");
        assert_eq!(memory.load(host.values[index("counts")], 8), Ok(62), "{what}");

        let (_, memory, host) = run(object, "on_malloc", &[0x1234]);
        assert_eq!(memory.load(host.values[index(".bss")], 8), Ok(1), "{what}");
        let called: Vec<_> = host.calls.iter().map(|(helper, _)| *helper).collect();
        assert_eq!(called, [5, 2, 130], "{what}");
        assert_eq!(host.calls[1].1[0], HANDLE + index("by_address") as u64, "{what}");
        assert_eq!(host.calls[2].1[0], HANDLE + index("events") as u64, "{what}");
        assert_eq!(host.calls[2].1[2], 16, "{what}");
    }
}

#[test]
fn callbacks_are_linked() {
    for (what, object) in PROGRAMS.iter() {
        // The interpreter calls the function itself, ten times.
        let (result, _, host) = run(object, "on_free_too", &[0]);
        let p = program(object, "on_free_too");
        let names: Vec<_> = p.functions.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["on_free_too", "each"], "{what}");
        assert_eq!((result, host.calls.len()), (10, 0), "{what}");
    }
}

#[test]
fn lines_follow_their_functions() {
    for (what, object) in PROGRAMS.iter() {
        for p in &object.programs {
            assert!(!p.lines.is_empty(), "{what} {}", p.name);
            assert!(p.lines.is_sorted_by_key(|l| l.insn_idx), "{what} {}", p.name);
            assert!(p.lines.iter().all(|l| l.file.ends_with("programs.bpf.c") && l.line > 0));
            assert!(p.lines.iter().all(|l| (l.insn_idx as usize) < p.insns.len()));
        }
        let p = program(object, "on_malloc_return");
        let twice = p.functions.iter().find(|f| f.name == "twice").unwrap().insn_idx;
        let line = p.lines.iter().find(|l| l.text.starts_with("return x * 2")).unwrap();
        assert!(line.insn_idx >= twice, "{what}");
    }
}

#[test]
fn sessions_call_their_kernel_functions_as_helpers() {
    for (what, object) in objects("session.bpf.c") {
        let p = program(&object, "time_work");
        assert_eq!((p.kind, p.target.as_deref()), (ProgramKind::Fsession, Some("main:work")));
        validate(&p.insns).unwrap();
        let helpers: Vec<_> =
            p.insns.iter().filter(|i| i.opcode == 0x85).map(|i| (i.src, i.imm)).collect();
        assert!(helpers.contains(&(0, Helper::SessionIsReturn as i32)), "{what}");
        assert!(helpers.contains(&(0, Helper::SessionCookie as i32)), "{what}");
    }
}

#[test]
fn objects_written_with_libbpfs_headers() {
    if !std::path::Path::new("/usr/include/bpf/bpf_helpers.h").exists() {
        eprintln!("skipped: libbpf's headers are not installed (libbpf-dev)");
        return;
    }
    for compiler in compilers() {
        // <asm/types.h> is in the host's own directory, which -target bpf does not look in.
        let include = format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH);
        let object = parse(&compile(compiler, "libbpf_headers.bpf.c", &["-g", &include])).unwrap();
        assert_eq!(object.maps[0], map("sizes", MapKind::Hash, [8, 8, 1024], 0));
        let p = program(&object, "count_sizes");
        assert_eq!(p.target.as_deref(), Some("libc.so.6:malloc"));
        let printk = |i: &Insn| i.opcode == 0x85 && i.imm == Helper::TracePrintk as i32;
        assert!(p.insns.iter().any(printk));
        let (result, _, _) = run(&object, "count_sizes", &[64]);
        assert_eq!(result, 0);
    }
}

#[test]
fn without_debug_information_programs_are_read_and_maps_are_not() {
    for compiler in compilers() {
        let error = parse(&compile(compiler, "programs.bpf.c", &[])).unwrap_err().to_string();
        assert!(error.contains("compile with -g"), "{error}");
    }
}

/// `bpftool gen object` is libbpf's static linker: it merges sections and writes BTF anew.
#[test]
fn objects_from_libbpfs_linker() {
    let bpftool = ["bpftool", "/usr/sbin/bpftool"]
        .into_iter()
        .find(|tool| Command::new(tool).arg("version").output().is_ok_and(|o| o.status.success()));
    let Some(bpftool) = bpftool else {
        eprintln!("skipped: bpftool is not installed");
        return;
    };
    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    for compiler in compilers() {
        let [a, b, linked] = ["a", "b", "linked"]
            .map(|name| directory.join(format!("{compiler}-{name}-{}.o", std::process::id())));
        std::fs::write(&a, compile(compiler, "session.bpf.c", &["-g"])).unwrap();
        std::fs::write(&b, compile(compiler, "programs.bpf.c", &["-g"])).unwrap();
        let output =
            Command::new(bpftool).args(["gen", "object"]).args([&linked, &a, &b]).output().unwrap();
        let bytes = std::fs::read(&linked).unwrap_or_default();
        for file in [a, b, linked] {
            let _ = std::fs::remove_file(file);
        }
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let object = parse(&bytes).unwrap_or_else(|e| panic!("{compiler}: {e}"));
        assert_eq!(object.programs.len(), 6);
        assert!(map_named(&object, "spent").is_some() && map_named(&object, "counts").is_some());
        assert_eq!(run(&object, "on_free", &[6]).0, 52);
        let (_, memory, host) = run(&object, "on_malloc_return", &[0, 5]);
        let counts = map_named(&object, "counts").unwrap();
        assert_eq!(memory.load(host.values[counts], 8), Ok(62), "{compiler}");
        assert!(program(&object, "on_free").lines.iter().any(|l| l.text.contains("twice(")));
    }
}

#[test]
fn maps_of_maps_and_locks_are_found() {
    for compiler in compilers() {
        let object = parse(&compile(compiler, "inner.bpf.c", &["-g"])).unwrap();
        let index = |name| MapIdx(u32::try_from(map_named(&object, name).unwrap()).unwrap());
        let at = |name| &object.maps[map_named(&object, name).unwrap()];
        let route = MapSpec { lock_offset: Some(8), ..map("north", MapKind::Hash, [4, 16, 16], 0) };
        assert_eq!(*at("north"), route, "{compiler}");
        assert_eq!(*at("south"), MapSpec { name: "south".into(), ..route.clone() });

        let template = MapSpec { name: "routes.inner".into(), template: true, ..route };
        assert_eq!(*at("routes.inner"), template, "{compiler}");
        let routes = InnerMaps {
            template: index("routes.inner"),
            init: vec![(0, index("north")), (2, index("south"))],
        };
        let expected = map("routes", MapKind::ArrayOfMaps, [4, 4, 4], 0);
        assert_eq!(*at("routes"), MapSpec { inner: Some(routes), ..expected }, "{compiler}");

        let lists = InnerMaps { template: index("lists.inner"), init: vec![(5, index("nine"))] };
        let expected = map("lists", MapKind::HashOfMaps, [4, 4, 8], 0);
        assert_eq!(*at("lists"), MapSpec { inner: Some(lists), ..expected }, "{compiler}");
        let fits = |map, template| at(map).shape().fits(at(template).shape());
        assert!(fits("nine", "lists.inner") && fits("south", "routes.inner"));
        assert!(!fits("nine", "routes.inner") && !fits("north", "lists.inner"));

        assert_eq!(at("deep").lock_offset, Some(4));
        assert!(at(".data.guarded").lock_offset.is_some_and(|o| o == 0 || o == 8));
        assert_eq!(at(".bss").lock_offset, None);
    }
}
