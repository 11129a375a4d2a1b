//! Whether a module has a C++ and Rust exception unwinder in it, and which. Frames of our own
//! have no rows in any module, so the unwinder must be told of them: libgcc's can be, at its
//! `_Unwind_Find_FDE`, or at the loader's `_dl_find_object`, which that asks. Start at
//! [`Module::unwinder`].

use object::{LittleEndian, Object as _, ObjectSymbol as _, read::elf::Sym as _};

use crate::addr::Svma;
use crate::module::Module;

/// libgcc's name of what finds the row of an address.
const FIND_FDE: &[u8] = b"_Unwind_Find_FDE";
/// Every unwinder has it. (glibc has functions of its own called `_Unwind_Resume` and
/// `_Unwind_ForcedUnwind`, which hand over to libgcc's.)
const ENTRY: &[u8] = b"_Unwind_RaiseException";
/// LLVM's libunwind, which has a `_Unwind_Find_FDE` and does not use it.
const LLVM_STEP: &[u8] = b"__unw_step";
/// What libgcc's asks glibc's loader since gcc 12 and glibc 2.35.
const FIND_OBJECT: &[u8] = b"_dl_find_object";
/// What an unwinder asks the loader.
const LOADER_QUESTIONS: [&[u8]; 2] = [FIND_OBJECT, b"dl_iterate_phdr"];

/// The unwinder in a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unwinder {
    /// There is none: the module uses another module's, or nothing.
    None,
    /// libgcc's.
    Libgcc {
        /// Its `_Unwind_Find_FDE`.
        find_fde: Svma,
    },
    /// There is none; it is the loader that answers to one that is loaded later.
    Loader {
        /// Its `_dl_find_object`.
        find_object: Svma,
    },
    /// LLVM's libunwind, nongnu libunwind, or one of the program's own.
    Other,
    /// One without symbols: exceptions are used, an unwinder's questions to the loader are
    /// imported, and no unwinder is.
    Hidden,
}

/// What the symbol tables say, in one pass.
#[derive(Default)]
struct Seen {
    find_fde: Option<Svma>,
    find_object: Option<Svma>,
    entry: bool,
    llvm: bool,
    any_name: bool,
    asks_loader: bool,
}

impl Module<'_> {
    /// Which unwinder the module has.
    #[must_use]
    pub fn unwinder(&self) -> Unwinder {
        self.unwinder.get_or_init(|| self.find_unwinder()).clone()
    }

    fn find_unwinder(&self) -> Unwinder {
        let seen = self.unwinder_symbols();
        match seen {
            Seen { llvm: true, entry: true, .. } => Unwinder::Other,
            Seen { find_fde: Some(find_fde), .. } => Unwinder::Libgcc { find_fde },
            Seen { entry: true, .. } => Unwinder::Other,
            Seen { any_name: false, asks_loader: true, .. }
                if self.section(".gcc_except_table").is_some() =>
            {
                Unwinder::Hidden
            }
            Seen { find_object: Some(find_object), .. } => Unwinder::Loader { find_object },
            _ => Unwinder::None,
        }
    }

    fn unwinder_symbols(&self) -> Seen {
        let mut seen = Seen::default();
        for elf in std::iter::once(&self.elf).chain(&self.debug_elf) {
            for symbol in elf.symbols().chain(elf.dynamic_symbols()) {
                let Ok(name) = symbol.name_bytes() else { continue };
                let name = name.split(|byte| *byte == b'@').next().unwrap_or_default();
                let defined = !symbol.elf_symbol().is_undefined(LittleEndian);
                if LOADER_QUESTIONS.contains(&name) {
                    seen.asks_loader |= !defined;
                    if defined && name == FIND_OBJECT {
                        seen.find_object = Some(Svma(symbol.address()));
                    }
                } else if name == LLVM_STEP {
                    seen.llvm |= defined;
                } else if name.starts_with(b"_Unwind_") {
                    seen.any_name = true;
                    seen.entry |= defined && name == ENTRY;
                    if defined && name == FIND_FDE {
                        seen.find_fde = Some(Svma(symbol.address()));
                    }
                }
            }
        }
        seen
    }
}
