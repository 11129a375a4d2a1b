//! Live patching: functions of a shared object take the place of functions of the target, for
//! all calls that begin from then on. Calls that are inside the original end there.
//!
//! Programs on a function run around whatever has taken its place. Several replacements of one
//! function stack; calls go to the newest, and taking any of them off, in any order, restores
//! what is the newest then.

mod resolve;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use flea_load::{ParseError, SharedObject};
use flea_symbols::{FunctionKind, Mismatch, ModuleError, addr::Svma};

use crate::{
    error::{AttachError, RemoteError},
    function::Function,
    replace::{self, Named, Replace},
    session::Inner,
    unload::HIDES_ADDRESSES,
};

pub use self::resolve::ResolveError;

/// A shared object whose functions can replace functions of the target. Reading it does
/// nothing to the target: each [`Patch::replace`] loads it anew, with variables of its own.
///
/// Its constructors are not run, nothing of the target's is called to load it, and what it
/// imports is the target's own: `malloc` and `printf`, but also functions and variables of the
/// program that no linker would have let it see.
///
/// ```
/// use flea::Session;
/// use std::process::Command;
///
/// #[unsafe(no_mangle)]
/// #[inline(never)]
/// extern "C" fn patch_example(x: i32) -> i32 {
///     x + 1
/// }
///
/// # let dir = std::env::temp_dir().join(format!("flea-doc-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir)?;
/// # let (source, object) = (dir.join("fix.c"), dir.join("fix.so"));
/// std::fs::write(&source, "int patch_example(int x) { return x + 2; }")?;
/// let built = Command::new("gcc").args(["-shared", "-fPIC", "-O2", "-g", "-o"])
///     .arg(&object).arg(&source).status();
/// # if built.is_err() { return Ok(()); }
/// let session = Session::this_process()?;
/// let function = &session.find("patch_example")?[0];
/// // Examples are compiled without debug information: nothing to check the signature by.
/// let patch = session.load_shared_object(&object)?.unchecked_signature();
/// # std::fs::remove_dir_all(&dir)?;
/// let replacement = patch.replace(function, "patch_example")?;
/// assert_eq!(patch_example(1), 3);
/// replacement.detach()?;
/// assert_eq!(patch_example(1), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Patch {
    session: Arc<Inner>,
    path: PathBuf,
    bytes: Arc<Vec<u8>>,
    object: Arc<SharedObject>,
    signatures: Signatures,
}

/// What is asked of signatures.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Signatures {
    Checked,
    Unchecked,
}

/// A replacement that was not made. The target runs as before.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It cannot be loaded.
    #[error("{}: {source}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ParseError,
    },
    /// Its symbols cannot be read.
    #[error("{}: {source}", .path.display())]
    Symbols {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ModuleError,
    },
    /// It has no such function.
    #[error(
        "{} has no function `{symbol}`{}", .path.display(),
        match .has.as_slice() { [] => String::new(), has => format!("; it has {}", has.join(", ")) }
    )]
    NoSuchFunction {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        symbol: String,
        /// Some that it has.
        has: Vec<String>,
    },
    /// The two are called in different ways.
    #[error(
        "{function} cannot be replaced: its signature is `{original}`, and that of the \
         replacement in {} is `{replacement}`", .path.display()
    )]
    Signature {
        /// The function.
        function: String,
        /// The file.
        path: PathBuf,
        /// The declaration of the one.
        original: String,
        /// And of the other.
        replacement: String,
    },
    /// Nobody knows how one of the two is called.
    #[error(
        "{function}: it cannot be checked that {symbol} in {} has the same signature, for \
         there is no (usable) debug information of {}; compile with -g, or say that it need not \
         be checked (`--unchecked-signature`, `Patch::unchecked_signature`)", .path.display(),
        match (.original_known, .replacement_known) {
            (true, _) => "the object's function",
            (false, true) => "the target's function",
            (false, false) => "either function",
        }
    )]
    UnknownSignature {
        /// The function.
        function: String,
        /// Its replacement.
        symbol: String,
        /// The file.
        path: PathBuf,
        /// There is debug information of the function.
        original_known: bool,
        /// There is of the replacement.
        replacement_known: bool,
    },
    /// The replacement would destroy what a caller keeps.
    #[error(
        "{function} cannot be replaced: its caller at {caller} (in its file) was compiled \
         to rely on registers that only this version of it leaves alone (gcc's -fipa-ra); \
         replace the caller as well or instead, or compile the program with -fno-ipa-ra"
    )]
    Registers {
        /// The function.
        function: String,
        /// The call, as the file states its address.
        caller: Svma,
    },
    /// One function cannot have two replacements from one go.
    #[error("{function} is to be replaced twice in one go; name it once")]
    Twice {
        /// The function.
        function: String,
    },
    /// Nothing is to be replaced.
    #[error("no function to replace was given")]
    Nothing,
    /// Something that it imports cannot be found.
    #[error("{}: {source}", .path.display())]
    Resolve {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ResolveError,
    },
    /// The function cannot be patched, or the target not be changed.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

