//! Links of proxied pages, so that they lead through the proxy again.
//!
//! Upstream counterpart: k8s.io/apimachinery/pkg/util/proxy/transport.go. The same attributes of the same elements are
//! changed, when they name a path of the page's own host from its root. Deliberately different: the page streams through,
//! and tags keep the form that they have; only the value of a changed attribute is written anew.
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};

use crate::body::{Body, BoxError};

/// A longer tag passes as it is.
const TAG_MAX_BYTES: usize = 64 << 10;

/// Where a page's links should lead.
pub struct Links {
    /// The path of the proxy, without a slash at its end.
    pub prefix: String,
    /// Names that the page's own host has.
    pub hosts: [String; 2],
}

impl Links {
    /// The proxy's path of one of the page's host.
    pub fn below(&self, path: &str) -> String {
        let mut joined = self.prefix.clone();
        let mut kept: Vec<&str> = Vec::new();
        for part in path.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(kept.pop()),
                part => kept.push(part),
            }
        }
        for part in &kept {
            joined.push('/');
            joined.push_str(part);
        }
        if path.ends_with('/') && !joined.ends_with('/') {
            joined.push('/');
        }
        joined
    }

    /// The URL through the proxy, or as it is when it leads elsewhere or is relative.
    pub fn url(&self, url: &str) -> String {
        let (_, rest) = split_scheme(url);
        let (host, path) = match rest.strip_prefix("//") {
            Some(rest) => rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len())),
            None => ("", rest),
        };
        let own = host.is_empty() || self.hosts.iter().any(|own| own == host);
        if !own || !path.starts_with('/') {
            return url.to_string();
        }
        let end = path.find(['?', '#']).unwrap_or(path.len());
        let (path, query) = path.split_at(end);
        match path.starts_with(&self.prefix) {
            true => format!("{path}{query}"),
            false => format!("{}{query}", self.below(path)),
        }
    }
}

fn split_scheme(url: &str) -> (&str, &str) {
    match url.split_once(':') {
        Some((scheme, rest))
            if scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c)) =>
        {
            (scheme, rest)
        }
        _ => ("", url),
    }
}

/// The page with its links changed, while it streams.
pub fn html(body: Body, links: Links) -> Body {
    let state = (body, Page { links, pending: BytesMut::new(), raw_until: None }, false);
    let frames = futures::stream::unfold(state, |(mut body, mut page, done)| async move {
        if done {
            return None;
        }
        loop {
            let (out, done) = match body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => (page.take(&data), false),
                    Err(_) => continue,
                },
                Some(Err(error)) => return Some((Err(error), (body, page, true))),
                None => (page.pending.split().freeze(), true),
            };
            if done || !out.is_empty() {
                return Some((Ok(out), (body, page, done)));
            }
        }
    });
    BodyExt::boxed_unsync(StreamBody::new(frames.map(|f: Result<Bytes, BoxError>| f.map(Frame::data))))
}

struct Page {
    links: Links,
    /// The beginning of what is not yet a whole tag.
    pending: BytesMut,
    /// Within an element whose text has no tags: what ends it.
    raw_until: Option<String>,
}

impl Page {
    /// Takes more of the page, gives what is certain of it.
    fn take(&mut self, data: &[u8]) -> Bytes {
        self.pending.extend_from_slice(data);
        let mut out = BytesMut::with_capacity(self.pending.len());
        while !self.pending.is_empty() {
            let Some(at) = self.pending.iter().position(|b| *b == b'<') else {
                out.extend(self.pending.split());
                break;
            };
            out.extend(self.pending.split_to(at));
            let Some(length) = tag_length(&self.pending) else {
                if self.pending.len() > TAG_MAX_BYTES {
                    out.extend(self.pending.split());
                }
                break;
            };
            let tag = self.pending.split_to(length);
            out.extend(self.tag(&tag));
        }
        out.freeze()
    }

