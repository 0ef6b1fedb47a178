//! What the scheduler knows of images: the platforms each is built for. `bin/sampan` implements [`Platforms`] with the
//! image client, since planes do not import each other. Upstream counterpart: none.
//!
//! Bounds: [`MAX_ENTRIES`] answers are kept, [`MAX_ASKED`] questions may be open, [`MAX_IN_FLIGHT`] of them at a registry
//! at once, each for at most [`LOOKUP_TIMEOUT`]. A pod waits [`PATIENCE`] for an answer; what is not known then is
//! allowed. An answer is used while it is refreshed, so that only the first pod of an image waits.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use sampan_drivers::runtime::Platform;
use sampan_world::clock;
use tokio::sync::{Semaphore, mpsc};
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

/// An image of a pod, with what its registry may want to see.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageQuery {
    /// As the pod names it.
    pub image: String,
    /// The pod's namespace, where the pull secrets are.
    pub namespace: String,
    /// Names of the pod's `imagePullSecrets` (admission has added the service account's).
    pub pull_secrets: Vec<String>,
}

/// Looks up the platforms of images. Calls are bounded, timed out and cached by the scheduler.
#[async_trait]
pub trait Platforms: Send + Sync {
    /// The platforms `query.image` is built for; `None` where that cannot be known (registry down, access denied,
    /// no such image): then the scheduler leaves the pod's choice of nodes alone.
    async fn lookup(&self, query: &ImageQuery) -> Option<Vec<Platform>>;
}

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

/// The answers, and the way to ask.
pub struct PlatformCache {
    entries: Mutex<HashMap<ImageQuery, Entry>>,
    asking: mpsc::Sender<ImageQuery>,
}

impl PlatformCache {
    /// The cache, and the questions that [`Self::answer`] works on.
    pub fn new() -> (Arc<Self>, mpsc::Receiver<ImageQuery>) {
        let (asking, questions) = mpsc::channel(MAX_ASKED);
        (Arc::new(Self { entries: Mutex::default(), asking }), questions)
    }

    /// What is known, without asking.
    pub fn known(&self, query: &ImageQuery) -> Known {
        self.entries.lock().get(query).map_or(Known::Unknown, Entry::known)
    }

    /// What is known; asks where there is no fresh answer.
    pub fn ask(&self, query: &ImageQuery) -> Known {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get(query)
            && (entry.asked_at.is_some() || entry.is_fresh(&query.image))
        {
            return entry.known();
        }
        make_room(&mut entries);
        let entry = entries.entry(query.clone()).or_default();
        if self.asking.try_send(query.clone()).is_ok() {
            entry.asked_at = Some(clock::monotonic());
        }
        entry.known()
    }

    /// Answers questions until all senders are gone; calls `answered` with the image when an answer changes what is
    /// known, and when waiting for it is over.
    pub async fn answer(
        self: Arc<Self>,
        mut questions: mpsc::Receiver<ImageQuery>,
        platforms: Arc<dyn Platforms>,
        answered: Arc<dyn Fn(String) + Send + Sync>,
    ) {
        let slots = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
        let tasks = Arc::new(Semaphore::new(MAX_ASKED));
        while let Some(query) = questions.recv().await {
            let Ok(task) = tasks.clone().acquire_owned().await else { return };
            let (cache, slots, platforms, answered) =
                (self.clone(), slots.clone(), platforms.clone(), answered.clone());
            tokio::spawn(async move {
                let lookup = async {
                    let _slot = slots.acquire().await.ok()?;
                    tokio::time::timeout(LOOKUP_TIMEOUT, platforms.lookup(&query)).await.ok()?
                };
                tokio::pin!(lookup);
                let answer = tokio::select! {
                    answer = &mut lookup => answer,
                    () = tokio::time::sleep(PATIENCE) => {
                        answered(query.image.clone());
                        lookup.await
                    }
                };
                if cache.store(&query, answer) {
                    answered(query.image.clone());
                }
                drop(task);
            });
        }
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
            let (cache, questions) = PlatformCache::new();
            let registry =
                Arc::new(Registry { delay: Duration::from_millis(delay_ms), asked: AtomicUsize::new(0) });
            let told = Arc::new(AtomicUsize::new(0));
            let counter = told.clone();
            let answered = Arc::new(move |_| {
                counter.fetch_add(1, Ordering::Relaxed);
            });
            tokio::spawn(cache.clone().answer(questions, registry.clone(), answered));
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
}
