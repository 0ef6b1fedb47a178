//! Exponential back-off of restarts and pulls. Upstream counterpart: client-go util/flowcontrol/backoff.go.
use std::time::Duration;

use jiff::Timestamp;

/// The back-off of one container or image: none for the first failure, then doubling up to a maximum.
#[derive(Clone, Debug, Default)]
pub struct BackOff {
    delay: Option<Duration>,
    updated_at: Option<Timestamp>,
}

fn since(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

impl BackOff {
    /// Until when to wait after what happened at `event`, and how long that is altogether.
    pub fn waiting(&self, event: Timestamp, now: Timestamp, max: Duration) -> Option<(Duration, Duration)> {
        let (delay, updated_at) = (self.delay?, self.updated_at?);
        if since(updated_at, event) > max * 2 || since(event, now) >= delay {
            return None;
        }
        Some((delay - since(event, now), delay))
    }

    /// Doubles; starts anew where it went well for twice the maximum.
    pub fn advance(&mut self, event: Timestamp, initial: Duration, max: Duration) {
        let expired = self.updated_at.is_none_or(|at| since(at, event) > max * 2);
        self.delay = Some(match self.delay {
            Some(delay) if !expired => (delay * 2).min(max),
            _ => initial,
        });
        self.updated_at = Some(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_maximum_and_resets() {
        let at = |s: i64| Timestamp::from_second(s).unwrap();
        let (initial, max) = (Duration::from_secs(10), Duration::from_secs(300));
        let mut back_off = BackOff::default();
        assert!(back_off.waiting(at(0), at(0), max).is_none(), "the first restart is at once");
        let mut now = 0;
        for want in [10, 20, 40, 80, 160, 300, 300] {
            back_off.advance(at(now), initial, max);
            let (left, delay) = back_off.waiting(at(now + 1), at(now + 2), max).unwrap();
            assert_eq!((left.as_secs(), delay.as_secs()), (want - 1, want));
            now += 1 + i64::try_from(want).unwrap();
            assert!(back_off.waiting(at(now - i64::try_from(want).unwrap()), at(now), max).is_none());
        }
        back_off.advance(at(now + 601), initial, max);
        assert_eq!(back_off.waiting(at(now + 601), at(now + 601), max).unwrap().1, initial);
    }
}
