//! The bytes of a file that somebody else may change meanwhile.
//!
//! A mapped file that is cut short ends its reader by SIGBUS, and bytes that change under a `&[u8]`
//! are nothing that Rust allows. So only a file is mapped that none but root and this very user may
//! write, either of whom can end us anyway; any other one is copied. Installed programs, whose
//! debug information may take gigabytes, are root's.

use std::{
    fs::{File, Metadata},
    io::{self, Read as _},
    ops::Deref,
    os::unix::fs::MetadataExt as _,
};

use memmap2::Mmap;

/// What is copied at most: a sparse file of any size costs its owner nothing.
const MAX_COPIED_BYTES: u64 = 4 << 30;
/// Write permission of group and others.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// A file's bytes as they were when it was read, or as they stay.
#[derive(Debug)]
pub(crate) enum FileBytes {
    Mapped(Mmap),
    Copied(Vec<u8>),
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Copied(bytes) => bytes,
        }
    }
}

/// All of a regular file.
pub(crate) fn read(file: &File) -> io::Result<FileBytes> {
    let metadata = file.metadata()?;
    if stays_as_it_is(&metadata) {
        // SAFETY: `Mmap` wants that nobody truncates or changes the file meanwhile. Nobody but
        // root and this user may; they replace programs by rename, as the kernel refuses to
        // write to a running one (ETXTBSY).
        return unsafe { Mmap::map(file) }.map(FileBytes::Mapped);
    }
    copy(file, metadata.len(), MAX_COPIED_BYTES).map(FileBytes::Copied)
}

fn stays_as_it_is(metadata: &Metadata) -> bool {
    let owner = metadata.uid();
    let is_trusted = owner == 0 || owner == nix::unistd::geteuid().as_raw();
    is_trusted && metadata.mode() & WRITABLE_BY_OTHERS == 0
}

fn copy(file: &File, size_bytes: u64, limit_bytes: u64) -> io::Result<Vec<u8>> {
    let too_large = || {
        let text = format!("it has over {limit_bytes} bytes, and others than root may write to it");
        io::Error::new(io::ErrorKind::FileTooLarge, text)
    };
    if size_bytes > limit_bytes {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(usize::try_from(size_bytes).unwrap_or(usize::MAX))?;
    // It may have grown since.
    file.take(limit_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit_bytes { Err(too_large()) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("flea-{name}-{}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    /// What a target does that wants its tracer dead.
    #[test]
    fn a_file_that_is_cut_short_ends_nobody() {
        let path = Scratch::new("cut");
        std::fs::write(&path.0, vec![7; 10_000]).unwrap();
        std::fs::set_permissions(&path.0, std::fs::Permissions::from_mode(0o666)).unwrap();
        let bytes = read(&File::open(&path.0).unwrap()).unwrap();
        File::options().write(true).open(&path.0).unwrap().set_len(0).unwrap();
        assert!(matches!(bytes, FileBytes::Copied(_)));
        assert!(bytes.len() == 10_000 && bytes.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn what_only_we_may_write_is_mapped() {
        let path = Scratch::new("own");
        std::fs::write(&path.0, b"own").unwrap();
        std::fs::set_permissions(&path.0, std::fs::Permissions::from_mode(0o644)).unwrap();
        let bytes = read(&File::open(&path.0).unwrap()).unwrap();
        assert!(matches!(bytes, FileBytes::Mapped(_)));
        assert_eq!(&*bytes, b"own");
    }

    #[test]
    fn a_file_larger_than_memory_is_refused() {
        let path = Scratch::new("sparse");
        let file = File::create_new(&path.0).unwrap();
        file.set_len(1 << 40).unwrap();
        std::fs::set_permissions(&path.0, std::fs::Permissions::from_mode(0o666)).unwrap();
        let refused = read(&File::open(&path.0).unwrap()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::FileTooLarge);
        assert!(copy(&File::open(&path.0).unwrap(), 10, 100).is_err(), "it has grown since");
    }
}
