//! Generates the calls of `c/variadic.c`: each number of arguments, of kinds drawn with a fixed
//! seed, at most as many as a variadic call promises to pass on.

use std::fmt::Write as _;

/// C's minimum of arguments per call (C11, 5.2.4.1), less what the functions name.
const MAX_ARGS: u32 = 120;
/// Words on the stack that the longest calls have.
const MAX_STACK_WORDS: u32 = 128;

/// The text of `variadic_calls.h`.
pub(crate) fn calls() -> String {
    let mut text = String::from("/* Generated. */\nstatic void all_calls(void)\n{\n");
    for n_args in 0..=MAX_ARGS {
        let mut call = Call::default();
        for i in 0..n_args {
            call.add(i, n_args);
        }
        // Writing to a String cannot fail.
        let Call { kinds, args, .. } = call;
        let _ = writeln!(text, "    printf(\"{n_args}: %lx\\n\", mixed(\"{kinds}\"{args}));");
    }
    // Five longs in registers, the others on the stack: all words that are passed on.
    let n_longs = MAX_STACK_WORDS + 5;
    let longs: String = (1..=n_longs).map(|i| format!(", {i}l")).collect();
    let _ = writeln!(text, "    printf(\"longs %ld\\n\", longs({n_longs}l{longs}));");
    for n_args in 0..20 {
        let doubles: String = (0..n_args).map(|i| format!(", {i}.25")).collect();
        let _ = writeln!(
            text,
            "    printf(\"named %g\\n\", named((struct big){{{{1, 2, 3, 4, 5}}}}, 6.5L, \
             {n_args}l{doubles}));"
        );
    }
    text.push_str("}\n");
    text
}

/// A call in the making, with what it has used of the convention's places.
#[derive(Default)]
struct Call {
    kinds: String,
    args: String,
    gprs: u32,
    xmms: u32,
    stack_words: u32,
}

impl Call {
    /// Adds the argument number `i` of `n_args`: the kind that a hash of both picks, or a double
    /// or long where that would not fit any more.
    fn add(&mut self, i: u32, n_args: u32) {
        let hash = (1 + i + 131 * n_args).wrapping_mul(2_654_435_761);
        let left = MAX_STACK_WORDS.saturating_sub(self.stack_words + (n_args - i));
        let v = i + 7 * n_args;
        let (kind, arg) = match (hash >> 16) % 7 {
            0 => ('i', format!("-{v}")),
            1 => ('d', format!("{v}.5")),
            2 if left > 3 => ('D', format!("{v}.25L")),
            3 if left > 2 => ('s', format!("(struct small){{{v}, {i}.75}}")),
            4 if left > 7 => ('w', format!("(struct wide){{{{{v}, 1, {i}, 3}}}}")),
            5 if left > 5 => ('b', format!("(struct big){{{{{v}, 1, {i}, 3, 4}}}}")),
            _ => ('l', format!("{v}l << 32")),
        };
        self.kinds.push(kind);
        let _ = write!(self.args, ", {arg}");
        self.take(kind);
    }

    /// Takes an argument's places; one of the registers is the first argument's.
    fn take(&mut self, kind: char) {
        let (gprs, xmms, words) = match kind {
            'i' | 'l' => (1, 0, 1),
            'd' => (0, 1, 1),
            's' => (1, 1, 2),
            'b' => (0, 0, 5),
            // Aligned to 32.
            'w' => (0, 0, 4 + (4 - self.stack_words % 4) % 4),
            // Aligned to 16.
            _ => (0, 0, 2 + self.stack_words % 2),
        };
        let in_registers = gprs + xmms > 0 && self.gprs + gprs <= 5 && self.xmms + xmms <= 8;
        if in_registers {
            self.gprs += gprs;
            self.xmms += xmms;
        } else {
            self.stack_words += words;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_and_many_words() {
        let text = calls();
        for kind in ['i', 'l', 'd', 'D', 's', 'b', 'w'] {
            assert!(text.lines().any(|l| l.contains("mixed") && l.contains(kind)), "{kind}");
        }
        let mut most = 0;
        for n_args in 0..=MAX_ARGS {
            let mut call = Call::default();
            (0..n_args).for_each(|i| call.add(i, n_args));
            assert!(call.stack_words <= MAX_STACK_WORDS, "{n_args}: {}", call.stack_words);
            most = most.max(call.stack_words);
        }
        assert!(most > MAX_STACK_WORDS - 8, "{most}");
    }
}
