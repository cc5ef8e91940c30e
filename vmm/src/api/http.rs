//! One request and its answer. Sizes and times are bounded; the peer may be anybody who can open the socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a peer may take to send its request, and to take the answer.
pub const WITHIN: Duration = Duration::from_secs(2);
/// Most bytes of a request line and header.
pub const MAX_HEAD: usize = 8 << 10;
/// Most bytes of a body. No request here needs one.
pub const MAX_BODY: usize = 64 << 10;
const MAX_HEADERS: usize = 32;

/// The methods there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Asks.
    Get,
    /// Does.
    Put,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// JSON; empty for none.
    pub body: String,
}

impl Answer {
    /// Done, and nothing to say.
    pub fn done() -> Self {
        Self { status: 204, body: String::new() }
    }

    /// What was asked for.
    pub fn json(value: &impl serde::Serialize) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Self { status: 200, body },
            Err(error) => Self::error(500, &error.to_string()),
        }
    }

    /// What went wrong: as with Cloud Hypervisor, a list of one message.
    pub fn error(status: u16, message: &str) -> Self {
        // A list of one string is JSON whatever the string is.
        Self { status, body: serde_json::to_string(&[message]).unwrap_or_default() }
    }

    fn reason(&self) -> &'static str {
        match self.status {
            200 => "OK",
            204 => "No Content",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            408 => "Request Timeout",
            413 => "Content Too Large",
            431 => "Request Header Fields Too Large",
            501 => "Not Implemented",
            _ => "Internal Server Error",
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let Self { status, body } = self;
        let reason = self.reason();
        let mut text =
            format!("HTTP/1.1 {status} {reason}\r\nServer: ivcpu-vmm API\r\nConnection: close\r\n");
        // An answer without content has no length either.
        if *status != 204 {
            text += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
        }
        text += "\r\n";
        text += body;
        text.into_bytes()
    }
}

/// Reads one request, answers it, and is done with the connection.
pub fn serve_one(stream: &UnixStream, answer: impl FnOnce(Method, &str) -> Answer) -> io::Result<()> {
    let deadline = Instant::now() + WITHIN;
    let answer = match read_request(stream, deadline) {
        Ok(request) => match request {
            Ok((method, path)) => answer(method, &path),
            Err(refusal) => refusal,
        },
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Answer::error(408, &format!("the request took longer than {} s", WITHIN.as_secs()))
        }
        // It hung up: there is nobody to answer.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        Err(error) => return Err(error),
    };
    stream.set_write_timeout(Some(WITHIN))?;
    let mut stream = stream;
    stream.write_all(&answer.to_bytes())
}

/// What the start of a request says.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    /// As it was written; the answer to one that is not known depends on the path.
    method: Option<Method>,
    path: String,
    /// Bytes of request line and header.
    length: usize,
    /// Bytes of body that follow.
    body: usize,
}

/// Reads a request with its body, which is dropped.
fn read_request(stream: &UnixStream, deadline: Instant) -> io::Result<Result<(Method, String), Answer>> {
    let mut bytes = Vec::new();
    let head = loop {
        match parse(&bytes) {
            Ok(Some(head)) => break head,
            Ok(None) if bytes.len() >= MAX_HEAD => {
                return Ok(Err(Answer::error(
                    431,
                    &format!("the request's header exceeds {MAX_HEAD} bytes"),
                )));
            }
            Ok(None) => {}
            Err(refusal) => return Ok(Err(refusal)),
        }
        read_more(stream, &mut bytes, deadline)?;
    };
    while bytes.len() < head.length.saturating_add(head.body) {
        read_more(stream, &mut bytes, deadline)?;
    }
    Ok(match head.method {
        Some(method) => Ok((method, head.path)),
        None => Err(Answer::error(405, "the methods of this API are GET and PUT")),
    })
}

