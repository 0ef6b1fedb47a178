//! `--flag=value` ahead of an instruction's arguments.
//!
//! Upstream counterpart: buildkit `instructions/bflag.go`.
use super::error::suggest;
use super::words::Word;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// Nothing, `true` or `false`.
    Bool,
    One,
    /// A value each time that it stands there.
    Many,
}

/// The flags that an instruction was given.
#[derive(Debug, Default)]
pub(super) struct Flags(Vec<(&'static str, Word)>);

/// What is wrong with a flag, and its offset.
#[derive(Debug)]
pub(super) struct BadFlag {
    pub message: String,
    pub offset: usize,
    pub expected: Option<String>,
}

pub(super) fn parse(words: &[Word], known: &[(&'static str, Takes)]) -> Result<Flags, BadFlag> {
    let mut given = Flags::default();
    for word in words {
        let bad =
            |message: String, expected: Option<String>| BadFlag { message, offset: word.offset, expected };
        let (flag, value) = match word.text.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (word.text.as_str(), None),
        };
        let name = flag.trim_start_matches("--");
        let Some((name, takes)) = known.iter().find(|(k, _)| flag.strip_prefix("--") == Some(k)) else {
            return Err(unknown(flag, name, known, word.offset));
        };
        if *takes != Takes::Many && given.at(name).is_some() {
            return Err(bad(format!("duplicate flag specified: {flag}"), None));
        }
        let value = match (takes, value) {
            (Takes::Bool, None) => "true",
            (Takes::Bool, Some("")) => return Err(bad(format!("missing a value on flag: {flag}"), None)),
            (Takes::Bool, Some(value)) if value.eq_ignore_ascii_case("true") => "true",
            (Takes::Bool, Some(value)) if value.eq_ignore_ascii_case("false") => "false",
            (Takes::Bool, Some(value)) => {
                let message = format!("expecting boolean value for flag {flag}, not: {value}");
                return Err(bad(message, Some("true or false".into())));
            }
            (_, None) => {
                return Err(bad(format!("missing a value on flag: {flag}"), Some(format!("{flag}=VALUE"))));
            }
            (_, Some(value)) => value,
        };
        given.0.push((name, Word { text: value.to_string(), offset: word.offset }));
    }
    Ok(given)
}

fn unknown(flag: &str, name: &str, known: &[(&'static str, Takes)], offset: usize) -> BadFlag {
    let names = || known.iter().map(|(name, _)| *name);
    let message = suggest(format!("unknown flag: {flag}"), name, names());
    let list: Vec<String> = names().map(|name| format!("--{name}")).collect();
    let expected = if list.is_empty() { "no flag".to_string() } else { list.join(", ") };
    BadFlag { message, offset, expected: Some(expected) }
}

impl Flags {
    pub fn one(&self, name: &str) -> Option<String> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, word)| word.text.clone()).filter(|v| !v.is_empty())
    }

    pub fn is_set(&self, name: &str) -> Option<bool> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, word)| word.text == "true")
    }

    pub fn many(&self, name: &str) -> Vec<Word> {
        self.0.iter().filter(|(n, _)| *n == name).map(|(_, word)| word.clone()).collect()
    }

    /// The offset of a flag that was given.
    pub fn at(&self, name: &str) -> Option<usize> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, word)| word.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_checked() {
        let known = [("link", Takes::Bool), ("from", Takes::One), ("exclude", Takes::Many)];
        let parse = |text: &str| {
            let words = crate::dockerfile::words::command(&format!("COPY {text}"), 0, '\\').flags;
            parse(&words, &known).map_err(|bad| format!("{} {}", bad.offset, bad.message))
        };
        let flags = parse("--link --exclude=a --exclude=b --from=c").unwrap();
        assert_eq!((flags.is_set("link"), flags.one("from")), (Some(true), Some("c".into())));
        assert_eq!(flags.many("exclude").len(), 2);
        assert_eq!(parse("--link=false").unwrap().is_set("link"), Some(false));
        for (text, wanted) in [
            ("--form=a", "5 unknown flag: --form (did you mean from?)"),
            ("--link --other", "12 unknown flag: --other"),
            ("--link --link", "12 duplicate flag specified: --link"),
            ("--link=", "5 missing a value on flag: --link"),
            ("--link=1", "5 expecting boolean value for flag --link, not: 1"),
            ("--from", "5 missing a value on flag: --from"),
            ("---from=a", "5 unknown flag: ---from (did you mean from?)"),
        ] {
            assert_eq!(parse(text).unwrap_err(), wanted, "{text}");
        }
    }
}
