//! Programs that no command is made of, attached with the library `flea`: what an empty program
//! costs, a counter at exit, and many programs on one function.

use anyhow::{Context, Result, ensure};
use flea::asm::{Asm, JmpOp, Reg, Size};
use flea::{
    Helper, Link, Map, MapIdx, MapKind, MapSpec, Object, ObjectSpec, ProgramKind, ProgramSpec,
    Session,
};

/// What each program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Returns.
    Nothing,
    /// Adds one to its element of a per-thread array.
    Count,
}

/// Some programs of one object on one function.
#[derive(Clone, Copy, Debug)]
pub struct Programs {
    /// When they run: the first in the first way, and so on in turns.
    pub kinds: &'static [ProgramKind],
    /// What they do.
    pub work: Work,
    /// How many.
    pub n: u32,
}

/// While they are attached.
pub struct AttachedPrograms {
    object: Object,
    link: Link,
    programs: Programs,
}

const MAP_NAME: &str = "calls";

impl Programs {
    /// Attaches them.
    pub fn attach(self, session: &Session, function: &str) -> Result<AttachedPrograms> {
        let object = session.load(self.object()?)?;
        let found = session.find(function)?;
        ensure!(found.len() == 1, "{} functions are called {function}", found.len());
        let attachments: Vec<_> = object.programs().map(|p| p.on(&found[0], 0)).collect();
        let link = object.attach(&attachments)?;
        Ok(AttachedPrograms { object, link, programs: self })
    }

    /// The object that they are of.
    pub fn object(self) -> Result<ObjectSpec> {
        let programs = (0..self.n).map(|i| {
            Ok(ProgramSpec {
                name: format!("p{i}"),
                section: "bench".into(),
                kind: self.kind(i),
                insns: self.program(i)?,
                ..ProgramSpec::default()
            })
        });
        Ok(ObjectSpec {
            maps: vec![MapSpec {
                name: MAP_NAME.into(),
                kind: MapKind::PerCpuArray,
                key_size_bytes: 4,
                value_size_bytes: 8,
                max_entries: self.n,
                flags: 0,
                init: None,
                read_only: false,
                ..MapSpec::default()
            }],
            programs: programs.collect::<Result<_>>()?,
            ..ObjectSpec::default()
        })
    }

    fn kind(self, index: u32) -> ProgramKind {
        let kinds = self.kinds.iter().copied().cycle();
        kinds.take(index as usize + 1).last().unwrap_or(ProgramKind::Fentry)
    }

    fn program(self, index: u32) -> Result<Vec<flea::Insn>> {
        let mut asm = Asm::new();
        let out = asm.new_label();
        if self.work == Work::Count {
            asm.store_imm(Size::W, Reg::R10, -4, index.cast_signed())
                .map_ref(Reg::R1, MapIdx(0))
                .mov64_reg(Reg::R2, Reg::R10)
                .add64_imm(Reg::R2, -4)
                .call(Helper::MapLookupElem)
                .jump_if(JmpOp::Eq, Reg::R0, 0, out)
                .load(Size::DW, Reg::R1, Reg::R0, 0)
                .add64_imm(Reg::R1, 1)
                .store(Size::DW, Reg::R0, 0, Reg::R1);
        }
        asm.bind(out).mov64_imm(Reg::R0, 0).exit();
        asm.finish().context("a program of the bench")
    }
}

impl AttachedPrograms {
    /// Takes them off; whether each has counted `n_called` calls, where they count.
    pub fn finish(self, n_called: u64) -> Result<Option<bool>> {
        self.link.detach()?;
        ensure!(self.object.missed() == 0, "{} runs were missed", self.object.missed());
        if self.programs.work != Work::Count {
            return Ok(None);
        }
        let Some(Map::PerCpuArray(calls)) = self.object.map(MAP_NAME) else {
            anyhow::bail!("the object has no map of counters");
        };
        for index in 0..self.programs.n {
            // An fsession program runs at entry and at exit.
            let is_session = self.programs.kind(index) == ProgramKind::Fsession;
            let per_call = if is_session { 2 } else { 1 };
            let cells = calls.get(index)?;
            let words = cells.iter().filter_map(|v| Some(u64::from_le_bytes(*v.first_chunk()?)));
            if words.sum::<u64>() != per_call * n_called {
                return Ok(Some(false));
            }
        }
        Ok(Some(true))
    }
}
