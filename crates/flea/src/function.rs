//! A function of the target: found by pattern, asked where and how it can be attached to.

use std::{
    fs::Metadata,
    sync::{Arc, OnceLock},
};

use flea_process::Pid;
use flea_symbols::{
    Pattern, Refusal, Site, TypeGraph, TypeNames,
    addr::{RemoteAddr, Svma},
    signature::{Signature, StackWords},
};

use crate::{
    error::FindError,
    modules::{Module, OpenError},
};

/// A function of a process.
#[derive(Clone)]
pub struct Function {
    module: Arc<Module>,
    symbol: flea_symbols::Function,
    address: RemoteAddr,
    signature: Arc<OnceLock<Signature>>,
    types: Arc<OnceLock<TypeGraph>>,
    site: Arc<OnceLock<Result<Site, Refusal>>>,
    uses_return_address: Arc<OnceLock<bool>>,
    never_returns: Arc<OnceLock<bool>>,
}

impl std::fmt::Debug for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}@{}", self.module.path(), self.symbol.name, self.address)
    }
}

impl Function {
    /// Its name, demangled.
    #[must_use]
    pub fn name(&self) -> String {
        self.symbol.display_name()
    }

    /// Its name as the linker knows it.
    #[must_use]
    pub fn linkage_name(&self) -> &str {
        &self.symbol.name
    }

    /// Path of its module, as the target sees it.
    #[must_use]
    pub fn module(&self) -> &str {
        self.module.path()
    }

    /// Its module.
    pub(crate) fn owner(&self) -> &Arc<Module> {
        &self.module
    }

    /// The types of its words, in its module's. Read on the first call.
    pub(crate) fn types(&self) -> &TypeGraph {
        self.types.get_or_init(|| {
            let signature = self.signature();
            let none = TypeNames::These(&[]);
            self.module
                .with_symbols(|s| s.types(&[(&self.symbol, signature)], none))
                .unwrap_or_default()
        })
    }

    /// Its first byte, in the target.
    #[must_use]
    pub fn address(&self) -> RemoteAddr {
        self.address
    }

