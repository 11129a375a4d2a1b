//! Libraries that are loaded and unloaded while they are traced.

use anyhow::Result;
use flea_fixtures::Running;

use crate::support::{PATIENCE, Tracing, ask, assert_clean, flea};
use crate::{Dir, counted};

fn traced(name: &str) -> [String; 2] {
    ["count".to_owned(), format!("{name}:lib_step")]
}

/// The library is unloaded while it is traced: what it counted is told, and where it was
/// nothing is written.
#[test]
fn unloaded_while_it_is_traced() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let path = dir.library("libone.so", 2)?;
    let mut family = dir.start()?;
    family.act(&format!("open {path}"))?;
    let tracing = Tracing::attach(&traced("libone.so"), family.pid())?;
    assert_eq!(family.number("lib 5")?, 20);
    family.act("close")?;
    assert_eq!(counted(&tracing.stop()?, "lib_step")?, 5);
    assert_clean(family.pid())?;
    family.finish()
}

/// Something else has been mapped where its code was.
#[test]
fn covered_by_other_memory() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let path = dir.library("libtwo.so", 3)?;
    let mut family = dir.start()?;
    family.act(&format!("open {path}"))?;
    let tracing = Tracing::attach(&traced("libtwo.so"), family.pid())?;
    assert_eq!(family.number("lib 4")?, 18);
    family.act("close")?;
    family.act("cover")?;
    assert_eq!(counted(&tracing.stop()?, "lib_step")?, 4);
    assert_eq!(family.ask("covered")?, "yes");
    assert_clean(family.pid())?;
    family.finish()
}

/// The same library comes back, mostly to the same place, as its file says: not traced any more.
#[test]
fn loaded_again() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let path = dir.library("libthree.so", 4)?;
    let mut family = dir.start()?;
    let pid = family.pid();
    family.act(&format!("open {path}"))?;
    let first = Tracing::attach(&traced("libthree.so"), pid)?;
    assert_eq!(family.number("lib 4")?, 24);
    family.act("close")?;
    family.act(&format!("open {path}"))?;
    assert_eq!(family.number("lib 10")?, 180);
    // Another one finds it as it is.
    let second = Tracing::attach(&traced("libthree.so"), pid)?;
    assert_eq!(family.number("lib 7")?, 84);
    assert_eq!(counted(&second.stop()?, "lib_step")?, 7);
    assert_eq!(counted(&first.stop()?, "lib_step")?, 4);
    assert_eq!(ask(&["ps", "-p", &pid.to_string()])?.of("attached").count(), 0);
    assert_clean(pid)?;
    assert_eq!(family.number("lib 2")?, 4);
    family.finish()
}

/// Another library comes to where the first one was.
#[test]
fn another_library_in_its_place() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let (four, five) = (dir.library("libfour.so", 4)?, dir.library("libfive.so", 5)?);
    let mut family = dir.start()?;
    let pid = family.pid();
    family.act(&format!("open {four}"))?;
    let tracing = Tracing::attach(&traced("libfour.so"), pid)?;
    assert_eq!(family.number("lib 3")?, 12);
    family.act("close")?;
    family.act(&format!("open {five}"))?;
    assert_eq!(family.number("lib 3")?, 15);
    assert_eq!(counted(&tracing.stop()?, "lib_step")?, 3);
    assert_eq!(family.number("lib 3")?, 15);
    assert_clean(pid)?;
    family.finish()
}

/// What is not there yet is attached to when it comes.
#[test]
fn waited_for() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let (six, seven) = (dir.library("libsix.so", 6)?, dir.library("libseven.so", 7)?);
    let mut family = dir.start()?;
    let pid = family.pid();
    let mut words = vec!["count", "libseven.so:lib_step", "work", "-p"];
    let number = pid.to_string();
    words.push(&number);
    let output = flea().args(&words).output()?;
    let said = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("no loaded module has that name"), "{said}");

    let words = ["count", "libseven.so:lib_step", "work", "--pending"];
    let mut tracing = Tracing::attach(&words, pid)?;
    let waits = "flea: `libseven.so:lib_step` waits for a library that has it";
    assert_eq!(tracing.said, [waits]);
    family.act("work 8")?;
    family.act(&format!("open {six}"))?;
    assert_eq!(family.number("lib 3")?, 18);
    family.act(&format!("open {seven}"))?;
    tracing.wait_said("has loaded a library: attached to 1 function")?;
    assert_eq!(family.number("lib 5")?, 70);
    family.act("close")?;
    let records = tracing.stop()?;
    assert_eq!(counted(&records, "lib_step")?, 5);
    assert_eq!(counted(&records, "work")?, 8);
    assert_clean(pid)?;
    family.finish()
}

/// Also in programs that are executed meanwhile, and by a command that has nothing at first.
#[test]
fn waited_for_in_a_started_command() -> Result<()> {
    let Some(dir) = Dir::new()? else { return Ok(()) };
    let path = dir.library("libeight.so", 8)?;
    let target = dir.path("target");
    let mut command = flea();
    command.args(["latency", "lib_step", "--pending", "-f", "--", "sh", "-c"]);
    let mut flea = Running::start(command.arg(format!("{target}; exit 6")))?;
    flea.expect_line("ready")?;
    flea.send(&format!("open {path}"))?;
    flea.expect_line("done")?;
    while !flea.stderr_line_within(PATIENCE)?.contains("has loaded a library: attached to 1") {}
    flea.send("lib 9")?;
    flea.expect_line("288")?;
    flea.close_stdin();
    let status = flea.wait()?;
    assert_eq!(status.code(), Some(6));
    let said = flea.rest()?;
    assert!(said.iter().any(|line| line.contains("count 9,")), "{said:?}");
    Ok(())
}
