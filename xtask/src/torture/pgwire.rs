//! As much of PostgreSQL's protocol (version 3, simple queries) as the checking client speaks.

use std::io::{BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use flea::Pid;

/// No answer of ours is longer.
const MAX_MESSAGE_BYTES: usize = 1 << 24;

/// What a query gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Values as text; NULL is none.
    pub rows: Vec<Vec<Option<String>>>,
    /// SQLSTATE of the error, if there was one.
    pub error: Option<String>,
}

/// A connection, which is a server process.
pub struct Connection {
    stream: BufReader<UnixStream>,
    /// That process.
    pub backend: Pid,
}

impl Connection {
    /// Connects to the database `postgres` as `user`; an answer may take `patience`.
    pub fn open(socket: &Path, user: &str, patience: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        let mut connection = Self { stream: BufReader::new(stream), backend: 0 };
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        for word in ["user", user, "database", "postgres", ""] {
            body.extend_from_slice(word.as_bytes());
            body.push(0);
        }
        connection.send(None, &body)?;
        loop {
            match connection.message()? {
                (b'Z', _) => return Ok(connection),
                (b'E', body) => bail!("{}", error_text(&body)),
                (b'K', body) => connection.backend = i32::from_be_bytes(head(&body)?),
                _ => {}
            }
        }
    }

    /// Runs one query.
    pub fn query(&mut self, sql: &str) -> Result<Answer> {
        self.run(sql).with_context(|| format!("the answer to {sql:?}"))
    }

    fn run(&mut self, sql: &str) -> Result<Answer> {
        let mut body = sql.as_bytes().to_vec();
        body.push(0);
        self.send(Some(b'Q'), &body)?;
        let mut answer = Answer::default();
        loop {
            match self.message()? {
                (b'Z', _) => return Ok(answer),
                (b'D', body) => answer.rows.push(row(&body)?),
                (b'E', body) => answer.error = Some(field(&body, b'C').unwrap_or_default()),
                _ => {}
            }
        }
    }

    fn send(&mut self, kind: Option<u8>, body: &[u8]) -> Result<()> {
        let mut bytes: Vec<u8> = kind.into_iter().collect();
        bytes.extend(u32::try_from(body.len() + 4)?.to_be_bytes());
        bytes.extend_from_slice(body);
        Ok(self.stream.get_mut().write_all(&bytes)?)
    }

    fn message(&mut self) -> Result<(u8, Vec<u8>)> {
        let mut begin = [0; 5];
        self.stream.read_exact(&mut begin).context("the server closed the connection")?;
        let len = u32::from_be_bytes(head(&begin[1..])?) as usize;
        ensure!((4..MAX_MESSAGE_BYTES).contains(&len), "a message of {len} bytes");
        let mut body = vec![0; len - 4];
        self.stream.read_exact(&mut body)?;
        Ok((begin[0], body))
    }
}

fn head<const N: usize>(bytes: &[u8]) -> Result<[u8; N]> {
    bytes.first_chunk().copied().context("a message is too short")
}

/// A DataRow.
fn row(body: &[u8]) -> Result<Vec<Option<String>>> {
    let n = u16::from_be_bytes(head(body)?);
    let mut rest = body.get(2..).unwrap_or_default();
    let mut values = Vec::new();
    for _ in 0..n {
        let len = i32::from_be_bytes(head(rest)?);
        rest = &rest[4..];
        let Ok(len) = usize::try_from(len) else {
            values.push(None);
            continue;
        };
        let (value, after) = rest.split_at_checked(len).context("a value is too short")?;
        values.push(Some(String::from_utf8(value.to_vec())?));
        rest = after;
    }
    Ok(values)
}

/// A field of an ErrorResponse.
fn field(body: &[u8], wanted: u8) -> Option<String> {
    body.split(|byte| *byte == 0)
        .find(|field| field.first() == Some(&wanted))
        .map(|field| String::from_utf8_lossy(&field[1..]).into_owned())
}

fn error_text(body: &[u8]) -> String {
    field(body, b'M').unwrap_or_else(|| "an error without a message".to_owned())
}
