//! redis-server under clients that keep a copy of what they have written, and compare.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flea::Pid;
use flea_fixtures::{Running, Tool, require};
use nix::sys::signal::Signal;

use super::bout::{Bout, Numbers};
use super::calls::Calls;
use super::random::Random;
use super::resp::{Connection, Reply};
use super::target::{Known, Target, last_words_of};

const PATTERNS: &[&str] = &[
    "processCommand",
    "call",
    "lookupKey*",
    "dict*",
    "sds*",
    "ae*",
    "zs*",
    "hash*",
    "set*",
    "client*",
    "server*",
    "rdb*",
    "l*",
    "evict*",
    "*Command",
    "*",
    "libc.so.6:malloc",
    "libc.so.6:mem*",
    "libc.so.6:epoll_wait",
    "libc.so.6:read",
    "libc.so.6:write",
    "libc.so.6:fork",
    "libc.so.6:pthread_*",
    "libc.so.6:clock_*",
];
/// Clients, each with keys of its own.
const N_CLIENTS: usize = 3;
/// An answer that takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Servers started: each has a directory of its own.
static N_STARTED: AtomicU32 = AtomicU32::new(0);

/// The server, in a directory of its own.
pub struct Redis {
    running: Mutex<Running>,
    pid: Pid,
    dir: PathBuf,
    calls: Calls,
}

impl Redis {
    /// Starts it; `None` where it is not installed, which was said.
    pub fn start() -> Result<Option<Self>> {
        let Some(server) = require(Tool::RedisServer) else { return Ok(None) };
        let dir = std::env::temp_dir().join(format!(
            "flea-torture-redis-{}-{}",
            std::process::id(),
            N_STARTED.fetch_add(1, Ordering::Relaxed)
        ));
        remove(&dir);
        fs::DirBuilder::new().mode(0o700).create(&dir)?;
        let mut command = Command::new(server);
        command.args(["--port", "0", "--unixsocket", "socket", "--save", "", "--daemonize", "no"]);
        // Its own report of a crash would run in the signal handler, and hide where it crashed.
        command.args(["--crash-log-enabled", "no"]);
        command.args(["--enable-debug-command", "local", "--hz", "50"]).current_dir(&dir);
        let running = Running::start_group(&mut command)?;
        let pid = running.pid().cast_signed();
        let redis = Self { running: Mutex::new(running), pid, dir, calls: Calls::default() };
        let begun = Instant::now();
        while redis.connect().is_err() {
            ensure!(begun.elapsed() < PATIENCE, "redis-server does not accept connections");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Some(redis))
    }

    fn connect(&self) -> Result<Connection> {
        Connection::open(&self.dir.join("socket"), PATIENCE)
    }
}

/// A client, and what the server must hold for it.
struct Client<'a> {
    bout: &'a Bout<'a>,
    calls: &'a Calls,
    connection: Connection,
    name: String,
    random: Random,
    values: HashMap<usize, Vec<u8>>,
    list: Vec<Vec<u8>>,
    counter: i64,
}

