//! A queue of keys to reconcile. Upstream counterpart: client-go util/workqueue.
//!
//! A key is in it at most once; a key that is added while it is worked on is worked on again afterwards, never
//! twice at the same time. So its size is bounded by the number of objects. Failures back off per key,
//! 5 ms doubling up to 1,000 s, as upstream's default controller rate limiter does.
use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::hash::Hash;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

const BASE_DELAY: Duration = Duration::from_millis(5);
const MAX_DELAY: Duration = Duration::from_secs(1000);

/// A shared work queue; clones are handles to the same queue.
pub struct WorkQueue<K>(Arc<Inner<K>>);

impl<K> Clone for WorkQueue<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

struct Inner<K> {
    state: Mutex<State<K>>,
    wake: Notify,
}

struct State<K> {
    ready: VecDeque<K>,
    dirty: HashSet<K>,
    processing: HashSet<K>,
    delayed: HashMap<K, Instant>,
    failures: HashMap<K, u32>,
}

impl<K: Clone + Eq + Hash> Default for WorkQueue<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Clone + Eq + Hash> WorkQueue<K> {
    pub fn new() -> Self {
        let state = State {
            ready: VecDeque::new(),
            dirty: HashSet::new(),
            processing: HashSet::new(),
            delayed: HashMap::new(),
            failures: HashMap::new(),
        };
        Self(Arc::new(Inner { state: Mutex::new(state), wake: Notify::new() }))
    }

    /// Adds `key` now.
    pub fn add(&self, key: K) {
        let mut state = self.0.state.lock();
        state.add(key);
        drop(state);
        self.0.wake.notify_one();
    }

    /// Adds `key` after `delay`; an earlier time already set for it stands.
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let at = Instant::now_after(delay);
        let mut state = self.0.state.lock();
        let entry = state.delayed.entry(key).or_insert(at);
        *entry = (*entry).min(at);
        drop(state);
        self.0.wake.notify_one();
    }

    /// Adds `key` after its back-off, which doubles with each call until [`Self::forget`].
    pub fn add_rate_limited(&self, key: K) {
        let delay = {
            let mut state = self.0.state.lock();
            let failures = state.failures.entry(key.clone()).or_insert(0);
            let delay = BASE_DELAY.saturating_mul(1 << (*failures).min(20)).min(MAX_DELAY);
            *failures = failures.saturating_add(1);
            delay
        };
        self.add_after(key, delay);
    }

    /// How often [`Self::add_rate_limited`] was called for `key` since it was last forgotten.
    pub fn failures(&self, key: &K) -> u32 {
        self.0.state.lock().failures.get(key).copied().unwrap_or(0)
    }

    /// Ends the back-off of `key`.
    pub fn forget(&self, key: &K) {
        self.0.state.lock().failures.remove(key);
    }

    /// Keys that wait now, without the delayed ones.
    pub fn len(&self) -> usize {
        self.0.state.lock().ready.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits for a key; it counts as being worked on until the [`Work`] is dropped.
    pub async fn next(&self) -> Work<K> {
        loop {
            let until = {
                let mut state = self.0.state.lock();
                let until = state.take_due(now());
                if let Some(key) = state.ready.pop_front() {
                    state.dirty.remove(&key);
                    state.processing.insert(key.clone());
                    if !state.ready.is_empty() {
                        self.0.wake.notify_one();
                    }
                    return Work { key, queue: self.clone() };
                }
                until
            };
            match until {
                Some(at) => {
                    let _ = tokio::time::timeout_at(at, self.0.wake.notified()).await;
                }
                None => self.0.wake.notified().await,
            }
        }
    }

    /// Runs `workers` loops that reconcile keys one by one; a failed key is retried with back-off. Never returns.
    pub async fn run<F, Fut, E>(&self, workers: usize, reconcile: F)
    where
        F: Fn(K) -> Fut,
        Fut: Future<Output = Result<(), E>>,
        E: std::fmt::Display,
        K: std::fmt::Debug,
    {
        let worker = || async {
            loop {
                let work = self.next().await;
                match reconcile(work.clone()).await {
                    Ok(()) => self.forget(&work),
                    Err(error) => {
                        tracing::debug!(key = ?*work, %error, "reconcile failed, will retry");
                        self.add_rate_limited(work.clone());
                    }
                }
            }
        };
        futures::future::join_all((0..workers.max(1)).map(|_| worker())).await;
    }
}

fn now() -> Instant {
    sampan_world::clock::monotonic()
}

trait After {
    fn now_after(delay: Duration) -> Self;
}

impl After for Instant {
    fn now_after(delay: Duration) -> Self {
        now() + delay
    }
}

impl<K: Clone + Eq + Hash> State<K> {
    fn add(&mut self, key: K) {
        self.delayed.remove(&key);
        if !self.dirty.insert(key.clone()) || self.processing.contains(&key) {
            return;
        }
        self.ready.push_back(key);
    }

    /// Moves what is due to the ready queue and returns when the next delayed key is due.
    fn take_due(&mut self, now: Instant) -> Option<Instant> {
        let due: Vec<K> = self.delayed.iter().filter(|(_, at)| **at <= now).map(|(k, _)| k.clone()).collect();
        for key in due {
            self.add(key);
        }
        self.delayed.values().min().copied()
    }
}

/// A key being worked on.
pub struct Work<K: Clone + Eq + Hash> {
    key: K,
    queue: WorkQueue<K>,
}

impl<K: Clone + Eq + Hash> Deref for Work<K> {
    type Target = K;
    fn deref(&self) -> &K {
        &self.key
    }
}

impl<K: Clone + Eq + Hash> Drop for Work<K> {
    fn drop(&mut self) {
        let mut state = self.queue.0.state.lock();
        state.processing.remove(&self.key);
        if state.dirty.contains(&self.key) {
            state.ready.push_back(self.key.clone());
            drop(state);
            self.queue.0.wake.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_is_queued_once_and_never_worked_on_twice_at_the_same_time() {
        let queue = WorkQueue::new();
        queue.add("a");
        queue.add("a");
        let work = queue.next().await;
        assert_eq!(*work, "a");
        queue.add("a");
        assert!(queue.is_empty(), "still being worked on");
        drop(work);
        assert_eq!(*queue.next().await, "a");
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn delays_and_back_off() {
        let queue = WorkQueue::new();
        let start = Instant::now_after(Duration::ZERO);
        queue.add_after("late", Duration::from_secs(5));
        assert_eq!(*queue.next().await, "late");
        assert!(start.elapsed() >= Duration::from_secs(5));
        for _ in 0..3 {
            queue.add_rate_limited("x");
            assert_eq!(*queue.next().await, "x");
        }
        assert_eq!(queue.failures(&"x"), 3);
        queue.forget(&"x");
        assert_eq!(queue.failures(&"x"), 0);
    }
}
