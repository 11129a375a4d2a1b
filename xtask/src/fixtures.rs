//! Builds the programs that tests trace, and prints where they are.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use flea_fixtures::{Fixture, try_build};

/// Builds all whose name contains `filter`.
pub fn run(filter: Option<&str>) -> Result<ExitCode> {
    let mut n_built = 0;
    for fixture in Fixture::all() {
        let name = fixture.program_name();
        if filter.is_some_and(|filter| !name.contains(filter)) {
            continue;
        }
        let path = try_build(fixture).with_context(|| format!("building {name}"))?;
        match path {
            Some(path) => println!("{}", path.display()),
            None => eprintln!("{name}: not built, its compiler is missing"),
        }
        n_built += 1;
    }
    ensure!(n_built > 0, "no fixture's name contains {filter:?}");
    Ok(ExitCode::SUCCESS)
}
