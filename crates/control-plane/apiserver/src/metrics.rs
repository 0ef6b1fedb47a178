//! `/metrics`: counters of requests in Prometheus' text form.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/endpoints/metrics. Names are upstream's; latencies are sums and counts.
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use parking_lot::Mutex;

use crate::Server;

/// Label sets beyond this many are counted as one, so that odd requests can't fill the memory.
const SERIES_MAX: usize = 2048;

#[derive(Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(String, String, u16), Series>>,
}

#[derive(Default)]
struct Series {
    count: u64,
    seconds: f64,
}

impl Metrics {
    pub fn count(&self, verb: &str, resource: &str, code: u16, took: Duration) {
        let mut requests = self.requests.lock();
        let mut key = (verb.to_ascii_uppercase(), resource.to_string(), code);
        if requests.len() >= SERIES_MAX && !requests.contains_key(&key) {
            key = ("OTHER".into(), String::new(), code);
        }
        let series = requests.entry(key).or_default();
        series.count += 1;
        series.seconds += took.as_secs_f64();
    }
}

/// The page.
pub fn page(server: &Server) -> String {
    let mut out = String::new();
    let requests = server.metrics.requests.lock();
    let mut family = |name: &str, kind: &str, value: &dyn Fn(&Series) -> String| {
        let _ = writeln!(out, "# TYPE {name} {kind}");
        for ((verb, resource, code), series) in requests.iter() {
            let labels = format!("{{code=\"{code}\",resource=\"{resource}\",verb=\"{verb}\"}}");
            let _ = writeln!(out, "{name}{labels} {}", value(series));
        }
    };
    family("apiserver_request_total", "counter", &|series| series.count.to_string());
    family("apiserver_request_duration_seconds_sum", "counter", &|series| series.seconds.to_string());
    family("apiserver_request_duration_seconds_count", "counter", &|series| series.count.to_string());
    drop(requests);
    let stats = server.config.store.stats();
    let gauges = [
        ("sampan_store_revision", stats.revision),
        ("sampan_store_compacted_revision", stats.compacted),
        ("sampan_store_commits_total", stats.commits),
        ("sampan_store_deferred_keys", stats.deferred_keys as u64),
        ("sampan_store_history_bytes", stats.history_bytes as u64),
        ("sampan_store_watches", stats.watches as u64),
    ];
    for (name, value) in gauges {
        let _ = writeln!(out, "# TYPE {name} gauge\n{name} {value}");
    }
    out
}
