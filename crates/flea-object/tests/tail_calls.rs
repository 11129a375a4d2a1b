//! Program arrays in objects made by every clang on this machine, filled where they are declared,
//! and what the interpreter makes of their programs.
#![allow(clippy::unwrap_used, reason = "a test panics where its input is not as expected")]

mod support;

use flea_object::insn::Insn;
use flea_object::interp::{Host, Interpreter, Memory, Protection};
use flea_object::parse;
use flea_object::spec::{MapIdx, MapKind, Object, ProgramSlot};
use support::{compile, compilers};

const HANDLE: u64 = 0x6000_0000;

/// Element 0 of `.bss`, and the program arrays.
struct ArraysHost<'a> {
    object: &'a Object,
    seen: u64,
}

impl Host for ArraysHost<'_> {
    fn call(&mut self, helper: i32, _: [u64; 5], _: &mut Memory) -> Result<u64, String> {
        Err(format!("helper {helper}"))
    }

    fn map_handle(&self, map: MapIdx) -> Option<u64> {
        Some(HANDLE + u64::from(map.0))
    }

    fn map_value_address(&self, _: MapIdx) -> Option<u64> {
        Some(self.seen)
    }

    fn tail_target(&self, map: u64, index: u32) -> Result<Option<usize>, String> {
        let slots = self.object.program_slots.iter();
        let mut found = slots.filter(|s| HANDLE + u64::from(s.map.0) == map && s.index == index);
        Ok(found.next().map(|slot| slot.program))
    }
}

/// Runs a program on two context words: its result, and what was seen on the way.
fn run(object: &Object, name: &str, words: [u64; 2]) -> (u64, u64) {
    let insns: Vec<&[Insn]> = object.programs.iter().map(|p| p.insns.as_slice()).collect();
    let first = object.programs.iter().position(|p| p.name == name).unwrap();
    let mut memory = Memory::new();
    let context = memory.add(words.map(u64::to_le_bytes).concat(), Protection::ReadOnly);
    let seen = memory.add(vec![0; 8], Protection::ReadWrite);
    let interpreter = Interpreter::new(insns[first]).unwrap().targets(&insns).unwrap();
    let mut host = ArraysHost { object, seen };
    let r0 = interpreter.run([context, 0, 0, 0, 0], &mut memory, &mut host).unwrap();
    (r0, memory.load(seen, 8).unwrap())
}

#[test]
fn arrays_that_are_filled_where_they_are_declared() {
    for compiler in compilers() {
        let object = parse(&compile(compiler, "tail_calls.bpf.c", &["-g"])).unwrap();
        let map = |name| object.maps.iter().position(|m| m.name == name).unwrap();
        let jumps = &object.maps[map("jumps")];
        assert_eq!((jumps.kind, jumps.max_entries), (MapKind::ProgArray, 4));
        assert_eq!((jumps.key_size_bytes, jumps.value_size_bytes), (4, 4));
        assert_eq!(object.maps[map("empty")].kind, MapKind::ProgArray);
        let program = |name| object.programs.iter().position(|p| p.name == name).unwrap();
        let slot = |index, name| ProgramSlot {
            map: MapIdx(u32::try_from(map("jumps")).unwrap()),
            index,
            program: program(name),
        };
        assert_eq!(object.program_slots, [slot(0, "twice"), slot(3, "thrice")], "{compiler}");
        let (twice, thrice) =
            (&object.programs[program("twice")], &object.programs[program("thrice")]);
        assert_eq!((&twice.target, twice.autoload), (&None, true));
        assert!(!thrice.autoload);
    }
}

#[test]
fn what_the_programs_do() {
    for compiler in compilers() {
        let object = parse(&compile(compiler, "tail_calls.bpf.c", &["-g"])).unwrap();
        assert_eq!(run(&object, "known", [21, 0]), (42, 1 + 3 + 2), "{compiler}");
        assert_eq!(run(&object, "unknown", [21, 0]), (42, 2), "{compiler}");
        assert_eq!(run(&object, "unknown", [21, 3]), (42, 5), "{compiler}");
        for index in [1, 2, 4, 1 << 31, 0xffff_ffff] {
            assert_eq!(run(&object, "unknown", [21, index]), (1, 0), "{compiler}");
        }
        // The target comes back to the caller of the function that called it.
        assert_eq!(run(&object, "calls", [21, 0]), (142, 2), "{compiler}");
    }
}
