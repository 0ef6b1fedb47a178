//! What is known of the platforms that images are built for: answers of registries, kept for all who ask in this
//! process (the DaemonSet controller too, by way of `sampan_drivers::platform::Platforms`). Upstream counterpart: none.
//!
//! Bounds: [`MAX_ENTRIES`] answers are kept, [`MAX_ASKED`] questions may be open, [`MAX_IN_FLIGHT`] of them at a registry
//! at once, each for at most [`LOOKUP_TIMEOUT`]. Whoever asks waits [`PATIENCE`] for an answer; what is not known then is
//! allowed. An answer is used while it is refreshed, so that only the first pod of an image waits.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use sampan_drivers::platform::{ImageQuery, Platforms};
use sampan_drivers::runtime::Platform;
use sampan_world::clock;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

const MAX_ENTRIES: usize = 512;
const MAX_ASKED: usize = 256;
const MAX_IN_FLIGHT: usize = 8;
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(2);
/// How long an answer is taken for fresh. A digest never changes.
const FRESH_TAG: Duration = Duration::from_secs(60);
const FRESH_DIGEST: Duration = Duration::from_secs(3600);
const FRESH_UNKNOWN: Duration = Duration::from_secs(30);

/// What is known of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    Platforms(Arc<Vec<Platform>>),
    Unknown,
    /// Asked, and the answer may still come in time.
    Waiting,
}

#[derive(Default)]
struct Entry {
    platforms: Option<Arc<Vec<Platform>>>,
    answered_at: Option<Instant>,
    asked_at: Option<Instant>,
}

impl Entry {
    fn is_fresh(&self, image: &str) -> bool {
        let fresh = match &self.platforms {
            None => FRESH_UNKNOWN,
            Some(_) if image.contains("@sha256:") => FRESH_DIGEST,
            Some(_) => FRESH_TAG,
        };
        self.answered_at.is_some_and(|at| clock::monotonic().duration_since(at) < fresh)
    }

    fn known(&self) -> Known {
        match (&self.platforms, self.answered_at, self.asked_at) {
            (Some(platforms), _, _) => Known::Platforms(platforms.clone()),
            (None, None, Some(asked)) if clock::monotonic().duration_since(asked) < PATIENCE => {
                Known::Waiting
            }
            _ => Known::Unknown,
        }
    }
}

type OnAnswered = Arc<dyn Fn(&str) + Send + Sync>;

/// The answers, and the way to ask.
#[derive(Clone)]
pub struct PlatformCache(Arc<Inner>);

struct Inner {
    registries: Arc<dyn Platforms>,
    entries: Mutex<HashMap<ImageQuery, Entry>>,
    asked: Arc<Semaphore>,
    in_flight: Semaphore,
    answered: Notify,
    on_answered: Mutex<Option<OnAnswered>>,
}

impl PlatformCache {
    pub fn new(registries: Arc<dyn Platforms>) -> Self {
        Self(Arc::new(Inner {
            registries,
            entries: Mutex::default(),
            asked: Arc::new(Semaphore::new(MAX_ASKED)),
            in_flight: Semaphore::new(MAX_IN_FLIGHT),
            answered: Notify::new(),
            on_answered: Mutex::default(),
        }))
    }

    /// Calls `handler` (instead of one before) with the image when an answer changes what is known, and when waiting
    /// for one is over.
    pub fn on_answered(&self, handler: impl Fn(&str) + Send + Sync + 'static) {
        *self.0.on_answered.lock() = Some(Arc::new(handler));
    }

    /// What is known, without asking.
    pub fn known(&self, query: &ImageQuery) -> Known {
        self.0.entries.lock().get(query).map_or(Known::Unknown, Entry::known)
    }

    /// What is known; asks where there is no fresh answer.
    pub fn ask(&self, query: &ImageQuery) -> Known {
        let mut entries = self.0.entries.lock();
        if let Some(entry) = entries.get(query)
            && (entry.asked_at.is_some() || entry.is_fresh(&query.image))
        {
            return entry.known();
        }
        let Ok(question) = self.0.asked.clone().try_acquire_owned() else {
            return entries.get(query).map_or(Known::Unknown, Entry::known);
        };
        make_room(&mut entries);
        let entry = entries.entry(query.clone()).or_default();
        entry.asked_at = Some(clock::monotonic());
        tokio::spawn(self.0.clone().answer(query.clone(), question));
        entry.known()
    }
}

#[async_trait]
impl Platforms for PlatformCache {
    async fn lookup(&self, query: &ImageQuery) -> Option<Vec<Platform>> {
        loop {
            let answered = self.0.answered.notified();
            tokio::pin!(answered);
            answered.as_mut().enable();
            match self.ask(query) {
                Known::Platforms(platforms) => return Some(platforms.to_vec()),
                Known::Unknown => return None,
                Known::Waiting => answered.await,
            }
        }
    }
}

