//! Where the symbols that a shared object imports are in a running process, without asking its
//! loader: nothing of the target is called, and static programs have none.
//!
//! In this order:
//! 1. what the linker would have bound in the modules whose functions are replaced: their
//!    global symbols that they do not export (all of an executable's, as a rule);
//! 2. exported symbols, in the order in which the loader searches modules;
//! 3. what is local to a source file of those modules, where the name is unique.
//!
//! An ifunc's address is what its resolver returned when the loader asked it. It is read from
//! where the loader put it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use flea_load::Import;
use flea_process::{Mapping, Memory, Pid};
use flea_symbols::{Definition, DefinitionKind, SlotOf, addr::RemoteAddr};

use crate::{
    error::RemoteError,
    modules::{Module, OpenError},
};

/// More modules than any process has loaded.
const MAX_LINK_MAP: usize = 1 << 16;
/// `struct r_debug`: version, then the first `struct link_map` (<link.h>).
const R_MAP_OFFSET: i64 = 8;
/// `struct link_map`: l_addr, l_name, l_ld, l_next.
const L_LD_OFFSET: i64 = 16;
const L_NEXT_OFFSET: i64 = 24;

/// A symbol that the target cannot provide. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Nobody defines it.
    #[error(
        "symbol `{symbol}` is not defined in the process: no module exports it, and {modules} \
         does not have it; load the library that defines it into the process, or define it in \
         the object"
    )]
    Missing {
        /// The symbol.
        symbol: String,
        /// The modules whose functions are replaced.
        modules: String,
    },
    /// Several source files have something of that name.
    #[error(
        "symbol `{symbol}` is local to {n} source files of {module}, so it is not clear which \
         one is meant; define it in the object"
    )]
    Ambiguous {
        /// The symbol.
        symbol: String,
        /// How many.
        n: usize,
        /// Where.
        module: String,
    },
    /// It is not at one address.
    #[error(
        "symbol `{symbol}` is thread-local in {module}: only the system's loader gives access \
         to such storage; use a function of the target that returns its address"
    )]
    ThreadLocal {
        /// The symbol.
        symbol: String,
        /// Where it is defined.
        module: String,
    },
    /// Which function it is was not decided yet.
    #[error(
        "symbol `{symbol}` of {module} is selected at run time (ifunc), and nothing in the \
         process has been bound to it; let the process run a little, or define it in the object"
    )]
    Undecided {
        /// The symbol.
        symbol: String,
        /// Where it is defined.
        module: String,
    },
    /// The process cannot be looked at.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// A module cannot be read.
    #[error(transparent)]
    Open(#[from] Arc<OpenError>),
}

/// The modules of a process, as a linker sees them.
pub(super) struct Scope {
    memory: Memory,
    maps: Vec<Mapping>,
    /// In the order of search; those that cannot be read are left out.
    modules: Vec<Arc<Module>>,
}

/// A definition and whose it is.
type Found = (Arc<Module>, Definition);

impl Scope {
    pub(super) fn of(pid: Pid, modules: Vec<Arc<Module>>) -> Result<Self, ResolveError> {
        let memory = Memory::open(flea_process::stand_in(pid)).map_err(RemoteError::from)?;
        let maps = flea_process::maps(pid).map_err(RemoteError::from)?;
        let mut modules: Vec<_> =
            modules.into_iter().filter(|module| module.with_symbols(|_| ()).is_ok()).collect();
        let order = link_map(&memory, &modules);
        let rank = |module: &Arc<Module>| {
            let at = module.with_symbols(|s| s.dynamic_address()).ok().flatten();
            let at = at.and_then(|at| module.remote(at).ok());
            at.and_then(|at| order.iter().position(|other| *other == at)).unwrap_or(usize::MAX)
        };
        // Stable: without a link map (a static program) they stay as they are mapped.
        modules.sort_by_key(|module| (!module.is_main(), rank(module)));
        Ok(Self { memory, maps, modules })
    }

