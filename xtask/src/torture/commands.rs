//! Controllers as people start them: the command `flea`, left to end, interrupted, or killed with
//! its whole process group at a random instant.

use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flea::Pid;
use flea_fixtures::Running;
use nix::sys::signal::{Signal, killpg};

use super::bout::{Bout, Numbers};
use super::random::Random;
use super::refusals::{Refusals, is_alive};
use super::target::Target;

/// A controller that takes longer hangs: thousands of functions, in a debug build, beside others.
const PATIENCE: Duration = Duration::from_secs(240);
/// How long one may stay attached.
const LONGEST: Duration = Duration::from_millis(300);

/// One after the other, until the bout ends.
pub struct Commands<'a> {
    bout: &'a Bout<'a>,
    target: &'a dyn Target,
    refusals: &'a Refusals,
    random: Random,
    /// What the last one took to attach: instants to kill at are chosen from it.
    lifetime: Duration,
}

impl<'a> Commands<'a> {
    /// The actor of this number.
    pub fn new(
        bout: &'a Bout<'a>,
        target: &'a dyn Target,
        refusals: &'a Refusals,
        number: u64,
    ) -> Self {
        let random = Random::new(bout.seed, 1 + number);
        Self { bout, target, refusals, random, lifetime: Duration::from_millis(300) }
    }

    /// Works until the bout ends.
    pub fn run(&mut self) -> Result<()> {
        while self.bout.goes_on() {
            let pid = *self.random.pick(&self.target.pids());
            match self.random.below(100) {
                0..78 => self.trace(pid)?,
                78..84 => self.ask(&["ps".into(), "-p".into(), pid.to_string()], pid)?,
                84..90 => self.detach(pid)?,
                _ => self.replace(pid)?,
            }
            Numbers::add(&self.bout.numbers.n_rounds, 1);
            if self.random.percent(30) {
                let pause = self.random.time(LONGEST);
                self.bout.sleep(pause);
            }
        }
        Ok(())
    }

    /// What to trace, in words.
    fn words(&mut self) -> Vec<String> {
        let kind = *self.random.pick(&["count", "count", "latency", "latency", "trace"]);
        let mut words = vec![kind.to_owned()];
        let patterns = self.target.patterns();
        // Everything at once is rare: it takes long.
        let all = self.random.percent(3);
        for _ in 0..=self.random.below(3) {
            let pattern = *self.random.pick(patterns);
            if pattern != "*" || (all && kind == "count") {
                words.push(pattern.to_owned());
            }
        }
        if words.len() == 1 {
            words.push(patterns[0].to_owned());
        }
        words
    }

    fn trace(&mut self, pid: Pid) -> Result<()> {
        let mut words = self.words();
        words.extend(["-p".into(), pid.to_string()]);
        words.extend(["--json".into(), "--output".into(), "/dev/null".into()]);
        let bout = self.bout;
        let name = words.join(" ");
        match self.random.below(10) {
            0..4 => bout.event(|| format!("killed {name}"), || self.kill(&words)),
            4..8 => bout.event(|| name, || self.interrupt(&words, pid)),
            _ => {
                let span = self.random.time(LONGEST).as_secs_f64();
                words.extend(["--duration".into(), format!("{span:.3}")]);
                self.ask(&words, pid)
            }
        }
    }

    fn start(&self, words: &[String]) -> Result<Running> {
        Running::start_group(Command::new(&self.bout.flea).args(words))
    }

    /// SIGKILL to all of its processes, anywhere in its life.
    fn kill(&mut self, words: &[String]) -> Result<()> {
        let mut running = self.start(words)?;
        let mut attached = 0;
        if self.random.percent(30) {
            // While it takes its programs off.
            attached = self.wait_attached(&mut running, &mut Vec::new())?.unwrap_or_default();
            let pause = self.random.time(LONGEST);
            self.bout.sleep(pause);
            // One that was refused has ended.
            let _ = running.signal(Signal::SIGINT);
            std::thread::sleep(self.random.time(self.lifetime / 2));
        } else {
            std::thread::sleep(self.random.time(self.lifetime * 5 / 4));
        }
        let group = nix::unistd::Pid::from_raw(running.pid().cast_signed());
        // Not reaped yet, so the number is its own.
        let _ = killpg(group, Signal::SIGKILL);
        let status = running.wait()?;
        let said = running.rest_of_stderr();
        attached = attached.max(said.iter().find_map(|line| attached_to(line)).unwrap_or_default());
        if status.code().is_none() {
            Numbers::add(&self.bout.numbers.n_killed, 1);
            Numbers::add(&self.bout.numbers.n_killed_attached, u64::from(attached > 0));
        }
        Numbers::add(&self.bout.numbers.n_swaps, attached);
        Ok(())
    }

