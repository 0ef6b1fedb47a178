//! Query strings: decoded, encoded, and cut into pages.
use crate::error::RegistryError;

/// What a page has at most, and has when nothing is said.
const CATALOG_MAX: usize = 1000;
const CATALOG_DEFAULT: usize = 100;

#[derive(Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(text: &str) -> Query {
        let pairs = text.split('&').filter(|p| !p.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name, true), decode(value, true))
        });
        Query(pairs.collect())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(n, _)| n == name).map(|(_, v)| v.clone()).collect()
    }

    fn count(&self) -> Result<Option<usize>, RegistryError> {
        let parse = |n: &str| n.parse().map_err(|_| RegistryError::PaginationInvalid(n.to_string()));
        self.get("n").map(parse).transpose()
    }

    /// A page of sorted names after `last`, and the query of the next one.
    pub(crate) fn page(
        &self,
        names: Vec<String>,
        bounded: bool,
    ) -> Result<(Vec<String>, Option<String>), RegistryError> {
        let count = match self.count()? {
            Some(n) if bounded => Some(n.min(CATALOG_MAX)),
            None if bounded => Some(CATALOG_DEFAULT),
            n => n,
        };
        let last = self.get("last").unwrap_or("");
        let begin = if last.is_empty() { 0 } else { names.partition_point(|name| name.as_str() <= last) };
        let mut page: Vec<String> = names.into_iter().skip(begin).collect();
        let Some(count) = count.filter(|n| *n < page.len()) else { return Ok((page, None)) };
        page.truncate(count);
        let next = page.last().map(|last| format!("last={}&n={count}", encode(last)));
        Ok((page, next))
    }
}

/// Percent-decoding; what isn't UTF-8 or well-formed stays as it is.
pub(crate) fn decode(text: &str, plus: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let digits = bytes.get(i + 1..i + 3).and_then(|d| std::str::from_utf8(d).ok());
        match (bytes[i], digits.and_then(|d| u8::from_str_radix(d, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                i += 3;
                continue;
            }
            (b'+', _) if plus => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        i += 1;
    }
    String::from_utf8(out).unwrap_or_else(|_| text.to_string())
}

pub(crate) fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(byte as char),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other() {
        let names = || ["a", "b/c", "d"].map(String::from).to_vec();
        let page = |query: &str, bounded| Query::parse(query).page(names(), bounded).unwrap();
        assert_eq!(page("", false).0.len(), 3);
        assert_eq!(page("n=2", false), (vec!["a".into(), "b/c".into()], Some("last=b%2Fc&n=2".into())));
        assert_eq!(page("n=2&last=b%2Fc", true), (vec!["d".to_string()], None));
        assert_eq!(page("n=0", false), (vec![], None));
        assert_eq!(page("last=aa", false).0, ["b/c", "d"]);
        assert_eq!(page("n=3", false).1, None);
        assert!(Query::parse("n=-1").page(names(), false).is_err());
        assert_eq!(Query::parse("digest=sha256%3Aab&x=a+b").get("x"), Some("a b"));
        assert_eq!(decode("%zz%e4", false), "%zz%e4");
    }
}