    fn tag(&mut self, tag: &[u8]) -> Vec<u8> {
        let Ok(text) = std::str::from_utf8(tag) else { return tag.to_vec() };
        let name: String = text.chars().skip(1).take_while(|c| !" \t\r\n\x0c>".contains(*c)).collect();
        let name = name.to_ascii_lowercase();
        if let Some(end) = &self.raw_until {
            if name == *end {
                self.raw_until = None;
            }
            return tag.to_vec();
        }
        let name = name.trim_end_matches('/');
        if ["script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes"].contains(&name) {
            self.raw_until = Some(format!("/{name}"));
        }
        let wanted = attributes(name);
        if wanted.is_empty() {
            return tag.to_vec();
        }
        let mut out = String::with_capacity(text.len() + self.links.prefix.len());
        let mut copied = 0;
        for (key, value) in attribute_values(text, 1 + name.len()) {
            let plain = unescape(&text[value.clone()]);
            if !wanted.contains(&text[key].to_ascii_lowercase().as_str()) {
                continue;
            }
            let changed = self.links.url(&plain);
            if changed != plain {
                let quoted = text[..value.start].ends_with(['"', '\'']);
                out.push_str(&text[copied..value.start]);
                out.push_str(if quoted { "" } else { "\"" });
                out.push_str(&escape(&changed));
                out.push_str(if quoted { "" } else { "\"" });
                copied = value.end;
            }
        }
        out.push_str(&text[copied..]);
        out.into_bytes()
    }
}

/// Attributes that hold URLs, by element.
fn attributes(element: &str) -> &'static [&'static str] {
    match element {
        "a" | "area" | "base" | "link" => &["href"],
        "applet" => &["codebase"],
        "audio" | "embed" | "script" | "source" => &["src"],
        "blockquote" | "del" | "ins" | "q" => &["cite"],
        "body" => &["background"],
        "button" => &["formaction"],
        "command" => &["icon"],
        "form" => &["action"],
        "frame" | "iframe" => &["longdesc", "src"],
        "head" => &["profile"],
        "html" => &["manifest"],
        "img" => &["longdesc", "src", "usemap"],
        "input" => &["src", "usemap", "formaction"],
        "object" => &["classid", "codebase", "data", "usemap"],
        "video" => &["poster", "src"],
        _ => &[],
    }
}

/// The bytes of the tag, comment or lone `<` that this begins with; nothing when its end isn't there yet.
fn tag_length(bytes: &[u8]) -> Option<usize> {
    if b"<!--".starts_with(&bytes[..bytes.len().min(4)]) {
        let rest = bytes.get(4..)?;
        return rest.windows(3).position(|w| w == b"-->").map(|at| at + 7);
    }
    match bytes.get(1)? {
        b'a'..=b'z' | b'A'..=b'Z' | b'/' | b'!' | b'?' => {}
        _ => return Some(1),
    }
    let mut quote = None;
    let mut before = b' ';
    for (at, byte) in bytes.iter().enumerate().skip(1) {
        match (quote, byte) {
            (Some(open), byte) if open == *byte => quote = None,
            (Some(_), _) => {}
            (None, b'"' | b'\'') if before == b'=' => quote = Some(*byte),
            (None, b'>') => return Some(at + 1),
            _ => {}
        }
        if !byte.is_ascii_whitespace() {
            before = *byte;
        }
    }
    None
}

type Span = std::ops::Range<usize>;

