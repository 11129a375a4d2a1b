//! Objects that are refused, and in which words; damaged files; and no bytes that panic.
#![allow(clippy::unwrap_used, reason = "a test panics where its input is not as expected")]

mod support;

use std::sync::LazyLock;

use flea_object::interp::{Interpreter, Memory, NoHost};
use flea_object::{disasm, parse};
use proptest::prelude::*;
use support::{compile, compilers};

/// A case of `refused.bpf.c`, and how the message begins.
const CASES: &[(&str, &str)] = &[
    (
        "kprobe",
        "program 'prog': section 'kprobe/do_unlinkat': kprobe programs are not supported; supported are SEC(\"fentry/FUNC\")",
    ),
    (
        "uprobe_offset",
        "program 'prog': section 'uprobe/libc:malloc+4': programs are attached to a function's \
         entry, not 4 bytes behind it",
    ),
    (
        "unknown_section",
        "program 'prog': section 'foo/bar' names nothing Flea knows; supported are",
    ),
    ("no_function", "program 'prog': section 'fentry/' names no function"),
    ("static", "program 'prog': is static in section 'fentry/f'"),
    ("prog_array", "map 'a_map': value_size is 8; a program array's value is 4 bytes"),
    ("prog_array_flags", "map 'a_map': map_flags 0x80: the bits 0x80 are not supported"),
    ("prog_array_size", "map 'a_map': 'value' says 8 bytes and its size member 4"),
    ("prog_array_end", "map 'a_map': values[2] is past its end: max_entries is 2"),
    ("prog_array_text", "map 'a_map': values[0] is 'helper', which is no program"),
    ("prog_array_data", "map 'a_map': values[1] is 'number', which is no program"),
    ("prog_array_values", "map 'a_map': member 'values' is not of the form"),
    ("lru", "map 'a_map': map type 9 (LRU_HASH) is not supported"),
    ("no_type", "map 'a_map': map type 0 (no type) is not supported"),
    ("array_key", "map 'a_map': key_size is 8; an array's key is 4 bytes"),
    ("no_entries", "map 'a_map': max_entries is 0;"),
    ("no_value", "map 'a_map': value_size is 0; a hash value is"),
    ("ringbuf_size", "map 'a_map': max_entries is 12288; a ring buffer's bytes are a power of two"),
    ("ringbuf_page", "map 'a_map': max_entries is 2048; a ring buffer's bytes"),
    ("ringbuf_key", "map 'a_map': key_size is 4; a ring buffer has no keys"),
    ("hash_key", "map 'a_map': key_size is 513; a hash key is 1 to 512 bytes"),
    ("percpu_value", "map 'a_map': value_size is 32769; a per-CPU value is 1 to 32768 bytes"),
    ("flags", "map 'a_map': map_flags 0x800: the bits 0x800 are not supported"),
    ("pinning", "map 'a_map': member 'pinning' is not supported"),
    ("conflict", "map 'a_map': 'key' says 4 bytes and its size member 8"),
    ("inner_map", "map 'a_map': member 'values' is not supported"),
    ("no_inner", "map 'a_map': is a map of maps: __array(values, struct ...) has to say"),
    ("nested_maps", "map 'a_map.inner': is a map of maps inside one"),
    ("outer_value", "map 'a_map': value_size is 8; a map in a map of maps takes 4 bytes"),
    ("wrong_inner", "map 'a_map': values[0] is 'two', which is not as `values` declares"),
    ("inner_slot", "map 'a_map': values[1] = &one has no place: an index is below"),
    ("inner_room", "map 'a_map': values[9] = &one has no place:"),
    ("inner_key", "map 'a_map': values[0] = &one has no place:"),
    ("inner_data", "map 'a_map': its initial value at offset"),
    ("two_locks", "map 'a_map': the value has a struct bpf_spin_lock at 0 and one at 8;"),
    ("lock_array", "map 'a_map': the value has a struct bpf_spin_lock at 8 and one at 12;"),
    ("lock_alignment", "map 'a_map': the struct bpf_spin_lock at 2 is not aligned to 4"),
    ("lock_percpu", "map 'a_map': the value has a struct bpf_spin_lock, which only HASH and"),
    ("lock_rodata", "map '.rodata': the value has a struct bpf_spin_lock, which only HASH and"),
    ("not_uint", "map 'a_map': member 'type' is not of the form"),
    ("not_a_structure", "map 'a_map': is not a structure of __uint and __type members"),
    ("legacy", "map 'maps': section 'maps' holds legacy map definitions"),
    (
        "extern_function",
        "program 'prog': refers to 'bpf_rcu_read_lock', which the object does not define",
    ),
    (
        "extern_variable",
        "program 'prog': refers to 'LINUX_KERNEL_VERSION', which the object does not define",
    ),
    ("not_a_session", "program 'prog': calls 'bpf_session_is_return', which only"),
    ("much_data", "map '.bss.two': 83886080 bytes of global data; at most 67108864 are allowed"),
    ("address_in_data", "map '.data': global data at offset 0x0 holds the address of 'number'"),
];

