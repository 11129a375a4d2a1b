//! What is stored is loaded, and nothing else is believed.

use std::ops::Range;

use proptest::prelude::*;

use flea_process::Memory;

use super::*;
use flea_image::{Saved, When};

/// A registry's place in this very process, zeros at first.
struct Place {
    memory: Memory,
    bytes: Vec<u8>,
    storage: Storage,
}

impl Place {
    fn new() -> Self {
        let size_bytes = usize::try_from(MAPPING_BYTES).unwrap();
        // Untouched pages of it take no memory.
        let bytes = vec![0; size_bytes];
        let storage = Storage::at(RemoteAddr(bytes.as_ptr().addr() as u64));
        let pid = std::process::id().cast_signed();
        Self { memory: Memory::open(pid).unwrap(), bytes, storage }
    }

    fn load(&self) -> Result<Registry, RegistryError> {
        self.storage.load(&self.memory)
    }

    fn store(&self, registry: &Registry) {
        self.storage.store(&self.memory, registry).unwrap();
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        let at = self.storage.base().offset(offset.cast_signed());
        self.memory.write(at, bytes).unwrap();
    }

    /// The text of the current half.
    fn text(&self) -> Range<u64> {
        let [_, which, len, _] = self.storage.header(&self.memory).unwrap();
        let start = HEADER_BYTES + (which & 1) * HALF_BYTES;
        assert!(start + len <= self.bytes.len() as u64);
        start..start + len
    }

    /// Makes `text` the current state, with a sum that fits.
    fn scribble(&self, text: &[u8]) {
        self.write(HEADER_BYTES, text);
        let header = [MAGIC, 0, text.len() as u64, checksum(text)];
        self.write(0, &header.map(u64::to_le_bytes).concat());
    }
}

fn sample() -> Registry {
    let code = RemoteAddr(0x10_0000);
    let mut arena = CodeArena::new(code, 0x1000);
    arena.next = code.offset(0x200);
    arena.free = vec![(code.offset(0x40), 0x10)];
    let owner = Controller { pid: 7, started: 9 };
    let body = BodyState {
        id: 3,
        owner,
        since: 1,
        arena: RemoteAddr(0x50_0000),
        programs: vec![("fexit".into(), "p".into())],
        writes_target: true,
        changes: 0x1_0021,
        entry: None,
        session: None,
        modify: None,
        exit: Some(Placed { at: code.offset(0x80), len: 0x30 }),
        frame_offset: flea_image::BODY_FRAMES_OFFSET,
        frame_words: 1,
        reads: 1,
        saves: vec![Save { when: When::Exit, what: Saved::Gpr(3), word: 0 }],
    };
    let replacement = ReplacementState {
        id: 2,
        owner,
        since: 1,
        object: RemoteAddr(0x60_0000),
        name: "f".into(),
        entry: RemoteAddr(0x60_0123),
    };
    Registry {
        next_id: 4,
        objects: vec![LoadedObject {
            base: RemoteAddr(0x60_0000),
            size_bytes: 0x4000,
            pinned: false,
        }],
        code: vec![arena],
        runtimes: vec![Runtime { code: Placed { at: code, len: 0x40 }, sum: 7 }],
        data: vec![DataArena {
            mapping: RemoteAddr(0x40_0000),
            size_bytes: 0x20_0000,
            owner,
            released: false,
        }],
        functions: vec![
            FunctionState {
                module: "/bin/true".into(),
                name: "f\u{fc}r \"<T>\"".into(),
                address: RemoteAddr(0x20_0000),
                file: None,
                site: RemoteAddr(0x20_0004),
                door: None,
                kind: SiteKind::Relocated,
                original: vec![0x55, 0x48, 0x89, 0xe5, 0x90, 0x90],
                insn_lens: vec![1, 3, 1, 1],
                patched: [0xe9, 1, 2, 3, 4],
                previous: [0x55, 0x48, 0x89, 0xe5, 0x90],
                skeleton: Some(Placed { at: code.offset(0x100), len: 0x60 }),
                skip: None,
                stack: StackArgs { may_be_fewer: true, ..StackArgs::NONE },
                calls_original: true,
                finds_frames: None,
                returns_to: Some(code.offset(0x120)),
                calls: vec![],
                switches: vec![Switch {
                    body: 3,
                    arena: RemoteAddr(0x50_0000),
                    calls: None,
                    at: code.offset(0x120),
                    expected: [0x48, 0x89, 0x6c, 0x24, 0xf8],
                    new: [0xe9, 1, 0, 0, 0],
                    trap_to: code.offset(0x126),
                }],
                bodies: vec![body],
                replacements: vec![replacement],
            }
            .into(),
        ],
        retired: vec![Retired::plain(Placed { at: code.offset(0x180), len: 0x20 }, vec![])],
    }
}

