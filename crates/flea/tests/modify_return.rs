//! fmod_ret in this very process, after Linux's own test of it (`prog_tests/modify_return.c`):
//! what runs, in which order, with which values, and what the caller gets.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread;

use flea::asm::{AluOp, Asm, Reg, Size};
use flea::{
    AttachError, Function, Helper, Link, Map, MapIdx, MapKind, MapSpec, Object, ObjectSpec,
    ProgramKind, ProgramSpec, Session,
};

/// One test at a time: each changes the code of this very process.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Linux's `bpf_modify_return_test`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn modify_test(a: i32, b: &mut i32) -> i32 {
    *b += 1;
    black_box(a) + *b
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn modify_double(x: f64) -> f64 {
    black_box(x) / 2.0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn modify_float(x: f32) -> f32 {
    black_box(x) / 2.0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn modify_nothing(n: &mut u64) {
    *n += black_box(1);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn modify_pointer(p: &u64) -> &u64 {
    black_box(p)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn modify_never(n: u64) -> ! {
    loop {
        black_box(n);
    }
}

fn session() -> &'static Session {
    static SESSION: OnceLock<Session> = OnceLock::new();
    SESSION.get_or_init(|| Session::this_process().unwrap())
}

fn function(name: &str) -> Function {
    let mut found = session().find(name).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Words of the array `log`: how many runs there were, then who ran.
const N_RUNS: usize = 16;
/// And the result that program `id` saw, behind them.
const RESULTS: usize = 1 + N_RUNS;
const N_PROGRAMS: usize = 8;

fn array(name: &str, n_words: usize) -> MapSpec {
    MapSpec {
        name: name.into(),
        kind: MapKind::Array,
        key_size_bytes: 4,
        value_size_bytes: u32::try_from(8 * n_words).unwrap(),
        max_entries: 1,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    }
}

/// `log[1 + log[0]++] = id; results[id] = result; return returns[id];`
fn step(id: usize, kind: ProgramKind) -> ProgramSpec {
    let at = |word: usize| i16::try_from(8 * word).unwrap();
    let mut asm = Asm::new();
    asm.mov64_reg(Reg::R6, Reg::R1)
        .map_value(Reg::R7, MapIdx(0), 0)
        .load(Size::DW, Reg::R3, Reg::R7, 0)
        .mov64_reg(Reg::R4, Reg::R3)
        .alu64(AluOp::And, Reg::R4, 15)
        .alu64(AluOp::Lsh, Reg::R4, 3)
        .mov64_reg(Reg::R5, Reg::R7)
        .add64_reg(Reg::R5, Reg::R4)
        .store_imm(Size::DW, Reg::R5, 8, i32::try_from(id).unwrap())
        .add64_imm(Reg::R3, 1)
        .store(Size::DW, Reg::R7, 0, Reg::R3)
        .mov64_reg(Reg::R2, Reg::R7)
        .mov64_reg(Reg::R2, Reg::R10)
        .add64_imm(Reg::R2, -8)
        .call(Helper::GetFuncRet)
        .store(Size::DW, Reg::R7, at(RESULTS + N_PROGRAMS), Reg::R0)
        .load(Size::DW, Reg::R1, Reg::R10, -8)
        .store(Size::DW, Reg::R7, at(RESULTS + id), Reg::R1)
        .map_value(Reg::R1, MapIdx(1), 0)
        .load(Size::DW, Reg::R0, Reg::R1, at(id))
        .exit();
    program(id, kind, &asm)
}

fn program(id: usize, kind: ProgramKind, asm: &Asm) -> ProgramSpec {
    let insns = asm.finish().unwrap();
    let section = kind.name().to_owned();
    ProgramSpec { name: format!("p{id}"), section, kind, insns, ..ProgramSpec::default() }
}

/// Loads one program of each kind, numbered as listed.
fn load(kinds: &[ProgramKind]) -> Object {
    let maps = vec![array("log", RESULTS + N_PROGRAMS + 1), array("returns", N_PROGRAMS)];
    let programs = kinds.iter().enumerate().map(|(id, kind)| step(id, *kind)).collect();
    session().load(ObjectSpec { maps, programs, ..ObjectSpec::default() }).unwrap()
}

fn attach(object: &Object, to: &Function) -> Link {
    let attachments: Vec<_> = object.programs().map(|p| p.on(to, 0)).collect();
    object.attach(&attachments).unwrap()
}

fn words(object: &Object, map: &str) -> Vec<u64> {
    let Some(Map::Array(array)) = object.map(map) else { panic!("no array {map}") };
    let value = array.get(0).unwrap();
    value.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

fn set(object: &Object, map: &str, words: &[u64]) {
    let Some(Map::Array(array)) = object.map(map) else { panic!("no array {map}") };
    array.set(0, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()).unwrap();
}

/// What program `id` returns from now on.
fn returns(object: &Object, id: usize, value: u64) {
    let mut all = words(object, "returns");
    all[id] = value;
    set(object, "returns", &all);
}

/// Who ran since the last time.
fn runs(object: &Object) -> Vec<u64> {
    let mut log = words(object, "log");
    let n = usize::try_from(log[0]).unwrap();
    log[0] = 0;
    set(object, "log", &log);
    log[1..=n].to_vec()
}

fn seen(object: &Object, id: usize) -> i64 {
    words(object, "log")[RESULTS + id].cast_signed()
}

const EINVAL: i32 = 22;

#[test]
fn the_first_value_other_than_zero_is_the_result() {
    use ProgramKind::{Fentry, Fexit, FmodRet, Fsession};
    let _turn = turn();
    // The last one is the newest and runs first within its kind.
    let object = load(&[Fexit, FmodRet, FmodRet, Fsession, Fentry]);
    let link = attach(&object, &function("modify_test"));
    let mut b = 2;
    assert_eq!((modify_test(1, &mut b), b), (4, 3));
    assert_eq!(runs(&object), [4, 3, 2, 1, 3, 0]);
    assert_eq!([0, 1, 2].map(|id| seen(&object, id)), [4, 0, 0]);

    returns(&object, 2, i64::from(-EINVAL).cast_unsigned());
    assert_eq!((modify_test(1, &mut b), b), (-EINVAL, 3), "no side effect");
    assert_eq!(runs(&object), [4, 3, 2, 3, 0], "the older one has no say");
    assert_eq!(seen(&object, 0), i64::from(-EINVAL));
    assert_eq!(seen(&object, 3), i64::from(-EINVAL), "a session at its exit");

    returns(&object, 2, 0);
    returns(&object, 1, 1 << 40 | 77);
    assert_eq!((modify_test(1, &mut b), b), (77, 3), "a caller takes an int's 32 bits");
    assert_eq!(runs(&object), [4, 3, 2, 1, 3, 0]);
    assert_eq!((seen(&object, 1), seen(&object, 0)), (0, 1 << 40 | 77));

    link.detach().unwrap();
    assert_eq!((modify_test(1, &mut b), b), (5, 4));
    assert_eq!(runs(&object), [0; 0]);
}

/// Each object is a controller of its own: the newest is asked first.
#[test]
fn several_controllers() {
    use ProgramKind::{Fentry, Fexit, FmodRet};
    let _turn = turn();
    let to = function("modify_test");
    let first = load(&[FmodRet, Fexit]);
    let first_link = attach(&first, &to);
    let watcher = load(&[Fentry, Fexit]);
    let watcher_link = attach(&watcher, &to);
    let second = load(&[FmodRet, Fexit]);
    let second_link = attach(&second, &to);
    let mut b = 0;
    assert_eq!((modify_test(5, &mut b), b), (6, 1));
    assert_eq!((runs(&first), runs(&second), runs(&watcher)), (vec![0, 1], vec![0, 1], vec![0, 1]));
    returns(&first, 0, 11);
    assert_eq!((modify_test(5, &mut b), b), (11, 1));
    returns(&second, 0, 22);
    assert_eq!((modify_test(5, &mut b), b), (22, 1));
    assert_eq!((runs(&first), runs(&second)), (vec![0, 1, 1], vec![0, 1, 0, 1]));
    assert_eq!([&first, &second, &watcher].map(|object| seen(object, 1)), [22; 3]);
    second_link.detach().unwrap();
    assert_eq!((modify_test(5, &mut b), b), (11, 1), "the older one is asked again");
    first_link.detach().unwrap();
    assert_eq!((modify_test(5, &mut b), b), (7, 2));
    assert_eq!(seen(&watcher, 1), 7);
    assert_eq!(runs(&watcher), [0, 1].repeat(4));
    watcher_link.detach().unwrap();
}

#[test]
fn results_of_every_kind() {
    use ProgramKind::{Fexit, FmodRet};
    let _turn = turn();
    let skipping = |name: &str, value: u64| {
        let object = load(&[Fexit, FmodRet]);
        returns(&object, 1, value);
        let link = attach(&object, &function(name));
        (object, link)
    };
    let (object, _link) = skipping("modify_double", 2.5f64.to_bits());
    assert_eq!(modify_double(80.0).to_bits(), 2.5f64.to_bits());
    assert_eq!(seen(&object, 0).cast_unsigned(), 2.5f64.to_bits());
    returns(&object, 1, 0);
    assert_eq!(modify_double(80.0).to_bits(), 40f64.to_bits());

    let (_object, _link) = skipping("modify_float", u64::from(1.25f32.to_bits()));
    assert_eq!(modify_float(80.0).to_bits(), 1.25f32.to_bits());

    let mut n = 7;
    let (object, _link) = skipping("modify_nothing", 1);
    modify_nothing(&mut n);
    assert_eq!((n, runs(&object)), (7, vec![1, 0]));
    returns(&object, 1, 0);
    modify_nothing(&mut n);
    assert_eq!((n, runs(&object)), (8, vec![1, 0]));

    let (one, other) = (1u64, 2u64);
    let (_object, _link) = skipping("modify_pointer", (&raw const other).addr() as u64);
    assert_eq!(*modify_pointer(&one), 2);
}

/// Arguments, cookie and the rest are those of the other kinds at entry.
#[test]
fn what_a_program_is_told() {
    let _turn = turn();
    let to = function("modify_test");
    let helpers = [Helper::GetFuncIp, Helper::GetAttachCookie, Helper::GetFuncArgCnt];
    let programs = helpers.iter().enumerate().map(|(id, helper)| {
        let mut asm = Asm::new();
        asm.mov64_reg(Reg::R6, Reg::R1)
            .call(*helper)
            .map_value(Reg::R1, MapIdx(0), 0)
            .store(Size::DW, Reg::R1, i16::try_from(8 * id).unwrap(), Reg::R0)
            .load(Size::DW, Reg::R0, Reg::R6, 0)
            .store(Size::DW, Reg::R1, 24, Reg::R0)
            .load(Size::DW, Reg::R0, Reg::R6, 16)
            .store(Size::DW, Reg::R1, 32, Reg::R0)
            .mov64_imm(Reg::R0, 0)
            .exit();
        program(id, ProgramKind::FmodRet, &asm)
    });
    let maps = vec![array("told", 5)];
    let spec = ObjectSpec { maps, programs: programs.collect(), ..ObjectSpec::default() };
    let object = session().load(spec).unwrap();
    set(&object, "told", &[9; 5]);
    let attachments: Vec<_> = object.programs().map(|p| p.on(&to, 1 << 50)).collect();
    let link = object.attach(&attachments).unwrap();
    assert_eq!(modify_test(31, &mut 0), 32);
    let told = words(&object, "told");
    assert_eq!(told[..3], [to.address().0, 1 << 50, 2]);
    assert_eq!((told[3] & 0xffff_ffff, told[4]), (31, 0), "an argument, and no result yet");
    link.detach().unwrap();
}

/// Its caller has nothing behind the call. One that provably returns 0 may watch.
#[test]
fn a_function_that_never_returns_is_not_skipped() {
    let _turn = turn();
    black_box(modify_never as extern "C" fn(u64) -> !);
    let to = function("modify_never");
    let object = load(&[ProgramKind::FmodRet]);
    let error = object.program("p0").unwrap().check(&to).unwrap_err();
    assert!(matches!(error, AttachError::Skip { .. }), "{error}");
    assert!(error.to_string().contains("the function never returns"), "{error}");

    let mut asm = Asm::new();
    asm.mov64_imm(Reg::R0, 0).exit();
    let programs = vec![program(0, ProgramKind::FmodRet, &asm)];
    let zero = session().load(ObjectSpec { programs, ..ObjectSpec::default() }).unwrap();
    zero.program("p0").unwrap().check(&to).unwrap();
}

/// Lets the threads of a test end, also when it fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Threads see the function's own result or the program's, and nothing between.
#[test]
fn busy_threads_get_one_or_the_other() {
    let _turn = turn();
    let to = function("modify_test");
    let stop = AtomicBool::new(false);
    let n_skipped = std::sync::atomic::AtomicU64::new(0);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..3 {
            scope.spawn(|| {
                let mut b = 0;
                while !stop.load(Ordering::Relaxed) {
                    let before = b;
                    match modify_test(3, &mut b) {
                        -5 => {
                            assert_eq!(b, before);
                            n_skipped.fetch_add(1, Ordering::Relaxed);
                        }
                        result => assert_eq!((result, b), (4 + before, before + 1)),
                    }
                    b &= 0xffff;
                }
            });
        }
        for _ in 0..10 {
            let object = load(&[ProgramKind::FmodRet, ProgramKind::Fexit]);
            returns(&object, 0, (-5i64).cast_unsigned());
            let link = attach(&object, &to);
            let before = n_skipped.load(Ordering::Relaxed);
            while n_skipped.load(Ordering::Relaxed) < before + 100 {
                thread::yield_now();
            }
            link.detach().unwrap();
        }
    });
}
