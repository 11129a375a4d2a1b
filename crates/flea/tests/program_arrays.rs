//! Program arrays that change while their programs are attached, in this very process.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::hint::black_box;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread;

use flea::asm::{Asm, Reg::*, Size};
use flea::{
    Function, Helper, LoadError, Map, MapIdx, MapKind, MapSpec, Object, ObjectSpec, Program,
    ProgramArray, ProgramArrayError, ProgramKind, ProgramSlot, ProgramSpec, Session,
};

/// One test at a time: each changes the code of this very process.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn arrays_one(x: u64) -> u64 {
    black_box(x) + 1
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn arrays_two(x: u64, y: u64) -> u64 {
    black_box(x) + y
}

/// Says that it runs, and waits for a word.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn arrays_wait(running: &Sender<()>, go: &Receiver<()>) {
    running.send(()).unwrap();
    go.recv().unwrap();
}

fn session() -> &'static Session {
    static SESSION: OnceLock<Session> = OnceLock::new();
    SESSION.get_or_init(|| Session::this_process().unwrap())
}

fn function(name: &str) -> Function {
    session().find(name).unwrap().remove(0)
}

const LOG: MapIdx = MapIdx(0);
const JUMPS: MapIdx = MapIdx(1);
const OTHER_JUMPS: MapIdx = MapIdx(2);
const N_WORDS: usize = 8;

fn maps() -> Vec<MapSpec> {
    let map = |name: &str, kind, value_size_bytes, max_entries| MapSpec {
        name: name.into(),
        kind,
        key_size_bytes: 4,
        value_size_bytes,
        max_entries,
        ..MapSpec::default()
    };
    let log_bytes = u32::try_from(8 * N_WORDS).unwrap();
    vec![
        map("log", MapKind::Array, log_bytes, 1),
        map("jumps", MapKind::ProgArray, 4, 4),
        map("other_jumps", MapKind::ProgArray, 4, 4),
    ]
}

fn program(name: &str, kind: ProgramKind, asm: &Asm) -> ProgramSpec {
    let insns = asm.finish().unwrap();
    ProgramSpec { name: name.into(), kind, insns, ..ProgramSpec::default() }
}

/// `log[word] += 1`, not in one piece.
fn count(asm: &mut Asm, word: i16) {
    asm.map_value(R7, LOG, 0).load(Size::DW, R8, R7, 8 * word);
    asm.call(Helper::GetPrandomU32).add64_imm(R8, 1).store(Size::DW, R7, 8 * word, R8);
}

/// Calls what stands at `index`; counts in word 0 where nothing does.
fn caller(name: &str, kind: ProgramKind, map: MapIdx, index: i32) -> ProgramSpec {
    let mut asm = Asm::new();
    asm.map_ref(R2, map).mov64_imm(R3, index).call(Helper::TailCall);
    count(&mut asm, 0);
    asm.mov64_imm(R0, 0).exit();
    program(name, kind, &asm)
}

/// Counts in `word`, and returns it.
fn target(name: &str, kind: ProgramKind, word: i16) -> ProgramSpec {
    let mut asm = Asm::new();
    count(&mut asm, word);
    asm.mov64_imm(R0, word.into()).exit();
    program(name, kind, &asm)
}

/// `first` calls what stands at 0; `a` and `b` count in words 1 and 2.
fn spec(kind: ProgramKind) -> ObjectSpec {
    let programs =
        vec![caller("first", kind, JUMPS, 0), target("a", kind, 1), target("b", kind, 2)];
    ObjectSpec { maps: maps(), programs, ..ObjectSpec::default() }
}

fn load(spec: ObjectSpec) -> Object {
    session().load(spec).unwrap()
}

fn named(object: &Object, name: &str) -> Program {
    object.program(name).unwrap()
}

fn jumps(object: &Object) -> ProgramArray {
    object.program_array("jumps").unwrap()
}

/// What was counted since the last time.
fn counted(object: &Object) -> [u64; 4] {
    let Some(Map::Array(log)) = object.map("log") else { panic!("no log") };
    let words = log.get(0).unwrap();
    log.set(0, &vec![0; words.len()]).unwrap();
    std::array::from_fn(|i| u64::from_le_bytes(words[8 * i..][..8].try_into().unwrap()))
}

