//! The resourceVersion contract: which state a get, list or watch is to see.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/storage/cacher/delegator.go, …/storage/continue.go,
//! …/apis/meta/internalversion/validation. Every read decides here, from its options alone, what it needs of the
//! watch cache; nothing else interprets `resourceVersion`, `resourceVersionMatch` or `continue`.
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sampan_kinds::{ErrorList, FieldError, Path};
use serde::{Deserialize, Serialize};

use crate::query::Query;
use crate::status::{Result, Status};

/// The state that a get or list answers with.
#[derive(Clone, Debug, PartialEq)]
pub enum Read {
    /// All that was acknowledged before the request came.
    Latest,
    /// Whatever is at hand.
    Any,
    /// At hand, once it is as new as this.
    NotOlderThan(u64),
    /// Exactly as of this revision.
    Exact(u64),
    /// A page that goes on after another: from this key (without the resource's prefix), at that revision, or at
    /// the latest one where the client accepted an inconsistent list.
    Continue { from: String, at: Option<u64> },
}

/// Where a watch begins.
#[derive(Clone, Debug, PartialEq)]
pub enum Start {
    /// The present state as ADDED events (at least as new as this), then changes. With `bookmark` the end of the
    /// state is marked by a bookmark annotated `k8s.io/initial-events-end`.
    State { not_older_than: Read, bookmark: bool },
    /// Changes after this revision.
    After(u64),
    /// Changes from now on.
    Now,
}

/// `resourceVersion` as a number: 0 for "" and "0".
pub fn parse(text: &str) -> Result<u64> {
    match text {
        "" | "0" => Ok(0),
        _ => text.parse().map_err(|_| {
            let why = format!("strconv.ParseUint: parsing {text:?}: {}", crate::write::unsigned_error(text));
            let error = FieldError::invalid(&Path::new("resourceVersion"), text, why);
            Status::bad_request(error.to_string())
        }),
    }
}

/// What a get's options ask for.
pub fn for_get(query: &Query) -> Result<Read> {
    Ok(match (query.get("resourceVersion"), parse(query.get("resourceVersion"))?) {
        ("", _) => Read::Latest,
        (_, 0) => Read::Any,
        (_, version) => Read::NotOlderThan(version),
    })
}

/// What a list's options ask for.
pub fn for_list(query: &Query) -> Result<Read> {
    validate(query, false)?;
    query.integer("timeoutSeconds")?;
    let text = query.get("resourceVersion");
    let token = query.get("continue");
    if !token.is_empty() {
        let read = decode_continue(token)
            .map_err(|status| Status::bad_request(format!("invalid continue token: {}", status.0.message)))?;
        if !matches!(text, "" | "0") {
            return Err(Status::bad_request(
                "specifying resource version is not allowed when using continue",
            ));
        }
        return Ok(read);
    }
    let version = parse(text)
        .map_err(|status| Status::bad_request(format!("invalid resource version: {}", status.0.message)))?;
    let limited = query.integer("limit")?.unwrap_or(0) > 0;
    Ok(match (query.get("resourceVersionMatch"), text, version) {
        (_, "", _) => Read::Latest,
        ("Exact", _, version) => Read::Exact(version),
        ("NotOlderThan", _, 0) => Read::Any,
        ("NotOlderThan", _, version) => Read::NotOlderThan(version),
        (_, _, 0) => Read::Any,
        // The legacy meaning of a limit: exactly that state.
        (_, _, version) if limited => Read::Exact(version),
        (_, _, version) => Read::NotOlderThan(version),
    })
}

/// What a watch's options ask for.
pub fn for_watch(query: &Query) -> Result<Start> {
    validate(query, true)?;
    let text = query.get("resourceVersion");
    let version = parse(text)?;
    let read = match (text, version) {
        ("", _) => Read::Latest,
        (_, 0) => Read::Any,
        (_, version) => Read::NotOlderThan(version),
    };
    Ok(match (query.optional_flag("sendInitialEvents"), version) {
        (Some(true), _) => Start::State { not_older_than: read, bookmark: query.flag("allowWatchBookmarks") },
        (Some(false), 0) => Start::Now,
        (_, 0) => Start::State { not_older_than: read, bookmark: false },
        (_, version) => Start::After(version),
    })
}

