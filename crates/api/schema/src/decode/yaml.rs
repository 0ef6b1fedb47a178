//! YAML's own ways, on the tree that was read from it.
//!
//! Upstream: sigs.k8s.io/yaml, which turns YAML into JSON before anything looks at it.
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::StrictError;

/// Numbers up to here are whole in JSON as Go writes them.
const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;

/// Follows merge keys, and makes integers of floats that are whole.
pub(super) fn as_go_reads(value: &mut Value) {
    match value {
        Value::Number(number) => {
            let whole =
                number.as_f64().filter(|f| number.is_f64() && f.fract() == 0.0 && f.abs() <= WHOLE_MAX);
            if let Some(whole) = whole {
                *value = Value::from(whole as i64);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(as_go_reads),
        Value::Object(fields) => {
            fields.values_mut().for_each(as_go_reads);
            if let Some(merged) = fields.remove("<<") {
                merge(fields, merged);
            }
        }
        _ => {}
    }
}

fn merge(fields: &mut Map<String, Value>, merged: Value) {
    match merged {
        Value::Object(more) => {
            for (key, value) in more {
                fields.entry(key).or_insert(value);
            }
        }
        Value::Array(several) => several.into_iter().for_each(|one| merge(fields, one)),
        _ => {}
    }
}

/// A reader's error in the words of Go's: the line comes first.
pub(super) fn go_error(text: &str) -> String {
    let Some((what, place)) = text.split_once(" at line ") else { return text.to_owned() };
    let line: String = place.chars().take_while(char::is_ascii_digit).collect();
    format!("line {line}: {what}")
}

/// The duplicates with the lines on which they stand, where these can be told.
pub(super) fn with_lines(bytes: &[u8], doubles: Vec<StrictError>) -> Vec<StrictError> {
    if doubles.is_empty() {
        return doubles;
    }
    let found = duplicate_lines(&String::from_utf8_lossy(bytes));
    let named = |(double, (_, key)): (&StrictError, &(usize, String))| match double {
        StrictError::Duplicate(path) => path == key || path.ends_with(&format!(".{key}")),
        _ => false,
    };
    if found.len() != doubles.len() || !doubles.iter().zip(&found).all(named) {
        return doubles;
    }
    found.into_iter().map(|(line, key)| StrictError::YamlDuplicate { line, key }).collect()
}

/// Keys that stand twice in a block mapping.
fn duplicate_lines(text: &str) -> Vec<(usize, String)> {
    let mut open: Vec<(usize, BTreeSet<String>)> = Vec::new();
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if line == "---" && at > 0 {
            break;
        }
        let trimmed = line.trim_start_matches(' ');
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let mut indent = line.len() - trimmed.len();
        let mut rest = trimmed;
        while let Some(item) = rest.strip_prefix("- ") {
            open.retain(|(depth, _)| *depth <= indent);
            indent += 2;
            rest = item;
        }
        if rest.len() < trimmed.len() {
            open.retain(|(depth, _)| *depth < indent);
        }
        open.retain(|(depth, _)| *depth <= indent);
        let Some((key, _)) = rest.split_once(':') else { continue };
        let key = key.trim().trim_matches(['"', '\'']).to_string();
        if open.last().is_none_or(|(depth, _)| *depth < indent) {
            open.push((indent, BTreeSet::new()));
        }
        if let Some((_, keys)) = open.last_mut()
            && !keys.insert(key.clone())
        {
            found.push((at + 1, key));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::yaml;

    #[test]
    fn as_upstream_reads_it() {
        let text = "a: &x\n  n: 1.0\nb:\n  <<: *x\n  m: 1.5\n---\nsecond: 1\n";
        let decoded = yaml(text.as_bytes(), None).unwrap();
        assert_eq!(decoded.value, json!({"a": {"n": 1}, "b": {"n": 1, "m": 1.5}}));
        assert!(yaml(b"", None).unwrap().value.is_null());
        let error = yaml(b"a:\n\tb: c\n", None).unwrap_err().to_string();
        assert_eq!(error, "yaml: line 2: found character that cannot start any token");
    }

    #[test]
    fn lines_of_duplicates() {
        let text =
            "metadata:\n  name: u\n  name: v\nlist:\n- a: 1\n  b: 2\n- a: 1\n  a: 2\ndata: {}\ndata: {}\n";
        let notes: Vec<String> =
            yaml(text.as_bytes(), None).unwrap().strict.iter().map(ToString::to_string).collect();
        assert_eq!(
            notes,
            [
                "line 3: key \"name\" already set in map",
                "line 8: key \"a\" already set in map",
                "line 10: key \"data\" already set in map",
            ]
        );
        let flow = yaml(b"{a: 1, a: 2}", None).unwrap();
        assert_eq!(flow.strict[0].to_string(), "duplicate field \"a\"");
    }
}
