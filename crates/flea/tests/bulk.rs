//! Ten thousand functions at once, in a process of gcc's making: each counts for itself, all of
//! them or none are attached, and nothing is left behind.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::process::Command;

use flea::asm::{Asm, JmpOp, Reg, Size};
use flea::{
    AttachError, Function, Helper, Link, Map, MapIdx, MapKind, MapSpec, Object, ObjectSpec,
    ProgramKind, ProgramSpec, Session, attached,
};
use flea_fixtures::{Fixture, Running, build};

const N: u32 = 10_000;

/// A process that waits for a line before it calls each of its functions once.
struct Target {
    running: Running,
    session: Session,
    functions: Vec<Function>,
    text: Vec<[u8; 5]>,
    maps: Vec<String>,
}

impl Target {
    /// `None` where gcc is missing, which was printed.
    fn start() -> Option<Self> {
        let program = build(Fixture::Many(N))?;
        let mut running = Running::start(Command::new(program).args(["1", "wait"])).unwrap();
        running.expect_line("ready").unwrap();
        let session = Session::attach(running.pid().cast_signed()).unwrap();
        let functions = session.find("many_*").unwrap();
        assert_eq!(functions.len(), N as usize);
        let mut target = Self { running, session, functions, text: vec![], maps: vec![] };
        target.text = target.text_now();
        target.maps = target.maps_now();
        Some(target)
    }

    fn memory(&self) -> File {
        let path = format!("/proc/{}/mem", self.running.pid());
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    fn text_now(&self) -> Vec<[u8; 5]> {
        let memory = self.memory();
        let read = |function: &Function| {
            let mut bytes = [0; 5];
            memory.read_exact_at(&mut bytes, function.address().0).unwrap();
            bytes
        };
        self.functions.iter().map(read).collect()
    }

    /// What is mapped that is executable, or says that it is ours.
    fn maps_now(&self) -> Vec<String> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.running.pid())).unwrap();
        let may_be_ours = |line: &&str| line.contains(" r-xp ") || line.contains("flea");
        maps.lines().filter(may_be_ours).map(str::to_owned).collect()
    }

    fn run(&mut self) {
        let report = self.running.run_counts().unwrap();
        assert_eq!(report.errors, 0, "results of the target");
    }

    /// As if nobody had been there.
    fn ensure_untouched(&self) {
        assert_eq!(self.text_now(), self.text);
        assert_eq!(self.maps_now(), self.maps);
    }
}

