//! The metrics socket, as Prometheus' scrapers and proxies see it.

mod guest;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use guest::*;

const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX;

/// What the backend answers to `request`: head and body.
fn ask(backend: &Backend, request: &str) -> (String, String) {
    let mut stream = UnixStream::connect(backend.dir.path().join("metrics")).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// The value of a metric with these labels.
#[track_caller]
fn value(text: &str, metric: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{metric} is not in\n{text}")).parse().unwrap()
}

fn backend(ports: &[&str]) -> Backend {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut words = vec!["--metrics-socket".to_owned(), path("metrics")];
    let ports = ports.iter().enumerate();
    words.extend(ports.map(|(index, port)| format!("--port=socket={},{port}", path(&index.to_string()))));
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    Backend::start_in(dir, &words)
}

#[test]
fn counters_are_those_of_the_traffic() {
    let backend = backend(&["uplink=loop,name=a", "uplink=null,name=b,queue_pairs=2"]);
    let mut guest = Guest::new(1, MODERN);
    guest.connect(&backend.port(0));
    guest.fill(0);
    for index in 0..10 {
        loop_once(&mut guest, index, &frame(100));
    }
    guest.describe(1, 20, u64::MAX - 10, 100, 0, 0);
    guest.offer(1, 20);
    guest.wait_used(1);
    guest.offer(1, SIZE);
    let (mut head, mut text) = Default::default();
    until("the ring is stopped", || {
        (head, text) = ask(&backend, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        text.contains(r#"ivcpu_ring_stops_total{port="a",queue="1",direction="from_guest"} 1"#)
    });
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", text.len())), "{head}");
    let from_guest = r#"port="a",queue="1",direction="from_guest""#;
    for (metric, expected) in [
        ("ivcpu_packets_total", 10),
        ("ivcpu_bytes_total", 1000),
        ("ivcpu_bad_chains_total", 1),
        ("ivcpu_burst_frames_count", 11),
        ("ivcpu_burst_frames_sum", 11),
    ] {
        assert_eq!(value(&text, &format!("{metric}{{{from_guest}}}")), expected, "{metric}");
    }
    for (reason, expected) in [("malformed", 1), ("too_large", 0), ("refused", 0), ("disabled", 0)] {
        assert_eq!(
            value(&text, &format!(r#"ivcpu_dropped_total{{{from_guest},reason="{reason}"}}"#)),
            expected
        );
    }
    assert_eq!(value(&text, r#"ivcpu_connected{port="a"}"#), 1);
    assert_eq!(value(&text, r#"ivcpu_connected{port="b"}"#), 0);
    assert_eq!(value(&text, r#"ivcpu_sessions_total{port="a"}"#), 1);
    assert_eq!(value(&text, r#"ivcpu_packets_total{port="b",queue="3",direction="from_guest"}"#), 0);
    // The same counters as on the other socket.
    let shown = backend.stats();
    let ring = &shown["ports"][0]["queues"][1];
    for (metric, counter) in [("kicks", "kicks"), ("calls", "calls"), ("completions", "completions")] {
        let metric = value(&text, &format!("ivcpu_{metric}_total{{{from_guest}}}"));
        assert!(ring[counter].as_u64().unwrap() >= metric);
    }
    guest.disconnect();
    guest.connect(&backend.port(0));
    let (_, text) = ask(&backend, "GET / HTTP/1.0\r\n\r\n");
    assert_eq!(value(&text, r#"ivcpu_reconnects_total{port="a"}"#), 1);
}

#[test]
fn a_bad_or_slow_reader_gets_no_metrics_and_holds_up_nobody() {
    let backend = backend(&["uplink=null"]);
    let status = |request: &str| ask(&backend, request).0.lines().next().unwrap().to_owned();
    assert_eq!(status("POST / HTTP/1.1\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
    assert_eq!(status("\u{1}\u{2}\r\n\r\n"), "HTTP/1.1 400 Bad Request");
    let (head, body) = ask(&backend, "HEAD / HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK") && body.is_empty());
    // Some that say nothing, and one that leaves at once.
    let silent = [(); 2].map(|()| UnixStream::connect(backend.dir.path().join("metrics")).unwrap());
    drop(UnixStream::connect(backend.dir.path().join("metrics")).unwrap());
    assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), "HTTP/1.1 200 OK");
    drop(silent);
    assert_eq!(backend.said(), "");
}
