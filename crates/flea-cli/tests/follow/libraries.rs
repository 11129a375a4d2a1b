//! Libraries that are loaded and unloaded while they are traced.

use anyhow::Result;

use crate::support::{Tracing, ask, assert_clean};
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
