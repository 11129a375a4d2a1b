//! As much of the protocol of redis as the checking client speaks.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Status(String),
    /// `-ERR ...`
    Error(String),
    /// `:1`
    Integer(i64),
    /// A string, or none.
    Bulk(Option<Vec<u8>>),
    /// Several.
    Array(Vec<Reply>),
}

/// A connection.
pub struct Connection(BufReader<UnixStream>);

impl Connection {
    /// Connects; an answer may take `patience`.
    pub fn open(socket: &Path, patience: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a command, returns the answer.
    pub fn ask(&mut self, words: &[&[u8]]) -> Result<Reply> {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend(format!("${}\r\n", word.len()).into_bytes());
            bytes.extend_from_slice(word);
            bytes.extend_from_slice(b"\r\n");
        }
        self.0.get_mut().write_all(&bytes).context("sending a command")?;
        self.reply().with_context(|| {
            format!("the answer to {}", String::from_utf8_lossy(words.first().unwrap_or(&&[][..])))
        })
    }

    fn reply(&mut self) -> Result<Reply> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let line = line.strip_suffix("\r\n").context("the connection was closed")?;
        let (kind, rest) = line.split_at_checked(1).context("an empty answer")?;
        Ok(match kind {
            "+" => Reply::Status(rest.to_owned()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Integer(rest.parse()?),
            "$" if rest == "-1" => Reply::Bulk(None),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Reply::Bulk(Some(bytes))
            }
            "*" => Reply::Array(
                (0..rest.parse::<usize>()?).map(|_| self.reply()).collect::<Result<_>>()?,
            ),
            other => bail!("an answer of the kind {other:?}"),
        })
    }
}