impl Patch {
    pub(crate) fn load(session: &Arc<Inner>, path: &Path) -> Result<Self, PatchError> {
        let path = path.to_owned();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) => return Err(PatchError::Read { path, source }),
        };
        match SharedObject::parse(&bytes) {
            Ok(object) => Ok(Self {
                session: Arc::clone(session),
                path,
                bytes: Arc::new(bytes),
                object: Arc::new(object),
                signatures: Signatures::Checked,
            }),
            Err(source) => Err(PatchError::Parse { path, source }),
        }
    }

    /// Does without the check that a replacement is called like its original. For functions
    /// without debug information: whoever says so answers for it.
    #[must_use]
    pub fn unchecked_signature(mut self) -> Self {
        self.signatures = Signatures::Unchecked;
        self
    }

    /// Puts the object's function `symbol` in the place of `function`.
    ///
    /// # Errors
    /// [`PatchError`]; the target runs as before.
    pub fn replace(&self, function: &Function, symbol: &str) -> Result<Replacement, PatchError> {
        self.replace_all(&[(function, symbol)])
    }

    /// Replaces several functions at once: all of them or none. They share one copy of the
    /// object's variables.
    ///
    /// # Errors
    /// [`PatchError`] for the first that cannot be; the target runs as before.
    pub fn replace_all(&self, pairs: &[(&Function, &str)]) -> Result<Replacement, PatchError> {
        let symbols = flea_symbols::Module::parse(&self.bytes, None)
            .map_err(|source| PatchError::Symbols { path: self.path.clone(), source })?;
        let mut named: Vec<Named<'_>> = Vec::new();
        for &(function, symbol) in pairs {
            if named.iter().any(|other| other.function.address() == function.address()) {
                return Err(PatchError::Twice { function: function.name() });
            }
            let offset = self.check(&symbols, function, symbol)?;
            if let Some(caller) = function.caller_relying_on_registers() {
                return Err(PatchError::Registers { function: function.name(), caller });
            }
            let site = function
                .site()
                .map_err(|refusal| AttachError::Refused { function: function.name(), refusal })?;
            named.push(Named { function, site, offset, symbol });
        }
        let Some(first) = named.first() else { return Err(PatchError::Nothing) };
        let near = first.function.address();
        let homes: Vec<String> = pairs.iter().map(|(f, _)| f.module().to_owned()).collect();
        let addresses = self
            .resolve(&homes)
            .map_err(|source| PatchError::Resolve { path: self.path.clone(), source })?;
        let hides = |name: &str| HIDES_ADDRESSES.contains(&name);
        let (handle, ids) = replace::attach(
            self.session.pid(),
            &Replace {
                object: &self.object,
                addresses: &addresses,
                near,
                pinned: self.object.imports().iter().any(|import| hides(&import.name)),
                named: &named,
            },
        )?;
        Ok(Replacement { session: Arc::clone(&self.session), handle, ids, is_let_go: false })
    }

    /// Where in the object the replacement of `function` begins.
    fn check(
        &self,
        symbols: &flea_symbols::Module<'_>,
        function: &Function,
        symbol: &str,
    ) -> Result<u64, PatchError> {
        let (offset, found) = self.find(symbols, symbol)?;
        let (original, replacement) = (function.signature(), symbols.signature(found));
        match original.check_replacement(&replacement) {
            Ok(()) => Ok(offset),
            Err(_) if self.signatures == Signatures::Unchecked => Ok(offset),
            Err(Mismatch::Unknown) => Err(PatchError::UnknownSignature {
                function: function.name(),
                symbol: symbol.to_owned(),
                path: self.path.clone(),
                original_known: original.is_wholly_known(),
                replacement_known: replacement.is_wholly_known(),
            }),
            Err(Mismatch::Different) => Err(PatchError::Signature {
                function: function.name(),
                path: self.path.clone(),
                original: function.signature_text(),
                replacement: replacement.declaration(&found.display_name()),
            }),
        }
    }

    fn find<'s>(
        &self,
        symbols: &'s flea_symbols::Module<'_>,
        symbol: &str,
    ) -> Result<(u64, &'s flea_symbols::Function), PatchError> {
        const MAX_SHOWN: usize = 8;
        let is_called = |f: &&flea_symbols::Function| {
            f.name == symbol
                || f.aliases.iter().any(|alias| alias == symbol)
                || f.display_name() == symbol
                || f.demangled_short().as_deref() == Some(symbol)
        };
        let usable = |f: &&flea_symbols::Function| {
            f.kind == FunctionKind::Func && !f.is_cold_part() && !is_of_start_files(&f.name)
        };
        let functions = || symbols.functions().iter().filter(usable);
        let found = functions().find(is_called).and_then(|f| Some((self.offset(f.address)?, f)));
        found.ok_or_else(|| PatchError::NoSuchFunction {
            path: self.path.clone(),
            symbol: symbol.to_owned(),
            has: functions().take(MAX_SHOWN).map(|f| format!("`{}`", f.display_name())).collect(),
        })
    }

    fn offset(&self, address: Svma) -> Option<u64> {
        self.object.offset_of(address)
    }

    fn resolve(
        &self,
        homes: &[String],
    ) -> Result<Vec<flea_symbols::addr::RemoteAddr>, ResolveError> {
        let modules = self.session.loaded_modules().map_err(RemoteError::from)?;
        let scope = resolve::Scope::of(self.session.pid(), modules)?;
        scope.resolve(self.object.imports(), homes)
    }
}

