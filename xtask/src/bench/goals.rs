//! What rows of the bench say together: costs that are wanted relative to others of the same
//! run. Told beside what was wanted; the bench judges nothing.

use super::rows::{BARE, CLOCK, ENTRY, EXIT, MIXED, SESSION, Summary, WALK};

/// Programs in the row of mixed kinds, and in the list that is walked by hand.
pub(super) const N_MIXED: u32 = 100;

/// Something wanted of the costs, from quartiles and from medians.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// What a reader sees.
    pub label: &'static str,
    /// From lower quartiles; `None` where a row was not measured.
    pub value: Option<f64>,
    /// From medians.
    pub median: Option<f64>,
    /// At most this; `None` where it is there to compare with.
    pub wanted: Option<f64>,
}

/// All goals.
pub(super) fn of(quartiles: &Summary, medians: &Summary) -> Vec<Goal> {
    let goal = |label, wanted, value: fn(&Summary) -> Option<f64>| Goal {
        label,
        value: value(quartiles),
        median: value(medians),
        wanted,
    };
    vec![
        goal("ns per program, 100 of mixed kinds", Some(1.5), |ns| per_program(ns, MIXED)),
        goal("ns per program, list with look-ups", None, |ns| per_program(ns, WALK)),
        goal("fexit counter / fentry counter", Some(2.0), |ns| {
            Some(added(ns, EXIT)? / added(ns, ENTRY)?)
        }),
        goal("latency less fexit and time, ns", Some(3.0), |ns| {
            Some(added(ns, SESSION)? - added(ns, EXIT)? - added(ns, CLOCK)?)
        }),
    ]
}

fn added(ns: &Summary, function: &str) -> Option<f64> {
    Some(ns.get(function)? - ns.get(BARE)?)
}

fn per_program(ns: &Summary, function: &str) -> Option<f64> {
    Some(added(ns, function)? / f64::from(N_MIXED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_and_ratios() {
        let ns = |values: &[(&'static str, f64)]| -> Summary { values.iter().copied().collect() };
        let quartiles = ns(&[
            (BARE, 2.0),
            (MIXED, 102.0),
            (WALK, 302.0),
            (ENTRY, 4.0),
            (EXIT, 5.0),
            (CLOCK, 42.0),
            (SESSION, 47.0),
        ]);
        let goals = of(&quartiles, &ns(&[(BARE, 1.0), (EXIT, 2.0)]));
        let values: Vec<_> = goals.iter().map(|goal| goal.value).collect();
        assert_eq!(values, [Some(1.0), Some(3.0), Some(1.5), Some(2.0)]);
        assert!(goals.iter().all(|goal| goal.median.is_none()), "a row is missing for each");
    }
}
