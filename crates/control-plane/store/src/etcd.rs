//! The store in an etcd that several servers share.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/storage/etcd3, over etcd's `client/v3`.
//!
//! Reads, transactions and compaction are one request each (`endpoints.rs` chooses the member, `grpc.rs` speaks to it,
//! `messages.rs` is what is said); one watch of etcd (`feed.rs`) feeds the same memory of recent changes that the
//! file's writer feeds, and all watches read from there. What stays true:
//! - A read without a revision is linearizable.
//! - A write whose outcome is unknown is never sent again; its error says so ([`StoreError::Unanswered`]).
//! - Who has the answer to a write also finds it in the watches of this store, but for a watch that is broken just now.
//! - Every request and every wait has its time.
//!
//! Deliberate differences from upstream: nothing is deferred or batched here, as etcd does that itself; older changes
//! than the memory's are not asked of etcd, so a watch from there begins with a list; a watch covers all keys (see
//! `feed.rs`). Why an own client: `etcd-client` needs `protoc` to build, and with tonic below it one cannot tell a
//! request that was never sent from one without an answer.
mod compactor;
mod endpoints;
mod feed;
mod grpc;
pub(crate) mod members;
mod messages;
mod transaction;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sampan_world::clock;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::Published;
use crate::entry::{Entry, Guard, Page, Range, Span, Write};
use crate::error::{StoreError, WriteError};
use crate::etcd::compactor::Compactor;
use crate::etcd::endpoints::Endpoints;
use crate::etcd::feed::{Feed, probe};
use crate::etcd::grpc::CallError;
use crate::etcd::messages::{KeyValue, RangeRequest, RangeResponse, TxnResponse};
use crate::etcd::transaction::{entry, signed, unsigned};
use crate::memory::Memory;

const RANGE: &str = "/etcdserverpb.KV/Range";
const TXN: &str = "/etcdserverpb.KV/Txn";
const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";
const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";
const TOO_LARGE: &str = "etcdserver: request is too large";
/// A list without a limit is read so many entries at a time.
const PAGE: usize = 500;
/// A write's answer waits so long for the write to come by the watch.
const SETTLE: Duration = Duration::from_millis(250);
/// While etcd is waited for at the start: how often it is tried, and how often that is told.
const RETRY: Duration = Duration::from_millis(500);
const TELL: Duration = Duration::from_secs(10);

/// Which etcd holds the store, and how it is reached. [`Etcd::new`] has the defaults of a server.
#[derive(Debug, Clone)]
pub struct Etcd {
    /// `http://HOST:PORT` or `https://HOST:PORT` of one or more members; one string may name several, with commas.
    pub endpoints: Vec<String>,
    /// PEM: who may sign the members' certificates. Without it the system's authorities may.
    pub ca_file: Option<PathBuf>,
    /// PEM: the certificate that etcd knows this server by, ...
    pub cert_file: Option<PathBuf>,
    /// ... and its key.
    pub key_file: Option<PathBuf>,
    /// History older than this is compacted (between once and twice this old). Zero leaves it to others.
    pub compact_interval: Duration,
    /// The memory for recent changes.
    pub history_bytes: usize,
    /// etcd's default limit of a request is 1.5 MiB.
    pub max_value_bytes: usize,
    /// How long an etcd that does not answer is waited for at the start.
    pub connect_wait: Duration,
}

impl Etcd {
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            ca_file: None,
            cert_file: None,
            key_file: None,
            compact_interval: Duration::from_secs(300),
            history_bytes: 4 << 20,
            max_value_bytes: 3 << 19,
            connect_wait: Duration::from_secs(60),
        }
    }
}

/// What the handle, the feed and the compactor have in common.
struct Core {
    endpoints: Endpoints,
    memory: Published,
    /// The memory's `published`, to wait for.
    published: watch::Sender<u64>,
    commits: AtomicU64,
}

/// The connection to etcd with its two tasks.
pub(crate) struct Cluster {
    core: Arc<Core>,
    /// How many have asked for the latest revision, and the last answer with how many of them it is good for.
    asking: AtomicU64,
    asked: tokio::sync::Mutex<(u64, Result<u64, StoreError>)>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.end();
    }
}