/// Counts by the attach cookie, and notes the function's own address beside the count.
fn counter(kind: ProgramKind) -> ObjectSpec {
    let mut asm = Asm::new();
    let out = asm.new_label();
    asm.mov64_reg(Reg::R6, Reg::R1)
        .call(Helper::GetAttachCookie)
        .store(Size::W, Reg::R10, -4, Reg::R0)
        .map_ref(Reg::R1, MapIdx(0))
        .mov64_reg(Reg::R2, Reg::R10)
        .add64_imm(Reg::R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(JmpOp::Eq, Reg::R0, 0, out)
        .mov64_reg(Reg::R7, Reg::R0)
        .load(Size::DW, Reg::R1, Reg::R7, 0)
        .add64_imm(Reg::R1, 1)
        .store(Size::DW, Reg::R7, 0, Reg::R1)
        .mov64_reg(Reg::R1, Reg::R6)
        .call(Helper::GetFuncIp)
        .store(Size::DW, Reg::R7, 8, Reg::R0)
        .bind(out)
        .mov64_imm(Reg::R0, 0)
        .exit();
    let map = MapSpec {
        name: "calls".into(),
        kind: MapKind::Array,
        key_size_bytes: 4,
        value_size_bytes: 16,
        max_entries: N,
        ..MapSpec::default()
    };
    let program = ProgramSpec {
        name: "count".into(),
        section: "bulk".into(),
        kind,
        insns: asm.finish().unwrap(),
        ..ProgramSpec::default()
    };
    ObjectSpec { maps: vec![map], programs: vec![program], ..ObjectSpec::default() }
}

/// Attaches to `functions`, each with its index as its cookie.
fn attach(object: &Object, functions: &[Function]) -> Result<Link, AttachError> {
    object.program("count").unwrap().attach_multi(functions.iter().zip(0..))
}

/// What function `index` counted, and the address that it was called by.
fn counted(object: &Object, index: u32) -> (u64, u64) {
    let Some(Map::Array(calls)) = object.map("calls") else { panic!("no map of counters") };
    let value = calls.get(index).unwrap();
    let word = |i: usize| u64::from_le_bytes(*value[8 * i..].first_chunk().unwrap());
    (word(0), word(1))
}

/// Also those that another object has a program on, which runs at their exit, and also once half
/// of the former have been taken off by somebody else.
#[test]
fn each_function_counts_for_itself() {
    let Some(mut target) = Target::start() else { return };
    let entries = target.session.load(counter(ProgramKind::Fentry)).unwrap();
    let exits = target.session.load(counter(ProgramKind::Fexit)).unwrap();
    let n_exits = 1000;
    let at_entry = attach(&entries, &target.functions).unwrap();
    let at_exit = attach(&exits, &target.functions[..n_exits]).unwrap();

    let pid = target.session.pid();
    let all = attached::in_process(pid).unwrap();
    assert_eq!(all.len(), N as usize + n_exits);
    let taken: Vec<usize> = (0..N as usize).filter(|i| i % 2 == 1).collect();
    let names: Vec<String> = taken.iter().map(|i| target.functions[*i].name()).collect();
    let names: std::collections::HashSet<&str> = names.iter().map(String::as_str).collect();
    let is_entry = |body: &&attached::AttachedBody| body.programs[0].0 == "fentry";
    let gone = all.iter().filter(is_entry).filter(|body| names.contains(body.function.as_str()));
    let gone: Vec<u32> = gone.map(|body| body.id).collect();
    assert_eq!(gone.len(), taken.len());
    attached::detach(pid, &gone).unwrap();

    target.run();
    for (i, function) in target.functions.iter().enumerate() {
        let address = function.address().0;
        let expected = if i % 2 == 1 { (0, 0) } else { (1, address) };
        assert_eq!(counted(&entries, i as u32), expected, "{function:?} at entry");
        let expected = if i < n_exits { (1, address) } else { (0, 0) };
        assert_eq!(counted(&exits, i as u32), expected, "{function:?} at exit");
    }
    assert_eq!(attached::in_process(pid).unwrap().len(), N as usize / 2 + n_exits);
    at_entry.detach().unwrap();
    at_exit.detach().unwrap();
    assert_eq!(attached::in_process(pid).unwrap(), []);
    drop((entries, exits));
    target.ensure_untouched();
    target.running.finish_counts().unwrap();
}

/// The last of ten thousand is not what it was: none is attached, and no memory is lost.
#[test]
fn all_or_none() {
    let Some(mut target) = Target::start() else { return };
    let object = target.session.load(counter(ProgramKind::Fentry)).unwrap();
    let last = target.functions.last().unwrap().clone();
    // The site is read from the file, so this is somebody else's patch. It does the same.
    last.site().unwrap();
    let theirs = [0x66, 0x66, 0x66, 0x66, 0x90];
    target.memory().write_all_at(&theirs, last.address().0).unwrap();
    let changed = target.text_now();

    let error = attach(&object, &target.functions).map(drop).unwrap_err();
    assert!(error.to_string().contains("nothing was changed"), "{error}");
    assert_eq!(target.text_now(), changed);
    assert_eq!(attached::in_process(target.session.pid()).unwrap(), []);

    target.memory().write_all_at(&target.text[N as usize - 1], last.address().0).unwrap();
    let before = target.maps_now();
    let link = attach(&object, &target.functions).unwrap();
    assert_eq!(target.maps_now(), before, "the memory of the first attempt was used again");
    target.run();
    for i in 0..N {
        assert_eq!(counted(&object, i).0, 1, "function {i}");
    }
    link.detach().unwrap();
    drop(object);
    target.ensure_untouched();
    target.running.finish_counts().unwrap();
}
