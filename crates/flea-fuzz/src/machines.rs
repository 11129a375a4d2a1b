//! Accepted programs on machines full of random numbers, which check every belief of the
//! verifier: see [`flea_verifier::soundness`].

use flea_generate::Random;
use flea_object::spec::{MapSpec, Program};
use flea_verifier::Context;
use flea_verifier::soundness::{Beliefs, NoBeliefs};

/// Machines that each program runs on.
pub const RUNS: u64 = 4;

/// What came of one program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tested {
    /// Everything was as the verifier had said.
    Right,
    /// The verifier refuses the program.
    Refused,
    /// It has more states than are kept: not run.
    TooManyStates,
    /// The machine did what the verifier had excluded.
    Stray(String),
}

/// Runs an accepted program where every belief is checked.
#[must_use]
pub fn run(program: &Program, maps: &[MapSpec], context: Context, seed: u64) -> Tested {
    let beliefs = match Beliefs::of(program, maps, context) {
        Ok(beliefs) => beliefs,
        Err(NoBeliefs::Refused(_)) => return Tested::Refused,
        Err(NoBeliefs::TooMany) => return Tested::TooManyStates,
        Err(e @ NoBeliefs::TwoVerdicts) => return Tested::Stray(e.to_string()),
    };
    for run in 0..RUNS {
        let mut random = Random::new(seed ^ (run << 56) ^ 0x5eed);
        if let Err(e) = beliefs.run(&mut || random.number()) {
            return Tested::Stray(format!("machine {run}: {e}"));
        }
    }
    Tested::Right
}
