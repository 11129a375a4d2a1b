//! What a program's section name says: `SEC("fentry/libc.so.6:malloc")`. The names are
//! libbpf's (`section_defs` in `tools/lib/bpf/libbpf.c`, 6.18 and 7.0's `fsession`).

use crate::spec::ProgramKind;

/// A section name that says nothing Flea can do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SectionFault {
    /// A kind that libbpf knows.
    #[error("section '{section}': {kind} programs are not supported; {SUPPORTED}")]
    Unsupported {
        /// The section.
        section: String,
        /// What precedes the slash.
        kind: String,
    },
    /// Nothing that libbpf knows either.
    #[error("section '{section}' names nothing Flea knows; {SUPPORTED}")]
    Unknown {
        /// The section.
        section: String,
    },
    /// A slash, or a module, and no function.
    #[error("section '{section}' names no function; {SUPPORTED}")]
    NoFunction {
        /// The section.
        section: String,
    },
}

const SUPPORTED: &str = "supported are SEC(\"fentry/FUNC\"), SEC(\"fexit/FUNC\"), \
                         SEC(\"fmod_ret/FUNC\") and SEC(\"fsession/FUNC\"), where FUNC may be \
                         MODULE:FUNC";

/// What a section name says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SectionName {
    pub kind: ProgramKind,
    pub target: Option<String>,
    pub autoload: bool,
}

/// Kinds without their suffixes `.s` (sleepable), `.multi`, `.session` and the like.
const LIBBPF_KINDS: &[&str] = &[
    "action",
    "cgroup",
    "cgroup_skb",
    "classifier",
    "fentry",
    "fexit",
    "flow_dissector",
    "fmod_ret",
    "freplace",
    "fsession",
    "iter",
    "kprobe",
    "kretprobe",
    "kretsyscall",
    "ksyscall",
    "lirc_mode2",
    "lsm",
    "lsm_cgroup",
    "lwt_in",
    "lwt_out",
    "lwt_seg6local",
    "lwt_xmit",
    "netfilter",
    "netkit",
    "perf_event",
    "raw_tp",
    "raw_tracepoint",
    "sk_lookup",
    "sk_msg",
    "sk_reuseport",
    "sk_skb",
    "socket",
    "sockops",
    "struct_ops",
    "syscall",
    "tc",
    "tcx",
    "tp",
    "tp_btf",
    "tracepoint",
    "uprobe",
    "uretprobe",
    "usdt",
    "xdp",
];

/// Reads the name of a section that holds programs.
pub(crate) fn parse_name(section: &str) -> Result<SectionName, SectionFault> {
    let (autoload, name) = match section.strip_prefix('?') {
        Some(name) => (false, name),
        None => (true, section),
    };
    let (kind, target) = match name.split_once('/') {
        Some((kind, target)) => (kind, Some(target)),
        None => (name, None),
    };
    let supported =
        [ProgramKind::Fentry, ProgramKind::Fexit, ProgramKind::FmodRet, ProgramKind::Fsession];
    let Some(program) = supported.into_iter().find(|p| p.name() == kind) else {
        let section = section.to_owned();
        let base = kind.split_once('.').map_or(kind, |(base, _suffix)| base);
        return Err(if LIBBPF_KINDS.contains(&base) {
            SectionFault::Unsupported { section, kind: kind.to_owned() }
        } else {
            SectionFault::Unknown { section }
        });
    };
    if target.is_some_and(|t| t.is_empty() || t.starts_with(':') || t.ends_with(':')) {
        return Err(SectionFault::NoFunction { section: section.to_owned() });
    }
    Ok(SectionName { kind: program, target: target.map(str::to_owned), autoload })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(section: &str, kind: ProgramKind, target: Option<&str>, autoload: bool) {
        let target = target.map(str::to_owned);
        assert_eq!(parse_name(section), Ok(SectionName { kind, target, autoload }));
    }

    fn check_error(section: &str, expect: &str) {
        let error = parse_name(section).unwrap_err().to_string();
        assert!(error.starts_with(&format!("section '{section}'{expect}")), "{error}");
        assert!(error.contains("SEC(\"fentry/FUNC\")"), "{error}");
    }

    #[test]
    fn names_that_flea_knows() {
        check("fentry/malloc", ProgramKind::Fentry, Some("malloc"), true);
        check("?fexit/libc.so.6:malloc", ProgramKind::Fexit, Some("libc.so.6:malloc"), false);
        check("fsession/a::b(int)", ProgramKind::Fsession, Some("a::b(int)"), true);
        check("fmod_ret/malloc", ProgramKind::FmodRet, Some("malloc"), true);
        check("fentry", ProgramKind::Fentry, None, true);
    }

    #[test]
    fn names_that_libbpf_knows() {
        for kind in [
            "kprobe",
            "kprobe.multi",
            "kprobe.session",
            "uprobe",
            "uprobe.s",
            "uretprobe",
            "uretprobe.multi",
            "usdt",
            "fmod_ret.s",
            "freplace",
            "tracepoint",
            "tp",
            "raw_tp.w",
            "lsm",
            "fentry.s",
            "fexit.multi",
            "fsession.s",
            "struct_ops",
            "iter",
        ] {
            check_error(&format!("{kind}/x"), &format!(": {kind} programs are not supported"));
        }
        for section in ["xdp", "xdp.frags/cpumap", "socket", "cgroup_skb/egress", "perf_event"] {
            check_error(section, ": ");
        }
        check_error("?kprobe/x", ": kprobe programs are not supported");
    }

    #[test]
    fn names_that_nobody_knows() {
        for section in ["foo/bar", "fentryx/y", "", "?", "/x", ".s/x"] {
            check_error(section, " names nothing Flea knows");
        }
        for section in ["fentry/", "fexit/libc:", "fexit/:f"] {
            check_error(section, " names no function");
        }
    }
}
