//! Counting by cause.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Causes, how often each was met, and a seed to see it again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    causes: BTreeMap<String, (u64, u64)>,
}

impl Tally {
    /// Counts `message`, of which numbers are left out.
    pub fn count(&mut self, message: &str, seed: u64) {
        let entry = self.causes.entry(cause(message)).or_insert((0, seed));
        entry.0 += 1;
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.causes.values().map(|(n, _)| n).sum()
    }

    /// A line for each cause, the most frequent first.
    #[must_use]
    pub fn lines(&self) -> String {
        let mut causes: Vec<_> = self.causes.iter().collect();
        causes.sort_by_key(|(cause, (n, _))| (std::cmp::Reverse(*n), (*cause).clone()));
        let mut text = String::new();
        for (cause, (n, seed)) in causes {
            writeln!(text, "{n:8} {cause} (seed {seed})").expect("a String takes everything");
        }
        text
    }
}

/// The first words of a message, without its numbers.
fn cause(message: &str) -> String {
    let mut words = String::new();
    let mut last = ' ';
    for c in message.chars().take(72) {
        let c = if c.is_ascii_digit() { '#' } else { c };
        if c != '#' || last != '#' {
            words.push(c);
        }
        last = c;
    }
    words.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cause_whatever_the_numbers() {
        let mut tally = Tally::default();
        tally.count("R1 offset 12 is outside", 5);
        tally.count("R10 offset -7 is outside", 6);
        tally.count("R2 offset 9 is outside", 7);
        assert_eq!(tally.total(), 3);
        let expected = "       2 R# offset # is outside (seed 5)\n       \
                        1 R# offset -# is outside (seed 6)\n";
        assert_eq!(tally.lines(), expected);
    }
}
