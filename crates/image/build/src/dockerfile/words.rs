//! An instruction's line to its name, flags and arguments, each with its offset.
//!
//! Upstream counterparts: buildkit `parser/split_command.go` and `parser/line_parsers.go`. Quotes stay in `name=value`
//! words, as they are only taken off when variables are expanded. Deliberate difference: words are read by character,
//! where upstream's flags are read by byte.

/// A word, and where it starts in its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Word {
    pub text: String,
    pub offset: usize,
}

/// `NAME --flag… arguments`
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Command<'l> {
    pub name: &'l str,
    pub name_offset: usize,
    pub flags: Vec<Word>,
    /// What follows the flags, trimmed.
    pub rest: &'l str,
    pub rest_offset: usize,
}

/// What separates words where upstream uses its whitespace expression.
fn blank(c: char) -> bool {
    matches!(c, '\t' | '\u{b}' | '\u{c}' | '\r' | ' ')
}

/// Reads `line` from `start` on.
pub(super) fn command(line: &str, start: usize, escape: char) -> Command<'_> {
    let text = line[start..].trim_end();
    let name_offset = start + (text.len() - text.trim_start().len());
    let text = text.trim_start();
    let name = text.split(blank).next().unwrap_or(text);
    let after = name_offset + name.len();
    let line = &line[..name_offset + text.len()];
    let (flags, end) = flags(line, after, escape);
    let rest = &line[end..];
    let rest_offset = end + (rest.len() - rest.trim_start().len());
    Command { name, name_offset, flags, rest: rest.trim(), rest_offset }
}

/// Words that start with `--`, up to the first that does not, or over a lone `--`. Also where they end.
fn flags(line: &str, start: usize, escape: char) -> (Vec<Word>, usize) {
    let mut flags = Vec::new();
    let mut at = start;
    loop {
        at += line[at..].len() - line[at..].trim_start().len();
        if !line[at..].starts_with("--") {
            return (flags, at);
        }
        let (text, end) = unquoted(line, at, escape);
        let offset = std::mem::replace(&mut at, end);
        if text == "--" {
            return (flags, at);
        }
        flags.push(Word { text, offset });
    }
}

/// The word at `start` without quotes and escapes, and where it ends.
fn unquoted(line: &str, start: usize, escape: char) -> (String, usize) {
    let mut text = String::new();
    let mut quote = None;
    let mut chars = line[start..].char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            c if quote.is_none() && c.is_whitespace() => return (text, start + i),
            c if quote == Some(c) => quote = None,
            '\'' | '"' if quote.is_none() => quote = Some(c),
            c if c == escape => text.extend(chars.next().map(|(_, c)| c)),
            c => text.push(c),
        }
    }
    (text, line.len())
}

/// Words at blanks, whatever is quoted.
pub(super) fn split(text: &str, offset: usize) -> Vec<Word> {
    let pieces = text.split(blank).filter(|piece| !piece.is_empty());
    let start = |piece: &str| offset + (piece.as_ptr() as usize - text.as_ptr() as usize);
    pieces.map(|piece| Word { text: piece.to_string(), offset: start(piece) }).collect()
}

/// Words at spaces outside of quotes, with their quotes and escapes left in.
pub(super) fn quoted(text: &str, offset: usize, escape: char) -> Vec<Word> {
    let mut words = Vec::new();
    let mut open: Option<Word> = None;
    let mut quote = None;
    let mut chars = text.char_indices().peekable();
    while let Some((i, c)) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            words.extend(open.take());
            continue;
        }
        let word = open.get_or_insert_with(|| Word { text: String::new(), offset: offset + i });
        if quote.is_none() && (c == '\'' || c == '"') {
            quote = Some(c);
        } else if quote == Some(c) {
            quote = None;
        }
        if c == escape && quote != Some('\'') {
            // At the end an escape character escapes nothing and is dropped.
            if let Some((_, escaped)) = chars.next() {
                word.text.push(c);
                word.text.push(escaped);
            }
            continue;
        }
        word.text.push(c);
    }
    words.extend(open.filter(|word| !word.text.is_empty()));
    words
}

/// What a JSON array of strings is.
pub(super) enum Json {
    Words(Vec<String>),
    /// An array of something else.
    NotStrings,
    /// No JSON array: the arguments are to be read otherwise.
    Not,
}

pub(super) fn json(text: &str) -> Json {
    if !text.starts_with('[') {
        return Json::Not;
    }
    let Ok(values) = serde_json::from_str::<Vec<serde_json::Value>>(text) else { return Json::Not };
    let strings: Option<Vec<String>> = values
        .into_iter()
        .map(|value| match value {
            serde_json::Value::String(text) => Some(text),
            _ => None,
        })
        .collect();
    strings.map_or(Json::NotStrings, Json::Words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(words: &[Word]) -> Vec<(&str, usize)> {
        words.iter().map(|w| (w.text.as_str(), w.offset)).collect()
    }

    #[test]
    fn commands_are_split_into_flags_and_the_rest() {
        for (line, name, flags, rest) in [
            ("RUN a b ", "RUN", vec![], ("a b", 4)),
            ("  RUN", "RUN", vec![], ("", 5)),
            ("COPY\t--from=a --link  b c", "COPY", vec![("--from=a", 5), ("--link", 14)], ("b c", 22)),
            (
                "RUN --mount=\"type=cache,target=/a b\" x",
                "RUN",
                vec![("--mount=type=cache,target=/a b", 4)],
                ("x", 37),
            ),
            ("RUN --a\\ b -- --c", "RUN", vec![("--a b", 4)], ("--c", 14)),
            ("CMD -x", "CMD", vec![], ("-x", 4)),
            ("RUN --a='b", "RUN", vec![("--a=b", 4)], ("", 10)),
        ] {
            let command = command(line, 0, '\\');
            assert_eq!(command.name, name, "{line}");
            assert_eq!(texts(&command.flags), flags, "{line}");
            assert_eq!((command.rest, command.rest_offset), rest, "{line}");
        }
        let inner = command("ONBUILD RUN x", 8, '\\');
        assert_eq!((inner.name, inner.name_offset, inner.rest, inner.rest_offset), ("RUN", 8, "x", 12));
    }

    #[test]
    fn quoted_words_stay_together() {
        for (text, wanted) in [
            ("a=b c='d e' f=\"g \\\" h\"", vec![("a=b", 0), ("c='d e'", 4), ("f=\"g \\\" h\"", 12)]),
            ("a=b\\ c d", vec![("a=b\\ c", 0), ("d", 7)]),
            ("a='x\\' b", vec![("a='x\\'", 0), ("b", 7)]),
            ("a=\\", vec![("a=", 0)]),
            ("  ", vec![]),
            ("é=1 b", vec![("é=1", 0), ("b", 5)]),
        ] {
            assert_eq!(texts(&quoted(text, 0, '\\')), wanted, "{text}");
        }
        assert_eq!(texts(&split("a  'b c'", 3)), [("a", 3), ("'b", 6), ("c'", 9)]);
    }

    #[test]
    fn arrays_of_strings_are_json() {
        assert!(matches!(json("[\"a\", \"b\"]"), Json::Words(w) if w == ["a", "b"]));
        assert!(matches!(json("[]"), Json::Words(w) if w.is_empty()));
        assert!(matches!(json("[\"a\", 1]"), Json::NotStrings));
        assert!(matches!(json("[[\"a\"]]"), Json::NotStrings));
        for text in ["['a']", "[\"a\"", "[ -f x ] && y", "a", "[\"a\"] b"] {
            assert!(matches!(json(text), Json::Not), "{text}");
        }
    }
}
