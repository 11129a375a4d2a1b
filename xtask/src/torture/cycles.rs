//! `cargo xtask cycles`: on and off again, as often as wanted, on one process. Both sides must
//! stay as large as they were.
//!
//! Three of four cycles attach and detach a program of an object that stays; the fourth loads
//! the object anew, which makes its memory in the target and takes it away.

use std::fs;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use flea::builtin::Count;
use flea::{Function, Object, Pid, ProgramKind, Session};
use flea_fixtures::{Fixture, Running, try_build};

use super::clean::our_mappings;
use super::interrupted;
use crate::bench::programs::{Programs, Work};

/// Cycles before anything is measured: allocators and caches fill.
const WARM_UP: u64 = 40;
/// `USER_HZ` is 100 on x86.
const MS_PER_TICK: f64 = 10.0;
/// Memory may grow by so much: an allocator's odd pages.
const SLACK_KB: u64 = 2048;

/// CPU time of this process and of those that it has started and waited for, in milliseconds: what
/// cycles cost on a machine that others do not use.
fn cpu_ms() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let (_, rest) = stat.rsplit_once(") ").context("a name in /proc/self/stat")?;
    // Fields 14 to 17 (utime, stime, cutime, cstime), of which the third is the first here.
    let ticks: Vec<u64> =
        rest.split(' ').skip(11).take(4).map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<u64>() as f64 * MS_PER_TICK)
}

/// What a process has.
#[derive(Debug, Clone, Copy)]
struct Size {
    rss_kb: u64,
    virtual_kb: u64,
    n_mappings: usize,
    n_fds: usize,
    n_threads: usize,
}

fn size_of(pid: Pid) -> Result<Size> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|rest| rest.split_whitespace().next());
        Ok(word.with_context(|| format!("{name} of {pid}"))?.parse()?)
    };
    Ok(Size {
        rss_kb: field("VmRSS:")?,
        virtual_kb: field("VmSize:")?,
        n_mappings: fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().count(),
        n_fds: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        n_threads: usize::try_from(field("Threads:")?)?,
    })
}

/// Fails where `now` is larger than `first` was.
fn compare(who: &str, first: Size, now: Size) -> Result<()> {
    let grown = now.rss_kb > first.rss_kb + SLACK_KB
        || now.virtual_kb > first.virtual_kb + SLACK_KB
        || now.n_mappings > first.n_mappings + 4
        || now.n_fds > first.n_fds
        || now.n_threads > first.n_threads;
    ensure!(!grown, "{who} has grown: {first:?} became {now:?}");
    Ok(())
}

struct Options {
    n_cycles: u64,
    /// Of the target.
    n_threads: String,
}

fn parse(args: &[&str]) -> Result<Options> {
    let mut options = Options { n_cycles: 10_000, n_threads: "2".to_owned() };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let value = args.next().with_context(|| format!("{arg} takes a value"))?;
        match *arg {
            "--count" => options.n_cycles = value.parse().context("--count N")?,
            "--threads" => options.n_threads = (*value).to_owned(),
            other => bail!("cycles does not know {other}"),
        }
    }
    ensure!(options.n_cycles > 0, "at least one cycle");
    Ok(options)
}

/// Runs it; fails where something grew.
pub fn run(args: &[&str]) -> Result<ExitCode> {
    let options = parse(args)?;
    let interrupted = interrupted()?;
    let program = try_build(Fixture::Spin)?.context("no C compiler")?;
    let mut target = Running::start_group(Command::new(program).arg(&options.n_threads))?;
    target.expect_line("ready")?;
    let pid = target.pid().cast_signed();
    let session = Session::attach(pid)?;
    let functions = session.find("spin_step")?;
    let kept = Kept::new(&session, &functions)?;
    (0..WARM_UP).try_for_each(|i| kept.cycle(i))?;
    measure(&kept, pid, options.n_cycles, &interrupted)?;
    drop(kept);
    finish(target, pid)?;
    Ok(ExitCode::SUCCESS)
}

/// The cycles, with a look at both sides at 1, 10, 50 and 100 percent.
fn measure(kept: &Kept<'_>, pid: Pid, n_cycles: u64, interrupted: &AtomicBool) -> Result<()> {
    let sizes = || -> Result<[Size; 2]> { Ok([size_of(pid)?, size_of(own_pid())?]) };
    let first = sizes()?;
    println!("target {:?}\ncontroller {:?}", first[0], first[1]);
    let (begun, cpu_before) = (Instant::now(), cpu_ms()?);
    let marks = [1, 10, 50, 100].map(|percent| (n_cycles * percent / 100).max(1));
    for i in 1..=n_cycles {
        kept.cycle(i)?;
        let ends = interrupted.load(Ordering::Relaxed);
        if !ends && !marks.contains(&i) {
            continue;
        }
        let now = sizes()?;
        let ms = begun.elapsed().as_secs_f64() * 1e3 / i as f64;
        let cpu = (cpu_ms()? - cpu_before) / i as f64;
        println!("{i} cycles, {ms:.2} ms each ({cpu:.2} ms of CPU)");
        println!("  target {:?}\n  controller {:?}", now[0], now[1]);
        compare("the target", first[0], now[0])?;
        compare("the controller", first[1], now[1])?;
        if ends {
            println!("interrupted");
            break;
        }
    }
    Ok(())
}

/// What the cycles are made of.
struct Kept<'a> {
    session: &'a Session,
    functions: &'a [Function],
    object: Object,
}

impl<'a> Kept<'a> {
    fn new(session: &'a Session, functions: &'a [Function]) -> Result<Self> {
        let kinds = &[ProgramKind::Fentry, ProgramKind::Fexit];
        let object = session.load(Programs { kinds, work: Work::Count, n: 2 }.object()?)?;
        Ok(Self { session, functions, object })
    }

    /// Number `i`: an entry program, an exit program, both, or all anew.
    fn cycle(&self, i: u64) -> Result<()> {
        let [function] = self.functions else { bail!("spin_step is not one function") };
        let all: Vec<_> = self.object.programs().map(|p| p.on(function, 0)).collect();
        match i % 4 {
            0 => Count::start(self.session, self.functions)?.detach()?,
            1 => self.object.attach(&all[..1])?.detach()?,
            2 => self.object.attach(&all[1..])?.detach()?,
            _ => self.object.attach(&all)?.detach()?,
        }
        Ok(())
    }
}

fn own_pid() -> Pid {
    std::process::id().cast_signed()
}

/// Nothing is left in the target, and it ends as always.
fn finish(mut target: Running, pid: Pid) -> Result<()> {
    let left = our_mappings(pid)?;
    ensure!(left.is_empty(), "left in the target: {left:?}");
    target.send("stop")?;
    let status = target.wait()?;
    ensure!(status.success(), "the target ended with {status}");
    Ok(())
}
