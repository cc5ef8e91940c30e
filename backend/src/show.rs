//! The sockets that show counters: JSON to whoever connects, Prometheus' text to whoever asks by HTTP.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::metrics::{self, CONTENT_TYPE, Shown};
use crate::stats::Stats;

/// How long a reader may take, and bytes and headers its request may have.
const PATIENCE: Duration = Duration::from_secs(1);
const MAX_REQUEST: usize = 8192;
const MAX_HEADERS: usize = 64;

/// A port as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct PortShown {
    /// Its name.
    pub name: String,
    /// Its counters.
    #[serde(flatten)]
    pub stats: Arc<Stats>,
}

/// All that is shown.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Board {
    /// The counters of a program that was started with one port's options.
    One([PortShown; 1]),
    /// The counters of ports.
    Ports {
        /// One a port, in the order of the command line.
        ports: Vec<PortShown>,
    },
}

impl Board {
    fn ports(&self) -> &[PortShown] {
        match self {
            Board::One(port) => port,
            Board::Ports { ports } => ports,
        }
    }

    /// Ports, and those of them that have a frontend.
    pub fn frontends(&self) -> (usize, usize) {
        let ports = self.ports();
        (ports.len(), ports.iter().filter(|port| port.stats.is_connected()).count())
    }

    fn json(&self) -> io::Result<String> {
        Ok(match self {
            Board::One([port]) => serde_json::to_string(&port.stats)?,
            ports @ Board::Ports { .. } => serde_json::to_string(ports)?,
        })
    }

    fn text(&self) -> io::Result<String> {
        let shown: Vec<_> =
            self.ports().iter().map(|port| Shown { name: &port.name, stats: &port.stats }).collect();
        metrics::text(&shown).map_err(io::Error::other)
    }

    /// Answers every connection with one JSON object, for as long as the process lives.
    pub fn serve_json(&self, listener: &UnixListener) {
        serve(listener, "stats", |mut reader| {
            reader.write_all(self.json()?.as_bytes())?;
            reader.write_all(b"\n")
        });
    }

    /// Answers every HTTP request with the metrics, for as long as the process lives.
    pub fn serve_metrics(&self, listener: &UnixListener) {
        serve(listener, "metrics", |mut reader| {
            let request = receive(reader);
            let is_head = matches!(request, Ok(Method::Head));
            let (status, kind, body) = match request {
                Ok(Method::Get | Method::Head) => ("200 OK", CONTENT_TYPE, self.text()?),
                Ok(Method::Other) => {
                    ("405 Method Not Allowed", "text/plain", "GET is all there is\n".to_owned())
                }
                // Whoever connects and leaves asked nothing.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => ("400 Bad Request", "text/plain", format!("{error}\n")),
            };
            // The length is what a GET would be given (RFC 9110, 8.6).
            let length = body.len();
            let body = if is_head { "" } else { &body };
            let answer = format!(
                "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nAllow: GET, HEAD\r\nConnection: close\r\n\r\n{body}"
            );
            reader.write_all(answer.as_bytes())
        });
    }
}

/// Answers one connection after another; none holds the next up for longer than it is given.
fn serve(listener: &UnixListener, what: &str, answer: impl Fn(&UnixStream) -> io::Result<()>) {
    for connection in listener.incoming() {
        let answered = connection.and_then(|connection| {
            connection.set_write_timeout(Some(PATIENCE))?;
            connection.set_read_timeout(Some(PATIENCE))?;
            answer(&connection)
        });
        match answered {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::WouldBlock
                ) => {}
            Err(error) => {
                tracing::warn!("cannot answer on the {what} socket: {error}");
                // Out of descriptors, for one, would come back at once.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// What is asked for. Any path is the metrics': there is nothing else.
#[derive(Debug, PartialEq, Eq)]
enum Method {
    Get,
    Head,
    Other,
}

/// Reads one request's head.
fn receive(mut reader: impl Read) -> io::Result<Method> {
    let deadline = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    let mut part = [0; 1024];
    loop {
        let read = reader.read(&mut part)?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        request.extend_from_slice(part.get(..read).unwrap_or_default());
        if let Some(method) = parse(&request).map_err(io::Error::other)? {
            return Ok(method);
        }
        if request.len() >= MAX_REQUEST {
            return Err(io::Error::other("the request is too long"));
        }
        if Instant::now() >= deadline {
            return Err(io::Error::other("the request takes too long"));
        }
    }
}

/// The method of a whole request; `None` where the request goes on.
fn parse(request: &[u8]) -> Result<Option<Method>, httparse::Error> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let is_whole = parsed.parse(request)?.is_complete();
    let method = match parsed.method {
        Some("GET") => Method::Get,
        Some("HEAD") => Method::Head,
        _ => Method::Other,
    };
    Ok(is_whole.then_some(method))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_to_its_end_and_no_further_than_it_may_be() {
        let whole = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        assert_eq!(receive(&whole[..]).unwrap(), Method::Get);
        assert_eq!(receive(&b"POST / HTTP/1.0\r\n\r\n"[..]).unwrap(), Method::Other);
        // Byte by byte, as a slow reader's would come.
        let mut bytes = whole.as_slice();
        let slow = std::iter::from_fn(|| bytes.split_off_first().copied());
        struct Slow<I>(I);
        impl<I: Iterator<Item = u8>> Read for Slow<I> {
            fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
                Ok(self.0.next().map_or(0, |byte| {
                    room[0] = byte;
                    1
                }))
            }
        }
        assert_eq!(receive(Slow(slow)).unwrap(), Method::Get);
        assert_eq!(receive(&b"GET /"[..]).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert!(receive(&b"\x00\x01\x02 nonsense\r\n\r\n"[..]).is_err());
        let endless = [b"GET / HTTP/1.1\r\nA: ".as_slice(), &vec![b'x'; 100_000]].concat();
        assert!(receive(endless.as_slice()).unwrap_err().to_string().contains("too long"));
        let many = [b"GET / HTTP/1.1\r\n".as_slice(), &b"A: b\r\n".repeat(100), b"\r\n"].concat();
        assert!(receive(many.as_slice()).is_err());
    }
}