    /// Ctrl-C when it has been attached for a while.
    fn interrupt(&mut self, words: &[String], pid: Pid) -> Result<()> {
        let begun = Instant::now();
        let mut running = self.start(words)?;
        let mut said = Vec::new();
        let attached = self.wait_attached(&mut running, &mut said)?;
        if attached.is_some() {
            self.lifetime = begun.elapsed().min(Duration::from_secs(20));
            let pause = self.random.time(LONGEST);
            self.bout.sleep(pause);
            // It ends by itself where the process has ended.
            let _ = running.signal(Signal::SIGINT);
        }
        let status = running.wait_within(PATIENCE).with_context(|| words.join(" "))?;
        said.extend(running.rest_of_stderr());
        self.judge(words, pid, status, &said)?;
        Numbers::add(&self.bout.numbers.n_swaps, 2 * attached.unwrap_or_default());
        Ok(())
    }

    /// How many functions it has attached to; nothing where it ended without.
    fn wait_attached(&self, running: &mut Running, said: &mut Vec<String>) -> Result<Option<u64>> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let Ok(line) = running.stderr_line_within(Duration::from_millis(200)) else {
                if running.wait_within(Duration::ZERO).is_ok() {
                    return Ok(None);
                }
                continue;
            };
            if let Some(n) = attached_to(&line) {
                return Ok(Some(n));
            }
            said.push(line);
        }
        anyhow::bail!("a controller neither attached nor ended in {PATIENCE:?}: {said:?}")
    }

    /// One that ends by itself.
    fn ask(&self, words: &[String], pid: Pid) -> Result<()> {
        let mut running = self.start(words)?;
        let status = running.wait_within(PATIENCE).with_context(|| words.join(" "))?;
        let said = running.rest_of_stderr();
        self.judge(words, pid, status, &said)?;
        let attached = said.iter().find_map(|line| attached_to(line)).unwrap_or_default();
        Numbers::add(&self.bout.numbers.n_swaps, 2 * attached);
        Ok(())
    }

    /// Everything that is attached, whoever did it.
    fn detach(&self, pid: Pid) -> Result<()> {
        let words = ["detach".into(), pid.to_string()];
        self.bout.take_off(|| self.ask(&words, pid))
    }

    /// Another code for a function, for a while or until somebody takes it off.
    fn replace(&mut self, pid: Pid) -> Result<()> {
        let Some((object, function)) = self.target.patch() else { return Ok(()) };
        let mut words = vec!["replace".into(), object, function.into()];
        words.extend(["-p".into(), pid.to_string()]);
        if self.random.percent(70) {
            words.extend(["--duration".into(), "0.1".into()]);
        }
        if self.random.percent(30) { self.kill(&words) } else { self.ask(&words, pid) }
    }

    /// Fails where it ended in a way that it must not.
    fn judge(&self, words: &[String], pid: Pid, status: ExitStatus, said: &[String]) -> Result<()> {
        if status.code() == Some(0) || !is_alive(pid) {
            return Ok(());
        }
        let refused = status.code() == Some(1) && !said.is_empty() && self.refusals.all_known(said);
        ensure!(refused, "`flea {}` ended with {status}: {said:?}", words.join(" "));
        Ok(())
    }
}

/// The number in the line that says so.
fn attached_to(line: &str) -> Option<u64> {
    line.strip_prefix("flea: attached to ")?.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::attached_to;

    #[test]
    fn the_line_that_says_so() {
        assert_eq!(attached_to("flea: attached to 17 functions"), Some(17));
        assert_eq!(attached_to("flea: not attached: 17 more"), None);
    }
}
