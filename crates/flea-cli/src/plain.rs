//! Text that others wrote, for a terminal: names in a registry, in a target's files, in its
//! memory. A target writes there what it likes, and a terminal obeys what it is sent.

use std::borrow::Cow;

/// With every control character escaped: for a name, which is on one line with others.
pub fn name(text: &str) -> Cow<'_, str> {
    escape(text, |_| false)
}

/// As [`name`], but for the ends of lines and tabs: for a whole text.
pub fn text(text: &str) -> Cow<'_, str> {
    escape(text, |c| matches!(c, '\n' | '\t'))
}

fn escape(text: &str, is_kept: impl Fn(char) -> bool) -> Cow<'_, str> {
    let is_harmless = |c: char| is_kept(c) || !c.is_control() && !reorders(c);
    if text.chars().all(is_harmless) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmless(c) {
            out.push(c);
        } else {
            out.extend(c.escape_default());
        }
    }
    Cow::Owned(out)
}

/// Whether it makes a terminal show other characters in another order than they are in.
fn reorders(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey() {
        assert_eq!(name("\u{1b}[2Jx\r\n\u{7f}\u{9b}1m"), "\\u{1b}[2Jx\\r\\n\\u{7f}\\u{9b}1m");
        assert_eq!(name("a\u{202e}b"), "a\\u{202e}b");
        assert_eq!(text("one\n\ttwo\u{7}"), "one\n\ttwo\\u{7}");
        assert!(matches!(name("operator<<(Größe, \"x\\n\")"), Cow::Borrowed(_)));
    }
}
