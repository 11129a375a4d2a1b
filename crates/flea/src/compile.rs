//! Compiling the bodies of one attach: on every CPU, and once for all functions that are alike.
//!
//! Compiling takes longer than all of the rest of attaching. Functions whose bodies differ in
//! addresses and cookies alone are therefore compiled once where there are many; a few are
//! compiled one by one, with their numbers folded into the code.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use flea_image::Body;
use flea_symbols::{addr::RemoteAddr, signature::Signature};
use flea_verifier::Verified;

use crate::{
    error::AttachError,
    object::Loaded,
    prepared::{Prepared, Shape},
    session::lock,
};

/// So many functions alike share their code. Compiling fewer takes a few milliseconds.
const MANY: usize = 64;
/// How many bodies an object keeps for when they are attached again.
const MOST_KNOWN: usize = 16;

/// One compilation, and the functions that it is for.
enum Job<'a> {
    One(usize),
    Shared(Shape<'a>, Vec<usize>),
}

/// The bodies of all of `prepared`, in their order.
pub(crate) fn all(
    object: &Loaded,
    prepared: &[Prepared],
    offsets: &[u32],
) -> Result<Vec<Arc<Body>>, AttachError> {
    let jobs = jobs(prepared, offsets);
    let compile = |job: &Job<'_>| match job {
        Job::One(index) => object.compiled.body(&prepared[*index], offsets[*index], || {
            prepared[*index].compile(object, offsets[*index])
        }),
        Job::Shared(shape, members) => {
            prepared[members[0]].compile_shared(object, shape).map(Arc::new)
        }
    };
    let made = on_every_cpu(&jobs, compile)?;
    let mut bodies: Vec<Option<Arc<Body>>> = vec![None; prepared.len()];
    for (job, body) in jobs.iter().zip(made) {
        let members = match job {
            Job::One(index) => std::slice::from_ref(index),
            Job::Shared(_, members) => members,
        };
        for &index in members {
            bodies[index] = Some(Arc::clone(&body));
        }
    }
    Ok(bodies.into_iter().map(|body| body.expect("each function is in one job")).collect())
}

/// The bodies that an object had compiled last: what is attached to a function now and then is
/// compiled once.
#[derive(Default)]
pub(crate) struct Compiled {
    /// The newest last.
    known: Mutex<VecDeque<Known>>,
}

/// A body, and what decided how it was compiled.
struct Known {
    function: RemoteAddr,
    signature: Signature,
    uses: Vec<(usize, u64)>,
    verified: Vec<Arc<Verified>>,
    frame_offset: u32,
    body: Arc<Body>,
}

impl Known {
    fn is_for(&self, one: &Prepared, frame_offset: u32) -> bool {
        // Proofs are kept here, so no other one has the address of one of them.
        let is_same = |(a, b): (&Arc<Verified>, &Arc<Verified>)| Arc::ptr_eq(a, b);
        self.function == one.function.address()
            && self.frame_offset == frame_offset
            && self.uses == one.uses
            && self.verified.len() == one.verified.len()
            && self.verified.iter().zip(&one.verified).all(is_same)
            && self.signature == *one.function.signature()
    }
}

impl Compiled {
    /// The body of `one`, compiled by `compile` where it is not known.
    fn body(
        &self,
        one: &Prepared,
        frame_offset: u32,
        compile: impl FnOnce() -> Result<Body, AttachError>,
    ) -> Result<Arc<Body>, AttachError> {
        let known = lock(&self.known)
            .iter()
            .find(|k| k.is_for(one, frame_offset))
            .map(|known| Arc::clone(&known.body));
        if let Some(body) = known {
            return Ok(body);
        }
        let body = Arc::new(compile()?);
        let mut known = lock(&self.known);
        if known.len() >= MOST_KNOWN {
            known.pop_front();
        }
        known.push_back(Known {
            function: one.function.address(),
            signature: one.function.signature().clone(),
            uses: one.uses.clone(),
            verified: one.verified.clone(),
            frame_offset,
            body: Arc::clone(&body),
        });
        Ok(body)
    }
}

fn jobs<'a>(prepared: &'a [Prepared], offsets: &[u32]) -> Vec<Job<'a>> {
    if prepared.len() < MANY {
        return (0..prepared.len()).map(Job::One).collect();
    }
    let mut by_shape: HashMap<Shape<'_>, Vec<usize>> = HashMap::new();
    for (index, (one, &offset)) in prepared.iter().zip(offsets).enumerate() {
        by_shape.entry(one.shape(offset)).or_default().push(index);
    }
    let mut jobs = Vec::with_capacity(by_shape.len());
    for (shape, members) in by_shape {
        if members.len() < MANY {
            jobs.extend(members.into_iter().map(Job::One));
        } else {
            jobs.push(Job::Shared(shape, members));
        }
    }
    // Which of several errors is told does not depend on chance.
    jobs.sort_unstable_by_key(|job| match job {
        Job::One(index) => *index,
        Job::Shared(_, members) => members[0],
    });
    jobs
}

/// The results in the order of `jobs`; one of the errors, if there are any.
fn on_every_cpu<J: Sync, R: Send>(
    jobs: &[J],
    work: impl Fn(&J) -> Result<R, AttachError> + Sync,
) -> Result<Vec<R>, AttachError> {
    let n_workers = std::thread::available_parallelism().map_or(1, usize::from);
    if jobs.len() <= n_workers {
        return jobs.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        while let Some((index, job)) = take(&next, jobs) {
            let outcome = work(job);
            let failed = outcome.is_err();
            done.push((index, outcome));
            if failed {
                next.store(jobs.len(), Ordering::Relaxed);
            }
        }
        done
    };
    let mut done: Vec<(usize, Result<R, AttachError>)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..n_workers).map(|_| scope.spawn(worker)).collect();
        let joined = workers.into_iter().map(std::thread::ScopedJoinHandle::join);
        joined.flat_map(|r| r.unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

fn take<'a, J>(next: &AtomicUsize, jobs: &'a [J]) -> Option<(usize, &'a J)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    Some((index, jobs.get(index)?))
}
