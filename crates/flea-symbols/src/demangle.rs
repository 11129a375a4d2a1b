//! From the linker's names to the names that people type. Knows nothing of files.

use cpp_demangle::{DemangleOptions, ParseOptions, Symbol};

/// Names come from strangers: nesting deeper than this stays mangled.
const RECURSION_LIMIT: u32 = 96;
/// Longer names stay mangled: demangling may grow exponentially with length.
const MAX_NAME_BYTES: usize = 16 * 1024;

/// With the parameter list for C++, without the hash for Rust; `None` where `raw` is not
/// mangled.
pub fn full(raw: &str) -> Option<String> {
    rust(raw).or_else(|| cpp(raw, &DemangleOptions::new()))
}

/// As [`full`], without parameter list and return type.
pub fn short(raw: &str) -> Option<String> {
    rust(raw).or_else(|| cpp(raw, &DemangleOptions::new().no_params().no_return_type()))
}

fn rust(raw: &str) -> Option<String> {
    let may_be_rust = raw.starts_with("_R") || (raw.starts_with("_ZN") && raw.contains("17h"));
    if !may_be_rust || raw.len() > MAX_NAME_BYTES {
        return None;
    }
    rustc_demangle::try_demangle(raw).ok().map(|name| format!("{name:#}"))
}

fn cpp(raw: &str, options: &DemangleOptions) -> Option<String> {
    if !raw.starts_with("_Z") || raw.len() > MAX_NAME_BYTES {
        return None;
    }
    // A clone's suffix (`.cold`, `.isra.0`) is kept as it is: it names another function.
    let (mangled, suffix) = raw.find('.').map_or((raw, ""), |at| raw.split_at(at));
    let parse = ParseOptions::default().recursion_limit(RECURSION_LIMIT);
    let symbol = Symbol::new_with_options(mangled, &parse).ok()?;
    let options = options.recursion_limit(RECURSION_LIMIT);
    let name = symbol.demangle_with_options(&options).ok()?;
    Some(name + suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_people_type_them() {
        let cases = [
            ("_ZN3foo3barEi", Some("foo::bar(int)"), Some("foo::bar")),
            ("_ZN3foo3barEi.cold", Some("foo::bar(int).cold"), Some("foo::bar.cold")),
            (
                "_ZN4core3fmt5write17h0123456789abcdefE",
                Some("core::fmt::write"),
                Some("core::fmt::write"),
            ),
            ("_RNvCs1234_7mycrate3foo", Some("mycrate::foo"), Some("mycrate::foo")),
            ("main", None, None),
        ];
        for (raw, full_name, short_name) in cases {
            assert_eq!(full(raw).as_deref(), full_name, "{raw}");
            assert_eq!(short(raw).as_deref(), short_name, "{raw}");
        }
    }
}