#[test]
fn what_is_attached_follows_the_array() {
    let _turn = turn();
    let kinds = [
        ProgramKind::Fentry,
        ProgramKind::Fexit,
        ProgramKind::Fsession,
        ProgramKind::Uprobe,
        ProgramKind::Uretprobe,
    ];
    for kind in kinds {
        let object = load(spec(kind));
        let sides = if kind == ProgramKind::Fsession { 2 } else { 1 };
        let calls = |n: u64| {
            (0..n).for_each(|i| assert_eq!(arrays_one(i), i + 1));
            counted(&object).map(|count| count / sides)
        };
        let link = named(&object, "first").attach(&function("arrays_one")).unwrap();
        let before = flea::attached::in_process(session().pid()).unwrap();
        assert_eq!(calls(3), [3, 0, 0, 0], "{kind:?}");
        let array = jumps(&object);
        array.set(0, &named(&object, "a")).unwrap();
        assert_eq!(calls(4), [0, 4, 0, 0], "{kind:?}");
        assert_eq!(array.get(0).unwrap().name(), "a");
        array.set(0, &named(&object, "b")).unwrap();
        assert_eq!(calls(5), [0, 0, 5, 0], "{kind:?}");
        array.clear(0).unwrap();
        assert_eq!(calls(6), [6, 0, 0, 0], "{kind:?}");
        assert!(array.get(0).is_none());
        // The same body, as anybody sees it.
        assert_eq!(flea::attached::in_process(session().pid()).unwrap(), before, "{kind:?}");
        link.detach().unwrap();
        array.set(0, &named(&object, "a")).unwrap();
        assert_eq!((calls(2), object.missed()), ([0; 4], 0), "{kind:?}");
    }
}

/// What is attached finds what stands in the array by then, at its own index.
#[test]
fn an_array_that_is_filled_before() {
    let _turn = turn();
    let object = load(spec(ProgramKind::Fentry));
    jumps(&object).set(0, &named(&object, "a")).unwrap();
    jumps(&object).set(1, &named(&object, "b")).unwrap();
    let link = named(&object, "first").attach(&function("arrays_one")).unwrap();
    assert_eq!((arrays_one(1), counted(&object)), (2, [0, 1, 0, 0]));
    jumps(&object).clear(1).unwrap();
    assert_eq!((arrays_one(1), counted(&object)), (2, [0, 1, 0, 0]));
    link.detach().unwrap();
}

#[test]
fn a_target_says_what_a_function_returns() {
    let _turn = turn();
    let object = load(spec(ProgramKind::FmodRet));
    let link = named(&object, "first").attach(&function("arrays_one")).unwrap();
    assert_eq!(arrays_one(10), 11);
    jumps(&object).set(0, &named(&object, "b")).unwrap();
    assert_eq!(arrays_one(10), 2);
    jumps(&object).clear(0).unwrap();
    assert_eq!(arrays_one(10), 11);
    drop(link);
    assert_eq!(counted(&object), [2, 0, 1, 0]);
}

