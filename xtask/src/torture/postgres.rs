//! A postgres cluster of its own, with clients that compare what they read with what they wrote.
//! Each client is a process of the server, forked from a traced one, and some reconnect often.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flea::Pid;
use flea_fixtures::{Running, Tool, require};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{User, geteuid};

use super::bout::{Bout, Numbers};
use super::calls::Calls;
use super::pgwire::{Answer, Connection};
use super::random::Random;
use super::redis::remove;
use super::target::{Known, Target, last_words_of};

const PATTERNS: &[&str] = &[
    "pg_parse_query",
    "Exec*",
    "heap_*",
    "bt*",
    "LWLock*",
    "palloc*",
    "pg_*",
    "Index*",
    "ProcSleep",
    "ProcSignal*",
    "errfinish",
    "Postgres*",
    "WaitEventSet*",
    "Proc*",
    "*",
    "hash_*",
    "Buffer*",
    "libc.so.6:malloc",
    "libc.so.6:mem*",
    "libc.so.6:epoll_wait",
    "libc.so.6:recv",
    "libc.so.6:fork",
    "libc.so.6:sem_*",
    "libc.so.6:kill",
    "*Latch*",
];
/// Clients; the first keeps its connection, and its queries are known.
const N_CLIENTS: usize = 3;
/// Who owns the cluster's tables.
const USER: &str = "torture";
/// An answer that takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(30);
const SETTINGS: &str = "\
listen_addresses = ''
fsync = off
shared_buffers = 16MB
max_connections = 20
log_min_messages = warning
log_min_error_statement = panic
max_parallel_workers_per_gather = 2
parallel_setup_cost = 0
parallel_tuple_cost = 0
min_parallel_table_scan_size = 0
";

/// The cluster.
pub struct Postgres {
    running: Mutex<Running>,
    postmaster: Pid,
    dir: PathBuf,
    calls: Calls,
    /// The server process of the first client, once it has one.
    first: AtomicI32,
}

/// Who runs it: postgres refuses to be run by root.
fn server_user() -> Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    for name in ["postgres", "nobody"] {
        if let Some(user) = User::from_name(name)? {
            return Ok(Some(user));
        }
    }
    bail!("there is no user postgres or nobody to run postgres")
}

impl Postgres {
    /// Makes and starts it; `None` where it is not installed, which was said.
    pub fn start() -> Result<Option<Self>> {
        let (Some(initdb), Some(server)) = (require(Tool::Initdb), require(Tool::Postgres)) else {
            return Ok(None);
        };
        let dir = std::env::temp_dir().join(format!("flea-torture-pg-{}", std::process::id()));
        remove(&dir);
        fs::DirBuilder::new().mode(0o700).create(&dir)?;
        let owner = server_user()?;
        let as_owner = |path: &PathBuf| {
            let mut command = Command::new(path);
            if let Some(owner) = &owner {
                command.uid(owner.uid.as_raw()).gid(owner.gid.as_raw());
            }
            command.current_dir(&dir).env("LC_ALL", "C");
            command
        };
        if let Some(owner) = &owner {
            chown(&dir, Some(owner.uid.as_raw()), Some(owner.gid.as_raw()))?;
        }
        let data = dir.join("data");
        let mut command = as_owner(&initdb);
        command.args(["--no-sync", "--auth=trust", "--username", USER, "-D"]).arg(&data);
        let output = command.output().with_context(|| format!("running {command:?}"))?;
        ensure!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
        fs::write(data.join("postgresql.conf"), SETTINGS)?;
        let mut command = as_owner(&server);
        command.arg("-k").arg(&dir).arg("-D").arg(&data);
        let running = Running::start_group(&mut command)?;
        let (calls, first) = (Calls::default(), AtomicI32::new(0));
        let postmaster = running.pid().cast_signed();
        let postgres = Self { running: Mutex::new(running), postmaster, dir, calls, first };
        let begun = Instant::now();
        while let Err(error) = postgres.connect() {
            ensure!(begun.elapsed() < PATIENCE, "postgres does not accept connections: {error:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(Some(postgres))
    }

    fn connect(&self) -> Result<Connection> {
        Connection::open(&self.dir.join(".s.PGSQL.5432"), USER, PATIENCE)
    }
}

/// A client, and what its table must hold.
struct Client<'a> {
    bout: &'a Bout<'a>,
    postgres: &'a Postgres,
    connection: Connection,
    number: usize,
    random: Random,
    values: HashMap<usize, String>,
}

impl Client<'_> {
    fn query(&mut self, sql: &str) -> Result<Answer> {
        let call = (self.number == 0).then(|| self.postgres.calls.begin());
        let asked = Instant::now();
        let answer = self.connection.query(sql)?;
        if let Some(call) = call {
            self.postgres.calls.end(call);
        }
        self.bout.answered(&format!("postgres's answer to {sql}"), asked);
        Ok(answer)
    }

    fn expect(&mut self, sql: &str, rows: &[&[&str]]) -> Result<()> {
        let answer = self.query(sql)?;
        let rows = rows.iter().map(|row| row.iter().map(|v| Some((*v).to_owned())).collect());
        let expected = Answer { rows: rows.collect(), error: None };
        ensure!(answer == expected, "wrong output: {sql}: {answer:?}, not {expected:?}");
        Ok(())
    }