    /// Its length.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.symbol.size_bytes
    }

    /// How it is called. Read from the debug information on the first call, or guessed.
    #[must_use]
    pub fn signature(&self) -> &Signature {
        self.signature.get_or_init(|| {
            self.module
                .with_symbols(|s| s.signature(&self.symbol))
                .unwrap_or_else(|_| Signature::guessed(StackWords::Unknown))
        })
    }

    /// Whether it would notice a frame between itself and its caller, which exit programs need.
    pub(crate) fn uses_return_address(&self) -> bool {
        *self.uses_return_address.get_or_init(|| {
            self.module.with_symbols(|s| s.uses_return_address(&self.symbol)).unwrap_or(true)
        })
    }

    /// Whether its caller may have nothing behind the call that could go on.
    pub(crate) fn never_returns(&self) -> bool {
        *self.never_returns.get_or_init(|| {
            self.module.with_symbols(|s| s.never_returns(&self.symbol)).unwrap_or(true)
        })
    }

    /// How many words of stack arguments its code can reach, whatever it is declared to take.
    pub(crate) fn stack_words_proof(&self) -> StackWords {
        let proof = self.module.with_symbols(|s| s.stack_words_proof(&self.symbol));
        proof.unwrap_or(StackWords::Unknown)
    }

    /// A direct call whose caller relies on registers that only this very code leaves alone.
    pub(crate) fn caller_relying_on_registers(&self) -> Option<flea_symbols::addr::Svma> {
        let signature = self.signature();
        let find =
            self.module.with_symbols(|s| s.caller_relying_on_registers(&self.symbol, signature));
        find.ok().flatten()
    }

    /// Its declaration, as C writes it.
    #[must_use]
    pub fn signature_text(&self) -> String {
        self.signature().declaration(&self.name())
    }

    /// Where its entry can be patched, or why it cannot.
    ///
    /// # Errors
    /// The reason for which no site can be proved.
    pub fn site(&self) -> Result<&Site, Refusal> {
        self.site
            .get_or_init(|| {
                let proved = self.module.with_symbols(|s| s.site(&self.symbol));
                match proved.expect("a function was found in a module that could be read") {
                    Err(Refusal::CallInPrologue { if_pushed: Some(site), .. })
                        if !self.module.has_shadow_stack() =>
                    {
                        Ok(*site)
                    }
                    other => other,
                }
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// Where the site is in the target.
    pub(crate) fn site_address(&self, site: &Site) -> RemoteAddr {
        self.remote(site.address)
    }

    /// Where `address`, in or next to it, is in the target.
    pub(crate) fn remote(&self, address: Svma) -> RemoteAddr {
        let into = address.0.wrapping_sub(self.symbol.address.0);
        self.address.offset(into.cast_signed())
    }
}

/// The function at `address`, which a symbol of `module` stands for.
pub(crate) fn at(
    module: &Arc<Module>,
    address: flea_symbols::addr::Svma,
) -> Result<Option<Function>, Arc<OpenError>> {
    let symbol = module.with_symbols(|s| s.function_at(address).cloned())?;
    symbol
        .filter(|symbol| symbol.address == address)
        .map(|symbol| function(module, symbol))
        .transpose()
}

/// The functions that `pattern` names. Without a module it means the main executable, and
/// every other module where nothing there matches.
pub(crate) fn find(
    pid: Pid,
    modules: &[Arc<Module>],
    pattern: &str,
) -> Result<Vec<Function>, FindError> {
    let parsed = Pattern::parse(pattern)
        .map_err(|source| FindError::Pattern { pattern: pattern.to_owned(), source })?;
    let explicit = parsed.module.is_some();
    let file = parsed.module.as_deref().and_then(|path| named_file(pid, path));
    let is_named = |m: &Module| {
        parsed.matches_module(m.path()) || file.as_ref().is_some_and(|file| m.is_file(file))
    };
    let candidates: Vec<_> = modules.iter().filter(|m| is_named(m)).collect();
    if candidates.is_empty() {
        return Err(FindError::NoSuchModule {
            pattern: pattern.to_owned(),
            loaded: modules.iter().map(|m| m.name().to_owned()).collect(),
        });
    }
    let (first, rest): (Vec<_>, Vec<_>) =
        candidates.into_iter().partition(|m| explicit || m.is_main());
    let mut unreadable = Vec::new();
    for group in [&first, &rest] {
        let mut found = Vec::new();
        for module in group {
            match find_in(module, &parsed) {
                Ok(functions) => found.extend(functions),
                Err(error) => unreadable.push(error),
            }
        }
        if !found.is_empty() {
            return Ok(found);
        }
    }
    if let (true, Some(error)) = (rest.is_empty(), unreadable.pop()) {
        return Err(FindError::Open(error));
    }
    let mut nearest: Vec<String> = Vec::new();
    for module in first.iter().chain(&rest) {
        let names = module.with_symbols(|s| s.nearest_names(&parsed.function, 3));
        nearest.extend(names.unwrap_or_default());
    }
    nearest.sort();
    nearest.dedup();
    nearest.truncate(5);
    Err(FindError::NoSuchFunction { pattern: pattern.to_owned(), nearest })
}

/// The file behind a module's path, which need not be the path that it was mapped by: the
/// target's directories have symbolic links. `/proc/self/exe` is the target's own program.
fn named_file(pid: Pid, path: &str) -> Option<Metadata> {
    let seen = match path {
        "/proc/self/exe" => format!("/proc/{}/exe", flea_process::stand_in(pid)),
        _ if path.starts_with('/') => format!("/proc/{}/root{path}", flea_process::stand_in(pid)),
        _ => return None,
    };
    std::fs::metadata(seen).ok()
}

fn find_in(module: &Arc<Module>, pattern: &Pattern) -> Result<Vec<Function>, Arc<OpenError>> {
    let symbols: Vec<_> =
        module.with_symbols(|s| s.find(pattern).into_iter().cloned().collect())?;
    symbols.into_iter().map(|symbol| function(module, symbol)).collect()
}

fn function(
    module: &Arc<Module>,
    symbol: flea_symbols::Function,
) -> Result<Function, Arc<OpenError>> {
    Ok(Function {
        address: module.remote(symbol.address)?,
        module: Arc::clone(module),
        symbol,
        signature: Arc::default(),
        types: Arc::default(),
        site: Arc::default(),
        uses_return_address: Arc::default(),
        never_returns: Arc::default(),
    })
}
