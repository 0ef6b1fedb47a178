//! Cron schedules as robfig/cron v3's standard parser reads them: five fields, lists, ranges, steps, names, and
//! `@every`, `@hourly` and the like.
use std::time::Duration;

use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Schedule {
    Every(Duration),
    Fields(Fields),
}

/// Each field's values as bits; `any_*` tells whether a day field was a star.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fields {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    any_day: bool,
    any_weekday: bool,
}

const MONTHS: [&str; 12] =
    ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
/// A schedule that has no time within these years has none.
const MAX_YEARS: i16 = 5;

/// Reads a schedule; the error is a sentence.
pub fn parse(text: &str) -> Result<Schedule, String> {
    let text = text.trim();
    if text.starts_with("TZ=") || text.starts_with("CRON_TZ=") {
        return Err("a time zone belongs into spec.timeZone".into());
    }
    let standard = match text {
        "@yearly" | "@annually" => "0 0 1 1 *",
        "@monthly" => "0 0 1 * *",
        "@weekly" => "0 0 * * 0",
        "@daily" | "@midnight" => "0 0 * * *",
        "@hourly" => "0 * * * *",
        _ => text,
    };
    if let Some(every) = standard.strip_prefix("@every ") {
        let every = duration(every).ok_or_else(|| format!("failed to parse duration {text}"))?;
        return Ok(Schedule::Every(Duration::from_secs(every.as_secs().max(1))));
    }
    if standard.starts_with('@') {
        return Err(format!("unrecognized descriptor: {text}"));
    }
    let parts: Vec<&str> = standard.split_whitespace().collect();
    let [minute, hour, day, month, weekday] = parts.as_slice() else {
        return Err(format!("expected exactly 5 fields, found {}: [{}]", parts.len(), parts.join(" ")));
    };
    let star = |f: &str| f.starts_with('*') || f.starts_with('?');
    Ok(Schedule::Fields(Fields {
        minutes: field(minute, 0, 59, &[])?,
        hours: field(hour, 0, 23, &[])?,
        days: field(day, 1, 31, &[])?,
        months: field(month, 1, 12, &MONTHS)?,
        weekdays: field(weekday, 0, 6, &WEEKDAYS)?,
        any_day: day.split(',').any(star),
        any_weekday: weekday.split(',').any(star),
    }))
}

/// Go's durations as far as schedules use them: `1h30m10s`.
fn duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |i| i + digits);
        total += match &rest[digits..unit_end] {
            "h" => Duration::from_secs(number.checked_mul(3600)?),
            "m" => Duration::from_secs(number.checked_mul(60)?),
            "s" => Duration::from_secs(number),
            "ms" => Duration::from_millis(number),
            _ => return None,
        };
        rest = &rest[unit_end..];
    }
    Some(total)
}

fn field(text: &str, min: u32, max: u32, names: &[&str]) -> Result<u64, String> {
    let mut bits = 0;
    for part in text.split(',') {
        bits |= range(part, min, max, names)?;
    }
    Ok(bits)
}

fn range(text: &str, min: u32, max: u32, names: &[&str]) -> Result<u64, String> {
    let number = |t: &str| -> Result<u32, String> {
        let by_name = names.iter().position(|n| n.eq_ignore_ascii_case(t)).map(|i| i as u32 + min);
        by_name.or_else(|| t.parse().ok()).ok_or_else(|| format!("failed to parse int from {t}"))
    };
    let (span, step) = text.split_once('/').map_or((text, None), |(s, step)| (s, Some(step)));
    let (first, mut last) = match span {
        "*" | "?" => (min, max),
        _ => match span.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(span)?, number(span)?),
        },
    };
    let step = match step {
        None => 1,
        Some(step) => {
            // N/step means from N on
            if !span.contains('-') && span != "*" && span != "?" {
                last = max;
            }
            step.parse().map_err(|_| format!("failed to parse int from {step}"))?
        }
    };
    if first < min {
        return Err(format!("beginning of range ({first}) below minimum ({min}): {text}"));
    }
    if last > max {
        return Err(format!("end of range ({last}) above maximum ({max}): {text}"));
    }
    if first > last {
        return Err(format!("beginning of range ({first}) beyond end of range ({last}): {text}"));
    }
    if step == 0 {
        return Err(format!("step of range should be a positive number: {text}"));
    }
    Ok((first..=last).step_by(step as usize).fold(0, |bits, n| bits | 1 << n))
}