impl Cluster {
    pub(crate) async fn connect(etcd: Etcd) -> Result<Self, StoreError> {
        let endpoints = Endpoints::new(&etcd)?;
        let header = wait_for(&endpoints, etcd.connect_wait).await?.header.unwrap_or_default();
        let revision = unsigned(header.revision);
        let core = Arc::new(Core {
            memory: Arc::new(Mutex::new(Memory::new(revision, 0, etcd.history_bytes))),
            published: watch::Sender::new(revision),
            commits: AtomicU64::new(0),
            endpoints,
        });
        let feed = Feed::new(core.clone(), &header, core.endpoints.index().await);
        let mut tasks = vec![tokio::spawn(feed.run())];
        if !etcd.compact_interval.is_zero() {
            tasks.push(tokio::spawn(Compactor::new(core.clone()).run(etcd.compact_interval)));
        }
        Ok(Self { core, asking: AtomicU64::new(0), asked: tokio::sync::Mutex::new((0, Ok(revision))), tasks })
    }

    pub(crate) fn memory(&self) -> Published {
        self.core.memory.clone()
    }

    pub(crate) fn commits(&self) -> u64 {
        self.core.commits.load(Ordering::Relaxed)
    }

    /// An error once it is closed.
    pub(crate) fn open(&self) -> Result<(), StoreError> {
        if self.core.memory.lock().closed { Err(StoreError::Closed) } else { Ok(()) }
    }

    pub(crate) fn close(&self) -> Result<(), StoreError> {
        self.open()?;
        self.end();
        Ok(())
    }

    fn end(&self) {
        for task in &self.tasks {
            task.abort();
        }
        self.core.memory.lock().close();
    }

    async fn read(&self, request: &RangeRequest) -> Result<RangeResponse, StoreError> {
        self.open()?;
        let answer = self.core.endpoints.read(RANGE, request).await;
        answer.map_err(|e| self.failed(e, unsigned(request.revision)))
    }

    /// One question answers all who came before it was asked.
    pub(crate) async fn latest(&self) -> Result<u64, StoreError> {
        let number = self.asking.fetch_add(1, Ordering::SeqCst);
        let mut asked = self.asked.lock().await;
        if number >= asked.0 {
            let covers = self.asking.load(Ordering::SeqCst);
            let answer = self.read(&probe()).await.map(|answer| revision(&answer));
            *asked = (covers, answer);
        }
        asked.1.clone()
    }

    pub(crate) async fn get(&self, key: &str, at: Option<u64>) -> Result<(Option<Entry>, u64), StoreError> {
        let key = Bytes::copy_from_slice(key.as_bytes());
        let request = RangeRequest { key, revision: at.map_or(0, signed), ..RangeRequest::default() };
        let answer = self.read(&request).await?;
        Ok((answer.kvs.first().and_then(entry), at.unwrap_or_else(|| revision(&answer))))
    }

    pub(crate) async fn range(&self, range: Range) -> Result<Page, StoreError> {
        let mut request = request(&Span::of(&range.prefix, range.from.as_deref()));
        request.revision = range.at.map_or(0, signed);
        let page = if range.limit == 0 { PAGE } else { range.limit };
        request.limit = i64::try_from(page).unwrap_or(i64::MAX);
        let mut entries = Vec::new();
        loop {
            let answer = self.read(&request).await?;
            entries.extend(answer.kvs.iter().filter_map(entry));
            if request.revision == 0 {
                request.revision = signed(revision(&answer));
            }
            match answer.kvs.last() {
                Some(last) if answer.more && range.limit == 0 => request.key = after(last),
                _ => {
                    let left = unsigned(answer.count).saturating_sub(answer.kvs.len() as u64);
                    let remaining = answer.more.then_some(left);
                    let revision = unsigned(request.revision);
                    return Ok(Page { entries, more: answer.more, remaining, revision });
                }
            }
        }
    }

    pub(crate) async fn count(&self, prefix: &str) -> Result<u64, StoreError> {
        let request = RangeRequest { count_only: true, ..request(&Span::of(prefix, None)) };
        Ok(unsigned(self.read(&request).await?.count))
    }

    pub(crate) async fn write_many(
        &self,
        guards: &[Guard],
        writes: &[Write],
    ) -> Result<Vec<u64>, WriteError> {
        self.open()?;
        transaction::check(guards, writes)?;
        let request = transaction::request(guards, writes);
        let answer: Result<TxnResponse, _> = self.core.endpoints.write(TXN, &request).await;
        let answer = answer.map_err(|e| match &e {
            CallError::Status { message, .. } if message == TOO_LARGE => too_large(writes),
            _ => self.failed(e, 0),
        })?;
        if !answer.succeeded {
            return Err(transaction::conflict(guards, writes, answer.responses));
        }
        self.core.commits.fetch_add(1, Ordering::Relaxed);
        let revision = unsigned(answer.header.unwrap_or_default().revision);
        // Callers were written for a store whose answer comes after the change is published.
        let mut published = self.core.published.subscribe();
        drop(timeout(SETTLE, published.wait_for(|at| *at >= revision)).await);
        Ok(vec![revision; writes.len()])
    }

