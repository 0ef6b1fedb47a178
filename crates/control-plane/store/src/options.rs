//! How the store in a file is opened.
use std::path::PathBuf;
use std::time::Duration;

/// Where the store lies and what it keeps. [`Options::new`] has the defaults of a server.
#[derive(Debug, Clone)]
pub struct Options {
    pub path: PathBuf,
    /// Keys under these may be written with [`crate::Class::Deferred`]. Their history lives in memory only.
    pub deferred_prefixes: Vec<String>,
    /// History older than this is compacted (between once and twice this old).
    pub compact_interval: Duration,
    /// More changes than this are never kept, however young.
    pub compact_after_revisions: u64,
    /// Deferred writes reach the disk after this time ...
    pub flush_interval: Duration,
    /// ... or when so many keys wait.
    pub flush_after_keys: usize,
    /// The memory for recent changes.
    pub history_bytes: usize,
    /// etcd's default limit of a request is 1.5 MiB.
    pub max_value_bytes: usize,
    /// How long another process that has the store open is waited for: one that was killed may still be ending.
    pub lock_wait: Duration,
}

impl Options {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            deferred_prefixes: Vec::new(),
            compact_interval: Duration::from_secs(300),
            compact_after_revisions: 10_000,
            flush_interval: Duration::from_secs(120),
            flush_after_keys: 1024,
            history_bytes: 4 << 20,
            max_value_bytes: 3 << 19,
            lock_wait: Duration::from_secs(10),
        }
    }

    pub fn deferred(mut self, prefixes: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.deferred_prefixes = prefixes.into_iter().map(Into::into).collect();
        self
    }

    pub(crate) fn is_deferred(&self, key: &str) -> bool {
        self.deferred_prefixes.iter().any(|p| key.starts_with(p.as_str()))
    }

    /// Whether some key under `prefix` may be deferred.
    pub(crate) fn may_be_deferred(&self, prefix: &str) -> bool {
        self.deferred_prefixes.iter().any(|p| prefix.starts_with(p.as_str()) || p.starts_with(prefix))
    }

    /// Whether every key under `prefix` may be deferred.
    pub(crate) fn all_deferred(&self, prefix: &str) -> bool {
        self.deferred_prefixes.iter().any(|p| prefix.starts_with(p.as_str()))
    }
}
