//! A program whose only debug information is BTF.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use flea_fixtures::{Running, Tool, require};
use serde_json::json;
use support::{TempFile, Tracing, ask, assert_clean, flea};

const SOURCE: &str = r#"
    #include <stdio.h>
    struct point { int x; double y; };
    enum mark { LOW = -3, HIGH = 7 };
    typedef unsigned char byte;
    __attribute__((noipa)) double weigh(struct point p, const char *name, double by, enum mark m, byte b) {
        return p.x + p.y * by + m + b + (name ? 1 : 0);
    }
    __attribute__((noipa)) long sum(int a, short b, long c, int d, int e, int f, int g, long h) {
        return a + b + c + d + e + f + g + h;
    }
    int main(void) {
        char line[64];
        setvbuf(stdout, NULL, _IONBF, 0);
        puts("ready");
        while (fgets(line, sizeof line, stdin)) {
            struct point p = { 5, 0.5 };
            printf("%g %ld\n", weigh(p, "apple", 4.0, LOW, 200), sum(-1, -2, 3, 4, 5, 6, -7, -8));
        }
        return 0;
    }
"#;

/// The program; `None`, said on stderr, where there is no gcc.
fn compile() -> Result<Option<TempFile>> {
    let Some(gcc) = require(Tool::Gcc) else { return Ok(None) };
    let (source, program) = (TempFile::new("btf.c"), TempFile::new("btf"));
    fs::write(&source.0, SOURCE)?;
    let output =
        Command::new(gcc).args(["-O2", "-gbtf", "-o"]).args([&program.0, &source.0]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(Some(program))
}

#[test]
fn typed_arguments() -> Result<()> {
    let Some(program) = compile()? else { return Ok(()) };
    let mut target = Running::start(&mut Command::new(&program.0))?;
    target.expect_line("ready")?;
    let tracing = Tracing::attach(&["trace", "weigh", "sum"], target.pid())?;
    target.send("go")?;
    assert_eq!(target.line()?, "205 0");
    let records = tracing.stop()?;
    assert_clean(target.pid())?;
    records.assert_complete()?;
    let weigh = records.one("call", "weigh")?;
    let args = &weigh["args"];
    assert_eq!(args["name"], json!("apple"));
    assert_eq!(args["by"], json!(4.0));
    assert_eq!(args["m"], json!(-3));
    assert_eq!(args["b"], json!(200));
    assert_eq!(weigh["retval"], json!(205.0));
    let sum = records.one("call", "sum")?;
    let expect = json!({"a": -1, "b": -2, "c": 3, "d": 4, "e": 5, "f": 6, "g": -7, "h": -8});
    assert_eq!(sum["args"], expect);
    assert_eq!(sum["retval"], json!(0));
    target.close_stdin();
    ensure!(target.wait()?.success());
    Ok(())
}

#[test]
fn list_says_where_it_is_from() -> Result<()> {
    let Some(program) = compile()? else { return Ok(()) };
    let mut target = Running::start(&mut Command::new(&program.0))?;
    target.expect_line("ready")?;
    let pid = target.pid().to_string();
    let weigh = "double weigh(struct point p, const char *name, double by, enum mark m, byte b)";
    let output = flea().args(["list", "weigh", "-p", &pid]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find(|line| line.contains("weigh")).unwrap_or_default();
    ensure!(line.contains(&format!("{weigh}  [from BTF]")), "{text}");
    let records = ask(&["list", "weigh", "-p", &pid])?;
    let record = records.one("function", "weigh")?;
    assert_eq!((&record["signature"], &record["signature_source"]), (&json!(weigh), &json!("btf")));
    target.close_stdin();
    ensure!(target.wait()?.success());
    Ok(())
}
