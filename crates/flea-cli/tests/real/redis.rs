//! A redis-server of our own on a socket in a directory of our own.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use flea_fixtures::{Running, Tool, require};

use crate::scratch::Scratch;

/// The server; ended with its guard.
pub struct Redis {
    server: Running,
    socket: PathBuf,
    _directory: Scratch,
}

impl Redis {
    /// Starts it and waits until it answers. `None` where it is not installed.
    pub fn start() -> Option<Self> {
        let program = require(Tool::RedisServer)?;
        let directory = Scratch::new("redis");
        let socket = directory.path().join("socket");
        let server = Running::start(
            Command::new(program)
                .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
                .arg(&socket)
                .current_dir(directory.path()),
        )
        .unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < until, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(Self { server, socket, _directory: directory })
    }

    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    pub fn client(&self) -> Client {
        Client::new(&self.socket)
    }

    /// Starts redis-benchmark for as long as its guard lives.
    pub fn benchmark(&self) -> Option<Load> {
        let program = require(Tool::RedisBenchmark)?;
        let running = Running::start(
            Command::new(program)
                .arg("-s")
                .arg(&self.socket)
                .args(["-l", "-q", "-c", "16", "-n", "100000", "-r", "1000"])
                .args(["-t", "ping,set,get,incr,lpush,rpop,sadd,hset"]),
        )
        .unwrap();
        Some(Load(running))
    }
}

/// A redis-benchmark under way.
pub struct Load(Running);

impl Load {
    /// Checks that no client has met an error: the benchmark ends at the first one.
    pub fn assert_undisturbed(&mut self) {
        let errors = self.0.stderr_so_far();
        assert!(errors.is_empty(), "redis-benchmark: {errors:?}");
        let ended = self.0.wait_within(Duration::ZERO);
        assert!(ended.is_err(), "redis-benchmark ended: {ended:?}");
    }
}

/// A client that checks every answer.
pub struct Client {
    stream: BufReader<UnixStream>,
    n_sent: u64,
}

impl Client {
    fn new(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { stream: BufReader::new(stream), n_sent: 0 }
    }

    fn ask(&mut self, request: &str) -> String {
        self.stream.get_mut().write_all(format!("{request}\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        self.stream.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    /// One PING, one SET, one GET, one DEL.
    pub fn round(&mut self) {
        self.n_sent += 1;
        let (key, value) = (format!("flea:{}", self.n_sent), format!("v{}", self.n_sent * 7));
        assert_eq!(self.ask("PING"), "+PONG");
        assert_eq!(self.ask(&format!("SET {key} {value}")), "+OK");
        assert_eq!(self.ask(&format!("GET {key}")), format!("${}", value.len()));
        let mut answer = String::new();
        self.stream.read_line(&mut answer).unwrap();
        assert_eq!(answer.trim_end(), value);
        assert_eq!(self.ask(&format!("DEL {key}")), ":1");
    }
}
