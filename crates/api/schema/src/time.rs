//! Time and MicroTime: RFC 3339 texts in UTC.
//!
//! Upstream: staging/src/k8s.io/apimachinery/pkg/apis/meta/v1/{time,micro_time}.go.
//! Deliberate difference: MicroTime is read with any number of fraction digits, upstream wants six.

/// A point in time as the wire has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instant {
    pub seconds: i64,
    pub nanos: i32,
}

/// Reads `2006-01-02T15:04:05[.999999999](Z|+07:00)`.
pub fn parse(text: &str) -> Option<Instant> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i32> {
        let digits = bytes.get(from..to)?;
        digits
            .iter()
            .try_fold(0, |sum, digit| digit.is_ascii_digit().then(|| sum * 10 + i32::from(digit - b'0')))
    };
    let mark = |at: usize, byte: u8| (bytes.get(at) == Some(&byte)).then_some(());
    mark(4, b'-').and_then(|()| mark(7, b'-')).and_then(|()| mark(10, b'T'))?;
    mark(13, b':').and_then(|()| mark(16, b':'))?;
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let mut at = 19;
    let mut nanos = 0;
    if mark(at, b'.').is_some() {
        at += 1;
        let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        if digits == 0 {
            return None;
        }
        let kept = digits.min(9);
        nanos = number(at, at + kept)? * 10_i32.pow(9 - kept as u32);
        at += digits;
    }
    let offset_seconds = match bytes.get(at)? {
        b'Z' if bytes.len() == at + 1 => 0,
        sign @ (b'+' | b'-') if bytes.len() == at + 6 => {
            mark(at + 3, b':')?;
            let (hours, minutes) = (number(at + 1, at + 3)?, number(at + 4, at + 6)?);
            if hours > 24 || minutes > 59 {
                return None;
            }
            (hours * 3600 + minutes * 60) * if *sign == b'-' { -1 } else { 1 }
        }
        _ => return None,
    };
    let date = jiff::civil::DateTime::new(
        year as i16,
        month as i8,
        day as i8,
        hour as i8,
        minute as i8,
        second as i8,
        0,
    );
    let civil = date.ok()?.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    Some(Instant { seconds: civil.timestamp().as_second() - i64::from(offset_seconds), nanos })
}

/// `2006-01-02T15:04:05Z`; None outside the years 0 to 9999.
pub fn format_seconds(instant: Instant) -> Option<String> {
    let civil = civil(instant)?;
    Some(format!("{}Z", civil))
}

/// `2006-01-02T15:04:05.000000Z`.
pub fn format_micros(instant: Instant) -> Option<String> {
    Some(format!("{}.{:06}Z", civil(instant)?, instant.nanos / 1000))
}

fn civil(instant: Instant) -> Option<jiff::civil::DateTime> {
    let timestamp = jiff::Timestamp::from_second(instant.seconds).ok()?;
    let civil = jiff::tz::TimeZone::UTC.to_datetime(timestamp);
    (0..=9999).contains(&civil.year()).then_some(civil)
}

/// What Go's time.Parse says of a text that is no RFC 3339 time, after the layout.
pub fn why_not(text: &str) -> String {
    const ELEMENTS: [(&str, usize); 12] = [
        ("2006", 4),
        ("-", 0),
        ("01", 2),
        ("-", 0),
        ("02", 2),
        ("T", 0),
        ("15", 2),
        (":", 0),
        ("04", 2),
        (":", 0),
        ("05", 2),
        ("Z07:00", 6),
    ];
    let mut rest = text;
    for (element, digits) in ELEMENTS {
        let fits = match (element, digits) {
            ("Z07:00", _) => {
                let zone = rest.as_bytes();
                let offset = zone.len() >= 6 && matches!(zone[0], b'+' | b'-') && zone[3] == b':';
                if offset { Some(6) } else { rest.starts_with('Z').then_some(1) }
            }
            (literal, 0) => rest.starts_with(literal).then_some(literal.len()),
            (_, digits) => {
                let all = rest.len() >= digits && rest.bytes().take(digits).all(|byte| byte.is_ascii_digit());
                all.then_some(digits)
            }
        };
        let Some(length) = fits else { return format!(": cannot parse {rest:?} as {element:?}") };
        rest = &rest[length..];
        if element == "05"
            && let Some(fraction) = rest.strip_prefix(['.', ','])
        {
            rest = fraction.trim_start_matches(|c: char| c.is_ascii_digit());
        }
    }
    if rest.is_empty() { ": day out of range".into() } else { format!(": extra text: {rest:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical() {
        for (text, seconds, micros) in [
            ("2024-02-29T12:00:00Z", "2024-02-29T12:00:00Z", "2024-02-29T12:00:00.000000Z"),
            ("2024-01-01T00:30:00.1234567+01:00", "2023-12-31T23:30:00Z", "2023-12-31T23:30:00.123456Z"),
            ("1969-12-31T23:59:59.5Z", "1969-12-31T23:59:59Z", "1969-12-31T23:59:59.500000Z"),
        ] {
            let instant = parse(text).unwrap();
            assert_eq!(format_seconds(instant).unwrap(), seconds);
            assert_eq!(format_micros(instant).unwrap(), micros);
        }
        for text in [
            "",
            "2024-02-30T00:00:00Z",
            "2024-01-01",
            "2024-01-01T00:00:00",
            "2024-01-01T00:00:00.Z",
            "2024-01-01 00:00:00Z",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn what_go_says_of_no_time() {
        let cases = [
            ("", ": cannot parse \"\" as \"2006\""),
            ("yesterday", ": cannot parse \"yesterday\" as \"2006\""),
            ("2020-01-01", ": cannot parse \"\" as \"T\""),
            ("2020-01-01T00:00:00", ": cannot parse \"\" as \"Z07:00\""),
            ("2020-01-01T00:00:00Zx", ": extra text: \"x\""),
        ];
        for (text, want) in cases {
            assert_eq!(why_not(text), want, "{text}");
        }
    }
}
