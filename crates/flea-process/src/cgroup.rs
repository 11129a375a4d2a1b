//! How much memory a process may use before its control group runs out of it.
//!
//! Memory of ours in the target is charged to the target's group. Where that is full the kernel
//! reclaims, and then kills: so whoever adds memory asks first.

use std::path::{Path, PathBuf};

use crate::proc::{Pid, read_to_string};

/// What a process's control groups leave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLeft {
    /// Bytes until the tightest limit, with what the page cache could give back.
    pub bytes: u64,
    /// The group with that limit.
    pub group: PathBuf,
}

/// The tightest limit of the groups that process `pid` is in; `None` where there is none, or
/// where they cannot be seen.
#[must_use]
pub fn memory_left(pid: Pid) -> Option<MemoryLeft> {
    let groups = read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let mounts = read_to_string("/proc/self/mountinfo").ok()?;
    let (hierarchy, root, path) = memory_group(&groups, &mounts)?;
    let mut tightest: Option<MemoryLeft> = None;
    for group in root.join(path.strip_prefix("/").unwrap_or(&path)).ancestors() {
        if !group.starts_with(&root) {
            break;
        }
        if let Some(bytes) = hierarchy.left(group)
            && tightest.as_ref().is_none_or(|other| bytes < other.bytes)
        {
            tightest = Some(MemoryLeft { bytes, group: group.to_owned() });
        }
    }
    tightest
}

/// The two versions of control groups name their files differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hierarchy {
    V1,
    V2,
}

/// The version, where its hierarchy is mounted, and the process's group in there.
fn memory_group(groups: &str, mounts: &str) -> Option<(Hierarchy, PathBuf, PathBuf)> {
    for line in groups.lines() {
        // hierarchy:controllers:path
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        if !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        let (root, top) = mounted(mounts, "cgroup", "memory")?;
        return Some((Hierarchy::V1, root, below(path, &top)?));
    }
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let (root, top) = mounted(mounts, "cgroup2", "")?;
    Some((Hierarchy::V2, root, below(path, &top)?))
}

/// Where a file system with such an option is mounted, and which of its directories that is.
fn mounted(mounts: &str, kind: &str, option: &str) -> Option<(PathBuf, String)> {
    mounts.lines().find_map(|line| {
        // id parent device directory mount-point options ... - type source options
        let (mount, rest) = line.split_once(" - ")?;
        let mut rest = rest.split(' ');
        let (found, options) = (rest.next()?, rest.nth(1)?);
        let mut mount = mount.split(' ').skip(3);
        let (top, point) = (mount.next()?, mount.next()?);
        let fits = found == kind && (option.is_empty() || options.split(',').any(|o| o == option));
        fits.then(|| (PathBuf::from(point), top.to_owned()))
    })
}

/// A group's path, seen from the directory that is mounted; `None` where it is outside of that.
fn below(path: &str, top: &str) -> Option<PathBuf> {
    let path = Path::new(path);
    let below = path.strip_prefix(top).ok()?;
    (!path.starts_with("/..")).then(|| below.to_owned())
}

impl Hierarchy {
    fn left(self, group: &Path) -> Option<u64> {
        let (limit, usage, prefix) = match self {
            Self::V1 => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            Self::V2 => ("memory.max", "memory.current", ""),
        };
        let number = |name: &str| read_to_string(group.join(name)).ok()?.trim().parse().ok();
        // `max` is no number, and version 1 says the largest one.
        let limit: u64 = number(limit).filter(|limit| *limit < i64::MAX.cast_unsigned() >> 1)?;
        let usage: u64 = number(usage)?;
        let stat = read_to_string(group.join("memory.stat")).unwrap_or_default();
        let cache = |name: &str| {
            let line = stat.lines().find_map(|l| l.strip_prefix(prefix)?.strip_prefix(name));
            line.and_then(|rest| rest.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        let used =
            usage.saturating_sub(cache("inactive_file ")).saturating_sub(cache("active_file "));
        Some(limit.saturating_sub(used))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const MOUNTS: &str = "\
        30 25 0:26 / /sys/fs/cgroup rw,nosuid - tmpfs tmpfs rw\n\
        31 30 0:27 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw,nsdelegate\n\
        32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        33 30 0:29 /box /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";

    #[test]
    fn which_group() {
        let v1 = memory_group("5:cpu:/x\n4:hugetlb,memory:/box/a\n0::/y\n", MOUNTS);
        let root = PathBuf::from("/sys/fs/cgroup/memory");
        assert_eq!(v1, Some((Hierarchy::V1, root, "a".into())));
        let v2 = memory_group("5:cpu:/x\n0::/y/z\n", MOUNTS);
        let root = PathBuf::from("/sys/fs/cgroup/unified");
        assert_eq!(v2, Some((Hierarchy::V2, root, "y/z".into())));
        // Groups that are not to be seen from here.
        assert_eq!(memory_group("4:memory:/other\n", MOUNTS), None);
        assert_eq!(memory_group("0::/../y\n", MOUNTS), None);
        assert_eq!(memory_group("", MOUNTS), None);
    }

    #[test]
    fn the_page_cache_can_be_given_back() {
        let dir = std::env::temp_dir().join(format!("flea-cgroup-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
        write("memory.current", "900\n");
        write("memory.stat", "anon 1\nactive_file 100\ninactive_file 50\n");
        write("memory.max", "1000\n");
        assert_eq!(Hierarchy::V2.left(&dir), Some(250));
        write("memory.max", "max\n");
        assert_eq!(Hierarchy::V2.left(&dir), None);
        fs::remove_dir_all(dir).unwrap();
    }
}
