//! `[MODULE:]FUNCTION` with `*` and `?`, and the names a person may have meant. Knows nothing
//! of addresses.

use crate::function::Function;
use crate::module::Module;

/// A parsed `[MODULE:]FUNCTION`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Which modules: file name or path, with wildcards.
    pub module: Option<String>,
    /// Which functions.
    pub function: String,
}

/// Why a pattern cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Nothing where the function should be.
    #[error(
        "the pattern '{pattern}' names no function: write [MODULE:]FUNCTION, for example 'libc.so.6:mall*'"
    )]
    NoFunction {
        /// What was typed.
        pattern: String,
    },
    /// Nothing before the colon.
    #[error("the pattern '{pattern}' names no module before ':': write [MODULE:]FUNCTION")]
    NoModule {
        /// What was typed.
        pattern: String,
    },
}

impl Pattern {
    /// Splits at the first single `:` (those of C++'s and Rust's `::` come in pairs).
    ///
    /// # Errors
    /// One side is empty.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let text = text.trim();
        let (module, function) = match single_colon(text) {
            Some(at) => (Some(text[..at].to_owned()), text[at + 1..].to_owned()),
            None => (None, text.to_owned()),
        };
        if function.is_empty() {
            return Err(PatternError::NoFunction { pattern: text.to_owned() });
        }
        if module.as_deref() == Some("") {
            return Err(PatternError::NoModule { pattern: text.to_owned() });
        }
        Ok(Self { module, function })
    }

    /// Has a `*` or a `?` in its function part.
    #[must_use]
    pub fn has_wildcard(&self) -> bool {
        self.function.contains(['*', '?'])
    }

    /// Whether it speaks of the module at `path`: by the whole path, the file name, or the
    /// file name up to `.so`. A pattern without a module speaks of every module.
    #[must_use]
    pub fn matches_module(&self, path: &str) -> bool {
        let Some(module) = &self.module else { return true };
        let file = path.rsplit('/').next().unwrap_or(path);
        let stem = file.find(".so").map_or(file, |at| &file[..at]);
        [path, file, stem].iter().any(|name| glob(module, name))
    }

    /// Whether it names `function`: by its raw or demangled name (with or without parameter
    /// list) or an alias.
    #[must_use]
    pub fn matches(&self, function: &Function) -> bool {
        std::iter::once(&function.name).chain(&function.aliases).any(|raw| self.matches_name(raw))
    }

    fn matches_name(&self, raw: &str) -> bool {
        let is = |name: &str| glob(&self.function, name);
        is(raw)
            || ((raw.starts_with("_Z") || raw.starts_with("_R"))
                && (crate::demangle::short(raw).is_some_and(|name| is(&name))
                    || crate::demangle::full(raw).is_some_and(|name| is(&name))))
    }
}

impl Module<'_> {
    /// The functions that `pattern` names; its module part is not looked at. Cold parts
    /// match only a pattern that spells them out.
    #[must_use]
    pub fn find(&self, pattern: &Pattern) -> Vec<&Function> {
        let functions = self.functions().iter();
        let cold_too = pattern.function.contains(".cold");
        functions
            .filter(|function| (cold_too || !function.is_cold_part()) && pattern.matches(function))
            .collect()
    }

    /// Up to `n` names of functions closest to `name`, the closest first; none that differ
    /// in more than a third of it (or two letters).
    #[must_use]
    pub fn nearest_names(&self, name: &str, n: usize) -> Vec<String> {
        let wanted: String = name.to_lowercase().chars().take(128).collect();
        let limit = (wanted.chars().count() / 3).max(2);
        let mut near: Vec<(usize, String)> = Vec::new();
        for function in self.functions() {
            for raw in std::iter::once(&function.name).chain(&function.aliases) {
                let shown = crate::demangle::short(raw).unwrap_or_else(|| raw.clone());
                let distance = name_distance(&wanted, &shown.to_lowercase(), limit);
                if distance <= limit {
                    near.push((distance, shown));
                }
            }
        }
        near.sort();
        near.dedup_by(|a, b| a.1 == b.1);
        near.into_iter().take(n).map(|(_, name)| name).collect()
    }
}

