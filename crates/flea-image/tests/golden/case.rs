//! A case as its file's upper part states it.

use std::convert::Infallible;
use std::sync::Arc;

use flea_image::{SiteKind, changeable};
use flea_object::spec::{MapIdx, MapKind, MapSpec, Program, ProgramKind};
use flea_object::types::TypeId;
use flea_symbols::signature::{
    ArgWord, Param, RetWord, Return, Signature, SignatureSource, StackWords, Type,
};
use flea_verifier::{Context, Permissions, Target, Verified, Verifier, targets};
use iced_x86::code_asm::*;

use crate::asm;
use crate::graph::Graph;
use crate::support::rig::{self, assemble};

/// One file's upper part.
pub struct Case {
    pub signature: Signature,
    pub site: Site,
    pub maps: Vec<MapSpec>,
    pub stack_words: u32,
    pub stack_align_bytes: u32,
    pub is_unwinder: bool,
    pub allows_write: bool,
    pub controllers: Vec<Controller>,
    /// Types of the target, and which of them the context's words have.
    graph: Graph,
    slots: Vec<Option<TypeId>>,
    /// The registers of each run that are named.
    pub runs: Vec<Vec<(String, u64)>>,
}

/// What one controller attaches.
pub struct Controller {
    pub placing: Placing,
    pub programs: Vec<(ProgramKind, Verified)>,
}

/// How a controller's bodies are reached.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Placing {
    Inline,
    Called,
    /// The site calls the only entry body, and there is no skeleton.
    Direct,
}

/// The traced function.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Site {
    /// Five bytes of nop, then what [`rig::function`] does.
    Nop,
    /// What [`rig::function`] does.
    Plain,
    /// Begins with a load by rip.
    Rip,
    /// Begins with a branch.
    Branch,
}

impl Site {
    pub fn kind(self) -> SiteKind {
        if self == Self::Nop { SiteKind::Nops } else { SiteKind::Relocated }
    }

    /// The function at `at`, and how many of its bytes are replaced.
    pub fn function(self, at: u64) -> (Vec<u8>, usize) {
        match self {
            Self::Nop | Self::Plain => rig::function(at, self.kind()),
            Self::Rip => (assemble(at, rip_function), 7),
            Self::Branch => (assemble(at, branch_function), 8),
        }
    }
}

/// `rax = rdi + 0x1000`, the number from memory beside the code.
fn rip_function(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut number = a.create_label();
    a.mov(rax, qword_ptr(number))?;
    a.add(rax, rdi)?;
    a.ret()?;
    a.set_label(&mut number)?;
    a.dq(&[0x1000])
}

/// `rax = edi == 0 ? 42 : rdi + 1`
fn branch_function(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut zero = a.create_label();
    a.test(edi, edi)?;
    a.je(zero)?;
    a.lea(rax, ptr(rdi + 1))?;
    a.ret()?;
    a.set_label(&mut zero)?;
    a.mov(eax, 42)?;
    a.ret()
}

impl Case {
    /// Reads the upper part of a file; panics with the line on a mistake.
    pub fn parse(text: &str) -> Self {
        let mut case = Self {
            signature: signature("void f()"),
            site: Site::Nop,
            maps: vec![],
            stack_words: 0,
            stack_align_bytes: 16,
            is_unwinder: false,
            allows_write: false,
            controllers: vec![],
            runs: vec![],
            graph: Graph::parse(text.lines().filter(|l| l.starts_with("struct "))),
            slots: vec![],
        };
        let mut programs: Vec<(usize, ProgramKind, Vec<&str>)> = vec![];
        let mut held: Vec<((MapIdx, u32), Vec<&str>)> = vec![];
        let mut is_held = false;
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "function:" => case.signature = signature(rest),
                "site:" => case.site = site(rest),
                "map" => case.maps.push(map(rest)),
                "flags:" => rest.split(' ').for_each(|flag| case.flag(flag)),
                "controller" => case.controllers.push(controller(rest)),
                "program" => {
                    is_held = false;
                    programs.push((case.controllers.len() - 1, kind(rest), vec![]));
                }
                "held" => {
                    is_held = true;
                    held.push((slot(rest), vec![]));
                }
                "run:" => case.runs.push(run(rest)),
                "struct" => {}
                "slots" => case.slots = case.graph.slots(rest),
                _ if is_held => held.last_mut().unwrap().1.push(line),
                _ => programs.last_mut().unwrap_or_else(|| panic!("what is {line}")).2.push(line),
            }
        }
        let slots = held.iter().zip(1..).map(|((slot, _), program)| (*slot, program)).collect();
        for (controller, kind, lines) in programs {
            let prove = |i: usize| {
                let lines = if i == 0 { &lines } else { &held[i - 1].1 };
                Ok::<_, Infallible>(Arc::new(verified(lines, kind, &case)))
            };
            let Ok(verified) = targets::link(0, &slots, prove);
            case.controllers[controller].programs.push((kind, verified));
        }
        case
    }

    fn flag(&mut self, flag: &str) {
        match flag.split_once('=') {
            Some(("stack_words", n)) => self.stack_words = n.parse().unwrap(),
            Some(("stack_align_bytes", n)) => self.stack_align_bytes = n.parse().unwrap(),
            None if flag == "unwinder" => self.is_unwinder = true,
            None if flag == "allow_write" => self.allows_write = true,
            _ => panic!("flag {flag}"),
        }
    }
}

fn site(text: &str) -> Site {
    match text {
        "nop" => Site::Nop,
        "plain" => Site::Plain,
        "rip" => Site::Rip,
        "branch" => Site::Branch,
        other => panic!("site {other}"),
    }
}