impl Inner {
    async fn answer(self: Arc<Self>, query: ImageQuery, question: OwnedSemaphorePermit) {
        let lookup = async {
            let _slot = self.in_flight.acquire().await.ok()?;
            tokio::time::timeout(LOOKUP_TIMEOUT, self.registries.lookup(&query)).await.ok()?
        };
        tokio::pin!(lookup);
        let answer = tokio::select! {
            answer = &mut lookup => answer,
            () = tokio::time::sleep(PATIENCE) => {
                self.tell(&query);
                lookup.await
            }
        };
        if self.store(&query, answer) {
            self.tell(&query);
        }
        drop(question);
    }

    fn tell(&self, query: &ImageQuery) {
        let handler = self.on_answered.lock().clone();
        if let Some(handler) = handler {
            handler(&query.image);
        }
        self.answered.notify_waiters();
    }

    /// Keeps the answer; true where it changes what is known.
    fn store(&self, query: &ImageQuery, answer: Option<Vec<Platform>>) -> bool {
        let mut entries = self.entries.lock();
        let entry = entries.entry(query.clone()).or_default();
        let first = entry.answered_at.is_none();
        let before = entry.platforms.clone();
        // a registry that is down now does not make forget what it said before
        if let Some(platforms) = answer {
            entry.platforms = Some(Arc::new(platforms));
        }
        entry.answered_at = Some(clock::monotonic());
        entry.asked_at = None;
        first || before != entry.platforms
    }
}

/// Drops the older half of the answers when the cache is full.
fn make_room(entries: &mut HashMap<ImageQuery, Entry>) {
    if entries.len() < MAX_ENTRIES {
        return;
    }
    let mut times: Vec<Instant> = entries.values().filter_map(|e| e.answered_at).collect();
    times.sort();
    if let Some(middle) = times.get(times.len() / 2).copied() {
        entries.retain(|_, e| e.answered_at.is_none_or(|at| at > middle));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Registry {
        delay: Duration,
        asked: AtomicUsize,
    }

    #[async_trait]
    impl Platforms for Registry {
        async fn lookup(&self, _query: &ImageQuery) -> Option<Vec<Platform>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(self.delay).await;
            Some(vec![Platform { os: "linux".into(), architecture: "amd64".into(), variant: None }])
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pods_wait_for_an_answer_but_not_long() {
        for (delay_ms, waits_at_1s, known_at_3s) in [(100, false, true), (5000, true, false)] {
            let registry =
                Arc::new(Registry { delay: Duration::from_millis(delay_ms), asked: AtomicUsize::new(0) });
            let cache = PlatformCache::new(registry.clone());
            let told = Arc::new(AtomicUsize::new(0));
            let counter = told.clone();
            cache.on_answered(move |_| {
                counter.fetch_add(1, Ordering::Relaxed);
            });
            let query = ImageQuery { image: "x".into(), namespace: "ns".into(), pull_secrets: vec![] };
            assert_eq!(cache.ask(&query), Known::Waiting);
            assert_eq!(cache.ask(&query), Known::Waiting);
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(cache.ask(&query) == Known::Waiting, waits_at_1s);
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert_eq!(matches!(cache.ask(&query), Known::Platforms(_)), known_at_3s);
            assert_eq!(told.load(Ordering::Relaxed), 1, "the pod is told once so far");
            tokio::time::sleep(Duration::from_secs(3)).await;
            assert!(matches!(cache.ask(&query), Known::Platforms(_)));
            assert_eq!(registry.asked.load(Ordering::Relaxed), 1);
            tokio::time::sleep(FRESH_TAG).await;
            assert!(
                matches!(cache.ask(&query), Known::Platforms(_)),
                "old answers are used while they are refreshed"
            );
            tokio::time::sleep(Duration::from_secs(6)).await;
            assert_eq!(registry.asked.load(Ordering::Relaxed), 2);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_looks_up_waits_like_a_pod_and_asks_no_second_time() {
        for (delay_ms, wanted) in [(100, true), (5000, false)] {
            let registry =
                Arc::new(Registry { delay: Duration::from_millis(delay_ms), asked: AtomicUsize::new(0) });
            let cache = PlatformCache::new(registry.clone());
            let query = ImageQuery { image: "x".into(), namespace: "ns".into(), pull_secrets: vec![] };
            let began = clock::monotonic();
            let (a, b) = tokio::join!(cache.lookup(&query), cache.lookup(&query));
            assert_eq!((a.is_some(), b.is_some()), (wanted, wanted));
            assert_eq!(began.elapsed(), Duration::from_millis(delay_ms).min(PATIENCE));
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert!(cache.lookup(&query).await.is_some());
            assert_eq!(registry.asked.load(Ordering::Relaxed), 1);
        }
    }
}
