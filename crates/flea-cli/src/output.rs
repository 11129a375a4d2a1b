//! Where results go: standard output or `--output FILE`, as text for people or a line of
//! JSON per record. Everything else (progress, warnings, errors) goes to standard error.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
};

use anyhow::{Context as _, Result};
use flea::builtin::Histogram;
use serde::Serialize;

use crate::{
    args::Common,
    plain,
    record::{BucketRecord, Record},
};

/// A number of functions, in words.
pub fn n_functions(n: usize) -> String {
    format!("{n} function{}", if n == 1 { "" } else { "s" })
}

/// The result stream.
pub struct Output {
    to: BufWriter<Box<dyn Write>>,
    /// What `to` is, for errors.
    name: String,
    format: Format,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Json,
}

impl Output {
    /// Opens what the flags say.
    pub fn open(common: &Common) -> Result<Self> {
        let to: Box<dyn Write> = match &common.output {
            Some(path) => Box::new(
                File::create(path)
                    .with_context(|| format!("cannot write to --output {}", path.display()))?,
            ),
            None => Box::new(io::stdout()),
        };
        let name = match &common.output {
            Some(path) => format!("--output {}", path.display()),
            None => "standard output".to_owned(),
        };
        let format = if common.json { Format::Json } else { Format::Text };
        Ok(Self { to: BufWriter::new(to), name, format })
    }

    /// Whether records are wanted instead of text.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Writes one record as JSON; nothing in text mode.
    pub fn record(&mut self, record: &Record<'_>) -> Result<()> {
        if self.is_json() {
            self.json(record)?;
        }
        Ok(())
    }

    fn json(&mut self, value: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        self.write(&text)
    }

    /// Writes a line of text, with control characters escaped; nothing in JSON mode.
    pub fn line(&mut self, text: impl AsRef<str>) -> Result<()> {
        if !self.is_json() {
            self.write(plain::text(text.as_ref()).as_bytes())?;
            self.write(b"\n")?;
        }
        Ok(())
    }

    /// Pushes everything out: before waiting, and at the end.
    pub fn flush(&mut self) -> Result<()> {
        self.to.flush().with_context(|| format!("writing results to {}", self.name))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.to.write_all(bytes).with_context(|| format!("writing results to {}", self.name))
    }

    /// A histogram in both forms.
    pub fn histogram(
        &mut self,
        module: &str,
        function: &str,
        value: &str,
        h: &Histogram,
    ) -> Result<()> {
        self.record(&Record::Histogram {
            module,
            function,
            value,
            count: h.count,
            sum: h.sum,
            min: h.min,
            max: h.max,
            buckets: h
                .buckets
                .iter()
                .map(|b| BucketRecord { min: b.min, max: b.max, count: b.count })
                .collect(),
        })?;
        if self.is_json() {
            return Ok(());
        }
        self.line(histogram_text(&format!("{}:{function} {value}", basename(module)), value, h))
    }
}

/// Last component of a path.
pub fn basename(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn histogram_text(title: &str, value: &str, h: &Histogram) -> String {
    const BAR: u64 = 40;
    let unit = |v: i128| if value == "duration_ns" { nanoseconds(v) } else { v.to_string() };
    let mut text = title.to_owned();
    let (Some(min), Some(max)) = (h.min, h.max) else {
        return text + "\n    no calls";
    };
    let average = h.sum / i128::from(h.count.max(1));
    text += &format!(
        "\n    count {}, min {}, avg {}, max {}",
        h.count,
        unit(min),
        unit(average),
        unit(max)
    );
    let most = h.buckets.iter().map(|b| b.count).max().unwrap_or(1).max(1);
    for b in &h.buckets {
        let bar = u128::from(b.count) * u128::from(BAR) / u128::from(most);
        let bar = "@".repeat(usize::try_from(bar).unwrap_or(0));
        let range = format!("[{}, {}]", unit(b.min), unit(b.max));
        text += &format!("\n    {range:<28} {:>12} |{bar:<40}|", b.count);
    }
    text
}

/// `1.5us`: three digits and a unit.
pub fn nanoseconds(ns: i128) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = ns as f64;
    match ns {
        ..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => format!("{:.3}us", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.3}ms", value / 1e6),
        _ => format!("{:.3}s", value / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use flea::builtin::Bucket;

    use super::*;

    #[test]
    fn a_histogram_for_people() {
        let h = Histogram {
            count: 5,
            sum: 5_000_100,
            min: Some(3),
            max: Some(5_000_000),
            buckets: vec![
                Bucket { min: 2, max: 3, count: 4 },
                Bucket { min: 1 << 22, max: (1 << 23) - 1, count: 1 },
            ],
        };
        expect![[r"
            a:f duration_ns
                count 5, min 3ns, avg 1.000ms, max 5.000ms
                [2ns, 3ns]                              4 |@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@|
                [4.194ms, 8.389ms]                      1 |@@@@@@@@@@                              |"]]
        .assert_eq(&histogram_text("a:f duration_ns", "duration_ns", &h));
    }
}
