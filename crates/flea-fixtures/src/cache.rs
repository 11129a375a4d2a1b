//! Builds a fixture once per content, beside other tests that want it at the same time.
//!
//! A fixture lives in `target/fixtures/NAME-HASH/`, where the hash covers its sources, its
//! commands and the compiler's version. What is protected, by what:
//! 1. a lock on `target/fixtures/NAME.lock` keeps two builders apart (the kernel drops it
//!    with its holder);
//! 2. the commands run in a private `NAME-HASH.PID.tmp`;
//! 3. a rename publishes it: a directory with the final name is always whole.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::recipe::{Recipe, Step, recipe};
use crate::{Fixture, require};

/// The path of the built program; `None` (said on stderr) when its compiler is missing and
/// cannot be installed.
///
/// # Panics
/// When the compiler is there and fails: that is a bug of the fixture. Use [`try_build`] to
/// get the error instead.
pub fn build(fixture: Fixture) -> Option<PathBuf> {
    match try_build(fixture) {
        Ok(path) => path,
        Err(e) => panic!("building {}: {e:#}", fixture.program_name()),
    }
}

/// As [`build`], with errors returned.
///
/// # Errors
/// When the compiler fails or the build directory cannot be written.
pub fn try_build(fixture: Fixture) -> Result<Option<PathBuf>> {
    let recipe = recipe(fixture);
    let Some(versions) = versions(&recipe) else {
        return Ok(None);
    };
    let root = fixtures_dir();
    fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
    let dir = root.join(format!("{}-{:016x}", recipe.program, hash(&recipe, &versions)));
    let program = dir.join(&recipe.program);
    let lock = File::create(root.join(format!("{}.lock", recipe.program)))?;
    lock.lock().context("locking the fixture")?;
    if !program.exists() {
        build_into(&recipe, &dir)?;
    }
    Ok(Some(program))
}

/// `target/fixtures` of this workspace.
fn fixtures_dir() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let dir = workspace.join(target).join("fixtures");
    // A tidy path: it ends up in what tracers print.
    let parent = dir.parent().map(Path::to_path_buf).unwrap_or_default();
    parent.canonicalize().map_or(dir, |parent| parent.join("fixtures"))
}

/// What each compiler says it is; `None` when one is missing.
fn versions(recipe: &Recipe) -> Option<Vec<String>> {
    recipe
        .steps
        .iter()
        .map(|step| {
            let path = require(step.tool)?;
            let output = Command::new(&path).arg("--version").output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        })
        .collect()
}

fn hash(recipe: &Recipe, versions: &[String]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for source in &recipe.sources {
        (source.name, &source.text).hash(&mut hasher);
    }
    for step in &recipe.steps {
        (step.tool.name(), &step.args).hash(&mut hasher);
    }
    versions.hash(&mut hasher);
    hasher.finish()
}

fn build_into(recipe: &Recipe, dir: &Path) -> Result<()> {
    let scratch = dir.with_extension(format!("{}.tmp", std::process::id()));
    fs::create_dir_all(&scratch)?;
    for source in &recipe.sources {
        fs::write(scratch.join(source.name), &source.text)?;
    }
    for step in &recipe.steps {
        run_step(step, &scratch)?;
    }
    if dir.exists() {
        // Left without its program by something that is not us.
        fs::remove_dir_all(dir)?;
    }
    fs::rename(&scratch, dir).with_context(|| format!("publishing {}", dir.display()))
}

fn run_step(step: &Step, dir: &Path) -> Result<()> {
    let Some(tool) = require(step.tool) else {
        bail!("{} went away", step.tool.name());
    };
    let output = Command::new(&tool)
        .args(&step.args)
        .current_dir(dir)
        .output()
        .with_context(|| format!("running {}", tool.display()))?;
    if !output.status.success() {
        bail!(
            "{} {} failed ({}):\n{}",
            tool.display(),
            step.args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