    pub(crate) async fn compact(&self, revision: u64) -> Result<(), StoreError> {
        self.open()?;
        compactor::compact(&self.core, revision).await.map_err(|e| self.failed(e, revision))
    }

    /// What went wrong with a request, for `requested` if it was for a revision.
    fn failed(&self, error: CallError, requested: u64) -> StoreError {
        let (compacted, current) = {
            let memory = self.core.memory.lock();
            (memory.compacted, memory.published)
        };
        match &error {
            CallError::Status { message, .. } if message == COMPACTED => {
                StoreError::Compacted { compacted: compacted.max(requested + 1) }
            }
            CallError::Status { message, .. } if message == FUTURE => {
                StoreError::FutureRevision { requested, current }
            }
            _ => failed(&self.core.endpoints, error),
        }
    }
}

/// Asks until etcd answers, and says that it waits.
async fn wait_for(endpoints: &Endpoints, patience: Duration) -> Result<RangeResponse, StoreError> {
    let begun = clock::monotonic();
    let mut told = None;
    loop {
        let error = match endpoints.read(RANGE, &probe()).await {
            Ok(answer) => return Ok(answer),
            // what only reads were asked of has not done anything
            Err(CallError::Unanswered(detail)) => {
                StoreError::Unreachable { endpoints: endpoints.names(), detail }
            }
            Err(e) => failed(endpoints, e),
        };
        let now = clock::monotonic();
        if matches!(error, StoreError::Refused { .. }) || now.saturating_duration_since(begun) >= patience {
            return Err(error);
        }
        if told.is_none_or(|at| now.saturating_duration_since(at) >= TELL) {
            tracing::warn!(%error, "waiting for etcd");
            told = Some(now);
        }
        sleep(RETRY).await;
    }
}

fn failed(endpoints: &Endpoints, error: CallError) -> StoreError {
    let endpoints = endpoints.names();
    match error {
        CallError::Unsent(detail) => StoreError::Unreachable { endpoints, detail },
        CallError::Status { message, .. } if message == NO_SPACE => StoreError::Full {
            path: format!("etcd at {endpoints}"),
            detail: format!(
                "{message}; make room with `etcdctl compact` and `etcdctl defrag` (or give it more with its \
                 --quota-backend-bytes), then end the alarm with `etcdctl alarm disarm`"
            ),
        },
        CallError::Unanswered(detail) => StoreError::Unanswered { endpoints, detail },
        // "resource exhausted": too many requests
        CallError::Status { code: 8, .. } => StoreError::Busy { path: format!("etcd at {endpoints}") },
        // invalid, not allowed, not known, not implemented
        CallError::Status { code: 3 | 5 | 7 | 9 | 11 | 12 | 16, message: detail } => {
            StoreError::Refused { endpoints, detail }
        }
        // all others may come after etcd has begun: it gave up waiting for its other members, or is ending
        CallError::Status { code, message } => {
            let detail = if message.is_empty() { format!("gRPC status {code}") } else { message };
            StoreError::Unanswered { endpoints, detail }
        }
    }
}

fn too_large(writes: &[Write]) -> StoreError {
    let size = |w: &Write| w.key.len() + w.value.as_ref().map_or(0, Bytes::len);
    let key = writes.iter().max_by_key(|w| size(w)).map(|w| w.key.clone()).unwrap_or_default();
    // etcd does not say how much it takes; this is what it takes unless told otherwise
    StoreError::TooLarge { key, size_bytes: writes.iter().map(size).sum(), limit_bytes: 3 << 19 }
}

fn revision(answer: &RangeResponse) -> u64 {
    answer.header.as_ref().map_or(0, |h| unsigned(h.revision))
}

fn request(span: &Span) -> RangeRequest {
    // etcd takes no empty key; no key sorts before this one
    let start = if span.start.is_empty() { Bytes::from_static(&[0]) } else { span.start.clone().into() };
    RangeRequest { key: start, range_end: span.end.clone().into(), ..RangeRequest::default() }
}

/// The first key there can be after this one.
fn after(last: &KeyValue) -> Bytes {
    let mut key = last.key.to_vec();
    key.push(0);
    key.into()
}
