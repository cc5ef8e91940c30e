//! The counters of all ports in Prometheus' text format, version 0.0.4.
//!
//! Made anew for every reader from the ports' own counters, which are read one by one without a lock: figures of one
//! answer may be some frames apart.

use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{TEXT_FORMAT, TextEncoder};

use crate::stats::{Bursts, RingStats, Stats};

/// What an answer is, for its `Content-Type`.
pub const CONTENT_TYPE: &str = TEXT_FORMAT;

/// A port's counters and the name it is shown under.
pub struct Shown<'a> {
    /// The port's name.
    pub name: &'a str,
    /// Its counters.
    pub stats: &'a Stats,
}

/// One kind of counter of a ring: name, help, and where it is.
type RingCounter = (&'static str, &'static str, fn(&RingStats) -> u64);

const RING_COUNTERS: &[RingCounter] = &[
    ("ivcpu_packets_total", "Frames that passed.", |ring| ring.packets.get()),
    ("ivcpu_bytes_total", "Bytes of the frames that passed, without the virtio header.", |ring| {
        ring.bytes.get()
    }),
    ("ivcpu_kicks_total", "Kick notifications received.", |ring| ring.kicks.get()),
    ("ivcpu_calls_total", "Call notifications sent: interrupts of the guest.", |ring| ring.calls.get()),
    ("ivcpu_calls_suppressed_total", "Times that the driver did not ask to be told.", |ring| {
        ring.calls_suppressed.get()
    }),
    ("ivcpu_completions_total", "Notifications that virtio's suppression rule asked for.", |ring| {
        ring.completions.get()
    }),
    ("ivcpu_fifo_entries_total", "Entries written to the FIFO.", |ring| ring.fifo_entries.get()),
    ("ivcpu_fifo_merged_total", "Completions that an entry still waiting in the FIFO covers.", |ring| {
        ring.fifo_merged.get()
    }),
    ("ivcpu_fifo_wakeups_total", "Calls because the FIFO's consumer slept or was absent.", |ring| {
        ring.wakeups.get()
    }),
    (
        "ivcpu_fifo_fallbacks_total",
        "Calls because the FIFO's consumer left the ring waiting too long.",
        |ring| ring.fallbacks.get(),
    ),
    ("ivcpu_bad_chains_total", "Malformed descriptor chains, given back unused.", |ring| {
        ring.dropped.malformed.get()
    }),
    (
        "ivcpu_ring_stops_total",
        "Times the ring was stopped because its indices, addresses or eventfd were bad.",
        |ring| ring.stopped.get(),
    ),
];

/// All metrics of `ports`.
pub fn text(ports: &[Shown<'_>]) -> Result<String, prometheus::Error> {
    let mut families: Vec<_> = RING_COUNTERS
        .iter()
        .map(|(name, help, get)| {
            let metrics = rings(ports).map(|(port, ring)| counter(ring_labels(port, ring), get(ring)));
            family(name, help, MetricType::COUNTER, metrics.collect())
        })
        .collect();
    let dropped = rings(ports).flat_map(|(port, ring)| {
        ring.dropped.reasons().map(|(reason, count)| {
            let mut labels = ring_labels(port, ring);
            labels.push(label("reason", reason));
            counter(labels, count.get())
        })
    });
    let bursts = rings(ports).map(|(port, ring)| histogram(ring_labels(port, ring), &ring.bursts));
    let of_port = |value: fn(&Stats) -> Metric| {
        ports
            .iter()
            .map(|port| {
                let mut metric = value(port.stats);
                metric.set_label(vec![label("port", port.name)]);
                metric
            })
            .collect()
    };
    families.extend([
        family(
            "ivcpu_dropped_total",
            "Frames that did not pass, by reason.",
            MetricType::COUNTER,
            dropped.collect(),
        ),
        family(
            "ivcpu_burst_frames",
            "Frames that one look at a ring moved.",
            MetricType::HISTOGRAM,
            bursts.collect(),
        ),
        family(
            "ivcpu_sessions_total",
            "Frontends that connected.",
            MetricType::COUNTER,
            of_port(|stats| counter(Vec::new(), stats.sessions.get())),
        ),
        family(
            "ivcpu_reconnects_total",
            "Frontends that connected after the first.",
            MetricType::COUNTER,
            of_port(|stats| counter(Vec::new(), stats.sessions.get().saturating_sub(1))),
        ),
        family(
            "ivcpu_connected",
            "1 while a frontend is connected.",
            MetricType::GAUGE,
            of_port(|stats| gauge(Vec::new(), stats.is_connected().into())),
        ),
        family(
            "ivcpu_build_info",
            "Always 1; the label tells the version.",
            MetricType::GAUGE,
            vec![gauge(vec![label("version", env!("CARGO_PKG_VERSION"))], 1)],
        ),
    ]);
    TextEncoder::new().encode_to_string(&families)
}

fn rings<'a>(ports: &'a [Shown<'a>]) -> impl Iterator<Item = (&'a str, &'a RingStats)> {
    ports.iter().flat_map(|port| port.stats.rings().iter().map(|ring| (port.name, &**ring)))
}

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut label = LabelPair::default();
    label.set_name(name.to_owned());
    label.set_value(value.to_owned());
    label
}

