//! The query string: decoded names and values, and the flags that API options are read from.
//!
//! Upstream counterparts: net/url, k8s.io/apimachinery/pkg/runtime/converter.go (string to bool and int).
use std::borrow::Cow;

use crate::status::{Result, Status};

/// A query string's pairs, in order.
#[derive(Clone, Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn parse(query: Option<&str>) -> Self {
        let pairs = query.unwrap_or("").split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (percent_decode(name, true).into_owned(), percent_decode(value, true).into_owned())
                })
                .collect(),
        )
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(n, _)| n == name)
    }

    /// The first value; "" where there is none.
    pub fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(n, _)| n == name).map_or("", |(_, v)| v)
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(n, v)| (n.as_str(), v.as_str()))
    }

    /// Upstream's reading of a flag: anything but `false` and `0` is true, also nothing at all (`?watch`).
    pub fn flag(&self, name: &str) -> bool {
        self.has(name) && !matches!(self.get(name).to_ascii_lowercase().as_str(), "false" | "0")
    }

    pub fn optional_flag(&self, name: &str) -> Option<bool> {
        self.has(name).then(|| self.flag(name))
    }

    pub fn integer(&self, name: &str) -> Result<Option<i64>> {
        match self.get(name) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                let why = crate::write::unsigned_error(text.strip_prefix(['+', '-']).unwrap_or(text));
                Status::bad_request(format!("strconv.ParseInt: parsing {text:?}: {why}"))
            }),
        }
    }

    /// The pairs as a query string again.
    pub fn encode<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
        let mut out = String::new();
        for (name, value) in pairs {
            if !out.is_empty() {
                out.push('&');
            }
            percent_encode(name, &mut out);
            out.push('=');
            percent_encode(value, &mut out);
        }
        out
    }
}

/// Decodes `%XX`, and `+` as a blank in queries. What isn't a code stays as it is.
pub fn percent_decode(text: &str, plus_is_blank: bool) -> Cow<'_, str> {
    let coded = text.contains('%') || (plus_is_blank && text.contains('+'));
    if !coded {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = (bytes[at] == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (bytes[at], code) {
            (_, Some(byte)) => {
                out.push(byte);
                at += 3;
                continue;
            }
            (b'+', None) if plus_is_blank => out.push(b' '),
            (byte, None) => out.push(byte),
        }
        at += 1;
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

fn percent_encode(text: &str, out: &mut String) {
    use std::fmt::Write;
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(byte as char),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_decoded() {
        let query = Query::parse(Some("labelSelector=a%3Db%2Cc+in+(d)&watch&limit=5&command=a&command=b%zz"));
        assert_eq!(query.get("labelSelector"), "a=b,c in (d)");
        assert!(query.flag("watch"));
        assert_eq!(query.integer("limit").unwrap(), Some(5));
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["a", "b%zz"]);
        assert_eq!(Query::encode([("a b", "c/d")]), "a%20b=c%2Fd");
        assert!(!Query::parse(Some("watch=false")).flag("watch"));
        assert!(Query::parse(Some("limit=x")).integer("limit").is_err());
    }
}
