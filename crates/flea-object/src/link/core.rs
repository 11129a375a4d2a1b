//! CO-RE relocations of a program's functions, with the types that they are about.

use std::sync::Arc;

use super::fault::ProgramFault;
use super::{Linker, Linking, in_range, index_u32};
use crate::btf::{Kind, Type, Word};
use crate::btf_ext;
use crate::core_relo::{CoreKind, CoreRelocation, MAX_STEPS};

/// A type behind more typedefs than this is a loop.
const MAX_TYPEDEFS: usize = 32;

impl Linker<'_> {
    /// Those of all functions in `linking`, by the place that the functions have there.
    pub(super) fn core_of(
        &mut self,
        linking: &Linking<'_>,
    ) -> Result<Vec<CoreRelocation>, ProgramFault> {
        let mut found = Vec::new();
        for &(function, base) in &linking.placed {
            let f = &self.functions[function.0];
            let (name, start) = (f.name, f.start);
            let section = self.elf.section(f.section).map_or("", |s| s.name.as_str());
            let range = start..start + f.insns.len();
            let inside = in_range(self.core_relocations.get(section), range, |r| r.insn_idx);
            let records: Vec<btf_ext::CoreRelocation<'_>> = inside.to_vec();
            for record in &records {
                let insn_idx = record.insn_idx - start;
                let bad = |what| ProgramFault::BadCoreRelocation {
                    function: name.to_owned(),
                    insn_idx,
                    what,
                };
                found.push(self.core_relocation(record, base + insn_idx).map_err(bad)?);
            }
        }
        found.sort_by_key(|relocation| relocation.insn_idx);
        match found.windows(2).find(|pair| pair[0].insn_idx == pair[1].insn_idx) {
            // So there are no more of them than instructions, however often a function is linked.
            Some([one, _]) => Err(ProgramFault::BadCoreRelocation {
                function: linking.program.to_owned(),
                insn_idx: one.insn_idx as usize,
                what: "is one of two".into(),
            }),
            _ => Ok(found),
        }
    }

    fn core_relocation(
        &mut self,
        record: &btf_ext::CoreRelocation<'_>,
        insn_idx: usize,
    ) -> Result<CoreRelocation, String> {
        let kind = CoreKind::from_number(record.kind)
            .ok_or_else(|| format!("has the unknown kind {}", record.kind))?;
        let number = |text: &str| text.parse::<u32>().ok();
        let steps = record.access.split(':').take(MAX_STEPS + 1);
        let path: Option<Vec<u32>> = steps.map(number).collect();
        let path = path.filter(|path| path.len() <= MAX_STEPS);
        let path = path.ok_or_else(|| format!("has no place in a type: '{}'", record.access))?;
        let names = self.names_of_type(record.type_id);
        self.type_names.insert(record.type_id, Arc::clone(&names));
        let root = self.types.id_of(0, record.type_id);
        Ok(CoreRelocation { insn_idx: index_u32(insn_idx), kind, root, names, path })
    }

    /// Of its typedefs, the outermost first, then its own.
    fn names_of_type(&self, type_id: u32) -> Arc<[String]> {
        if let Some(names) = self.type_names.get(&type_id) {
            return Arc::clone(names);
        }
        let mut names: Vec<String> = Vec::new();
        let mut id = type_id;
        for _ in 0..MAX_TYPEDEFS {
            let Some(Type { name, kind }) = self.btf.first().and_then(|btf| btf.get(id).ok())
            else {
                break;
            };
            let is_name = !matches!(kind, Kind::Alias { word, .. } if *word != Word::Typedef);
            if is_name && !name.is_empty() {
                names.push((*name).to_owned());
            }
            let Kind::Alias { of, .. } = kind else { break };
            id = *of;
        }
        names.into()
    }
}
