//! Code that the system's loader would run when it loads or unloads the object. What every
//! compiler adds does nothing that is needed and is known by sight; all else is refused.
//!
//! - `_init` of the C library's `crti.o`: calls `__gmon_start__` if there is one. `_fini`:
//!   returns. Both are known by their bytes, for a function may add to them.
//! - `frame_dummy` and `__do_global_dtors_aux` of gcc's `crtstuff.c`: register tables of
//!   transactional memory, and run `__cxa_finalize`, which has nothing to do where no
//!   destructor was registered.

use std::collections::HashMap;

use object::elf::FileHeader64;
use object::read::elf::ElfFile;
use object::{LittleEndian, Object as _, ObjectSymbol as _};

use flea_symbols::addr::Svma;

use crate::error::ParseError;
use crate::file::{File, damaged};
use crate::relocations::{Relocation, Value};
use crate::symbols::Dynamic;

const DT_INIT: u64 = 12;
const DT_FINI: u64 = 13;
const DT_INIT_ARRAY: u64 = 25;
const DT_FINI_ARRAY: u64 = 26;
const DT_INIT_ARRAYSZ: u64 = 27;
const DT_FINI_ARRAYSZ: u64 = 28;
const DT_PREINIT_ARRAYSZ: u64 = 33;

const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
const STT_FILE: u8 = 4;
const CRT_FILE: &[u8] = b"crtstuff.c";
const CRT_FUNCTIONS: [&str; 2] = ["frame_dummy", "__do_global_dtors_aux"];
/// What a hostile file can make us look at.
const MAX_ENTRIES: u64 = 1 << 16;

/// Fails where something of the author's own would run.
pub(crate) fn check(
    file: &File<'_>,
    dynamic: &Dynamic<'_>,
    relocations: &[Relocation],
) -> Result<(), ParseError> {
    let names = Names::read(file.bytes);
    let by_place: HashMap<Svma, &Relocation> = relocations.iter().map(|r| (r.at, r)).collect();
    for tag in [DT_INIT, DT_FINI] {
        let Some(at) = dynamic.value(tag).filter(|at| *at != 0).map(Svma) else { continue };
        let code = file.bytes_from(at.0).unwrap_or_default();
        if !is_empty_init(code) && !is_empty_fini(code) {
            return Err(ParseError::StartCode { at, symbol: names.at(at) });
        }
    }
    if dynamic.value(DT_PREINIT_ARRAYSZ).is_some_and(|size_bytes| size_bytes > 0) {
        return Err(damaged("it has a pre-initialisation array, which only executables have"));
    }
    for (table, size) in [(DT_INIT_ARRAY, DT_INIT_ARRAYSZ), (DT_FINI_ARRAY, DT_FINI_ARRAYSZ)] {
        let (Some(start), size_bytes) = (dynamic.value(table), dynamic.value(size).unwrap_or(0))
        else {
            continue;
        };
        if size_bytes / 8 > MAX_ENTRIES {
            return Err(damaged("its array of constructors is longer than any"));
        }
        for i in 0..size_bytes / 8 {
            let slot = Svma(start.wrapping_add(8 * i));
            check_slot(file, slot, by_place.get(&slot).copied(), &names)?;
        }
    }
    Ok(())
}

fn check_slot(
    file: &File<'_>,
    slot: Svma,
    relocation: Option<&Relocation>,
    names: &Names,
) -> Result<(), ParseError> {
    let at = match relocation {
        Some(Relocation { value: Value::Own(at), addend, .. }) => at.offset(*addend),
        Some(_) => return Err(ParseError::StartCode { at: slot, symbol: None }),
        // 0 and -1 were marks of the ends, once.
        None => match file.at(slot, 8) {
            Some(bytes) if bytes.iter().all(|b| *b == 0) || bytes.iter().all(|b| *b == 255) => {
                return Ok(());
            }
            _ => return Err(ParseError::StartCode { at: slot, symbol: None }),
        },
    };
    if names.is_of_crt(at) {
        return Ok(());
    }
    Err(ParseError::StartCode { at, symbol: names.at(at) })
}

/// `sub rsp, 8; mov rax, [rip + __gmon_start__]; test rax, rax; jz +2; call rax; add rsp, 8;
/// ret`, or musl's `push rax; pop rax; ret`.
fn is_empty_init(code: &[u8]) -> bool {
    let code = code.strip_prefix(&ENDBR64).unwrap_or(code);
    let glibc = code.starts_with(&[0x48, 0x83, 0xec, 0x08, 0x48, 0x8b, 0x05])
        && code.get(11..).is_some_and(|rest| {
            rest.starts_with(&[
                0x48, 0x85, 0xc0, 0x74, 0x02, 0xff, 0xd0, 0x48, 0x83, 0xc4, 0x08, 0xc3,
            ])
        });
    glibc || code.starts_with(&[0x50, 0x58, 0xc3])
}

/// `sub rsp, 8; add rsp, 8; ret`, or musl's.
fn is_empty_fini(code: &[u8]) -> bool {
    let code = code.strip_prefix(&ENDBR64).unwrap_or(code);
    code.starts_with(&[0x48, 0x83, 0xec, 0x08, 0x48, 0x83, 0xc4, 0x08, 0xc3])
        || code.starts_with(&[0x50, 0x58, 0xc3])
}

/// Names from the full symbol table, which a stripped file does not have.
#[derive(Debug, Default)]
struct Names {
    all: Vec<(Svma, String)>,
    /// Functions of gcc's start files.
    of_crt: Vec<Svma>,
}

impl Names {
    fn read(bytes: &[u8]) -> Self {
        let mut names = Self::default();
        let Ok(elf) = ElfFile::<FileHeader64<LittleEndian>>::parse(bytes) else { return names };
        let mut in_crt = false;
        for symbol in elf.symbols() {
            let Ok(name) = symbol.name_bytes() else { continue };
            if symbol.elf_symbol().st_type().0 == STT_FILE {
                // Local symbols follow the name of the file that they come from.
                in_crt = name == CRT_FILE;
                continue;
            }
            let name = String::from_utf8_lossy(name).into_owned();
            let at = Svma(symbol.address());
            if in_crt && symbol.is_local() && CRT_FUNCTIONS.contains(&name.as_str()) {
                names.of_crt.push(at);
            }
            if symbol.is_definition() {
                names.all.push((at, name));
            }
        }
        names
    }

    fn at(&self, address: Svma) -> Option<String> {
        self.all.iter().find(|(at, _)| *at == address).map(|(_, name)| name.clone())
    }

    fn is_of_crt(&self, address: Svma) -> bool {
        self.of_crt.contains(&address)
    }
}