/// Two functions, other controllers' programs around, arrays that lead to arrays.
#[test]
fn only_what_may_come_there_is_made_anew() {
    let _turn = turn();
    let kind = ProgramKind::Fentry;
    let mut of_two = spec(kind);
    // `other` never comes to `jumps`; `far` does by way of `near`.
    of_two.programs.push(caller("near", kind, JUMPS, 3));
    of_two.programs.push(caller("far", kind, OTHER_JUMPS, 1));
    of_two.programs.push(target("other", kind, 3));
    of_two.program_slots = vec![ProgramSlot { map: OTHER_JUMPS, index: 1, program: 3 }];
    let object = load(of_two);
    let (one, two) = (function("arrays_one"), function("arrays_two"));
    let older = load(spec(ProgramKind::Fexit));
    let older_link = named(&older, "a").attach(&one).unwrap();
    let attachments = [
        named(&object, "first").on(&one, 0),
        named(&object, "far").on(&two, 0),
        named(&object, "other").on(&two, 0),
    ];
    let link = object.attach(&attachments).unwrap();
    let newer = load(spec(ProgramKind::Fsession));
    let newer_link = named(&newer, "a").attach(&one).unwrap();
    let calls = || {
        assert_eq!((arrays_one(1), arrays_two(1, 2)), (2, 3));
        assert_eq!((counted(&older)[1], counted(&newer)[1]), (1, 2));
        counted(&object)
    };
    assert_eq!(calls(), [2, 0, 0, 1]);
    jumps(&object).set(3, &named(&object, "a")).unwrap();
    assert_eq!(calls(), [1, 1, 0, 1]);
    jumps(&object).set(0, &named(&object, "b")).unwrap();
    assert_eq!(calls(), [0, 1, 1, 1]);
    object.program_array("other_jumps").unwrap().clear(1).unwrap();
    assert_eq!(calls(), [1, 0, 1, 1]);
    drop((older_link, newer_link));
    link.detach().unwrap();
}

/// A call that is inside the function ends with the exit program that it began with.
#[test]
fn calls_that_are_under_way() {
    let _turn = turn();
    let object = load(spec(ProgramKind::Fexit));
    jumps(&object).set(0, &named(&object, "a")).unwrap();
    let link = named(&object, "first").attach(&function("arrays_wait")).unwrap();
    let enter = || {
        let ((running, runs), (go, goes)) = (channel(), channel());
        let thread = thread::spawn(move || arrays_wait(&running, &goes));
        runs.recv().unwrap();
        move || {
            go.send(()).unwrap();
            thread.join().unwrap();
        }
    };
    let first = enter();
    jumps(&object).set(0, &named(&object, "b")).unwrap();
    let second = enter();
    jumps(&object).clear(0).unwrap();
    let third = enter();
    first();
    assert_eq!(counted(&object), [0, 1, 0, 0]);
    third();
    assert_eq!(counted(&object), [1, 0, 0, 0]);
    // Taken off meanwhile: none of its exit programs runs, of whatever time.
    link.detach().unwrap();
    second();
    assert_eq!(counted(&object), [0; 4]);
}