/// Where in a tag the names of attributes and their values stand.
fn attribute_values(tag: &str, from: usize) -> Vec<(Span, Span)> {
    let bytes = tag.as_bytes();
    let skip = |mut at: usize, wanted: &dyn Fn(u8) -> bool| {
        while at < bytes.len() && wanted(bytes[at]) {
            at += 1;
        }
        at
    };
    let space = |b: u8| b.is_ascii_whitespace();
    let (mut found, mut at) = (Vec::new(), from);
    loop {
        at = skip(at, &|b| space(b) || b == b'/');
        let name = at..skip(at, &|b| !space(b) && !b"=>/".contains(&b));
        if name.is_empty() && bytes.get(name.end) != Some(&b'=') {
            return found;
        }
        at = skip(name.end, &space);
        if bytes.get(at) != Some(&b'=') {
            continue;
        }
        at = skip(at + 1, &space);
        let value = match bytes.get(at) {
            Some(quote @ (b'"' | b'\'')) => at + 1..skip(at + 1, &|b| b != *quote),
            _ => at..skip(at, &|b| !space(b) && b != b'>'),
        };
        at = value.end + usize::from(matches!(bytes.get(value.end), Some(b'"' | b'\'')));
        found.push((name, value));
    }
}

const ENTITIES: &[(&str, &str)] =
    &[("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#34;", "\""), ("&#39;", "'"), ("&amp;", "&")];

fn unescape(value: &str) -> String {
    ENTITIES.iter().fold(value.to_string(), |text, (entity, plain)| text.replace(entity, plain))
}

fn escape(value: &str) -> String {
    let escaped = value.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    escaped.replace('"', "&#34;").replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links() -> Links {
        Links { prefix: "/p/web/proxy".into(), hosts: ["10.42.0.7:80".into(), "127.0.0.1:6443".into()] }
    }

    #[test]
    fn urls() {
        for (url, expected) in [
            ("/", "/p/web/proxy/"),
            ("/a/b/?q=/c#d", "/p/web/proxy/a/b/?q=/c#d"),
            ("/a/../../b", "/p/web/proxy/b"),
            ("a/b", "a/b"),
            ("?q", "?q"),
            ("", ""),
            ("#top", "#top"),
            ("/p/web/proxy/a", "/p/web/proxy/a"),
            ("http://10.42.0.7:80/a", "/p/web/proxy/a"),
            ("https://127.0.0.1:6443/a", "/p/web/proxy/a"),
            ("//10.42.0.7:80/a", "/p/web/proxy/a"),
            ("http://example.com/a", "http://example.com/a"),
            ("//example.com/a", "//example.com/a"),
            ("mailto:someone@example.com", "mailto:someone@example.com"),
        ] {
            assert_eq!(links().url(url), expected, "{url}");
        }
    }

    #[test]
    fn pages() {
        for (page, expected) in [
            (r#"<a href="/x">test</a>"#, r#"<a href="/p/web/proxy/x">test</a>"#),
            ("<A class=b HREF=/x?a=1&amp;b>t", r#"<A class=b HREF="/p/web/proxy/x?a=1&amp;b">t"#),
            ("<img alt='a>b' src = '/i.png'/>", "<img alt='a>b' src = '/p/web/proxy/i.png'/>"),
            (
                "<p href='/x'>1 < 2 & <!-- <a href='/x'> --> é",
                "<p href='/x'>1 < 2 & <!-- <a href='/x'> --> é",
            ),
            (
                "<script src=\"/s.js\">if (a<b) \"<a href='/x'>\"</script><link href=/c>",
                "<script src=\"/p/web/proxy/s.js\">if (a<b) \"<a href='/x'>\"</script><link href=\"/p/web/proxy/c\">",
            ),
            ("<a href", "<a href"),
            ("<", "<"),
            ("<a =/x href=/y b>", "<a =/x href=\"/p/web/proxy/y\" b>"),
        ] {
            for step in [1, 3, 1000] {
                let mut taken = Page { links: links(), pending: BytesMut::new(), raw_until: None };
                let mut out: Vec<u8> = Vec::new();
                for chunk in page.as_bytes().chunks(step) {
                    out.extend(taken.take(chunk));
                }
                out.extend(taken.pending.split());
                assert_eq!(String::from_utf8_lossy(&out), expected, "{page} by {step}");
            }
        }
    }
}