/// What compilers add to every shared object.
fn is_of_start_files(name: &str) -> bool {
    matches!(
        name,
        "_init"
            | "_fini"
            | "frame_dummy"
            | "deregister_tm_clones"
            | "register_tm_clones"
            | "__do_global_dtors_aux"
    )
}

/// Functions that were replaced together. Dropping it gives the originals their place back.
pub struct Replacement {
    session: Arc<Inner>,
    handle: replace::Handle,
    ids: Vec<u32>,
    is_let_go: bool,
}

impl Replacement {
    /// Takes the replacements off: calls go to what was there before, or, where others have
    /// replaced the function since, go on to theirs. Calls that are inside end there, and the
    /// object's memory is given back once nobody can be in it.
    ///
    /// # Errors
    /// The target could not be seized, or another tool has changed a site since; what is
    /// attached stays so. A target that has ended is no error.
    pub fn detach(mut self) -> Result<(), AttachError> {
        self.take_off()
    }

    /// Leaves the functions replaced when this process ends: `flea ps` finds them, `flea
    /// detach` takes them off.
    pub fn keep(mut self) {
        self.is_let_go = true;
    }

    /// The numbers by which `flea ps` and [`crate::attached`] know them, in the order in which
    /// the functions were given.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    fn take_off(&mut self) -> Result<(), AttachError> {
        if self.is_let_go {
            return Ok(());
        }
        replace::undo(&self.session, self.handle, &self.ids)?;
        self.is_let_go = true;
        Ok(())
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        // A failure cannot be reported from here; `detach` reports it.
        let _ = self.take_off();
    }
}
