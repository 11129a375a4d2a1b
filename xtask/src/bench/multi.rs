//! Ten thousand functions at once, by the library and by the kernel's `uprobe_multi` link, on the
//! same functions of one process. An example of the library measures it (`examples/bulk`): built
//! without optimisation its numbers mean nothing, and this program is.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Who attached what, and the medians of the times.
#[derive(Debug, PartialEq)]
pub struct Multi {
    /// `flea entry`, `uprobe_multi exit` and so on.
    pub what: String,
    /// Milliseconds until all are attached.
    pub on_ms: f64,
    /// Milliseconds until all are off and all memory is given back.
    pub off_ms: f64,
}

/// All lines, or why there are none. One that the kernel refuses is an error in its place.
pub fn measure() -> Result<Vec<Result<Multi>>> {
    let program = find()?;
    let output = Command::new(&program).output().context("running examples/bulk")?;
    let text = String::from_utf8(output.stdout)?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(text.lines().map(parse).collect())
}

fn find() -> Result<PathBuf> {
    let xtask = std::env::current_exe().context("finding this program")?;
    let target = xtask.ancestors().nth(2).context("finding target/")?;
    let path = target.join("release/examples/bulk");
    if !path.is_file() {
        bail!("it is missing: cargo build --release -p flea --example bulk");
    }
    Ok(path)
}

/// Reads `WHAT: on N ms, off N ms`.
fn parse(line: &str) -> Result<Multi> {
    let (what, times) = line.split_once(": ").with_context(|| format!("not a row: {line:?}"))?;
    let ms = |name: &str, text: &str| -> Result<f64> {
        let number = text.strip_prefix(name).and_then(|rest| rest.trim().strip_suffix(" ms"));
        Ok(number.with_context(|| format!("{what}: {times}"))?.parse()?)
    };
    let (on, off) = times.split_once(", ").with_context(|| format!("{what}: {times}"))?;
    Ok(Multi { what: what.to_owned(), on_ms: ms("on", on)?, off_ms: ms("off", off)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read() {
        let row = parse("uprobe_multi exit: on 61.50 ms, off 110.00 ms").unwrap();
        let what = "uprobe_multi exit".to_owned();
        assert_eq!(row, Multi { what, on_ms: 61.5, off_ms: 110.0 });
        let refused = parse("uprobe_multi entry: not measured: making the link: EPERM");
        assert!(refused.unwrap_err().to_string().contains("EPERM"));
        assert!(parse("").is_err());
    }
}
