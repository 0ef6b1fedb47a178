//! Wall-clock and monotonic time.
//!
//! The wall clock can be shifted, for the whole process by a file that holds an offset in seconds
//! (`SAMPAN_CLOCK_OFFSET_FILE`, what the lab's clock jumps write), or by [`shift`] in a test. Monotonic
//! time is tokio's, so that `tokio::time::pause` owns it in tests.
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};

use jiff::{SignedDuration, Timestamp};

static OFFSET_MS: AtomicI64 = AtomicI64::new(0);
static OFFSET_FILE: OnceLock<Option<std::path::PathBuf>> = OnceLock::new();

/// The wall clock.
pub fn now() -> Timestamp {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
    let now = Timestamp::now();
    let offset = OFFSET_MS.load(Ordering::Relaxed).saturating_add(offset_from_file_ms());
    now.saturating_add(SignedDuration::from_millis(offset)).unwrap_or(now)
}

/// The wall clock without its fraction of a second: the precision of `metav1.Time`.
pub fn now_seconds() -> Timestamp {
    let now = now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// Monotonic time.
pub fn monotonic() -> tokio::time::Instant {
    tokio::time::Instant::now()
}

/// Shifts the wall clock of this process by `ms`, besides what the offset file says.
pub fn shift(ms: i64) {
    OFFSET_MS.fetch_add(ms, Ordering::Relaxed);
}

fn offset_from_file_ms() -> i64 {
    let path = OFFSET_FILE.get_or_init(|| std::env::var_os("SAMPAN_CLOCK_OFFSET_FILE").map(Into::into));
    let Some(path) = path else { return 0 };
    let seconds = std::fs::read_to_string(path).ok().and_then(|s| s.trim().parse::<i64>().ok());
    seconds.unwrap_or(0).saturating_mul(1000)
}

#[cfg(test)]
mod tests {
    #[test]
    fn shift_moves_the_wall_clock() {
        let before = super::now();
        super::shift(3_600_000);
        let after = super::now();
        super::shift(-3_600_000);
        assert!(after.duration_since(before).as_secs() >= 3600);
    }
}
