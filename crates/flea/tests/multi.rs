//! One program on many functions, each with its own cookie: after Linux's tracing_multi tests
//! (random subsets, rollback, failures of the interface) and bpf_cookie, in this very process.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, MutexGuard, OnceLock};

use flea::asm::{Asm, JmpOp, Reg, Size};
use flea::{
    AttachError, Function, Helper, Map, MapIdx, MapKind, MapSpec, Object, ObjectSpec, ProgramKind,
    ProgramSpec, Session, attached,
};

/// One test at a time: each changes the code of this very process.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn session() -> &'static Session {
    static SESSION: OnceLock<Session> = OnceLock::new();
    SESSION.get_or_init(|| Session::this_process().unwrap())
}

macro_rules! traced {
    ($($name:ident = $n:literal),*) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $name(x: u64) -> u64 {
                black_box(x).wrapping_mul($n + 3)
            }
        )*
        /// All of them: name, number, and the function.
        const TRACED: &[(&str, u64, extern "C" fn(u64) -> u64)] =
            &[$((stringify!($name), $n, $name)),*];
    };
}
traced!(
    many_0 = 0,
    many_1 = 1,
    many_2 = 2,
    many_3 = 3,
    many_4 = 4,
    many_5 = 5,
    many_6 = 6,
    many_7 = 7,
    many_8 = 8,
    many_9 = 9,
    many_10 = 10,
    many_11 = 11,
    many_12 = 12,
    many_13 = 13,
    many_14 = 14,
    many_15 = 15
);

// A function that no jump fits into: the next one begins behind its only instruction.
std::arch::global_asm!(
    ".globl many_too_short",
    ".type many_too_short, @function",
    "many_too_short: ret",
    ".size many_too_short, 1",
    ".globl many_behind",
    ".type many_behind, @function",
    "many_behind: lea 1(%rdi), %rax",
    "ret",
    ".size many_behind, . - many_behind",
    options(att_syntax)
);

unsafe extern "C" {
    fn many_behind(x: u64) -> u64;
}

fn function(name: &str) -> Function {
    let mut found = session().find(name).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

fn functions() -> Vec<Function> {
    TRACED.iter().map(|(name, _, _)| function(name)).collect()
}

fn call_all(times: u64) {
    for _ in 0..times {
        for (name, n, f) in TRACED {
            assert_eq!(f(7), 7 * (n + 3), "{name}");
        }
        // SAFETY: it adds 1.
        assert_eq!(unsafe { many_behind(1) }, 2);
    }
}

const N_COOKIES: u32 = 64;
const KINDS: [ProgramKind; 5] = [
    ProgramKind::Fentry,
    ProgramKind::Fexit,
    ProgramKind::Fsession,
    ProgramKind::Uprobe,
    ProgramKind::Uretprobe,
];

fn array(name: &str) -> MapSpec {
    MapSpec {
        name: name.into(),
        kind: MapKind::Array,
        key_size_bytes: 4,
        value_size_bytes: 8,
        max_entries: N_COOKIES,
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    }
}

/// Looks element `cookie` of map `map` up, r0, with the context in r6; to `out` if there is none.
fn lookup_cookie(asm: &mut Asm, map: u32, out: flea::asm::Label) {
    asm.mov64_reg(Reg::R1, Reg::R6)
        .call(Helper::GetAttachCookie)
        .store(Size::W, Reg::R10, -4, Reg::R0)
        .map_ref(Reg::R1, MapIdx(map))
        .mov64_reg(Reg::R2, Reg::R10)
        .add64_imm(Reg::R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(JmpOp::Eq, Reg::R0, 0, out);
}

/// `calls[cookie] += 1; addresses[cookie] = bpf_get_func_ip(ctx)`
fn program(kind: ProgramKind) -> ProgramSpec {
    let mut asm = Asm::new();
    let out = asm.new_label();
    asm.mov64_reg(Reg::R6, Reg::R1).call(Helper::GetFuncIp).mov64_reg(Reg::R7, Reg::R0);
    lookup_cookie(&mut asm, 0, out);
    asm.mov64_imm(Reg::R1, 1).atomic_add(Size::DW, Reg::R0, 0, Reg::R1);
    lookup_cookie(&mut asm, 1, out);
    asm.store(Size::DW, Reg::R0, 0, Reg::R7).bind(out).mov64_imm(Reg::R0, 0).exit();
    ProgramSpec {
        name: kind.name().into(),
        section: kind.name().into(),
        kind,
        multi: true,
        insns: asm.finish().unwrap(),
        ..ProgramSpec::default()
    }
}

/// As above, for functions with a second argument only: it reads that.
fn reads_second_argument() -> ProgramSpec {
    let mut asm = Asm::new();
    asm.load(Size::DW, Reg::R0, Reg::R1, 8).mov64_imm(Reg::R0, 0).exit();
    let insns = asm.finish().unwrap();
    ProgramSpec { name: "second".into(), insns, ..program(ProgramKind::Fentry) }
}

fn load() -> Object {
    let mut programs: Vec<ProgramSpec> = KINDS.map(program).to_vec();
    programs.push(reads_second_argument());
    let maps = vec![array("calls"), array("addresses")];
    session().load(ObjectSpec { maps, programs, ..ObjectSpec::default() }).unwrap()
}

/// The elements of a map, which are 0 afterwards.
fn take(object: &Object, map: &str) -> Vec<u64> {
    let Some(Map::Array(map)) = object.map(map) else { panic!("no map") };
    (0..N_COOKIES)
        .map(|i| {
            let value = u64::from_le_bytes(map.get(i).unwrap().try_into().unwrap());
            map.set(i, &0u64.to_le_bytes()).unwrap();
            value
        })
        .collect()
}

fn assert_nothing_attached() {
    assert_eq!(attached::in_process(session().pid()).unwrap(), []);
}

/// xorshift64*, so that a failure is the same one again.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = usize::try_from(self.below(i as u64 + 1)).unwrap();
            items.swap(i, j);
        }
    }
}

