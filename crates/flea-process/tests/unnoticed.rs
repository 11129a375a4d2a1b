//! The target does not notice: no EINTR, no signal lost or changed, no thread missed.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::time::{Duration, Instant};

use flea_process::{Tracer, seize};
use support::Target;

fn getpid(tracer: &mut Tracer) -> i64 {
    tracer.remote_syscall(libc::SYS_getpid, [0; 6]).unwrap().cast_signed()
}

#[test]
fn sleepers_sleep_on() {
    let target = Target::start("sleepers", &[]);
    let pid = target.pid();
    let started = Instant::now();
    let n_threads = seize(pid, |tracer| tracer.threads().len()).unwrap();
    println!("seize and release: {:?} for {n_threads} threads", started.elapsed());
    assert_eq!(n_threads.to_string(), target.first_line);
    seize(pid, |tracer| {
        for tid in tracer.threads() {
            for _ in 0..5 {
                let seen = tracer.with_this_thread(tid, |t| t.syscall(libc::SYS_gettid, [0; 6]));
                assert_eq!(seen.unwrap(), u64::try_from(tid).unwrap());
                tracer.wait_a_moment(Duration::from_micros(300)).unwrap();
            }
        }
        let started = Instant::now();
        for _ in 0..1000 {
            assert_eq!(getpid(tracer), i64::from(pid));
        }
        println!("remote system call: {:?}", started.elapsed() / 1000);
        println!("{:?}", tracer.counts());
    })
    .unwrap();
    // Again and again, each time by another tracer, as controllers come and go.
    let mut n_rewound = 0;
    for _ in 0..40 {
        let counts = seize(pid, |tracer| {
            for tid in tracer.threads() {
                let seen = tracer.with_this_thread(tid, |t| t.syscall(libc::SYS_gettid, [0; 6]));
                assert_eq!(seen.unwrap(), u64::try_from(tid).unwrap());
            }
            tracer.counts()
        });
        n_rewound += counts.unwrap().rewound;
    }
    println!("{n_rewound} calls rewound");
    // epoll, semop, sigtimedwait, inotify, io_getevents, io_uring, timeouts of sockets
    assert!(n_rewound > 40 * 10, "{n_rewound}");
    print!("{}", target.finish());
}
