//! Whether a text is a cron schedule: five fields, or one of the `@` words.
//!
//! Upstream counterpart: ParseStandard in github.com/robfig/cron/v3, with its messages. Left out: whether the zone of a
//! `TZ=` prefix, which new objects may not have anyway, is a known one.
use crate::field::go_quote;

/// A field's name, its least and greatest number, and the names that stand for numbers.
struct Bounds {
    low: u64,
    high: u64,
    names: &'static [&'static str],
    first_name: u64,
}

const MONTHS: &[&str] = &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: &[&str] = &["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

const FIELDS: [Bounds; 5] = [
    Bounds { low: 0, high: 59, names: &[], first_name: 0 },
    Bounds { low: 0, high: 23, names: &[], first_name: 0 },
    Bounds { low: 1, high: 31, names: &[], first_name: 0 },
    Bounds { low: 1, high: 12, names: MONTHS, first_name: 1 },
    Bounds { low: 0, high: 6, names: DAYS, first_name: 0 },
];

const WORDS: &[&str] = &["@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"];

/// What is wrong with the schedule, if anything.
pub fn check(schedule: &str) -> Result<(), String> {
    if schedule.is_empty() {
        return Err("empty spec string".to_string());
    }
    let mut rest = schedule;
    if schedule.starts_with("TZ=") || schedule.starts_with("CRON_TZ=") {
        let Some((_, after)) = schedule.split_once(' ') else {
            return Err("invalid schedule format: runtime error: slice bounds out of range [:-1]".to_string());
        };
        rest = after.trim();
    }
    if rest.starts_with('@') {
        return check_word(rest);
    }
    let fields: Vec<&str> = rest.split_whitespace().collect();
    if fields.len() != FIELDS.len() {
        let found = fields.len();
        return Err(format!("expected exactly 5 fields, found {found}: [{}]", fields.join(" ")));
    }
    for (field, bounds) in fields.iter().zip(&FIELDS) {
        for range in field.split(',').filter(|r| !r.is_empty()) {
            check_range(range, bounds)?;
        }
    }
    Ok(())
}

fn check_word(word: &str) -> Result<(), String> {
    if WORDS.contains(&word) {
        return Ok(());
    }
    match word.strip_prefix("@every ") {
        Some(duration) => check_duration(duration).map_err(|error| {
            format!("failed to parse duration {word}: time: {error} {}", go_quote(duration))
        }),
        None => Err(format!("unrecognized descriptor: {word}")),
    }
}

/// `*`, `a`, `a-b`, each with `/step`.
fn check_range(text: &str, bounds: &Bounds) -> Result<(), String> {
    let parts: Vec<&str> = text.split('/').collect();
    let range: Vec<&str> = parts[0].split('-').collect();
    let (start, mut end) = match range.as_slice() {
        ["*" | "?", ..] => (bounds.low, bounds.high),
        [only] => {
            let number = number_or_name(only, bounds)?;
            (number, number)
        }
        [low, high] => (number_or_name(low, bounds)?, number_or_name(high, bounds)?),
        _ => return Err(format!("too many hyphens: {text}")),
    };
    let step = match parts.as_slice() {
        [_] => 1,
        [_, step] => {
            let step = number(step)?;
            if range.len() == 1 {
                end = bounds.high;
            }
            step
        }
        _ => return Err(format!("too many slashes: {text}")),
    };
    let (low, high) = (bounds.low, bounds.high);
    if start < low {
        return Err(format!("beginning of range ({start}) below minimum ({low}): {text}"));
    }
    if end > high {
        return Err(format!("end of range ({end}) above maximum ({high}): {text}"));
    }
    if start > end {
        return Err(format!("beginning of range ({start}) beyond end of range ({end}): {text}"));
    }
    if step == 0 {
        return Err(format!("step of range should be a positive number: {text}"));
    }
    Ok(())
}

fn number_or_name(text: &str, bounds: &Bounds) -> Result<u64, String> {
    let lower = text.to_lowercase();
    match bounds.names.iter().position(|name| *name == lower) {
        Some(position) => Ok(bounds.first_name + position as u64),
        None => number(text),
    }
}

fn number(text: &str) -> Result<u64, String> {
    match text.parse::<i64>() {
        Ok(number) => {
            u64::try_from(number).map_err(|_| format!("negative number ({number}) not allowed: {text}"))
        }
        Err(_) => {
            let quoted = go_quote(text);
            Err(format!("failed to parse int from {text}: strconv.Atoi: parsing {quoted}: invalid syntax"))
        }
    }
}

/// Go's ParseDuration: numbers with units, such as `1h30m`.
fn check_duration(text: &str) -> Result<(), &'static str> {
    let mut rest = text.trim_start_matches(['+', '-']);
    if rest == "0" {
        return Ok(());
    }
    if rest.is_empty() || text.len() - rest.len() > 1 {
        return Err("invalid duration");
    }
    while !rest.is_empty() {
        let digits = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let number = &rest[..rest.len() - digits.len()];
        if !number.contains(|c: char| c.is_ascii_digit()) || number.matches('.').count() > 1 {
            return Err("invalid duration");
        }
        let after = digits.trim_start_matches(|c: char| !c.is_ascii_digit() && c != '.');
        match &digits[..digits.len() - after.len()] {
            "" => return Err("missing unit in duration"),
            "ns" | "us" | "µs" | "μs" | "ms" | "s" | "m" | "h" => rest = after,
            _ => return Err("unknown unit in duration"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn schedules() {
        let cases = [
            ("*/1 * * * ?", ""),
            ("0 0-23/2 1,15 JAN-mar sun", ""),
            ("@every 1h30m", ""),
            ("@daily", ""),
            ("TZ=UTC 0 0 * * *", ""),
            ("5/15 * * * *", ""),
            ("* * * *", "expected exactly 5 fields, found 4: [* * * *]"),
            ("60 * * * *", "end of range (60) above maximum (59): 60"),
            ("* * 0 * *", "beginning of range (0) below minimum (1): 0"),
            ("5-1 * * * *", "beginning of range (5) beyond end of range (1): 5-1"),
            ("*/0 * * * *", "step of range should be a positive number: */0"),
            ("1-2-3 * * * *", "too many hyphens: 1-2-3"),
            ("a * * * *", "failed to parse int from a: strconv.Atoi: parsing \"a\": invalid syntax"),
            ("@never", "unrecognized descriptor: @never"),
            ("@every x", "failed to parse duration @every x: time: invalid duration \"x\""),
            ("TZ=0", "invalid schedule format: runtime error: slice bounds out of range [:-1]"),
        ];
        for (schedule, want) in cases {
            assert_eq!(check(schedule).err().unwrap_or_default(), want, "{schedule}");
        }
    }
}
