//! The modules of a process: which files are mapped executable, where, and what functions
//! they have. Files are opened as the target sees them (its root directory), and only if they
//! still are the ones that it mapped.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use flea_object::types::Types;
use flea_process::{Mapping, Pid, ProcError};
use flea_symbols::{
    ModuleError, TypeNames,
    addr::{RemoteAddr, Svma},
};
use self_cell::self_cell;

use crate::{
    file_bytes::{self, FileBytes},
    frames_file,
    registry::SiteFile,
};

pub(crate) type Symbols<'data> = flea_symbols::Module<'data>;

/// The bytes of a module and of its debug files.
struct Files {
    image: FileBytes,
    debug: Option<FileBytes>,
    alt_debug: Option<FileBytes>,
}

self_cell! {
    struct ParsedFiles {
        owner: Files,
        #[not_covariant]
        dependent: Symbols,
    }
}

/// A file that the target has mapped executable.
pub struct Module {
    path: String,
    open_path: PathBuf,
    /// Its first executable mapping.
    mapping: Mapping,
    is_main: bool,
    /// The process forbids returns to addresses that were pushed.
    has_shadow_stack: bool,
    /// Shared by all processes that have mapped the file.
    parsed: Arc<Parsed>,
}

type Parsed = OnceLock<Result<ParsedFiles, Arc<OpenError>>>;

/// A module whose functions cannot be known.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened.
    #[error("{path}: cannot be opened: {source}")]
    Io {
        /// The path in the target's view.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// It was in the memory map a moment ago.
    #[error("{path}: the process has closed it since it was looked for; try again")]
    Closed {
        /// The path in the target's view.
        path: String,
    },
    /// Another file has that path now.
    #[error(
        "{path}: the file was replaced since the process mapped it; restart the process, or \
         put the old file back"
    )]
    Replaced {
        /// The path.
        path: String,
    },
    /// Not a module that Flea reads.
    #[error("{path}: {source}")]
    Parse {
        /// The path.
        path: String,
        /// Why.
        source: ModuleError,
    },
    /// Mapped in a way that its program headers do not explain.
    #[error("{path}: its mapping at {at} matches no segment of the file")]
    NoSegment {
        /// The path.
        path: String,
        /// Start of the mapping.
        at: RemoteAddr,
    },
}

/// The modules of process `pid`, the main executable first.
pub(crate) fn list(pid: Pid) -> Result<Vec<Arc<Module>>, ProcError> {
    let main = flea_process::exe(pid)?;
    let main = main.to_string_lossy().into_owned();
    let has_shadow_stack = flea_process::may_use_shadow_stack(pid)?;
    let mut modules: Vec<Module> = Vec::new();
    for mapping in flea_process::maps(pid)? {
        let path = mapping.path.clone();
        let is_ours = Path::new(&path).file_name().is_some_and(|name| name == frames_file::NAME);
        let is_main = path == main;
        // A program may be executed from a memfd; what else is in one is no module with a name.
        let is_no_file = !path.starts_with('/') || path.starts_with("/memfd:") && !is_main;
        if !mapping.perms.execute || is_no_file || is_ours {
            continue;
        }
        if modules.iter().any(|m| m.mapping.same_file(&mapping)) {
            continue;
        }
        let open_path = if is_main {
            PathBuf::from(format!("/proc/{}/exe", flea_process::stand_in(pid)))
        } else {
            match flea_process::module_file_path(pid, &mapping) {
                Ok(open_path) => open_path,
                // It has been closed meanwhile.
                Err(_) if !flea_process::maps(pid)?.contains(&mapping) => continue,
                Err(error) => return Err(error),
            }
        };
        let parsed = Arc::default();
        modules.push(Module { path, open_path, mapping, is_main, has_shadow_stack, parsed });
    }
    modules.sort_by_key(|m| !m.is_main);
    Ok(modules.into_iter().map(Arc::new).collect())
}