fn has(bits: u64, n: i8) -> bool {
    bits & (1 << n.max(0)) != 0
}

impl Fields {
    /// With both day fields given, either is enough.
    fn day_matches(&self, date: Date) -> bool {
        let day = has(self.days, date.day());
        let weekday = has(self.weekdays, date.weekday().to_sunday_zero_offset());
        if self.any_day || self.any_weekday { day && weekday } else { day || weekday }
    }

    fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let start = zone.to_datetime(after);
        let mut at =
            start.date().at(start.hour(), start.minute(), 0, 0).checked_add(Span::new().minutes(1)).ok()?;
        let last_year = start.year() + MAX_YEARS;
        while at.year() <= last_year {
            let date = at.date();
            if !has(self.months, date.month()) {
                at = date.first_of_month().checked_add(Span::new().months(1)).ok()?.at(0, 0, 0, 0);
            } else if !self.day_matches(date) {
                at = date.checked_add(Span::new().days(1)).ok()?.at(0, 0, 0, 0);
            } else if !has(self.hours, at.hour()) {
                at = date.at(at.hour(), 0, 0, 0).checked_add(Span::new().hours(1)).ok()?;
            } else if !has(self.minutes, at.minute()) {
                at = at.checked_add(Span::new().minutes(1)).ok()?;
            } else if let Some(found) = existing(at, zone).filter(|t| *t > after) {
                return Some(found);
            } else {
                at = at.checked_add(Span::new().minutes(1)).ok()?;
            }
        }
        None
    }
}

/// The moment of a civil time, unless the clocks skip it.
fn existing(at: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    let moment = zone.to_timestamp(at).ok()?;
    (zone.to_datetime(moment) == at).then_some(moment)
}

impl Schedule {
    /// The first time after `after`.
    pub fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        match self {
            Self::Every(every) => {
                let whole = Timestamp::from_second(after.as_second()).ok()?;
                whole.checked_add(*every).ok()
            }
            Self::Fields(fields) => fields.next(after, zone),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_times() {
        let cases = [
            ("*/15 * * * *", "2026-01-01T00:07:30Z", "2026-01-01T00:15:00Z"),
            ("0 0 1 * *", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"),
            ("30 4 * * mon-fri", "2026-01-02T05:00:00Z", "2026-01-05T04:30:00Z"),
            ("0 0 13 * 5", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
            ("0 12 29 feb *", "2026-01-01T00:00:00Z", "2028-02-29T12:00:00Z"),
            ("5/20 1 * * ?", "2026-01-01T01:05:00Z", "2026-01-01T01:25:00Z"),
            ("@hourly", "2026-01-01T01:05:00Z", "2026-01-01T02:00:00Z"),
            ("@every 1m30s", "2026-01-01T01:05:00.5Z", "2026-01-01T01:06:30Z"),
        ];
        for (text, after, expected) in cases {
            let next = parse(text).unwrap().next(after.parse().unwrap(), &TimeZone::UTC);
            assert_eq!(next, Some(expected.parse().unwrap()), "{text}");
        }
        assert_eq!(
            parse("0 0 31 2 *").unwrap().next("2026-01-01T00:00:00Z".parse().unwrap(), &TimeZone::UTC),
            None
        );
        let berlin = TimeZone::fixed(jiff::tz::offset(2));
        let next = parse("0 0 * * *").unwrap().next("2026-01-01T00:00:00Z".parse().unwrap(), &berlin);
        assert_eq!(next, Some("2026-01-01T22:00:00Z".parse().unwrap()));
    }

    #[test]
    fn bad_schedules() {
        for text in [
            "",
            "* * * *",
            "60 * * * *",
            "* * * * 8",
            "5-1 * * * *",
            "*/0 * * * *",
            "@often",
            "@every x",
            "TZ=UTC * * * * *",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