/// Each round attaches one program to two disjoint random sets of functions by two links, with
/// cookies that are all different, and looks at what every function was seen with.
#[test]
fn random_subsets_with_cookies() {
    let _turn = turn();
    let object = load();
    let functions = functions();
    let mut random = Random(20_190_712);
    for round in 0..25 {
        let kind = KINDS[usize::try_from(random.below(5)).unwrap()];
        let program = object.program(kind.name()).unwrap();
        let mut chosen: Vec<&Function> = functions.iter().collect();
        random.shuffle(&mut chosen);
        chosen.truncate(usize::try_from(2 + random.below(15)).unwrap());
        let mut cookies: Vec<u64> = (0..N_COOKIES.into()).collect();
        random.shuffle(&mut cookies);
        let pairs: Vec<(&Function, u64)> = chosen.into_iter().zip(cookies).collect();
        let (some, others) =
            pairs.split_at(usize::try_from(1 + random.below(pairs.len() as u64 - 1)).unwrap());
        let links = [some, others].map(|part| {
            let link = program.attach_multi(part.iter().copied()).unwrap();
            assert_eq!(link.n_functions(), part.len());
            link
        });
        let times = 1 + random.below(5);
        call_all(times);
        let runs = if kind == ProgramKind::Fsession { 2 * times } else { times };
        let mut expected = (vec![0; 64], vec![0; 64]);
        for (function, cookie) in &pairs {
            let cookie = usize::try_from(*cookie).unwrap();
            expected.0[cookie] = runs;
            expected.1[cookie] = function.address().0;
        }
        let seen = (take(&object, "calls"), take(&object, "addresses"));
        assert_eq!(seen, expected, "round {round}, {kind:?}");
        // One of the links by itself.
        let [first, second] = links;
        first.detach().unwrap();
        call_all(1);
        assert_eq!(take(&object, "calls").iter().filter(|n| **n > 0).count(), others.len());
        second.detach().unwrap();
        call_all(1);
        assert_eq!(take(&object, "calls"), [0; 64]);
        assert_nothing_attached();
        take(&object, "addresses");
    }
    assert_eq!(object.missed(), 0);
}

/// All kinds at once on the same functions, each with its own cookies.
#[test]
fn every_kind_has_its_own_cookies() {
    let _turn = turn();
    let object = load();
    let functions = &functions()[..8];
    let mut attachments = Vec::new();
    for (kind, n) in KINDS.iter().zip(0..) {
        let program = object.program(kind.name()).unwrap();
        attachments.extend(functions.iter().zip(8 * n..).map(|(f, cookie)| program.on(f, cookie)));
    }
    let link = object.attach(&attachments).unwrap();
    assert_eq!(link.n_functions(), functions.len());
    call_all(3);
    let calls = take(&object, "calls");
    for (kind, calls) in KINDS.iter().zip(calls.chunks(8)) {
        let runs = if *kind == ProgramKind::Fsession { 6 } else { 3 };
        assert_eq!(calls, [runs; 8], "{kind:?}");
    }
    let addresses = take(&object, "addresses");
    let expected: Vec<u64> = functions.iter().map(|f| f.address().0).collect();
    assert!(addresses.chunks(8).take(KINDS.len()).all(|c| c == expected));
    link.detach().unwrap();
    assert_nothing_attached();
}

