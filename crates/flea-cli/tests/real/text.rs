//! What a process executes, byte for byte: read before Flea comes and after it has gone.

use std::{fs::File, os::unix::fs::FileExt as _};

/// The executable, file-backed memory of a process.
#[derive(PartialEq, Eq)]
pub struct Text {
    mappings: Vec<Mapping>,
}

#[derive(PartialEq, Eq)]
struct Mapping {
    start: u64,
    path: String,
    bytes: Vec<u8>,
}

impl Text {
    /// Reads it.
    pub fn of(pid: u32) -> Self {
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut mappings = Vec::new();
        for line in maps(pid).lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (range, perms) = (fields[0], fields[1]);
            let path = fields.get(5).copied().unwrap_or_default();
            if !perms.starts_with("r-x") || !path.starts_with('/') {
                continue;
            }
            let (start, end) = range.split_once('-').unwrap();
            let start = u64::from_str_radix(start, 16).unwrap();
            let end = u64::from_str_radix(end, 16).unwrap();
            let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
            memory.read_exact_at(&mut bytes, start).unwrap();
            mappings.push(Mapping { start, path: path.to_owned(), bytes });
        }
        assert!(!mappings.is_empty(), "process {pid} has no text");
        Self { mappings }
    }

    /// Checks that process `pid` has exactly this text, and nothing of Flea's in it.
    #[track_caller]
    pub fn assert_untouched(&self, pid: u32) {
        self.assert_same(pid);
        assert!(!has_flea(pid), "something of Flea's is left: {}", maps(pid));
    }

    #[track_caller]
    fn assert_same(&self, pid: u32) {
        let now = Self::of(pid);
        assert_eq!(self.mappings.len(), now.mappings.len(), "{}", maps(pid));
        for (before, after) in self.mappings.iter().zip(&now.mappings) {
            assert_eq!((before.start, &before.path), (after.start, &after.path));
            let differs = before.bytes.iter().zip(&after.bytes).position(|(a, b)| a != b);
            if let Some(at) = differs {
                let show = |bytes: &[u8]| format!("{:02x?}", &bytes[at..(at + 8).min(bytes.len())]);
                panic!(
                    "{} differs at {:#x} (offset {at:#x} of the mapping): {} became {}",
                    before.path,
                    before.start + at as u64,
                    show(&before.bytes),
                    show(&after.bytes),
                );
            }
        }
    }
}

/// Whether memory of Flea's is mapped in process `pid`.
pub fn has_flea(pid: u32) -> bool {
    maps(pid).contains("/memfd:flea")
}

/// `/proc/PID/maps`
pub fn maps(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap()
}
