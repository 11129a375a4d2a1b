//! `/proc/PID/maps`, parsed. Pure: the text comes in, mappings go out.

use flea_symbols::addr::{FileOffset, RemoteAddr};

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: RemoteAddr,
    /// One past the last byte.
    pub end: RemoteAddr,
    /// What may be done with it.
    pub perms: Perms,
    /// Where in the file it starts.
    pub offset: FileOffset,
    /// The file system's device: major, minor.
    pub dev: (u32, u32),
    /// The file's number there; 0 for memory without a file.
    pub inode: u64,
    /// The file, or a name such as `[heap]`; empty for anonymous memory. Without the kernel's
    /// ` (deleted)`, which is [`Mapping::deleted`].
    pub path: String,
    /// The file has been unlinked since it was mapped (as by a package upgrade).
    pub deleted: bool,
}

/// Permissions of a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Perms {
    /// `r`
    pub read: bool,
    /// `w`
    pub write: bool,
    /// `x`
    pub execute: bool,
    /// `s` (else private, `p`)
    pub shared: bool,
}

impl Mapping {
    /// Bytes it covers.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.end.0 - self.start.0
    }

    /// Whether `addr` is in it.
    #[must_use]
    pub fn contains(&self, addr: RemoteAddr) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Whether both are mappings of one file.
    #[must_use]
    pub fn same_file(&self, other: &Self) -> bool {
        self.inode != 0 && self.inode == other.inode && self.dev == other.dev
    }
}

/// Parses the whole file. Lines that are not of the known form are left out: the kernel
/// writes none, and a reader of someone else's address space must not fail on a new suffix.
#[must_use]
pub fn parse_maps(text: &str) -> Vec<Mapping> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mapping> {
    // 7f30a000-7f30b000 r-xp 00001000 fe:01 1234      /usr/lib/a b.so (deleted)
    let mut rest = line;
    let mut field = || {
        rest = rest.trim_start_matches(' ');
        let end = rest.find(' ').unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail;
        word
    };
    let (start, end) = field().split_once('-')?;
    let perms = field().as_bytes();
    let offset = field();
    let (major, minor) = field().split_once(':')?;
    let inode = field().parse().ok()?;
    let name = rest.trim_start_matches(' ');
    let (path, deleted) = match name.strip_suffix(" (deleted)") {
        Some(path) => (path, true),
        None => (name, false),
    };
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    if end < start {
        return None;
    }
    Some(Mapping {
        start: RemoteAddr(start),
        end: RemoteAddr(end),
        perms: Perms {
            read: perms.first()? == &b'r',
            write: perms.get(1)? == &b'w',
            execute: perms.get(2)? == &b'x',
            shared: perms.get(3)? == &b's',
        },
        offset: FileOffset(u64::from_str_radix(offset, 16).ok()?),
        dev: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode,
        path: unescape(path),
        deleted,
    })
}

/// The kernel writes a newline in a path as `\012`.
fn unescape(path: &str) -> String {
    path.replace("\\012", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind() {
        let text = "\
00400000-00401000 r--p 00000000 fe:01 77                         /opt/a b/prog (deleted)
00401000-00402000 r-xp 00001000 fe:01 77                         /opt/a b/prog (deleted)
01000000-01021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000001000 rw-s 00000000 00:05 9                  /memfd:flea (deleted)
7ffc00000000-7ffc00001000 rw-p 00000000 00:00 0 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0          [vsyscall]
nonsense
";
        let maps = parse_maps(text);
        assert_eq!(maps.len(), 6);
        assert_eq!(maps[0].path, "/opt/a b/prog");
        assert!(maps[0].deleted && maps[0].same_file(&maps[1]));
        assert_eq!(maps[1].offset, FileOffset(0x1000));
        assert_eq!(maps[1].dev, (0xfe, 1));
        assert!(maps[1].perms.execute && !maps[1].perms.write);
        assert_eq!(maps[2].path, "[heap]");
        assert!(maps[3].perms.shared && maps[3].deleted);
        assert_eq!(maps[4].path, "");
        assert!(maps[5].contains(RemoteAddr(0xffff_ffff_ff60_0000)));
    }
}