/// No call is lost and none runs two programs, while the array changes all the time.
#[test]
fn threads_while_the_array_changes() {
    let _turn = turn();
    let object = load(spec_of_atomics());
    let link = named(&object, "first").attach(&function("arrays_one")).unwrap();
    let (stop, n_calls) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut n = 0;
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(arrays_one(n), n + 1);
                    n += 1;
                }
                n_calls.fetch_add(n, Ordering::Relaxed);
            });
        }
        for round in 0..6 {
            match round % 3 {
                0 => jumps(&object).set(0, &named(&object, "a")).unwrap(),
                1 => jumps(&object).set(0, &named(&object, "b")).unwrap(),
                _ => jumps(&object).clear(0).unwrap(),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    link.detach().unwrap();
    let [missed, a, b, _] = counted(&object);
    assert_eq!(missed + a + b, n_calls.into_inner());
    assert_eq!(object.missed(), 0);
}

/// As [`spec`], with counters that threads can share.
fn spec_of_atomics() -> ObjectSpec {
    let counts = |asm: &mut Asm, word: i16| {
        asm.map_value(R1, LOG, 0).mov64_imm(R2, 1).atomic_add(Size::DW, R1, 8 * word, R2);
        asm.mov64_imm(R0, 0).exit();
    };
    let kind = ProgramKind::Fentry;
    let mut first = Asm::new();
    first.map_ref(R2, JUMPS).mov64_imm(R3, 0).call(Helper::TailCall);
    counts(&mut first, 0);
    let (mut a, mut b) = (Asm::new(), Asm::new());
    counts(&mut a, 1);
    counts(&mut b, 2);
    let programs =
        vec![program("first", kind, &first), program("a", kind, &a), program("b", kind, &b)];
    ObjectSpec { maps: maps(), programs, ..ObjectSpec::default() }
}

/// A target that reads what only the skeleton's frame can show: the probe moves there.
#[test]
fn a_target_that_needs_a_frame() {
    let _turn = turn();
    let kind = ProgramKind::Uprobe;
    let mut with_frame = spec(kind);
    let mut asm = Asm::new();
    // rbx and r12 of struct pt_regs, as they are: no parameter of a body.
    asm.load(Size::DW, R3, R1, 40).load(Size::DW, R4, R1, 24).map_value(R2, LOG, 0);
    asm.store_imm(Size::DW, R2, 24, 1).mov64_imm(R0, 0).exit();
    with_frame.programs.push(program("saved", kind, &asm));
    let object = load(with_frame);
    let link = named(&object, "first").attach(&function("arrays_two")).unwrap();
    jumps(&object).set(0, &named(&object, "saved")).unwrap();
    assert_eq!(arrays_two(20, 22), 42);
    assert_eq!(counted(&object), [0, 0, 0, 1]);
    jumps(&object).set(0, &named(&object, "a")).unwrap();
    assert_eq!(arrays_two(20, 22), 42);
    assert_eq!(counted(&object), [0, 1, 0, 0]);
    link.detach().unwrap();
}

#[test]
fn changes_that_are_refused() {
    let _turn = turn();
    let kind = ProgramKind::Fentry;
    let mut mixed = spec(kind);
    let mut asm = Asm::new();
    asm.load(Size::DW, R0, R1, 8).exit();
    mixed.programs.push(program("second_argument", kind, &asm));
    mixed.programs.push(target("at_exit", ProgramKind::Fexit, 3));
    let object = load(mixed.clone());
    let array = jumps(&object);
    array.set(0, &named(&object, "a")).unwrap();
    let link = named(&object, "first").attach(&function("arrays_one")).unwrap();

    let error = array.set(0, &named(&object, "at_exit")).unwrap_err();
    assert!(matches!(error, ProgramArrayError::Kind { .. }), "{error}");
    let said = error.to_string();
    assert!(
        said.contains("at_exit an fexit program") && said.contains("first is an fentry"),
        "{said}"
    );
    let other = load(spec(kind));
    let error = array.set(0, &named(&other, "a")).unwrap_err();
    assert!(matches!(error, ProgramArrayError::OtherObject { .. }), "{error}");
    let error = array.set(4, &named(&object, "a")).unwrap_err();
    assert_eq!(error.to_string(), "program array jumps has 4 elements: there is no index 4");
    // The function has one argument.
    let error = array.set(0, &named(&object, "second_argument")).unwrap_err();
    assert!(error.to_string().contains("invalid bpf_context access off=8"), "{error}");
    assert!(object.map("jumps").is_none(), "it has no elements to be read");

    assert_eq!((arrays_one(1), counted(&object)), (2, [0, 1, 0, 0]));
    assert_eq!(array.get(0).unwrap().name(), "a");
    link.detach().unwrap();
    // Nor does it get there with the array filled before.
    array.set(0, &named(&object, "second_argument")).unwrap();
    let error = named(&object, "first").attach(&function("arrays_one")).err().unwrap();
    assert!(error.to_string().contains("program second_argument on"), "{error}");

    let slot = ProgramSlot { map: JUMPS, index: 2, program: 4 };
    let error = session().load(ObjectSpec { program_slots: vec![slot], ..mixed }).err().unwrap();
    assert!(matches!(error, LoadError::ProgramArray(ProgramArrayError::Kind { .. })), "{error}");
}

/// Of a process that has ended there is nothing to make anew.
#[test]
fn a_process_that_has_ended() {
    let _turn = turn();
    let mut command = Command::new("cat");
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let session = Session::spawn(command).unwrap();
    let object = session.load(spec(ProgramKind::Fentry)).unwrap();
    let function = session.find("libc.so.6:read").unwrap().remove(0);
    let link = named(&object, "first").attach(&function).unwrap();
    session.resume().unwrap();
    jumps(&object).set(0, &named(&object, "a")).unwrap();
    // Ends as its input does.
    drop(session.take_pipes());
    session.wait().unwrap();
    jumps(&object).set(0, &named(&object, "b")).unwrap();
    link.detach().unwrap();
}
