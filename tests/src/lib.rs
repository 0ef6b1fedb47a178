//! Tests through the real binary: a cluster in the lab, driven by the real kubectl and by kube-rs.
//!
//! Upstream counterpart: test/e2e and test/cmd. One lab is shared by all cases of a suite ([`suite::Suite`]), each case
//! in a namespace of its own. What a case checks is what a user would see: exit codes, status codes, reasons, events.
//! They need root (namespaces, mounts, cgroups) and kubectl, and fail with a sentence where something is missing.
pub mod boards;
pub mod cluster;
pub mod etcd;
pub mod image;
pub mod members;
pub mod peer;
pub mod process;
pub mod registry;
pub mod suite;

pub use cluster::{Answer, Cluster, Space};
pub use suite::Suite;

use std::fmt::Display;
use std::time::Duration;

use anyhow::{Result, bail};

/// Asks again and again, until the answer is `Some` or `limit` is over; then tells what was last seen.
pub fn wait_for<T, S: Display>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> Result<Result<T, S>>,
) -> Result<T> {
    let start = sampan_world::clock::monotonic();
    let mut pause = Duration::from_millis(10);
    loop {
        let seen = match ask() {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(seen)) => seen.to_string(),
            Err(error) => format!("{error:#}"),
        };
        if start.elapsed() > limit {
            bail!("{what}: not within {} s; last seen: {seen}", limit.as_secs());
        }
        std::thread::sleep(pause);
        pause = (pause * 5 / 4).min(Duration::from_millis(200));
    }
}

/// A command that prints what `url` answers. Python, since Debian's static busybox crashes in wget where there is no libc.
pub fn fetch(url: &str) -> [String; 3] {
    let program =
        format!("import urllib.request as u; print(u.urlopen('{url}', timeout=3).read().decode(), end='')");
    ["python3".to_string(), "-c".to_string(), program]
}

pub const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// `Ok` when `text` holds `want`, an error that shows both otherwise.
pub fn has(text: &str, want: &str) -> Result<()> {
    match text.contains(want) {
        true => Ok(()),
        false => bail!("expected {want:?} in:\n{text}"),
    }
}