    /// The address of each of `imports`, for functions that replace some of `homes`.
    pub(super) fn resolve(
        &self,
        imports: &[Import],
        homes: &[String],
    ) -> Result<Vec<RemoteAddr>, ResolveError> {
        let wanted: HashSet<&str> = imports.iter().map(|import| import.name.as_str()).collect();
        let is_home = |module: &&Arc<Module>| homes.iter().any(|home| home == module.path());
        let mut exports: HashMap<String, Vec<Found>> = HashMap::new();
        let mut private: HashMap<String, Vec<Found>> = HashMap::new();
        for module in &self.modules {
            for found in module.with_symbols(|s| s.exports(&wanted))? {
                exports.entry(found.name.clone()).or_default().push((Arc::clone(module), found));
            }
        }
        for module in self.modules.iter().filter(is_home) {
            for found in module.with_symbols(|s| s.private_definitions(&wanted))? {
                private.entry(found.name.clone()).or_default().push((Arc::clone(module), found));
            }
        }
        let empty = Vec::new();
        let resolve = |import: &Import| {
            let exports = exports.get(&import.name).unwrap_or(&empty);
            let private = private.get(&import.name).unwrap_or(&empty);
            match choose(import, exports, private)? {
                Some((module, definition)) => self.address(module, definition),
                None if import.weak => Ok(RemoteAddr(0)),
                None => Err(ResolveError::Missing {
                    symbol: import.to_string(),
                    modules: homes.join(", "),
                }),
            }
        };
        imports.iter().map(resolve).collect()
    }

    fn address(
        &self,
        module: &Arc<Module>,
        definition: &Definition,
    ) -> Result<RemoteAddr, ResolveError> {
        let symbol = definition.name.clone();
        let home = module.path().to_owned();
        match definition.kind {
            DefinitionKind::Plain => Ok(module.remote(definition.address)?),
            DefinitionKind::ThreadLocal => Err(ResolveError::ThreadLocal { symbol, module: home }),
            DefinitionKind::Ifunc => self
                .selected(module, definition)?
                .ok_or(ResolveError::Undecided { symbol, module: home }),
        }
    }

    /// What an ifunc's resolver has returned, from any slot that the loader put it in: the
    /// defining module's own, or those of modules that import it.
    fn selected(
        &self,
        home: &Arc<Module>,
        ifunc: &Definition,
    ) -> Result<Option<RemoteAddr>, ResolveError> {
        let wanted = HashSet::from([ifunc.name.as_str()]);
        for module in std::iter::once(home).chain(&self.modules) {
            for slot in module.with_symbols(|s| s.slots(&wanted))? {
                let is_its = match &slot.of {
                    SlotOf::Import(name) => *name == ifunc.name,
                    SlotOf::Resolver(at) => Arc::ptr_eq(module, home) && *at == ifunc.address,
                };
                if !is_its {
                    continue;
                }
                let Ok(value) = self.memory.read_u64(module.remote(slot.at)?) else { continue };
                let value = RemoteAddr(value);
                // What leads to a stub was not bound yet.
                if value != home.remote(ifunc.address)?
                    && self.is_code(value)
                    && !self.is_stub(value)?
                {
                    return Ok(Some(value));
                }
            }
        }
        Ok(None)
    }

    fn is_code(&self, at: RemoteAddr) -> bool {
        self.maps.iter().any(|mapping| mapping.contains(at) && mapping.perms.execute)
    }

