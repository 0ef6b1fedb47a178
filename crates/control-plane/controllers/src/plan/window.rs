//! When a plan may begin with a node. Upstream counterpart: kured's pkg/timewindow, which system-upgrade-controller uses.
//! Deliberate difference: a window that ends before it starts belongs to the day that it starts on.
use std::time::Duration;

use jiff::civil::Weekday;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use sampan_kinds::upgrade::v1::plan::TimeWindowSpec;

const DAY_MINUTES: u16 = 24 * 60;

pub struct Window {
    zone: TimeZone,
    /// Sunday first.
    days: [bool; 7],
    start: u16,
    end: u16,
}

impl Window {
    /// `Err` says what is wrong.
    pub fn new(spec: &TimeWindowSpec) -> Result<Self, String> {
        let zone = match spec.time_zone.as_str() {
            "" | "UTC" => TimeZone::UTC,
            name => TimeZone::get(name).map_err(|_| format!("spec.window.timeZone: {name} is not known"))?,
        };
        let mut days = [spec.days.is_empty(); 7];
        for day in spec.days.iter().filter_map(|day| TimeWindowSpec::day(day)) {
            days[usize::from(day.unsigned_abs())] = true;
        }
        let start = TimeWindowSpec::minutes(&spec.start_time).unwrap_or(0);
        let end = TimeWindowSpec::minutes(&spec.end_time).unwrap_or(DAY_MINUTES);
        Ok(Self { zone, days, start, end: if end == 0 { DAY_MINUTES } else { end } })
    }

    pub fn contains(&self, at: Timestamp) -> bool {
        let at = at.to_zoned(self.zone.clone());
        let minute = u16::from(at.hour().unsigned_abs()) * 60 + u16::from(at.minute().unsigned_abs());
        let open = |day: Weekday| self.days[usize::from(day.to_sunday_zero_offset().unsigned_abs())];
        match self.start < self.end {
            true => open(at.weekday()) && (self.start..self.end).contains(&minute),
            false => {
                let began_yesterday = minute < self.end && open(at.weekday().previous());
                began_yesterday || minute >= self.start && open(at.weekday())
            }
        }
    }

    /// How long until it is open, to the minute.
    pub fn opens_in(&self, now: Timestamp) -> Option<Duration> {
        let minutes = (0..=8 * i64::from(DAY_MINUTES))
            .find(|minutes| now.checked_add(minutes.minutes()).is_ok_and(|at| self.contains(at)))?;
        Some(Duration::from_secs(minutes.unsigned_abs() * 60))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_and_closed() {
        let window = |days: &[&str], start: &str, end: &str| {
            Window::new(&TimeWindowSpec {
                days: days.iter().map(|d| (*d).to_string()).collect(),
                start_time: start.to_string(),
                end_time: end.to_string(),
                time_zone: String::new(),
            })
            .unwrap()
        };
        // 2026-11-22 is a Sunday
        for (days, start, end, at, want) in [
            (&[][..], "", "", "2026-11-22T23:59:59Z", true),
            (&["su"], "10:00", "11:00", "2026-11-22T10:59:00Z", true),
            (&["su"], "10:00", "11:00", "2026-11-22T11:00:00Z", false),
            (&["mo"], "10:00", "11:00", "2026-11-22T10:30:00Z", false),
            (&["saturday"], "22:00", "05:30", "2026-11-22T05:00:00Z", true),
            (&["sunday"], "22:00", "05:30", "2026-11-22T05:00:00Z", false),
            (&["0"], "22:00", "05:30", "2026-11-22T23:00:00Z", true),
        ] {
            let at: Timestamp = at.parse().unwrap();
            assert_eq!(window(days, start, end).contains(at), want, "{days:?} {start}-{end} {at}");
        }
        let now = "2026-11-22T09:58:30Z".parse().unwrap();
        assert_eq!(window(&[], "10:00", "11:00").opens_in(now), Some(Duration::from_secs(120)));
        assert_eq!(
            window(&["sa"], "09:00", "11:00").opens_in(now),
            Some(Duration::from_secs((6 * 1440 - 58) * 60))
        );
    }
}