impl Client<'_> {
    fn ask(&mut self, words: &[&[u8]]) -> Result<Reply> {
        let call = self.calls.begin();
        let asked = Instant::now();
        let reply = self.connection.ask(words)?;
        self.calls.end(call);
        let name = String::from_utf8_lossy(words.first().unwrap_or(&&[][..]));
        self.bout.answered(&format!("redis's answer to {name}"), asked);
        Ok(reply)
    }

    fn expect(&mut self, words: &[&[u8]], expected: &Reply) -> Result<()> {
        let found = self.ask(words)?;
        let shown =
            || words.iter().map(|w| String::from_utf8_lossy(w)).collect::<Vec<_>>().join(" ");
        ensure!(found == *expected, "wrong output: {}: {found:?}, not {expected:?}", shown());
        Ok(())
    }

    fn value(&mut self) -> Vec<u8> {
        let len = self.random.below(300);
        (0..len).map(|_| self.random.next().to_le_bytes()[0]).collect()
    }

    /// One command, its answer checked.
    fn step(&mut self) -> Result<()> {
        let ok = Reply::Status("OK".into());
        let number = self.random.below(200);
        let key = format!("{}:{number}", self.name).into_bytes();
        match self.random.below(100) {
            0..30 => {
                let value = self.value();
                self.expect(&[b"SET", &key, &value], &ok)?;
                self.values.insert(number, value);
            }
            30..65 => {
                let kept = self.values.get(&number).cloned();
                self.expect(&[b"GET", &key], &Reply::Bulk(kept))?;
            }
            65..70 => {
                let was_there = self.values.remove(&number).is_some();
                self.expect(&[b"DEL", &key], &Reply::Integer(was_there.into()))?;
            }
            70..78 => {
                self.counter += 7;
                let key = format!("{}:n", self.name).into_bytes();
                self.expect(&[b"INCRBY", &key, b"7"], &Reply::Integer(self.counter))?;
            }
            78..90 => self.step_list()?,
            90..97 => self.step_script(&key, number)?,
            _ => self.step_save()?,
        }
        Ok(())
    }

    fn step_list(&mut self) -> Result<()> {
        let key = format!("{}:list", self.name).into_bytes();
        if self.list.len() > 20 {
            let all = self.list.drain(..).map(|v| Reply::Bulk(Some(v))).collect();
            self.expect(&[b"LRANGE", &key, b"0", b"-1"], &Reply::Array(all))?;
            return self.expect(&[b"DEL", &key], &Reply::Integer(1));
        }
        let value = self.value();
        self.list.push(value.clone());
        let len = i64::try_from(self.list.len())?;
        self.expect(&[b"RPUSH", &key, &value], &Reply::Integer(len))
    }

    /// In Lua: the interpreter's stack, and errors, which leave by longjmp.
    fn step_script(&mut self, key: &[u8], number: usize) -> Result<()> {
        if number.is_multiple_of(4) {
            let reply = self.ask(&[b"EVAL", b"error('on purpose')", b"0"])?;
            ensure!(
                matches!(&reply, Reply::Error(text) if text.contains("on purpose")),
                "wrong output: a script's error: {reply:?}"
            );
            return Ok(());
        }
        let kept = self.values.get(&number).cloned();
        self.expect(&[b"EVAL", b"return redis.call('GET', KEYS[1])", b"1", key], &Reply::Bulk(kept))
    }

    /// A fork, whose child writes all down.
    fn step_save(&mut self) -> Result<()> {
        let reply = self.ask(&[b"BGSAVE"])?;
        match &reply {
            Reply::Status(_) => Numbers::add(&self.bout.numbers.n_born, 1),
            Reply::Error(text) if text.contains("in progress") => {}
            other => bail!("wrong output: BGSAVE: {other:?}"),
        }
        let Reply::Bulk(Some(info)) = self.ask(&[b"INFO", b"persistence"])? else {
            bail!("wrong output: INFO is no string");
        };
        let info = String::from_utf8_lossy(&info).into_owned();
        ensure!(info.contains("rdb_last_bgsave_status:ok"), "a child failed to save: {info}");
        Ok(())
    }
}

impl Target for Redis {
    fn pids(&self) -> Vec<Pid> {
        vec![self.pid]
    }

    fn patterns(&self) -> &[&'static str] {
        PATTERNS
    }

    fn signals(&self) -> &'static [Signal] {
        &[Signal::SIGWINCH, Signal::SIGCHLD, Signal::SIGHUP, Signal::SIGPIPE]
    }

    fn known(&self) -> Option<Known<'_>> {
        Some(Known { function: "processCommand", pid: self.pid, calls: &self.calls })
    }

    fn n_clients(&self) -> usize {
        N_CLIENTS
    }

    fn work(&self, client: usize, bout: &Bout<'_>) -> Result<()> {
        let mut client = Client {
            bout,
            calls: &self.calls,
            connection: self.connect()?,
            name: format!("c{client}"),
            random: Random::new(bout.seed, 100 + client as u64),
            values: HashMap::new(),
            list: Vec::new(),
            counter: 0,
        };
        while bout.goes_on() {
            client.step()?;
            if client.random.percent(2) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    fn quiet(&self, _: &Bout<'_>) -> Result<()> {
        // Its clients have gone; it has threads that only wait.
        Ok(())
    }

    fn last_words(&mut self) -> String {
        last_words_of(self.running.get_mut().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&mut self, _: &Bout<'_>) -> Result<()> {
        // It closes the connection instead of an answer.
        let _ = self.connect()?.ask(&[b"SHUTDOWN", b"NOSAVE", b"FORCE"]);
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        let status = running.wait().context("redis after SHUTDOWN")?;
        let said = running.rest()?;
        ensure!(status.success(), "redis-server ended with {status}: {said:?}");
        let crash = said.iter().find(|line| line.contains("crashed by signal"));
        ensure!(crash.is_none(), "redis-server said {crash:?}");
        Ok(())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// Removes what a server wrote, unless it has left a core file (`ulimit -c unlimited`). What
/// cannot be removed stays in the temporary directory.
pub fn remove(dir: &Path) {
    let is_core = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("core");
    let mut entries = fs::read_dir(dir).into_iter().flatten().flatten();
    if entries.any(|entry| is_core(&entry.file_name())) {
        println!("a core file is in {}", dir.display());
        return;
    }
    let _ = fs::remove_dir_all(dir);
}