/// Distance to the whole name, or, one worse, to its last `::` component.
fn name_distance(wanted: &str, name: &str, limit: usize) -> usize {
    let whole = edit_distance(wanted, name, limit);
    match name.rsplit_once("::") {
        Some((_, last)) if whole > 1 => whole.min(edit_distance(wanted, last, limit) + 1),
        _ => whole,
    }
}

/// Letters to insert, drop, replace or swap with their neighbour; `limit + 1` for anything
/// above `limit`.
fn edit_distance(a: &str, b: &str, limit: usize) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > limit {
        return limit + 1;
    }
    // Rows of the usual table: the one before the last, the last, the new one.
    let (mut before, mut last): (Vec<usize>, Vec<usize>) = (Vec::new(), (0..=b.len()).collect());
    for i in 0..a.len() {
        let mut row = vec![i + 1];
        for j in 0..b.len() {
            let replaced = last[j] + usize::from(a[i] != b[j]);
            let mut best = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        if row.iter().min().is_some_and(|least| *least > limit + 1) {
            return limit + 1;
        }
        (before, last) = (last, row);
    }
    last[b.len()].min(limit + 1)
}

fn single_colon(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    // Behind a bracket it is the function's: `repeat[abi:cxx11](char, int)`.
    let end = text.find(['[', '(', '<', '{']).unwrap_or(bytes.len());
    (0..end).find(|&i| {
        bytes[i] == b':' && bytes.get(i + 1) != Some(&b':') && (i == 0 || bytes[i - 1] != b':')
    })
}

/// `*` is any run of characters, `?` any one. Iterative: linear in practice, quadratic at
/// worst, for any pattern.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((star_p, star_t)) => {
                    star = Some((star_p, star_t + 1));
                    p = star_p + 1;
                    t = star_t + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_is_split_at_a_single_colon() {
        let cases = [
            ("main", None, "main"),
            ("libc.so.6:malloc", Some("libc.so.6"), "malloc"),
            ("foo::bar", None, "foo::bar"),
            ("lib*:foo::bar", Some("lib*"), "foo::bar"),
            ("lib:::bar", None, "lib:::bar"),
        ];
        for (text, module, function) in cases {
            let pattern = Pattern::parse(text).unwrap();
            assert_eq!((pattern.module.as_deref(), pattern.function.as_str()), (module, function));
        }
        assert!(Pattern::parse("").is_err());
        assert!(Pattern::parse("libc:").is_err());
        assert!(Pattern::parse(":malloc").is_err());
    }

    #[test]
    fn wildcards() {
        assert!(glob("mall*", "malloc"));
        assert!(glob("*", ""));
        assert!(glob("?alloc", "malloc"));
        assert!(glob("*a*b*c", "xxaybzbc"));
        assert!(!glob("mall", "malloc"));
        assert!(!glob("?", ""));
        let pattern = Pattern::parse("libstdc++:x").unwrap();
        assert!(pattern.matches_module("/usr/lib/libstdc++.so.6.0.30"));
        assert!(!pattern.matches_module("/usr/lib/libc.so.6"));
    }

    #[test]
    fn cpp_names_match_with_and_without_parameters() {
        let function = Function {
            name: "_ZN3foo3barEi".into(),
            aliases: vec!["alias".into(), "_Z6repeatB5cxx11ci".into()],
            address: crate::addr::Svma(0),
            size_bytes: 1,
            kind: crate::FunctionKind::Func,
        };
        let texts = ["foo::bar", "foo::bar(int)", "foo::*", "_ZN3foo3barEi", "alias"];
        for text in texts.into_iter().chain(["repeat[abi:cxx11](char, int)", "*:repeat[abi:cxx11]"])
        {
            assert!(Pattern::parse(text).unwrap().matches(&function), "{text}");
        }
        assert!(!Pattern::parse("bar").unwrap().matches(&function));
    }

    #[test]
    fn distances() {
        assert_eq!(edit_distance("malloc", "maloc", 3), 1);
        assert_eq!(edit_distance("malloc", "free", 2), 3);
        assert_eq!(edit_distance("mallco", "malloc", 2), 1);
        assert_eq!(edit_distance("", "ab", 2), 2);
    }
}