    fn expect_error(&mut self, sql: &str, code: &str) -> Result<()> {
        let answer = self.query(sql)?;
        ensure!(answer.error.as_deref() == Some(code), "wrong output: {sql}: {answer:?}");
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        let (me, key) = (self.number, self.random.below(100));
        match self.random.below(100) {
            0..30 => {
                let value = format!("{:x}", self.random.next());
                self.expect(
                    &format!(
                        "insert into t{me} values ({key}, '{value}') \
                         on conflict (k) do update set v = excluded.v"
                    ),
                    &[],
                )?;
                self.values.insert(key, value);
            }
            30..65 => {
                let kept = self.values.get(&key).cloned();
                let rows: Vec<&[&str]> = Vec::new();
                let sql = format!("select v from t{me} where k = {key}");
                match kept {
                    Some(value) => self.expect(&sql, &[&[&value]])?,
                    None => self.expect(&sql, &rows)?,
                }
            }
            65..72 => {
                self.expect(&format!("begin; delete from t{me}; rollback"), &[])?;
                let n = self.values.len().to_string();
                self.expect(&format!("select count(*) from t{me}"), &[&[&n]])?;
            }
            72..80 => self.expect_error(&format!("select 1/(0*{key})"), "22012")?,
            80..88 => {
                self.expect("select sum(x) from generate_series(1,10000) x", &[&["50005000"]])?;
            }
            88..92 => {
                self.expect("select count(*), sum(i) from big", &[&["20000", "200010000"]])?
            }
            92..94 => {
                self.expect("set statement_timeout = 30", &[])?;
                self.expect_error("select pg_sleep(20)", "57014")?;
                self.expect("set statement_timeout = 0", &[])?;
            }
            _ if self.number > 0 => self.reconnect()?,
            _ => self.expect("select length(repeat('flea', 1000))", &[&["4000"]])?,
        }
        Ok(())
    }

    /// A new process of the server.
    fn reconnect(&mut self) -> Result<()> {
        let asked = Instant::now();
        self.connection = self.postgres.connect().context("connecting again")?;
        self.bout.answered("connecting to postgres", asked);
        Numbers::add(&self.bout.numbers.n_born, 1);
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        let me = self.number;
        self.expect(&format!("create table t{me} (k int primary key, v text)"), &[])?;
        if me == 0 {
            self.expect(
                "begin; create table big (i int); \
                 insert into big select generate_series(1, 20000); commit",
                &[],
            )?;
        }
        let begun = Instant::now();
        // Made by the first client.
        while self.query("select 1 from big limit 1")?.rows.is_empty() {
            ensure!(begun.elapsed() < PATIENCE, "the first client's table does not come");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Target for Postgres {
    fn pids(&self) -> Vec<Pid> {
        let postmaster = self.postmaster;
        let children = fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"));
        let children = children.unwrap_or_default();
        std::iter::once(postmaster)
            .chain(children.split_whitespace().filter_map(|word| word.parse().ok()))
            .collect()
    }

    fn patterns(&self) -> &[&'static str] {
        PATTERNS
    }

    fn signals(&self) -> &'static [Signal] {
        // SIGHUP reads the configuration again, in all of its processes.
        &[Signal::SIGHUP, Signal::SIGWINCH, Signal::SIGPIPE, Signal::SIGCONT]
    }

    fn known(&self) -> Option<Known<'_>> {
        let pid = self.first.load(Ordering::Relaxed);
        (pid != 0).then_some(Known { function: "pg_parse_query", pid, calls: &self.calls })
    }

    fn n_clients(&self) -> usize {
        N_CLIENTS
    }

    fn work(&self, client: usize, bout: &Bout<'_>) -> Result<()> {
        let connection = self.connect()?;
        if client == 0 {
            self.first.store(connection.backend, Ordering::Relaxed);
        }
        let mut client = Client {
            bout,
            postgres: self,
            connection,
            number: client,
            random: Random::new(bout.seed, 200 + client as u64),
            values: HashMap::new(),
        };
        client.prepare()?;
        while bout.goes_on() {
            client.step()?;
        }
        Ok(())
    }

    fn quiet(&self, _: &Bout<'_>) -> Result<()> {
        // Its clients have gone; its own processes wait for work.
        Ok(())
    }

    fn last_words(&mut self) -> String {
        last_words_of(self.running.get_mut().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&mut self, _: &Bout<'_>) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.postmaster);
        kill(pid, Signal::SIGINT)?;
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        let status = running.wait().context("postgres after SIGINT")?;
        let said = running.rest_of_stderr();
        ensure!(status.success(), "postgres ended with {status}: {said:?}");
        let marks = ["terminated by signal", "PANIC", "server process (PID"];
        let crash = said.iter().find(|line| marks.iter().any(|mark| line.contains(mark)));
        ensure!(crash.is_none(), "postgres said {crash:?}");
        Ok(())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Its processes are no group. Where it still runs, it is stopped first: what it does not
        // reap keeps its number.
        if running.signal(Signal::SIGSTOP).is_ok() {
            for child in self.pids().into_iter().filter(|pid| *pid != self.postmaster) {
                let _ = kill(nix::unistd::Pid::from_raw(child), Signal::SIGKILL);
            }
        }
        remove(&self.dir);
    }
}