#[test]
fn what_is_stored_is_loaded() {
    let place = Place::new();
    assert_eq!(place.load().unwrap(), Registry::default(), "nothing was ever written");
    for next_id in 4..8 {
        let registry = Registry { next_id, ..sample() };
        place.store(&registry);
        assert_eq!(place.load().unwrap(), registry);
    }
}

/// A writer that dies before the header has changed nothing.
#[test]
fn the_other_half_does_not_matter() {
    let place = Place::new();
    place.store(&sample());
    let current = place.text().start;
    let other = if current == HEADER_BYTES { HEADER_BYTES + HALF_BYTES } else { HEADER_BYTES };
    place.write(other, b"half of a new sta");
    assert_eq!(place.load().unwrap(), sample());
}

#[test]
fn a_damaged_header_is_noticed() {
    for (offset, bytes) in [(0, 0u64), (0, 1), (16, HALF_BYTES + 1), (16, u64::MAX), (24, 5)] {
        let place = Place::new();
        place.store(&sample());
        place.write(offset, &bytes.to_le_bytes());
        let error = place.load().unwrap_err();
        assert!(matches!(error, RegistryError::Damaged { .. }), "{offset}: {error}");
        assert!(error.to_string().contains("nothing was changed"), "{error}");
    }
}

#[test]
fn one_changed_byte_is_noticed() {
    let place = Place::new();
    place.store(&sample());
    let text = place.text();
    for offset in text.clone().step_by(7) {
        let at = place.storage.base().offset(offset.cast_signed());
        let old = place.memory.read_vec(at, 1).unwrap()[0];
        place.write(offset, &[old ^ 0x20]);
        assert!(place.load().is_err(), "byte {offset}");
        place.write(offset, &[old]);
    }
    assert_eq!(place.load().unwrap(), sample());
}

/// One lie at a time, in a text whose sum is right.
#[test]
fn what_others_rely_on_is_checked() {
    type Lie = fn(&mut Registry);
    let lies: [(&str, Lie); 27] = [
        ("switch", |r| r.functions[0].switches[0].at = RemoteAddr(8)),
        ("rows", |r| r.code[0].rows = Some(Placed { at: RemoteAddr(8), len: 8 })),
        ("no runtime to read the stack with", |r| r.runtimes.clear()),
        ("a door in the patch", |r| r.functions[0].door = Some(RemoteAddr(0x20_0008))),
        ("a door outside", |r| r.functions[0].door = Some(RemoteAddr(0x20_0009))),
        ("few bytes", |r| r.functions[0].original.truncate(4)),
        ("no instructions", |r| r.functions[0].insn_lens.clear()),
        ("an empty instruction", |r| r.functions[0].insn_lens.extend([0])),
        ("long instructions", |r| r.functions[0].insn_lens = vec![200, 200]),
        ("a site at the end", |r| r.functions[0].site = RemoteAddr(u64::MAX - 2)),
        ("frame offset", |r| r.functions[0].bodies[0].frame_offset = u32::MAX - 7),
        ("frame words", |r| r.functions[0].bodies[0].frame_words = u32::MAX / 8),
        ("a save outside the frame", |r| r.functions[0].bodies[0].saves[0].word = 1),
        ("a save of no register", |r| r.functions[0].bodies[0].saves[0].what = Saved::Gpr(4)),
        ("result words for a frame", |r| r.functions[0].bodies[0].frame_offset = 8),
        ("body length", |r| r.functions[0].bodies[0].exit.as_mut().unwrap().len = u32::MAX),
        ("skeleton", |r| r.functions[0].skeleton.as_mut().unwrap().at = RemoteAddr(8)),
        ("retired", |r| r.retired[0].code.at = RemoteAddr(u64::MAX)),
        ("arena size", |r| r.code[0].size_bytes = u64::MAX),
        ("next", |r| r.code[0].next = RemoteAddr(0)),
        ("free", |r| r.code[0].free.push((RemoteAddr(u64::MAX), u64::MAX))),
        ("data", |r| r.data[0].mapping = RemoteAddr(u64::MAX - 1)),
        ("ids", |r| r.next_id = u32::MAX),
        ("object size", |r| r.objects[0].size_bytes = u64::MAX),
        ("object base", |r| r.objects[0].base = RemoteAddr(0x60_0001)),
        ("whose object", |r| r.functions[0].replacements[0].object = RemoteAddr(0x70_0000)),
        ("replacement", |r| r.functions[0].replacements[0].entry = RemoteAddr(0x60_4000)),
    ];
    let place = Place::new();
    for (what, lie) in lies {
        let mut registry = sample();
        lie(&mut registry);
        place.scribble(&serde_json::to_vec(&registry).unwrap());
        assert!(matches!(place.load(), Err(RegistryError::Damaged { .. })), "{what}");
    }
    let mut many = sample();
    many.retired = vec![many.retired[0].clone(); 1000];
    place.scribble(&serde_json::to_vec(&many).unwrap());
    assert!(place.load().is_err(), "a thousand images in the same place");
    place.scribble(&serde_json::to_vec(&sample()).unwrap());
    assert_eq!(place.load().unwrap(), sample());
}