/// What cannot be attached is found before anything is changed, and what was attached before
/// goes on; afterwards the same functions can be attached.
#[test]
fn failures_leave_everything_as_it_was() {
    let _turn = turn();
    let object = load();
    let functions = functions();
    let program = object.program("fentry").unwrap();
    let before = object.program("fexit").unwrap().attach(&functions[3]).unwrap();
    let all = || functions.iter().zip(0..);
    let too_short = function("many_too_short");

    let error = program.attach_multi([]).map(drop).unwrap_err();
    assert!(matches!(error, AttachError::NoFunctions { .. }), "{error}");
    let error = program.attach_multi(all().chain([(&too_short, 1)])).map(drop).unwrap_err();
    assert!(matches!(error, AttachError::Refused { .. }), "{error}");
    assert_eq!(error.reason(), "too short");
    let error = program.attach_multi(all().chain(all())).map(drop).unwrap_err();
    assert!(matches!(error, AttachError::NamedTwice { .. }), "{error}");
    let second = object.program("second").unwrap();
    let error = second.attach_multi(all()).map(drop).unwrap_err();
    assert!(matches!(error, AttachError::Rejected { .. }), "{error}");
    assert!(error.to_string().contains("invalid bpf_context access off=8 size=8"), "{error}");
    let one = program.attach(&functions[5]).unwrap();
    let error = program.attach_multi(all()).map(drop).unwrap_err();
    assert!(matches!(error, AttachError::Twice { .. }), "{error}");

    call_all(1);
    let mut expected = [0; 64];
    // Both have the cookie 0, as what is attached without one.
    expected[0] = 2;
    assert_eq!(take(&object, "calls"), expected);
    one.detach().unwrap();
    let link = program.attach_multi(all()).unwrap();
    call_all(1);
    // The exit program still has cookie 0.
    let calls = take(&object, "calls");
    assert_eq!((calls[0], &calls[1..16], &calls[16..]), (2, &[1; 15][..], &[0; 48][..]));
    link.detach().unwrap();
    before.detach().unwrap();
    assert_nothing_attached();
}

/// A byte of this process that is another one until the guard goes.
struct Changed<'a> {
    memory: &'a File,
    at: u64,
    before: [u8; 1],
}

impl<'a> Changed<'a> {
    fn new(memory: &'a File, at: u64, byte: u8) -> Self {
        let mut before = [0];
        memory.read_exact_at(&mut before, at).unwrap();
        memory.write_all_at(&[byte], at).unwrap();
        Self { memory, at, before }
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        self.memory.write_all_at(&self.before, self.at).unwrap();
    }
}

/// The last function's code is not what its file says: somebody else has been there. All are
/// as before, also those whose turn came earlier.
#[test]
fn a_changed_site_rolls_everything_back() {
    let _turn = turn();
    let object = load();
    let functions = functions();
    let memory = OpenOptions::new().read(true).write(true).open("/proc/self/mem").unwrap();
    let code = |f: &Function| {
        let mut bytes = [0; 16];
        memory.read_exact_at(&mut bytes, f.address().0).unwrap();
        bytes
    };
    let as_before: Vec<_> = functions.iter().map(code).collect();
    let changed = &functions[functions.len() - 1];
    // Nobody calls it meanwhile.
    let hlt = Changed::new(&memory, changed.address().0, 0xf4);
    let mut with_change = as_before.clone();
    with_change.last_mut().unwrap()[0] = 0xf4;

    for kind in KINDS {
        let program = object.program(kind.name()).unwrap();
        let error = program.attach_multi(functions.iter().zip(0..)).map(drop).unwrap_err();
        assert!(error.to_string().contains("nothing was changed"), "{kind:?}: {error}");
        assert_eq!(functions.iter().map(code).collect::<Vec<_>>(), with_change, "{kind:?}");
        assert_nothing_attached();
    }
    drop(hlt);
    call_all(2);
    assert_eq!(take(&object, "calls"), [0; 64]);
    let program = object.program("uretprobe").unwrap();
    let link = program.attach_multi(functions.iter().zip(0..)).unwrap();
    call_all(2);
    assert_eq!(take(&object, "calls")[..16], [2; 16]);
    link.detach().unwrap();
    assert_eq!(functions.iter().map(code).collect::<Vec<_>>(), as_before);
}
