//! Programs that Flea starts, with every function of a module counted: same output and same
//! exit code as without.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use flea_fixtures::{Running, Tool, require};

use crate::{
    flea::{PATIENCE, Records, list},
    scratch::Scratch,
};

/// A command line and what it is started with.
struct Program<'a> {
    line: Vec<String>,
    stdin: &'a [&'a str],
    directory: &'a Path,
    user: Option<(u32, u32)>,
    flea: &'a Path,
}

/// What a run showed.
#[derive(Debug, PartialEq)]
struct Outcome {
    stdout: Vec<String>,
    stderr: Vec<String>,
    status: ExitStatus,
}

impl<'a> Program<'a> {
    fn new(line: &[&str], directory: &'a Path) -> Self {
        Self {
            line: line.iter().map(|&word| word.to_owned()).collect(),
            stdin: &[],
            directory,
            user: None,
            flea: Path::new(env!("CARGO_BIN_EXE_flea")),
        }
    }

    fn start(&self, words: &[&str]) -> Outcome {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).current_dir(self.directory);
        command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
        command.env("LC_ALL", "C").env("TZ", "UTC").env("PYTHONDONTWRITEBYTECODE", "1");
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        let mut running = Running::start_group(&mut command).unwrap();
        for line in self.stdin {
            running.send(line).unwrap();
        }
        running.close_stdin();
        let status = running.wait_within(PATIENCE).unwrap();
        Outcome { stdout: running.rest().unwrap(), stderr: running.rest_of_stderr(), status }
    }

    fn alone(&self) -> Outcome {
        self.start(&self.line.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Runs it under `flea VERB PATTERN`; what it did, and what Flea saw.
    fn traced(&self, verb: &str, pattern: &str) -> (Outcome, Records) {
        let records = self.directory.join("records");
        let flea = self.flea.to_str().unwrap();
        let mut words =
            vec![flea, verb, pattern, "--json", "--output", records.to_str().unwrap(), "--"];
        words.extend(self.line.iter().map(String::as_str));
        let mut outcome = self.start(&words);
        let (ours, its): (Vec<_>, Vec<_>) =
            outcome.stderr.into_iter().partition(|line| line.starts_with("flea: "));
        outcome.stderr = its;
        let text = std::fs::read_to_string(&records)
            .unwrap_or_else(|error| panic!("{error}: {ours:?} {:?}", outcome.stderr));
        std::fs::remove_file(&records).unwrap();
        (outcome, Records::parse(&text.lines().collect::<Vec<_>>()))
    }

    /// The whole check; what Flea saw.
    fn check(&self, verb: &str, pattern: &str, n_at_least: usize) -> Records {
        let alone = self.alone();
        let (traced, records) = self.traced(verb, pattern);
        assert_eq!(traced, alone, "flea {verb} {pattern}");
        let names = records.attached(if verb == "count" { "count" } else { "histogram" });
        assert!(names.len() >= n_at_least, "only {} functions", names.len());
        records.assert_complete(names.len());
        records
    }
}

#[test]
fn python_with_all_of_libc() {
    let debian = PathBuf::from("/usr/bin/python3");
    let found = Some(debian).filter(|path| path.is_file()).or_else(|| require(Tool::Python3));
    let Some(python) = found else { return };
    let directory = Scratch::new("python");
    let script = directory.path().join("script.py");
    std::fs::write(&script, include_str!("script.py")).unwrap();
    let line = [python.to_str().unwrap(), script.to_str().unwrap()];
    let program = Program::new(&line, directory.path());
    // Exit programs: the calls of a frame between function and caller (vfork, dlopen, ...).
    program.check("latency", "*:*", 3000);
    let records = program.check("count", "libc.so.6:*", 2000);
    assert_eq!(program.alone().status.code(), Some(3));
    let counts = records.counts();
    assert!(counts["malloc"] > 1000, "{}", counts["malloc"]);
    // Eight threads, and each function that was attached to is one that `flea list` offers.
    assert!(counts["pthread_create"] >= 8, "{}", counts["pthread_create"]);
    let listed = list("libc.so.6:*", &["--", line[0], line[1]]);
    assert_eq!(records.attached("count"), listed.attachable());
}

#[test]
fn git_with_all_of_libc() {
    let Some(git) = require(Tool::Git) else { return };
    let directory = Scratch::new("git");
    let repository = directory.path().join("repository");
    std::fs::create_dir(&repository).unwrap();
    let git = git.to_str().unwrap();
    let run = |arguments: &[&str]| {
        let mut line = vec![git];
        line.extend(arguments);
        let outcome = Program::new(&line, &repository).alone();
        assert!(outcome.status.success(), "{outcome:?}");
    };
    run(&["init", "--quiet", "."]);
    let author = ["-c", "user.name=A B", "-c", "user.email=a@b.example"];
    for n in 1..=5 {
        std::fs::write(repository.join(format!("file{n}")), format!("{n}\n").repeat(n)).unwrap();
        run(&["add", "."]);
        let mut commit = author.to_vec();
        let subject = format!("Commit {n}");
        commit.extend(["commit", "--quiet", "-m", &subject]);
        run(&commit);
    }
    std::fs::write(repository.join("file1"), "changed\n").unwrap();
    for arguments in [
        &["log", "--stat", "-p"][..],
        &["status", "--porcelain", "--untracked-files=no"],
        &["diff"],
        &["fsck", "--no-progress"],
        &["show", "no-such-commit"],
    ] {
        let mut line = vec![git];
        line.extend(arguments);
        Program::new(&line, &repository).check("count", "libc.so.6:*", 2000);
    }
}

/// A user that postgres agrees to run as: (user, group). `None` where we are not root.
fn postgres_user() -> Option<(u32, u32)> {
    use nix::unistd::{User, geteuid};
    if !geteuid().is_root() {
        return None;
    }
    let user = ["postgres", "nobody"].iter().find_map(|name| User::from_name(name).ok()?).unwrap();
    Some((user.uid.as_raw(), user.gid.as_raw()))
}

/// A database cluster of our own, and a copy of `flea` that its user can execute.
struct Cluster {
    scratch: Scratch,
    postgres: PathBuf,
    user: Option<(u32, u32)>,
}

impl Cluster {
    fn new() -> Option<Self> {
        let postgres = require(Tool::Postgres)?;
        let initdb = require(Tool::Initdb)?;
        let scratch = Scratch::new("postgres");
        let user = postgres_user();
        if let Some((uid, gid)) = user {
            std::os::unix::fs::chown(scratch.path(), Some(uid), Some(gid)).unwrap();
        }
        std::fs::copy(env!("CARGO_BIN_EXE_flea"), scratch.path().join("flea")).unwrap();
        let data = scratch.path().join("data");
        let line =
            [initdb.to_str().unwrap(), "--no-sync", "-A", "trust", "-D", data.to_str().unwrap()];
        let cluster = Self { postgres, user, scratch };
        let outcome = cluster.program(&line, Path::new("")).alone();
        assert!(outcome.status.success(), "{outcome:?}");
        Some(cluster)
    }

    fn program<'a>(&'a self, line: &[&str], flea: &'a Path) -> Program<'a> {
        Program { user: self.user, flea, ..Program::new(line, self.scratch.path()) }
    }
}

const SQL: [&str; 6] = [
    "create temp table t(a int, b text);",
    "insert into t select i, md5(i::text) from generate_series(1, 1000) i;",
    "select count(*), sum(a), max(b) from t;",
    "select 1/0;",
    "select a from t where b like '%abc%' order by a;",
    "select sum(sqrt(a)), string_agg(b, ',' order by b) from t where a < 20;",
];

#[test]
fn postgres_with_all_of_libc_and_with_all_of_its_own() {
    let Some(cluster) = Cluster::new() else { return };
    let flea = cluster.scratch.path().join("flea");
    let data = cluster.scratch.path().join("data");
    let line = [
        cluster.postgres.to_str().unwrap(),
        "--single",
        "-D",
        data.to_str().unwrap(),
        "-F",
        // No times and process numbers in what it writes.
        "-c",
        "log_line_prefix=",
        "-c",
        "log_checkpoints=off",
        "postgres",
    ];
    let program = Program { stdin: &SQL, ..cluster.program(&line, &flea) };
    // The first start of a cluster says other things than later ones.
    program.alone();
    let records = program.check("count", "libc.so.6:*", 2000);
    assert!(records.counts()["malloc"] > 0);
    let records = program.check("count", "*", 5000);
    assert!(records.counts()["pg_parse_query"] >= 6, "one per line of SQL");
}