#[test]
fn bytes_are_hexadecimal_text() {
    let text = serde_json::to_string(&sample()).unwrap();
    assert!(text.contains("\"original\":\"554889e59090\""), "{text}");
    for (good, bad) in [("554889e59090", "5548xx"), ("554889e59090", "554"), ("e901020304", "")] {
        let bad = text.replace(&format!("\"{good}\""), &format!("\"{bad}\""));
        let parsed: Result<Registry, _> = serde_json::from_str(&bad);
        assert!(parsed.is_err() || check::check(&parsed.unwrap()).is_err(), "{bad}");
    }
}

fn damage() -> impl Strategy<Value = Vec<u8>> {
    let text = serde_json::to_vec(&sample()).unwrap();
    let n_bytes = text.len();
    let edits = prop::collection::vec((0..n_bytes, any::<u8>()), 0..8);
    // Digits for digits keep it parseable, with other numbers in it.
    let digits = prop::collection::vec((0..n_bytes, b'0'..=b'9'), 0..40);
    (edits, digits, 0..n_bytes * 40).prop_map(move |(edits, digits, len)| {
        let mut text = text.clone();
        for (at, byte) in edits {
            text[at] = byte;
        }
        for (at, digit) in digits {
            if text[at].is_ascii_digit() {
                text[at] = digit;
            }
        }
        text.truncate(len.max(1));
        text
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever stands there, loading ends with a registry or an error, and what a change
    /// of everything in it does is an error or a plan.
    #[test]
    fn scribbled_registries_harm_nobody(text in damage()) {
        let Ok(mut registry) = serde_json::from_slice::<Registry>(&text) else { return Ok(()) };
        if check::check(&registry).is_err() {
            return Ok(());
        }
        for retired in std::mem::take(&mut registry.retired) {
            registry.unplace(retired.code);
        }
        let _ = registry.place(RemoteAddr(0x20_0000), 100);
        let mut change = crate::change::Change::new(registry, std::collections::HashMap::new());
        let _ = change.remove(|_| true);
    }

    #[test]
    fn garbage_headers_harm_nobody(words in any::<[u64; 4]>(), magic in any::<bool>()) {
        let place = Place::new();
        let mut words = words;
        if magic {
            words[0] = MAGIC;
            words[2] %= 2 * HALF_BYTES;
        }
        place.write(0, &words.map(u64::to_le_bytes).concat());
        prop_assert!(place.load().is_err());
    }
}

/// Bodies of another build call functions at other places.
#[test]
fn a_runtime_is_known_by_its_bytes() {
    let mut registry = sample();
    assert_eq!(registry.own_runtime(), None, "its sum is another build's");
    let at = RemoteAddr(0x10_0040);
    registry.runtimes.push(Runtime { code: Placed { at, len: 16 }, sum: runtime_sum() });
    assert_eq!(registry.own_runtime(), Some(at));
}