    fn is_stub(&self, at: RemoteAddr) -> Result<bool, ResolveError> {
        for module in &self.modules {
            if let Some(stated) = module.stated(at)?
                && module.with_symbols(|s| s.is_stub(stated))?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The definition that `import` means.
fn choose<'a>(
    import: &Import,
    exports: &'a [Found],
    private: &'a [Found],
) -> Result<Option<&'a Found>, ResolveError> {
    let is_exported = |found: &Found| {
        exports.iter().any(|e| Arc::ptr_eq(&e.0, &found.0) && e.1.address == found.1.address)
    };
    let own = private.iter().find(|found| !found.1.is_local && !is_exported(found));
    if let Some(own) = own {
        return Ok(Some(own));
    }
    if let Some(first) = exports.first() {
        // One module may have several versions of it: the one that the object was linked
        // against, else the one for who asks for none.
        let same = || exports.iter().filter(|found| Arc::ptr_eq(&found.0, &first.0));
        let versioned = same().find(|f| f.1.version.is_some() && f.1.version == import.version);
        return Ok(versioned.or_else(|| same().find(|f| f.1.is_default)).or(Some(first)));
    }
    match private {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        [first, ..] => Err(ResolveError::Ambiguous {
            symbol: import.name.clone(),
            n: private.len(),
            module: first.0.path().to_owned(),
        }),
    }
}

/// The addresses of the dynamic sections of what is loaded, in the loader's order. Empty where
/// there is no loader. What the target has scribbled there is a wrong order, no more.
fn link_map(memory: &Memory, modules: &[Arc<Module>]) -> Vec<RemoteAddr> {
    let mut order = Vec::new();
    let word = |at: RemoteAddr| memory.read_u64(at).ok().filter(|word| *word != 0).map(RemoteAddr);
    let main = modules.iter().find(|module| module.is_main());
    let slot = main.and_then(|main| {
        let slot = main.with_symbols(|s| s.debug_slot()).ok()??;
        main.remote(slot).ok()
    });
    let mut next = slot.and_then(word).and_then(|r_debug| word(r_debug.offset(R_MAP_OFFSET)));
    while let Some(entry) = next {
        order.extend(word(entry.offset(L_LD_OFFSET)));
        next = word(entry.offset(L_NEXT_OFFSET)).filter(|_| order.len() < MAX_LINK_MAP);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str) -> Arc<Module> {
        Arc::new(Module::unread(path))
    }

    fn found(module: &Arc<Module>, address: u64, is_local: bool) -> Found {
        let definition = Definition {
            name: "f".into(),
            address: flea_symbols::addr::Svma(address),
            kind: DefinitionKind::Plain,
            version: None,
            is_default: true,
            is_local,
        };
        (Arc::clone(module), definition)
    }

    fn version(found: Found, version: &str, is_default: bool) -> Found {
        let version = Some(version.to_owned());
        (found.0, Definition { version, is_default, ..found.1 })
    }

    fn chosen(import: &Import, exports: &[Found], private: &[Found]) -> Option<u64> {
        choose(import, exports, private).ok().unwrap().map(|found| found.1.address.0)
    }

    #[test]
    fn a_linker_would_choose_the_same() {
        let (main, lib, other) = (module("/main"), module("/lib"), module("/other"));
        let import = Import { name: "f".into(), version: None, weak: false };
        assert_eq!(chosen(&import, &[], &[]), None);
        // The first module that exports it, whatever later ones do.
        let exports = [found(&lib, 1, false), found(&other, 2, false)];
        assert_eq!(chosen(&import, &exports, &[]), Some(1));
        // A global of the patched program that it does not export comes first, a local last.
        assert_eq!(chosen(&import, &exports, &[found(&main, 3, false)]), Some(3));
        assert_eq!(chosen(&import, &exports, &[found(&main, 3, true)]), Some(1));
        assert_eq!(chosen(&import, &[], &[found(&main, 3, true)]), Some(3));
        // What is both is exported.
        let both = [found(&other, 2, false)];
        assert_eq!(chosen(&import, &exports, &both), Some(1));
        let twice = [found(&main, 3, true), found(&main, 4, true)];
        let error = choose(&import, &[], &twice).err().unwrap();
        assert!(matches!(error, ResolveError::Ambiguous { n: 2, .. }), "{error}");
    }

    #[test]
    fn versions_are_those_that_the_object_was_linked_against() {
        let lib = module("/lib");
        let exports = [
            version(found(&lib, 1, false), "GLIBC_2.2.5", false),
            version(found(&lib, 2, false), "GLIBC_2.14", true),
        ];
        let import = |version: Option<&str>| Import {
            name: "f".into(),
            version: version.map(str::to_owned),
            weak: false,
        };
        assert_eq!(chosen(&import(Some("GLIBC_2.2.5")), &exports, &[]), Some(1));
        assert_eq!(chosen(&import(Some("GLIBC_2.14")), &exports, &[]), Some(2));
        assert_eq!(chosen(&import(None), &exports, &[]), Some(2));
        assert_eq!(chosen(&import(Some("OTHER_1")), &exports, &[]), Some(2));
    }
}
