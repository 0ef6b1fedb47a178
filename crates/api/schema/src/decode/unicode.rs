//! JSON text that isn't Unicode, made so as Go's reader does it.
//!
//! Upstream: encoding/json (unquote). What stays true: only text that a strict reader refuses is touched.

/// The text with U+FFFD in the place of bytes that are no UTF-8 and of escaped surrogates that have no partner; None
/// where it has neither.
pub(super) fn repaired(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    let mut changed = matches!(text, std::borrow::Cow::Owned(_));
    let mut rest: &str = &text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = match surrogate(rest) {
            None => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            Some(first) if (0xd800..0xdc00).contains(&first) && is_low(&rest[6..]) => 12,
            Some(_) => {
                changed = true;
                out.push_str("\\ufffd");
                rest = &rest[6..];
                continue;
            }
        };
        let (kept, after) = rest.split_at(length);
        out.push_str(kept);
        rest = after;
    }
    out.push_str(rest);
    changed.then_some(out)
}

/// The surrogate that an escape at the beginning stands for.
fn surrogate(text: &str) -> Option<u32> {
    let hex = text.strip_prefix("\\u")?.get(..4)?;
    u32::from_str_radix(hex, 16).ok().filter(|code| (0xd800..0xe000).contains(code))
}

fn is_low(text: &str) -> bool {
    surrogate(text).is_some_and(|code| code >= 0xdc00)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_character() {
        let cases: [(&[u8], Option<&str>); 5] = [
            (br#"{"a":"b"}"#, None),
            (br#""\ud83d\ude00 \\ud800""#, None),
            (br#""\ud800""#, Some(r#""\ufffd""#)),
            (br#""\ud800\n\udc00""#, Some(r#""\ufffd\n\ufffd""#)),
            (b"\"\xff\"", Some("\"\u{fffd}\"")),
        ];
        for (bytes, want) in cases {
            assert_eq!(repaired(bytes).as_deref(), want, "{}", String::from_utf8_lossy(bytes));
        }
    }
}
