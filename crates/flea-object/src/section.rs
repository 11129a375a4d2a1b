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
    /// A place inside a function.
    #[error(
        "section '{section}': programs are attached to a function's entry, not {offset} bytes \
         behind it; name the function alone"
    )]
    Offset {
        /// The section.
        section: String,
        /// What follows the function's name.
        offset: i64,
    },
}

const SUPPORTED: &str = "supported are SEC(\"fentry/FUNC\"), SEC(\"fexit/FUNC\"), \
                         SEC(\"fmod_ret/FUNC\"), SEC(\"fsession/FUNC\"), \
                         SEC(\"uprobe/FUNC\") and SEC(\"uretprobe/FUNC\"), where FUNC may be \
                         MODULE:FUNC, and all but fmod_ret with .multi, as \
                         SEC(\"fentry.multi/GLOB\")";
/// Kinds that there are.
const KINDS: &[ProgramKind] = &[
    ProgramKind::Fentry,
    ProgramKind::Fexit,
    ProgramKind::Fsession,
    ProgramKind::FmodRet,
    ProgramKind::Uprobe,
    ProgramKind::Uretprobe,
];
/// Those that Linux has a `.multi` form of.
const MULTI_KINDS: &[ProgramKind] = &[
    ProgramKind::Fentry,
    ProgramKind::Fexit,
    ProgramKind::Fsession,
    ProgramKind::Uprobe,
    ProgramKind::Uretprobe,
];

/// What a section name says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SectionName {
    pub kind: ProgramKind,
    /// `.multi`
    pub multi: bool,
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
    let (base, suffix) = match kind.split_once('.') {
        Some((base, suffix)) => (base, Some(suffix)),
        None => (kind, None),
    };
    let of = |kinds: &[ProgramKind]| kinds.iter().copied().find(|p| p.name() == base);
    let program = match suffix {
        None => of(KINDS),
        Some("multi") => of(MULTI_KINDS),
        Some(_) => None,
    };
    let Some(program) = program else {
        let section = section.to_owned();
        return Err(if LIBBPF_KINDS.contains(&base) {
            SectionFault::Unsupported { section, kind: kind.to_owned() }
        } else {
            SectionFault::Unknown { section }
        });
    };
    let is_probe = matches!(program, ProgramKind::Uprobe | ProgramKind::Uretprobe);
    let target = match target {
        Some(target) if is_probe => Some(without_offset(section, target)?),
        other => other,
    };
    let no_function = |t: &str| {
        let path_alone = is_probe && t.starts_with('/') && !t.contains(':');
        path_alone || t.is_empty() || t.starts_with(':') || t.ends_with(':')
    };
    if target.is_some_and(no_function) {
        return Err(SectionFault::NoFunction { section: section.to_owned() });
    }
    let target = target.map(str::to_owned);
    Ok(SectionName { kind: program, multi: suffix.is_some(), target, autoload })
}

/// `FUNC` of `FUNC+0`; any other number is refused. As in libbpf a number is what `strtol`
/// takes, and anything else belongs to the name (`operator+`).
fn without_offset<'a>(section: &str, target: &'a str) -> Result<&'a str, SectionFault> {
    let Some((function, text)) = target.rsplit_once('+') else { return Ok(target) };
    let offset = match text.strip_prefix("0x") {
        Some(hex) => i64::from_str_radix(hex, 16),
        None if text.starts_with('0') => i64::from_str_radix(text, 8),
        None => text.parse(),
    };
    match offset {
        Ok(0) => Ok(function),
        Ok(offset) => Err(SectionFault::Offset { section: section.to_owned(), offset }),
        Err(_) => Ok(target),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(section: &str, kind: ProgramKind, target: Option<&str>, autoload: bool) {
        let target = target.map(str::to_owned);
        assert_eq!(parse_name(section), Ok(SectionName { kind, multi: false, target, autoload }));
    }

    fn check_multi(section: &str, kind: ProgramKind, target: &str) {
        let target = Some(target.to_owned());
        let autoload = !section.starts_with('?');
        assert_eq!(parse_name(section), Ok(SectionName { kind, multi: true, target, autoload }));
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
    fn names_of_probes() {
        let (uprobe, uretprobe) = (ProgramKind::Uprobe, ProgramKind::Uretprobe);
        check("uprobe", uprobe, None, true);
        check("?uretprobe", uretprobe, None, false);
        check("uprobe/malloc", uprobe, Some("malloc"), true);
        check("uretprobe/libc.so.6:malloc", uretprobe, Some("libc.so.6:malloc"), true);
        check("uprobe//usr/bin/x:main", uprobe, Some("/usr/bin/x:main"), true);
        check("uprobe//proc/self/exe:a::b", uprobe, Some("/proc/self/exe:a::b"), true);
        check("uprobe/x:main+0", uprobe, Some("x:main"), true);
        check("uprobe/x:main+0x0", uprobe, Some("x:main"), true);
        check("uprobe/x:operator+", uprobe, Some("x:operator+"), true);
        check("uprobe/x:operator+(int)", uprobe, Some("x:operator+(int)"), true);
        for (section, offset) in
            [("uprobe/f+1", 1), ("uretprobe//bin/x:f+0x10", 16), ("uprobe/x:f+010", 8)]
        {
            let section = section.to_owned();
            assert_eq!(parse_name(&section), Err(SectionFault::Offset { section, offset }));
        }
        // Only probes have offsets.
        check("fentry/f+1", ProgramKind::Fentry, Some("f+1"), true);
    }

    #[test]
    fn names_of_programs_on_many_functions() {
        check_multi("fentry.multi/mall*", ProgramKind::Fentry, "mall*");
        check_multi("fexit.multi/libc.so.6:?alloc", ProgramKind::Fexit, "libc.so.6:?alloc");
        check_multi("?fsession.multi/f", ProgramKind::Fsession, "f");
        check_multi("uprobe.multi//bin/x:a*", ProgramKind::Uprobe, "/bin/x:a*");
        check_multi("uretprobe.multi/x:*", ProgramKind::Uretprobe, "x:*");
    }

    #[test]
    fn names_that_libbpf_knows() {
        for kind in [
            "kprobe",
            "kprobe.multi",
            "kprobe.session",
            "uprobe.s",
            "uprobe.session",
            "uprobe.multi.s",
            "uretprobe.s",
            "usdt",
            "fmod_ret.s",
            "freplace",
            "tracepoint",
            "tp",
            "raw_tp.w",
            "lsm",
            "fentry.s",
            "fmod_ret.multi",
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
        for section in ["fentry/", "fexit/libc:", "fexit/:f", "uprobe//bin/x", "uprobe/x:+0"] {
            check_error(section, " names no function");
        }
    }
}