/// As [`list`]; the modules that are among `known` are those, with what was read of them.
pub(crate) fn list_again(pid: Pid, known: &[Arc<Module>]) -> Result<Vec<Arc<Module>>, ProcError> {
    let mut modules = list(pid)?;
    for module in &mut modules {
        if let Some(same) = known.iter().find(|k| k.mapping == module.mapping) {
            *module = Arc::clone(same);
        }
    }
    Ok(modules)
}

/// As [`list`], for another process than that of `known`: files that are among those are not read
/// once more.
pub(crate) fn list_knowing(pid: Pid, known: &[Arc<Module>]) -> Result<Vec<Arc<Module>>, ProcError> {
    let mut modules = list(pid)?;
    for module in &mut modules {
        let same = |k: &&Arc<Module>| k.is_same_file(module);
        if let (Some(same), Some(module)) = (known.iter().find(same), Arc::get_mut(module)) {
            module.parsed = Arc::clone(&same.parsed);
        }
    }
    Ok(modules)
}

impl Module {
    /// Whether it is the program itself.
    pub(crate) fn is_main(&self) -> bool {
        self.is_main
    }

    /// Whether the process forbids returns to addresses that were pushed.
    pub(crate) fn has_shadow_stack(&self) -> bool {
        self.has_shadow_stack
    }

    /// Its path as the target sees it.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether both are one file.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        self.mapping.same_file(&other.mapping) && self.path == other.path
    }

    /// Whether it is the very file with this metadata.
    pub(crate) fn is_file(&self, file: &Metadata) -> bool {
        let same = |own: Metadata| (own.dev(), own.ino()) == (file.dev(), file.ino());
        std::fs::metadata(&self.open_path).is_ok_and(same)
    }

    /// What of its file is mapped at `site`, where that is in its first executable mapping.
    pub(crate) fn file_at(&self, site: RemoteAddr) -> Option<SiteFile> {
        self.mapping.contains(site).then(|| SiteFile::at(site, &self.mapping))
    }

    /// Last component of its path.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// Runs `f` on the module's symbols, which are read on the first call.
    pub(crate) fn with_symbols<R>(
        &self,
        f: impl FnOnce(&Symbols<'_>) -> R,
    ) -> Result<R, Arc<OpenError>> {
        let parsed = self.parsed.get_or_init(|| self.open().map_err(Arc::new));
        match parsed {
            Ok(cell) => Ok(cell.with_dependent(|_, symbols| f(symbols))),
            Err(error) => Err(Arc::clone(error)),
        }
    }

    /// The types that programs may call by one of `names`.
    pub(crate) fn types_named(&self, names: &[&str]) -> Result<Types, Arc<OpenError>> {
        self.with_symbols(|s| s.types(&[], TypeNames::These(names)).types)
    }

    /// Where `address` is in the target.
    pub(crate) fn remote(&self, address: Svma) -> Result<RemoteAddr, Arc<OpenError>> {
        Ok(RemoteAddr(address.0.wrapping_add(self.bias()?)))
    }

    /// What the file says of an address of the target; `None` outside of the module.
    pub(crate) fn stated(&self, address: RemoteAddr) -> Result<Option<Svma>, Arc<OpenError>> {
        let stated = Svma(address.0.wrapping_sub(self.bias()?));
        let inside = self.with_symbols(|s| {
            let mut segments = s.segments().iter();
            segments.any(|segment| {
                stated.0.checked_sub(segment.address.0).is_some_and(|at| at < segment.size_bytes)
            })
        })?;
        Ok(inside.then_some(stated))
    }

    fn bias(&self) -> Result<u64, Arc<OpenError>> {
        let first = &self.mapping;
        let no_segment =
            || Arc::new(OpenError::NoSegment { path: self.path.clone(), at: first.start });
        let stated = self.with_symbols(|s| s.code_mapping_to_svma(first.offset))?;
        Ok(first.start.0.wrapping_sub(stated.ok_or_else(no_segment)?.0))
    }

    /// A module of which nothing but its path is known.
    #[cfg(test)]
    pub(crate) fn unread(path: &str) -> Self {
        let line = format!("400000-401000 r-xp 00000000 00:01 1 {path}");
        let mapping = flea_process::parse_maps(&line).remove(0);
        let (path, open_path) = (path.to_owned(), PathBuf::from(path));
        Self {
            path,
            open_path,
            mapping,
            is_main: false,
            has_shadow_stack: false,
            parsed: Arc::default(),
        }
    }

    fn open(&self) -> Result<ParsedFiles, OpenError> {
        let io = |source: io::Error| match source.kind() {
            // The link is there for as long as the mapping.
            io::ErrorKind::NotFound if self.open_path.iter().any(|part| part == "map_files") => {
                OpenError::Closed { path: self.path.clone() }
            }
            _ => OpenError::Io { path: self.path.clone(), source },
        };
        let file = flea_process::open_regular(&self.open_path).map_err(io)?;
        if file.metadata().map_err(io)?.ino() != self.mapping.inode {
            return Err(OpenError::Replaced { path: self.path.clone() });
        }
        ParsedFiles::read(&file, &self.path)
    }
}

