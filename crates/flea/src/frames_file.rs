//! The file that code arenas are mapped from where it exists, so that `perf record --call-graph
//! dwarf` walks through frames of ours: see [`flea_image::frames_file`].
//!
//! perf looks for unwind rows in the files that a process has mapped, when the process may be
//! long gone. So the file has to be in the file system, and stay there; nothing of it depends
//! on the process. Without it arenas are anonymous memory, and all but perf's DWARF is the same.
//!
//! Like every library, the file must not be shortened while a process has it mapped. It is
//! replaced by a new one, not written over, and used only if others than its owner cannot
//! write to it.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use flea_image::frames_file::{FILE_BYTES, HEAD_BYTES, head};
use flea_process::Pid;

/// Its name, whatever its directory: by it, it is told from the modules of a process.
pub const NAME: &str = "flea-frames.so";
/// Where it is looked for, unless [`VARIABLE`] names another place.
pub const DEFAULT_PATH: &str = "/usr/local/lib/flea-frames.so";
/// The environment variable with the path of another one.
pub const VARIABLE: &str = "FLEA_FRAMES_FILE";

/// Why the file was not made.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// It would not be used.
    #[error("{path}: the file has to be called {NAME}, and its path to begin with `/`")]
    Name {
        /// What was asked for.
        path: PathBuf,
    },
    /// It cannot be written.
    #[error("{path}: {source}; nothing was changed. Name another directory, and set {VARIABLE}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Where the file is, or would be.
#[must_use]
pub fn path() -> PathBuf {
    env::var_os(VARIABLE).map_or_else(|| PathBuf::from(DEFAULT_PATH), PathBuf::from)
}

/// Makes the file. Processes that have an older one mapped keep that.
///
/// # Errors
/// [`WriteError`]
pub fn write(path: &Path) -> Result<(), WriteError> {
    if path.file_name() != Some(OsStr::new(NAME)) || !path.is_absolute() {
        return Err(WriteError::Name { path: path.to_owned() });
    }
    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = write_draft(&draft).and_then(|()| fs::rename(&draft, path));
    written.map_err(|source| {
        // What failed first is what is told.
        let _ = fs::remove_file(&draft);
        WriteError::Io { path: path.to_owned(), source }
    })
}

fn write_draft(path: &Path) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(&head())?;
    file.set_len(FILE_BYTES)?;
    file.set_permissions(Permissions::from_mode(0o644))
}

/// The path of the file, if process `pid` would find it there, and it is one.
pub(crate) fn usable(pid: Pid) -> Option<PathBuf> {
    let path = path();
    let in_root = path.strip_prefix("/").ok()?;
    let seen =
        Path::new("/proc").join(flea_process::stand_in(pid).to_string()).join("root").join(in_root);
    (path.file_name()? == NAME && is_frames_file(&seen).unwrap_or(false)).then_some(path)
}

fn is_frames_file(path: &Path) -> io::Result<bool> {
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    let file = flea_process::open_regular(path)?;
    let metadata = file.metadata()?;
    let fits = metadata.is_file()
        && metadata.len() == FILE_BYTES
        && metadata.mode() & WRITABLE_BY_OTHERS == 0;
    if !fits {
        return Ok(false);
    }
    let mut found = Vec::new();
    file.take(HEAD_BYTES).read_to_end(&mut found)?;
    Ok(found == head())
}
