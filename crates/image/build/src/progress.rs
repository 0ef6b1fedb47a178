//! What a build tells while it goes on.
//!
//! Upstream counterpart: BuildKit's `progressui` in its plain form, whose lines these are.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Begin,
    /// What a step prints; the text begins with the seconds since it began.
    Output,
    Cached,
    Done,
    Failed,
    Warning,
}

pub trait Progress: Send + Sync {
    /// `number` is the step's, 0 for what belongs to none.
    fn tell(&self, number: usize, kind: Kind, text: &str);
}

/// The line as it is printed where nothing can be drawn.
pub fn plain(number: usize, kind: Kind, text: &str) -> String {
    match kind {
        Kind::Warning => format!("WARNING: {text}"),
        Kind::Begin | Kind::Output => format!("#{number} {text}"),
        Kind::Cached => format!("#{number} CACHED\n"),
        Kind::Done => format!("#{number} DONE {text}\n"),
        Kind::Failed => format!("#{number} ERROR: {text}"),
    }
}

/// Numbers a build's steps.
#[derive(Clone)]
pub struct Reporter {
    out: Arc<dyn Progress>,
    next: Arc<AtomicUsize>,
}

impl Reporter {
    pub fn new(out: Arc<dyn Progress>) -> Reporter {
        Reporter { out, next: Arc::new(AtomicUsize::new(1)) }
    }

    pub fn begin(&self, name: &str) -> Task {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.out.tell(number, Kind::Begin, name);
        Task { out: self.out.clone(), number, started: sampan_world::clock::monotonic() }
    }

    pub fn warn(&self, text: &str) {
        self.out.tell(0, Kind::Warning, text);
    }
}

/// A step on its way.
pub struct Task {
    out: Arc<dyn Progress>,
    number: usize,
    started: Instant,
}

impl Task {
    fn seconds(&self) -> f32 {
        self.started.elapsed().as_secs_f32()
    }

    pub fn line(&self, text: &str) {
        self.out.tell(self.number, Kind::Output, &format!("{:.3} {text}", self.seconds()));
    }

    pub fn cached(self) {
        self.out.tell(self.number, Kind::Cached, "");
    }

    pub fn done(self) {
        self.out.tell(self.number, Kind::Done, &format!("{:.1}s", self.seconds()));
    }

    pub fn failed(self, message: &str) {
        self.out.tell(self.number, Kind::Failed, message);
    }
}
