//! The target's types as a C header, for programs to be compiled against: the user-space
//! `vmlinux.h`. Start at [`of_file`] and [`Session::types_header`](crate::Session::types_header).

use std::{path::Path, sync::Arc};

use flea_object::header::header;
use flea_symbols::{Function, Pattern, TypeNames, signature::Signature};

use crate::modules::{self, Module, OpenError, Symbols};

/// Why there is no header.
#[derive(Debug, thiserror::Error)]
pub enum TypesError {
    /// The file cannot be read.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A module of the process cannot be read.
    #[error(transparent)]
    Module(#[from] Arc<OpenError>),
    /// No debug information describes types.
    #[error(
        "{module} has no debug information that describes types; install its debug symbols, or \
         compile it with -g"
    )]
    NoTypes {
        /// Where they were looked for.
        module: String,
    },
    /// Names that mean neither a function nor a type.
    #[error(
        "{module} has neither a function nor a type called {}; name the module that has \
         (MODULE:NAME), scopes as in std::string",
        .names.join(", ")
    )]
    NoSuchName {
        /// The names.
        names: Vec<String>,
        /// Where they were looked for.
        module: String,
    },
    /// Names in different modules.
    #[error("`{first}` and `{second}` are in different modules; a header is of one")]
    SeveralModules {
        /// A name.
        first: String,
        /// One with another module.
        second: String,
    },
    /// No loaded module has the name.
    #[error("no module `{module}` is loaded")]
    NoSuchModule {
        /// The name.
        module: String,
    },
    /// A name that is no pattern.
    #[error("`{pattern}`: {source}")]
    Pattern {
        /// As given.
        pattern: String,
        /// Why.
        source: flea_symbols::PatternError,
    },
}

/// A C header of types of the file at `path`: those of the functions and types `names`, and
/// all that they lead to; everything where there are no names.
///
/// ```no_run
/// let names = ["redisObject".to_owned(), "processCommand".to_owned()];
/// let header = flea::types::of_file("/usr/bin/redis-server".as_ref(), &names)?;
/// std::fs::write("redis.h", header)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// The file cannot be read, or does not have them.
pub fn of_file(path: &Path, names: &[String]) -> Result<String, TypesError> {
    let wanted = Wanted::parse(names)?;
    let file = path.to_string_lossy();
    modules::with_file(path, |symbols| wanted.header(symbols, &file))?
}

/// As [`of_file`] for the modules of a process, the main executable first.
pub(crate) fn of_modules(modules: &[Arc<Module>], names: &[String]) -> Result<String, TypesError> {
    let wanted = Wanted::parse(names)?;
    let Some(first) = modules.iter().find(|module| wanted.may_be_in(module)) else {
        let module = wanted.module_name();
        return Err(TypesError::NoSuchModule { module });
    };
    let in_first = in_module(&wanted, first);
    if wanted.names.is_empty() || !matches!(in_first, Err(TypesError::NoSuchName { .. })) {
        return in_first;
    }
    // What the program itself does not have, a library may.
    let others = modules.iter().filter(|module| wanted.may_be_in(module)).skip(1);
    others.map(|module| in_module(&wanted, module)).find(Result::is_ok).unwrap_or(in_first)
}

fn in_module(wanted: &Wanted, module: &Module) -> Result<String, TypesError> {
    module.with_symbols(|symbols| wanted.header(symbols, module.path()))?
}

/// What a header is to have.
struct Wanted {
    /// The module that all of it is in, by a pattern.
    module: Option<Pattern>,
    /// As given, and as a pattern for functions.
    names: Vec<(String, Pattern)>,
}

impl Wanted {
    fn parse(names: &[String]) -> Result<Self, TypesError> {
        let mut wanted = Self { module: None, names: Vec::new() };
        for name in names {
            let pattern = Pattern::parse(name)
                .map_err(|source| TypesError::Pattern { pattern: name.clone(), source })?;
            match (&wanted.module, wanted.names.first()) {
                (Some(Pattern { module, .. }), Some((first, _))) if *module != pattern.module => {
                    return Err(TypesError::SeveralModules {
                        first: first.clone(),
                        second: name.clone(),
                    });
                }
                (None, _) => wanted.module = Some(pattern.clone()),
                _ => {}
            }
            wanted.names.push((name.clone(), pattern));
        }
        wanted.module = wanted.module.filter(|pattern| pattern.module.is_some());
        Ok(wanted)
    }

    fn may_be_in(&self, module: &Module) -> bool {
        self.module.as_ref().is_none_or(|pattern| pattern.matches_module(module.path()))
    }

    fn module_name(&self) -> String {
        self.module.as_ref().and_then(|pattern| pattern.module.clone()).unwrap_or_default()
    }

    fn header(&self, symbols: &Symbols<'_>, module: &str) -> Result<String, TypesError> {
        let functions: Vec<(&Function, Signature)> = self
            .names
            .iter()
            .flat_map(|(_, pattern)| symbols.find(pattern))
            .map(|function| (function, symbols.signature(function)))
            .collect();
        let pairs: Vec<(&Function, &Signature)> =
            functions.iter().map(|(function, signature)| (*function, signature)).collect();
        let names: Vec<&str> =
            self.names.iter().map(|(_, pattern)| pattern.function.as_str()).collect();
        let names = if names.is_empty() { TypeNames::All } else { TypeNames::These(&names) };
        let graph = symbols.types(&pairs, names);
        let missing: Vec<String> = self
            .names
            .iter()
            .filter(|(_, pattern)| graph.types.named(&pattern.function).is_empty())
            .filter(|(_, pattern)| symbols.find(pattern).is_empty())
            .map(|(name, _)| name.clone())
            .collect();
        let module = module.to_owned();
        if !symbols.describes_types() {
            return Err(TypesError::NoTypes { module });
        }
        if !missing.is_empty() {
            return Err(TypesError::NoSuchName { names: missing, module });
        }
        let roots: Vec<_> = match names {
            TypeNames::All => graph.types.iter().map(|(id, _)| id).collect(),
            TypeNames::These(names) => {
                let named = names.iter().flat_map(|name| graph.types.named(name));
                named.chain(&graph.declared).copied().collect()
            }
        };
        Ok(header(&graph.types, &roots).text)
    }
}
