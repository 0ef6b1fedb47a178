//! Cells shared by the kinds' table rows: names, ages.
use jiff::Timestamp;
use serde_json::Value;

/// The row of a kind that prints nothing of its own.
pub fn name_and_age(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), age(object, now)]
}

/// `metadata.name`.
pub fn name(object: &Value) -> Value {
    object.pointer("/metadata/name").cloned().unwrap_or_default()
}

/// The text, `<none>` where it is empty.
pub fn or_none(text: &str) -> Value {
    if text.is_empty() { "<none>".into() } else { text.into() }
}

/// Labels or a selector as `a=b,c=d`.
pub fn labels(map: Option<&Value>) -> Value {
    let pairs: Vec<String> = map
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    or_none(&pairs.join(","))
}

/// The time since `metadata.creationTimestamp`, as kubectl prints it.
pub fn age(object: &Value, now: Timestamp) -> Value {
    since(object.pointer("/metadata/creationTimestamp"), now).into()
}

/// The time since `timestamp`, `<unknown>` without one.
pub fn since(timestamp: Option<&Value>, now: Timestamp) -> String {
    let parsed = timestamp.and_then(Value::as_str).and_then(|t| t.parse::<Timestamp>().ok());
    parsed.map_or_else(|| "<unknown>".to_string(), |t| human_duration(now.duration_since(t).as_secs()))
}

/// Upstream's `duration.HumanDuration`: two units at most, the coarser the longer.
pub fn human_duration(seconds: i64) -> String {
    match seconds {
        ..=-2 => return "<invalid>".to_string(),
        -1..0 => return "0s".to_string(),
        0..120 => return format!("{seconds}s"),
        _ => {}
    }
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let both = |big: i64, unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{big}{unit}"),
        _ => format!("{big}{unit}{small}{small_unit}"),
    };
    if minutes < 10 {
        return both(minutes, "m", seconds % 60, "s");
    }
    if minutes < 180 {
        return format!("{minutes}m");
    }
    match hours {
        ..8 => both(hours, "h", minutes % 60, "m"),
        8..48 => format!("{hours}h"),
        48..192 => both(hours / 24, "d", hours % 24, "h"),
        192..17520 => format!("{}d", hours / 24),
        17520..70080 => both(hours / 24 / 365, "y", hours / 24 % 365, "d"),
        _ => format!("{}y", hours / 24 / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::human_duration;

    #[test]
    fn ages_are_upstreams() {
        let cases = [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (121, "2m1s"),
            (599, "9m59s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (10_860, "3h1m"),
            (28_800, "8h"),
            (172_799, "47h"),
            (172_800, "2d"),
            (176_400, "2d1h"),
            (691_200, "8d"),
            (63_071_999, "729d"),
            (63_072_000, "2y"),
            (63_158_400, "2y1d"),
            (252_288_000, "8y"),
        ];
        for (seconds, want) in cases {
            assert_eq!(human_duration(seconds), want, "{seconds}");
        }
    }
}