fn ring_labels(port: &str, ring: &RingStats) -> Vec<LabelPair> {
    vec![
        label("port", port),
        label("queue", &ring.index.to_string()),
        label("direction", ring.direction.name()),
    ]
}

fn counter(labels: Vec<LabelPair>, value: u64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value as f64);
    let mut metric = Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: Vec<LabelPair>, value: u64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value as f64);
    let mut metric = Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}

/// The buckets of the text format hold all smaller bursts too.
fn histogram(labels: Vec<LabelPair>, bursts: &Bursts) -> Metric {
    let mut cumulative = 0;
    let buckets = Bursts::BOUNDS.iter().zip(bursts.counts()).map(|(bound, count)| {
        cumulative += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound as f64);
        bucket.set_cumulative_count(cumulative);
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(cumulative);
    histogram.set_sample_sum(bursts.frames() as f64);
    let mut metric = Metric::from_label(labels);
    metric.set_histogram(histogram);
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_its_line() {
        let stats = [Stats::new(1), Stats::new(2)];
        let ring = stats[1].ring(3).unwrap();
        ring.packets.add(5);
        ring.dropped.refused.add(2);
        ring.bursts.count(3);
        ring.bursts.count(64);
        stats[1].sessions.add(3);
        let ports = [Shown { name: "a\"b", stats: &stats[0] }, Shown { name: "b", stats: &stats[1] }];
        let text = text(&ports).unwrap();
        for line in [
            r#"# TYPE ivcpu_packets_total counter"#,
            r#"ivcpu_packets_total{port="b",queue="3",direction="from_guest"} 5"#,
            r#"ivcpu_packets_total{port="a\"b",queue="0",direction="to_guest"} 0"#,
            r#"ivcpu_dropped_total{port="b",queue="3",direction="from_guest",reason="refused"} 2"#,
            r#"ivcpu_burst_frames_bucket{port="b",queue="3",direction="from_guest",le="2"} 0"#,
            r#"ivcpu_burst_frames_bucket{port="b",queue="3",direction="from_guest",le="4"} 1"#,
            r#"ivcpu_burst_frames_bucket{port="b",queue="3",direction="from_guest",le="+Inf"} 2"#,
            r#"ivcpu_burst_frames_sum{port="b",queue="3",direction="from_guest"} 67"#,
            r#"ivcpu_sessions_total{port="b"} 3"#,
            r#"ivcpu_reconnects_total{port="b"} 2"#,
            r#"ivcpu_connected{port="a\"b"} 0"#,
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
        }
        assert_eq!(text.lines().filter(|line| line.starts_with("ivcpu_kicks_total{")).count(), 6);
    }
}