fn controller(text: &str) -> Controller {
    let placing = match text {
        "inline" => Placing::Inline,
        "called" => Placing::Called,
        "direct" => Placing::Direct,
        other => panic!("controller {other}"),
    };
    Controller { placing, programs: vec![] }
}

fn kind(text: &str) -> ProgramKind {
    match text {
        "fentry" => ProgramKind::Fentry,
        "fexit" => ProgramKind::Fexit,
        "fsession" => ProgramKind::Fsession,
        "fmod_ret" => ProgramKind::FmodRet,
        "uprobe" => ProgramKind::Uprobe,
        "uretprobe" => ProgramKind::Uretprobe,
        other => panic!("program {other}"),
    }
}

/// `array 4 64 1`: kind, key bytes, value bytes, entries.
fn map(text: &str) -> MapSpec {
    let words: Vec<&str> = text.split(' ').collect();
    let number = |i: usize| words[i].parse().unwrap_or_else(|_| panic!("map {text}"));
    MapSpec {
        name: "m".into(),
        kind: match words[0] {
            "array" => MapKind::Array,
            "percpu_array" => MapKind::PerCpuArray,
            "prog_array" => MapKind::ProgArray,
            other => panic!("map kind {other}: the rig has no runtime for it"),
        },
        key_size_bytes: number(1),
        value_size_bytes: number(2),
        max_entries: number(3),
        flags: 0,
        init: None,
        read_only: false,
        ..MapSpec::default()
    }
}

/// `1 3`: map, index.
fn slot(text: &str) -> (MapIdx, u32) {
    let (map, index) = text.split_once(' ').unwrap_or_else(|| panic!("held {text}"));
    (MapIdx(map.parse().unwrap()), index.parse().unwrap())
}

/// `rdi=5 xmm0=0x10`
fn run(text: &str) -> Vec<(String, u64)> {
    let setting = |word: &str| {
        let (register, number) = word.split_once('=').unwrap_or_else(|| panic!("run {word}"));
        let number = match number.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => number.parse(),
        };
        (register.to_owned(), number.unwrap_or_else(|_| panic!("run {word}")))
    };
    text.split_whitespace().map(setting).collect()
}

/// What the verifier says to the program; panics with its report.
fn verified(lines: &[&str], kind: ProgramKind, case: &Case) -> Verified {
    let program =
        Program { name: "p".into(), kind, insns: asm::assemble(lines), ..Program::default() };
    let sees_result = kind != ProgramKind::Fentry;
    let n_results = u8::try_from(case.signature.ret.words.len()).unwrap().max(1);
    let tracing = Context::Tracing {
        n_args: u8::try_from(case.signature.arg_words().count()).unwrap(),
        n_results: if sees_result { n_results } else { 0 },
        session: kind == ProgramKind::Fsession,
    };
    let context = match kind {
        ProgramKind::Uprobe | ProgramKind::Uretprobe => Context::PtRegs,
        _ => tracing,
    };
    let target = Target { types: &case.graph.types, slots: &case.slots };
    let verifier = Verifier::new(&program, &case.maps, context)
        .target(target)
        .permit(Permissions { write_target: case.allows_write })
        .changeable(changeable(kind, &case.signature));
    verifier.verify().unwrap_or_else(|e| panic!("{}", e.log.join("\n")))
}

/// `u64 f(int a, double b)`: integers and pointers, float and double, `__int128` results.
fn signature(text: &str) -> Signature {
    let (ret, rest) = text.split_once(" f(").unwrap_or_else(|| panic!("function {text}"));
    let params = rest.strip_suffix(')').unwrap_or_else(|| panic!("function {text}"));
    let (mut n_gpr, mut n_xmm, mut n_stack) = (0, 0, 0);
    let mut place = |ty: &Type| match ty {
        Type::Float { .. } if n_xmm < 8 => {
            n_xmm += 1;
            ArgWord::Xmm(n_xmm - 1)
        }
        Type::Int { .. } if n_gpr < 6 => {
            n_gpr += 1;
            ArgWord::Gpr(n_gpr - 1)
        }
        _ => {
            n_stack += 1;
            ArgWord::Stack(n_stack - 1)
        }
    };
    let params = params.split(", ").filter(|p| !p.is_empty()).map(|param| {
        let (ty, name) = param.rsplit_once(' ').unwrap_or_else(|| panic!("parameter {param}"));
        let ty = self::ty(ty);
        Param { name: Some(name.to_owned()), words: vec![place(&ty)], ty, absent: None }
    });
    let params = params.collect();
    let ret_words = match ret {
        "void" => vec![],
        "float" | "double" => vec![RetWord::Xmm0],
        "__int128" => vec![RetWord::Rax, RetWord::Rdx],
        _ => vec![RetWord::Rax],
    };
    Signature {
        params,
        ret: Return { ty: ty(ret), words: ret_words, absent: None },
        doubt: None,
        variadic: false,
        stack_words: StackWords::Known(n_stack),
        stack_align_bytes: 16,
        source: SignatureSource::Dwarf,
    }
}

fn ty(name: &str) -> Type {
    let int = |size_bytes, signed| Type::Int { name: name.into(), size_bytes, signed };
    match name {
        "void" => Type::Void,
        "u64" => int(8, false),
        "long" => int(8, true),
        "int" => int(4, true),
        "unsigned" => int(4, false),
        "char" => int(1, true),
        "__int128" => int(16, true),
        "float" => Type::Float { name: name.into(), size_bytes: 4 },
        "double" => Type::Float { name: name.into(), size_bytes: 8 },
        other => panic!("type {other}"),
    }
}
