//! From the bytes of an object file to an [`Object`]: ELF, then types, then maps, then
//! programs, each in its own module.

use crate::btf::Btf;
use crate::btf_ext::BtfExt;
use crate::elf::Elf;
use crate::error::ObjectError;
use crate::link::{Linker, ProgramFault};
use crate::maps;
use crate::prog_array;
use crate::spec::Object;

/// Reads an eBPF object as `clang -target bpf -O2 -g -c` makes it and libbpf takes it.
///
/// Nothing is verified: instructions are linked and otherwise as the compiler wrote them.
///
/// # Errors
/// [`ObjectError`]: the file is damaged or no eBPF object, or asks for something that Flea
/// does not have; the text names the map or program.
pub fn parse(bytes: &[u8]) -> Result<Object, ObjectError> {
    let elf = Elf::parse(bytes)?;
    let btf = elf.section_named(".BTF").map(|s| Btf::parse(s.data)).transpose()?;
    let ext = match (&btf, elf.section_named(".BTF.ext")) {
        (Some(btf), Some(section)) => BtfExt::parse(section.data, btf)?,
        _ => BtfExt::default(),
    };
    let declared = maps::read_declared(&elf, btf.as_ref())?;
    let slots = prog_array::named_slots(&elf, &declared.program_arrays)?;
    let mut linker = Linker::new(&elf, btf.as_ref(), &ext, declared)?;
    let programs = linker.link_programs()?;
    let program_slots = slots.iter().map(|s| s.resolve(&programs)).collect::<Result<_, _>>()?;
    let (maps, types) = linker.into_parts();
    for program in &programs {
        for relocation in &program.core_relocations {
            relocation.check(&types).map_err(|e| ProgramFault::Core(e).of(&program.name))?;
        }
    }
    Ok(Object { maps, programs, license: license(&elf), types, program_slots })
}

fn license(elf: &Elf<'_>) -> Option<String> {
    let bytes = elf.section_named("license")?.data;
    let text = bytes.split(|&b| b == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned())
}