/// Appends what has come, or waits for it. At most [`MAX_HEAD`] bytes at once, so that the limits hold within that.
fn read_more(mut stream: &UnixStream, bytes: &mut Vec<u8>, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    stream.set_read_timeout(Some(left))?;
    let mut chunk = [0; MAX_HEAD];
    match stream.read(&mut chunk) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => {
            bytes.extend(chunk.iter().take(count));
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        Err(error) => Err(error),
    }
}

/// `None` if more must come.
fn parse(bytes: &[u8]) -> Result<Option<Head>, Answer> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Answer::error(
                431,
                &format!("the request has more than {MAX_HEADERS} header fields"),
            ));
        }
        Err(error) => return Err(Answer::error(400, &format!("this is no HTTP request: {error}"))),
    };
    let method = match request.method {
        Some("GET") => Some(Method::Get),
        Some("PUT") => Some(Method::Put),
        _ => None,
    };
    let path = request.path.unwrap_or_default().to_owned();
    let mut body = 0;
    for header in request.headers.iter() {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Answer::error(501, "give the body's length with Content-Length"));
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let text = std::str::from_utf8(header.value).unwrap_or_default();
            body = match text.trim().parse::<usize>() {
                Ok(length) if length <= MAX_BODY => length,
                Ok(_) => {
                    return Err(Answer::error(413, &format!("the request's body exceeds {MAX_BODY} bytes")));
                }
                Err(_) => return Err(Answer::error(400, "Content-Length is no number")),
            };
        }
    }
    Ok(Some(Head { method, path, length, body }))
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    /// What a peer that sends `request` and then nothing more gets.
    fn exchange(request: &[u8]) -> String {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let request = request.to_owned();
        let peer = thread::spawn(move || {
            // The server may have answered and gone before all is written.
            let _ = peer.write_all(&request);
            let _ = peer.shutdown(Shutdown::Write);
            let mut text = String::new();
            let _ = peer.read_to_string(&mut text);
            text
        });
        serve_one(&ours, |method, path| Answer::json(&format!("{method:?} {path}"))).unwrap();
        drop(ours);
        peer.join().unwrap()
    }

    #[test]
    fn a_request_is_answered_and_the_connection_closed() {
        let text = exchange(b"PUT /api/v1/vm.pause HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}");
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        assert!(text.contains("Content-Length: 22\r\n") && text.contains("Connection: close\r\n"), "{text}");
        assert!(text.ends_with("\r\n\r\n\"Put /api/v1/vm.pause\""), "{text}");
    }

    #[test]
    fn what_is_no_request_or_too_large_is_refused() {
        let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(MAX_HEAD));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "X: x\r\n".repeat(MAX_HEADERS + 1));
        let body = format!("PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", MAX_BODY + 1);
        for (request, status) in [
            ("nonsense\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
            ("DELETE / HTTP/1.1\r\n\r\n", 405),
            (&body, 413),
            (&long, 431),
            (&many, 431),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
        ] {
            let text = exchange(request.as_bytes());
            assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.60}: {text}");
            assert!(text.ends_with("\"]"), "{text}");
        }
    }

    #[test]
    fn whoever_hangs_up_gets_nothing() {
        assert_eq!(exchange(b"GET / HT"), "");
        assert_eq!(exchange(b"PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nshort"), "");
    }

    #[test]
    fn whoever_says_nothing_is_told_so_and_cut_off() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        peer.write_all(b"GET /").unwrap();
        serve_one(&ours, |_, _| Answer::done()).unwrap();
        drop(ours);
        let mut text = String::new();
        let _ = peer.read_to_string(&mut text);
        assert!(text.starts_with("HTTP/1.1 408 "), "{text}");
    }

    proptest! {
        #[test]
        fn no_bytes_bring_the_parser_down(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(Some(head)) = parse(&bytes) {
                prop_assert!(head.length <= bytes.len() && head.body <= MAX_BODY);
            }
        }
    }
}