fn validate(query: &Query, watch: bool) -> Result<()> {
    let mut errors = ErrorList::new();
    let path = Path::new("resourceVersionMatch");
    let matching = query.get("resourceVersionMatch");
    let forbidden = |detail: &str| FieldError::forbidden(&path, detail);
    let initial = query.has("sendInitialEvents");
    if watch && initial && matching != "NotOlderThan" {
        errors.push(forbidden("sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"));
    }
    if !matching.is_empty() {
        if watch && !initial {
            errors.push(forbidden(
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        if !watch && query.get("resourceVersion").is_empty() {
            errors.push(forbidden("resourceVersionMatch is forbidden unless resourceVersion is provided"));
        }
        if !query.get("continue").is_empty() {
            errors.push(forbidden("resourceVersionMatch is forbidden when continue is provided"));
        }
        let supported: &[&str] = if watch { &["NotOlderThan"] } else { &["Exact", "NotOlderThan", ""] };
        if !supported.contains(&matching) {
            errors.push(FieldError::not_supported_as_listed(&path, matching, supported));
        }
        if !watch && matching == "Exact" && query.get("resourceVersion") == "0" {
            errors.push(forbidden("resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\""));
        }
    }
    if !watch && initial {
        let detail = "sendInitialEvents is forbidden for list";
        errors.push(FieldError::forbidden(&Path::new("sendInitialEvents"), detail));
    }
    if errors.is_empty() { Ok(()) } else { Err(Status::invalid("meta.k8s.io", "ListOptions", "", &errors)) }
}

#[derive(Serialize, Deserialize)]
struct Token {
    #[serde(default)]
    v: String,
    #[serde(default)]
    rv: i64,
    #[serde(default)]
    start: String,
}

/// The token for the page after `last_key` (a key without the resource's prefix); None for `at` makes one that goes
/// on at the latest revision.
pub fn encode_continue(from: &str, at: Option<u64>) -> String {
    let rv = at.map_or(-1, |at| at as i64);
    let token = Token { v: "meta.k8s.io/v1".into(), rv, start: from.into() };
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).unwrap_or_default())
}

fn decode_continue(text: &str) -> Result<Read> {
    let invalid = |why: &str| Status::bad_request(format!("continue key is not valid{why}"));
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|e| {
        let at = match e {
            base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => at,
            _ => text.len() / 4 * 4,
        };
        invalid(&format!(": illegal base64 data at input byte {at}"))
    })?;
    let decoded = sampan_schema::decode::json(&bytes, None).map_err(|e| invalid(&format!(": {e}")))?;
    let token: Token = serde_json::from_value(decoded.value).map_err(|e| invalid(&format!(": {e}")))?;
    if token.v != "meta.k8s.io/v1" {
        return Err(invalid(&format!(": server does not recognize this encoded version {}", token.v)));
    }
    if token.rv == 0 {
        return Err(invalid(": incorrect encoded start resourceVersion (version meta.k8s.io/v1)"));
    }
    if token.start.is_empty() {
        return Err(invalid(": encoded start key empty (version meta.k8s.io/v1)"));
    }
    if token.start.split('/').any(|part| matches!(part, ".." | ".")) {
        return Err(invalid(&format!(": {}", token.start)));
    }
    Ok(Read::Continue { from: token.start, at: u64::try_from(token.rv).ok() })
}

pub const CONTINUE_EXPIRED: &str = "The provided continue parameter is too old to display a consistent list result. \
     You can start a new list without the continue parameter.";
pub const INCONSISTENT_CONTINUE: &str = "The provided continue parameter is too old to display a consistent list \
     result. You can start a new list without the continue parameter, or use the continue token in this response to \
     retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - \
     objects that were created, modified, or deleted between the time the first chunk was returned and now may show \
     up in the list.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contract_of_lists() {
        let token = encode_continue("a/b\0", Some(7));
        let inconsistent = encode_continue("a/b\0", None);
        let cases: &[(&str, Result<Read>)] = &[
            ("", Ok(Read::Latest)),
            ("limit=5", Ok(Read::Latest)),
            ("resourceVersion=0", Ok(Read::Any)),
            ("resourceVersion=0&limit=5", Ok(Read::Any)),
            ("resourceVersion=9", Ok(Read::NotOlderThan(9))),
            ("resourceVersion=9&limit=5", Ok(Read::Exact(9))),
            ("resourceVersion=9&limit=5&resourceVersionMatch=NotOlderThan", Ok(Read::NotOlderThan(9))),
            ("resourceVersion=0&resourceVersionMatch=NotOlderThan", Ok(Read::Any)),
            ("resourceVersion=9&resourceVersionMatch=Exact", Ok(Read::Exact(9))),
            (&format!("continue={token}"), Ok(Read::Continue { from: "a/b\0".into(), at: Some(7) })),
            (&format!("continue={inconsistent}"), Ok(Read::Continue { from: "a/b\0".into(), at: None })),
        ];
        for (query, want) in cases {
            assert_eq!(&for_list(&Query::parse(Some(query))), want, "{query}");
        }
        for (query, code) in [
            ("resourceVersionMatch=Exact", 422),
            ("resourceVersion=0&resourceVersionMatch=Exact", 422),
            ("resourceVersion=1&resourceVersionMatch=Newest", 422),
            ("sendInitialEvents=true", 422),
            ("resourceVersion=x", 400),
            ("continue=%25", 400),
            (&format!("continue={token}&resourceVersion=3"), 400),
        ] {
            assert_eq!(for_list(&Query::parse(Some(query))).unwrap_err().0.code, code, "{query}");
        }
    }

    #[test]
    fn the_contract_of_watches() {
        let state = |read, bookmark| Start::State { not_older_than: read, bookmark };
        let initial = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
        let cases = [
            (String::new(), state(Read::Latest, false)),
            ("resourceVersion=0".into(), state(Read::Any, false)),
            ("resourceVersion=5".into(), Start::After(5)),
            (initial.to_string(), state(Read::Latest, false)),
            (
                format!("{initial}&allowWatchBookmarks=true&resourceVersion=5"),
                state(Read::NotOlderThan(5), true),
            ),
            ("sendInitialEvents=false&resourceVersionMatch=NotOlderThan".into(), Start::Now),
        ];
        for (query, want) in cases {
            assert_eq!(for_watch(&Query::parse(Some(&query))).unwrap(), want, "{query}");
        }
        for query in ["sendInitialEvents=true", "resourceVersionMatch=NotOlderThan"] {
            assert_eq!(for_watch(&Query::parse(Some(query))).unwrap_err().0.code, 422, "{query}");
        }
    }
}