#[test]
fn what_is_not_supported_says_so() {
    for compiler in compilers() {
        for (case, expected) in CASES {
            let bytes = compile(compiler, "refused.bpf.c", &["-g", &format!("-DCASE_{case}")]);
            let error = parse(&bytes).expect_err(case).to_string();
            assert!(error.starts_with(expected), "{compiler} {case}: {error}");
        }
    }
}

/// A good object, where there is a compiler.
static GOOD: LazyLock<Option<Vec<u8>>> = LazyLock::new(|| {
    compilers().first().map(|compiler| compile(compiler, "programs.bpf.c", &["-g"]))
});

/// The file's bytes with `patch` at `offset`.
fn patched(offset: usize, patch: &[u8]) -> Option<String> {
    let mut bytes = GOOD.clone()?;
    bytes[offset..offset + patch.len()].copy_from_slice(patch);
    Some(parse(&bytes).expect_err("a damaged file").to_string())
}

/// After uBPF's descriptions of malformed files.
#[test]
fn damaged_headers_are_refused() {
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"\x7fELG", "not an ELF file"),
        (4, &[1], "ELF class 1 is not 64-bit"),
        (5, &[2], "ELF byte order 2 is not little-endian"),
        (6, &[2], "damaged object"),
        (16, &[0, 0], "ELF type 0 is not a relocatable object"),
        (18, &[62, 0], "the object is for ELF machine 62, not BPF"),
        (40, &[0xff; 8], "damaged object"),
        (58, &[0, 4], "damaged object"),
        (60, &[0xff, 0xf0], "damaged object"),
    ];
    for &(offset, patch, expected) in cases {
        let Some(error) = patched(offset, patch) else { return };
        assert!(error.starts_with(expected), "at {offset}: {error}");
    }
    for short in [0, 4, 19, 20, 63] {
        let error = parse(&GOOD.as_ref().unwrap()[..short]).unwrap_err().to_string();
        assert!(error.starts_with("not an ELF file") || error.starts_with("damaged"), "{error}");
    }
}

/// References that no compiler makes, by changing an instruction's `imm` (bytes 4 to 7).
#[test]
fn stray_references_are_refused() {
    let Some(good) = GOOD.as_ref() else { return };
    let imm_of = |insn: fn(&[u8]) -> bool| good.windows(13).position(insn).unwrap() + 4;
    // seen_twice is at .data+8.
    let data = imm_of(|b| b[0] == 0x18 && b[2..] == [0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
    let error = patched(data, &24i32.to_le_bytes()).unwrap();
    assert!(error.contains("refers to offset 24 of '.data', which has 24 bytes"), "{error}");
    let error = patched(data, &(-1i32).to_le_bytes()).unwrap();
    assert!(error.contains("refers to offset -1 of '.data'"), "{error}");
    // thrice calls twice, with no relocation between.
    let call = imm_of(|b| b[..5] == [0x85, 0x10, 0, 0, 6]);
    let error = patched(call, &5i32.to_le_bytes()).unwrap();
    assert!(error.contains("calls instruction 7 of section '.text', where no"), "{error}");
}

/// Reads whatever it is, and looks at what comes out with everything there is.
fn must_not_panic(bytes: &[u8]) {
    let Ok(object) = parse(bytes) else { return };
    for program in &object.programs {
        let _ = disasm::listing(&program.insns);
        if let Ok(mut interpreter) = Interpreter::new(&program.insns) {
            interpreter.max_steps = 1000;
            let _ = interpreter.run([0; 5], &mut Memory::new(), &mut NoHost);
        }
    }
}

/// Offsets of what the parser reads: no DWARF, whose bytes nobody looks at.
fn interesting_ranges(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    use object::{Object as _, ObjectSection as _};
    let file = object::File::parse(bytes).unwrap();
    let mut ranges: Vec<_> = file
        .sections()
        .filter(|s| s.name().is_ok_and(|name| !name.contains(".debug")))
        .filter_map(|s| s.file_range())
        .map(|(start, size)| {
            usize::try_from(start).unwrap()..usize::try_from(start + size).unwrap()
        })
        .filter(|range| !range.is_empty())
        .collect();
    ranges.push(0..64);
    // Section headers end the file.
    ranges.push(bytes.len() - file.sections().count() * 64..bytes.len());
    ranges
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_mutation_panics(
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..8),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let Some(good) = GOOD.as_ref() else { return Ok(()) };
        static RANGES: LazyLock<Vec<std::ops::Range<usize>>> =
            LazyLock::new(|| interesting_ranges(GOOD.as_ref().unwrap()));
        let mut bytes = good.clone();
        for (section, place, value, how) in &mutations {
            let range = section.get(&RANGES).clone();
            let at = range.start + place.index(range.len());
            bytes[at] = match how {
                0 => *value,
                1 => 0xff,
                2 => bytes[at] ^ (1 << (value % 8)),
                _ => bytes[at].wrapping_add(*value % 3).wrapping_sub(1),
            };
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        must_not_panic(&bytes);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        must_not_panic(&bytes);
        let mut with_header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\xf7\0\x01\0\0\0".to_vec();
        with_header.extend(&bytes);
        must_not_panic(&with_header);
    }
}