impl ParsedFiles {
    /// `path` is what the file is called.
    fn read(file: &File, path: &str) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let image = file_bytes::read(file).map_err(io)?;
        let parse = |source| OpenError::Parse { path: path.to_owned(), source };
        let (debug, alt_debug) = debug_files(&image, path).map_err(parse)?;
        Self::try_new(Files { image, debug, alt_debug }, |files| {
            flea_symbols::Module::parse_files(flea_symbols::Files {
                image: &files.image,
                debug: files.debug.as_deref(),
                alt_debug: files.alt_debug.as_deref(),
            })
            .map_err(parse)
        })
    }
}

/// Runs `f` on the symbols of the file at `path`, which no process need have mapped.
pub(crate) fn with_file<R>(path: &Path, f: impl FnOnce(&Symbols<'_>) -> R) -> Result<R, OpenError> {
    let name = path.to_string_lossy();
    let io = |source| OpenError::Io { path: name.clone().into_owned(), source };
    // What belongs to it is looked for beside it.
    let file = flea_process::open_regular(path).map_err(io)?;
    let real = path.canonicalize().map_err(io)?;
    let parsed = ParsedFiles::read(&file, &real.to_string_lossy())?;
    Ok(parsed.with_dependent(|_, symbols| f(symbols)))
}

/// The separate debug files of `image`, where the system has them installed.
fn debug_files(
    image: &[u8],
    path: &str,
) -> Result<(Option<FileBytes>, Option<FileBytes>), ModuleError> {
    let module = flea_symbols::Module::parse(image, None)?;
    let debug = module.build_id().and_then(by_build_id).or_else(|| {
        let (name, _crc) = module.debuglink()?;
        let name = std::str::from_utf8(name).ok()?;
        let directory = Path::new(path).parent()?;
        [directory.join(name), directory.join(".debug").join(name)]
            .iter()
            .chain([&Path::new("/usr/lib/debug")
                .join(directory.strip_prefix("/").ok()?)
                .join(name)])
            .find_map(|candidate| read(candidate))
    });
    let alt = match &debug {
        Some(debug) => flea_symbols::Module::parse(image, Some(debug)).ok().and_then(|m| alt(&m)),
        None => alt(&module),
    };
    Ok((debug, alt))
}

fn read(path: &Path) -> Option<FileBytes> {
    file_bytes::read(&flea_process::open_regular(path).ok()?).ok()
}

fn alt(module: &Symbols<'_>) -> Option<FileBytes> {
    let (_path, build_id) = module.debugaltlink()?;
    by_build_id(build_id)
}

fn by_build_id(id: &[u8]) -> Option<FileBytes> {
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let (head, tail) = hex.split_at_checked(2)?;
    let path = format!("/usr/lib/debug/.build-id/{head}/{tail}.debug");
    read(Path::new(&path))
}
