//! Quotes, escapes and `$VARIABLES` in an instruction's words.
//!
//! Upstream counterpart: buildkit `frontend/dockerfile/shell/lex.go`. Deliberate differences: nesting and the size of
//! the outcome are bounded; a variable with a fallback (`${A:-b}`, `${A+b}`, `${A?why}`) does not count as undefined.
use super::limits;
use super::pattern::Pattern;
use std::iter::Peekable;
use std::str::Chars;

/// How words are read, and where variables come from.
#[derive(Clone, Copy)]
pub(super) struct Lexer<'a> {
    pub escape: char,
    /// Keep quotes in the outcome.
    pub raw_quotes: bool,
    /// Keep escape characters in the outcome.
    pub raw_escapes: bool,
    /// Quotes are ordinary characters.
    pub skip_quotes: bool,
    /// Leave variables that are not set as they are written.
    pub skip_unset: bool,
    pub lookup: &'a dyn Fn(&str) -> Option<String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Expanded {
    pub text: String,
    /// The text split at spaces that were neither quoted nor escaped.
    pub words: Vec<String>,
    /// Variables used without a fallback that are not set.
    pub undefined: Vec<String>,
}

impl<'a> Lexer<'a> {
    pub fn new(escape: char, lookup: &'a dyn Fn(&str) -> Option<String>) -> Lexer<'a> {
        Lexer { escape, raw_quotes: false, raw_escapes: false, skip_quotes: false, skip_unset: false, lookup }
    }

    pub fn expand(&self, word: &str) -> Result<Expanded, String> {
        let chars = word.chars().peekable();
        let mut reading = Reading { lexer: *self, chars, depth: 0, undefined: Vec::new() };
        let (text, words) = reading
            .until(None, self.raw_escapes)
            .map_err(|why| format!("failed to process {word:?}: {why}"))?;
        Ok(Expanded { text, words, undefined: reading.undefined })
    }
}

struct Reading<'a, 'w> {
    lexer: Lexer<'a>,
    chars: Peekable<Chars<'w>>,
    depth: usize,
    undefined: Vec<String>,
}

/// Collects words. Spaces separate unless they were quoted.
#[derive(Default)]
struct Words {
    done: Vec<String>,
    open: String,
}

impl Words {
    fn add(&mut self, text: &str) {
        for c in text.chars() {
            match c.is_whitespace() {
                false => self.open.push(c),
                true if !self.open.is_empty() => self.done.push(std::mem::take(&mut self.open)),
                true => {}
            }
        }
    }

    fn finish(mut self) -> Vec<String> {
        if !self.open.is_empty() {
            self.done.push(self.open);
        }
        self.done
    }
}

fn missing_brace() -> String {
    "syntax error: missing '}'".to_string()
}

fn unsupported(modifier: &str) -> String {
    format!("unsupported modifier ({modifier}) in substitution")
}

fn bounded(text: &str) -> Result<(), String> {
    match text.len() > limits::EXPANDED_SIZE_BYTES {
        true => Err(format!("the outcome is longer than {} bytes", limits::EXPANDED_SIZE_BYTES)),
        false => Ok(()),
    }
}

impl Reading<'_, '_> {
    /// Reads up to and over `stop`, or to the end.
    fn until(&mut self, stop: Option<char>, raw_escapes: bool) -> Result<(String, Vec<String>), String> {
        self.depth += 1;
        if self.depth > limits::NESTING {
            return Err(format!("more than {} substitutions within one another", limits::NESTING));
        }
        let outer = std::mem::replace(&mut self.lexer.raw_escapes, raw_escapes);
        let outcome = self.pieces(stop);
        self.lexer.raw_escapes = outer;
        self.depth -= 1;
        outcome
    }

    fn pieces(&mut self, stop: Option<char>) -> Result<(String, Vec<String>), String> {
        let mut text = String::new();
        let mut words = Words::default();
        while let Some(c) = self.chars.next() {
            if Some(c) == stop {
                return Ok((text, words.finish()));
            }
            let quoted = match c {
                '$' => {
                    let value = self.dollar()?;
                    text.push_str(&value);
                    words.add(&value);
                    bounded(&text)?;
                    continue;
                }
                '<' => self.less(),
                '\'' if !self.lexer.skip_quotes => self.single_quoted()?,
                '"' if !self.lexer.skip_quotes => self.double_quoted()?,
                c if c == self.lexer.escape => {
                    let mut escaped = String::new();
                    if self.lexer.raw_escapes {
                        escaped.push(c);
                    }
                    escaped.extend(self.chars.next());
                    escaped
                }
                c => {
                    text.push(c);
                    words.add(c.encode_utf8(&mut [0; 4]));
                    continue;
                }
            };
            text.push_str(&quoted);
            words.open.push_str(&quoted);
            bounded(&text)?;
        }
        match stop {
            Some(stop) => Err(format!("unexpected end of statement while looking for matching {stop}")),
            None => Ok((text, words.finish())),
        }
    }

    /// `<<` takes the spaces after it along, so that `<< EOF` is one word.
    fn less(&mut self) -> String {
        let mut text = "<".to_string();
        if self.chars.next_if_eq(&'<').is_some() {
            text.push('<');
            while let Some(space) = self.chars.next_if(|c| matches!(c, '\t' | '\r' | ' ')) {
                text.push(space);
            }
        }
        text
    }

    fn single_quoted(&mut self) -> Result<String, String> {
        let mut text = String::new();
        loop {
            match self.chars.next() {
                None => {
                    return Err("unexpected end of statement while looking for matching single-quote".into());
                }
                Some('\'') => return Ok(if self.lexer.raw_quotes { format!("'{text}'") } else { text }),
                Some(c) => text.push(c),
            }
        }
    }

    fn double_quoted(&mut self) -> Result<String, String> {
        let unclosed =
            || Err("unexpected end of statement while looking for matching double-quote".to_string());
        let mut text = String::new();
        loop {
            match self.chars.next() {
                None => return unclosed(),
                Some('"') => return Ok(if self.lexer.raw_quotes { format!("\"{text}\"") } else { text }),
                Some('$') => {
                    text.push_str(&self.dollar()?);
                    bounded(&text)?;
                }
                Some(c) if c == self.lexer.escape => {
                    // Between quotes only these lose the escape character before them.
                    let escape = self.lexer.escape;
                    let escaped = self.chars.next_if(|c| matches!(c, '"' | '$') || *c == escape);
                    if self.lexer.raw_escapes || escaped.is_none() {
                        text.push(c);
                    }
                    text.extend(escaped);
                }
                Some(c) => text.push(c),
            }
        }
    }

    /// After `$`.
    fn dollar(&mut self) -> Result<String, String> {
        if self.chars.next_if_eq(&'{').is_some() {
            return self.braced();
        }
        let name = self.name();
        if name.is_empty() {
            return Ok("$".to_string());
        }
        let written = || format!("${name}");
        Ok(self.plain(&name, written))
    }

    fn plain(&mut self, name: &str, written: impl Fn() -> String) -> String {
        match (self.lexer.lookup)(name) {
            Some(value) => value,
            None if self.lexer.skip_unset => written(),
            None => {
                // Positional and special parameters never have a value in a Dockerfile.
                if name.starts_with(|c: char| c.is_alphabetic() || c == '_') {
                    self.undefined.push(name.to_string());
                }
                String::new()
            }
        }
    }

    /// After `${`.
    fn braced(&mut self) -> Result<String, String> {
        match self.chars.peek() {
            None => return Err(missing_brace()),
            Some('{' | '}' | ':') => return Err("syntax error: bad substitution".to_string()),
            Some(_) => {}
        }
        let name = self.name();
        match self.chars.next() {
            None => Err(missing_brace()),
            Some('}') => Ok(self.plain(&name, || format!("${{{name}}}"))),
            Some(':') => match self.chars.next() {
                Some(modifier @ ('-' | '+' | '?')) => self.fallback(&name, modifier, true),
                Some(modifier) => Err(unsupported(&format!(":{modifier}"))),
                None => Err(missing_brace()),
            },
            Some(modifier @ ('-' | '+' | '?')) => self.fallback(&name, modifier, false),
            Some(modifier @ ('#' | '%')) => self.trimmed(&name, modifier),
            Some('/') => self.replaced(&name),
            Some(modifier) => Err(unsupported(&modifier.to_string())),
        }
    }

    /// What stands up to `stop` as a part of a `${…}`.
    fn part(&mut self, stop: char, raw_escapes: bool) -> Result<String, String> {
        match self.until(Some(stop), raw_escapes) {
            Ok((text, _)) => Ok(text),
            Err(why) if self.chars.peek().is_none() && why.starts_with("unexpected end") => Err(match stop {
                '/' => "syntax error: missing '/' in ${}".to_string(),
                _ => missing_brace(),
            }),
            Err(why) => Err(why),
        }
    }

    /// `${name-word}`, `${name+word}`, `${name?word}`; with a colon, an empty value is none.
    fn fallback(&mut self, name: &str, modifier: char, empty_is_unset: bool) -> Result<String, String> {
        let word = self.part('}', false)?;
        let value = (self.lexer.lookup)(name);
        if value.is_none() && self.lexer.skip_unset {
            let colon = if empty_is_unset { ":" } else { "" };
            return Ok(format!("${{{name}{colon}{modifier}{word}}}"));
        }
        let usable = value.as_deref().is_some_and(|v| !(empty_is_unset && v.is_empty()));
        match modifier {
            '-' if usable => Ok(value.unwrap_or_default()),
            '-' => Ok(word),
            '+' if usable => Ok(word),
            '+' => Ok(String::new()),
            _ if usable => Ok(value.unwrap_or_default()),
            _ if !word.is_empty() => Err(format!("{name}: {word}")),
            _ if value.is_none() => Err(format!("{name}: is not allowed to be unset")),
            _ => Err(format!("{name}: is not allowed to be empty")),
        }
    }

    /// `${name#pattern}`, `${name##pattern}`, `${name%pattern}`, `${name%%pattern}`
    fn trimmed(&mut self, name: &str, modifier: char) -> Result<String, String> {
        let word = self.part('}', true)?;
        if self.lexer.skip_unset && (self.lexer.lookup)(name).is_none() {
            return Ok(format!("${{{name}{modifier}{word}}}"));
        }
        let value = self.plain(name, String::new);
        let (pattern, longest) = match word.strip_prefix(modifier) {
            Some(pattern) => (pattern, true),
            None => (word.as_str(), false),
        };
        let outcome = Pattern::parse(pattern).and_then(|parsed| match modifier {
            '#' => parsed.trim_start(&value, longest),
            _ => parsed.trim_end(&value, longest),
        });
        outcome.map_err(|why| format!("invalid pattern ({pattern}) in substitution: {why}"))
    }

    /// `${name/pattern/replacement}`, `${name//pattern/replacement}`
    fn replaced(&mut self, name: &str) -> Result<String, String> {
        let all = self.chars.next_if_eq(&'/').is_some();
        let pattern = self.part('/', true)?;
        let replacement = self.part('}', true)?;
        if self.lexer.skip_unset && (self.lexer.lookup)(name).is_none() {
            let slash = if all { "//" } else { "/" };
            return Ok(format!("${{{name}{slash}{pattern}/{replacement}}}"));
        }
        let value = self.plain(name, String::new);
        let outcome = Pattern::parse(&pattern).and_then(|parsed| parsed.replace(&value, &replacement, all));
        let text = outcome.map_err(|why| format!("invalid pattern ({pattern}) in substitution: {why}"))?;
        bounded(&text)?;
        Ok(text)
    }

    /// Letters, digits and `_`; or digits alone; or one of the shell's special parameters.
    fn name(&mut self) -> String {
        let mut name = String::new();
        match self.chars.peek() {
            Some(c) if c.is_numeric() => {
                while let Some(c) = self.chars.next_if(|c| c.is_numeric()) {
                    name.push(c);
                }
                return name;
            }
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => {
                name.extend(self.chars.next());
                return name;
            }
            _ => {}
        }
        while let Some(c) = self.chars.next_if(|c| c.is_alphanumeric() || *c == '_') {
            name.push(c);
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(name: &str) -> Option<String> {
        let value = match name {
            "PWD" => "/home",
            "SHELL" => "bash",
            "KOREAN" => "한국어",
            "NULL" => "",
            "SPACE" => "abc  def",
            "FILE" => "archive.tar.gz",
            "URL" => "https://example.org/a/b",
            "SPECIAL" => "()[]{}^$.*?|\\x",
            "STARS" => "a***yy*",
            "BIG" => return Some("x".repeat(limits::EXPANDED_SIZE_BYTES / 2)),
            _ => return None,
        };
        Some(value.to_string())
    }

    fn expand(word: &str) -> String {
        match Lexer::new('\\', &lookup).expand(word) {
            Ok(expanded) => expanded.text,
            Err(why) => format!("error {}", why.rsplit_once("\": ").map_or(why.as_str(), |(_, w)| w)),
        }
    }

    #[test]
    fn quotes_and_escapes() {
        for (word, wanted) in [
            ("he'll'o", "hello"),
            (r"he\'llo", "he'llo"),
            (r"abc\tdef", "abctdef"),
            (r#""abc\tdef""#, r"abc\tdef"),
            (r#""abc\\tdef""#, r"abc\tdef"),
            (r"'abc\tdef'", r"abc\tdef"),
            (r"hello\", "hello"),
            (r"hello\\", r"hello\"),
            ("\"''\"", "''"),
            (r"'hello\'", r"hello\"),
            (r"he\$PWD", "he$PWD"),
            (r"he\\$PWD", r"he\/home"),
            (r#""he\\$PWD""#, r"he\/home"),
            ("'$PWD'", "$PWD"),
            ("\"he'$PWD'\"", "he'/home'"),
            ("안'녕'$KOREAN", "안녕한국어"),
            ("he'llo", "error unexpected end of statement while looking for matching single-quote"),
            (r#""hello\""#, "error unexpected end of statement while looking for matching double-quote"),
        ] {
            assert_eq!(expand(word), wanted, "{word}");
        }
    }

    #[test]
    fn variables_with_and_without_fallbacks() {
        for (word, wanted) in [
            ("he$PWD.", "he/home."),
            ("he$pwd.", "he."),
            ("$.", "$."),
            ("$", "$"),
            ("he$1x $999aaa $@@ $*a", "hex aaa @ a"),
            (r"\${}aaa", "${}aaa"),
            ("${1:-bbb}${@:-c}${#}", "bbbc"),
            ("he${XXX:-000}xx", "he000xx"),
            ("he${NULL:-000}${NULL-1}xx", "he000xx"),
            ("he${XXX:-${YYY:-$PWD}}xx", "he/homexx"),
            ("he${PWD:+${SHELL}}${XXX:+1}${NULL:+2}${NULL+3}xx", "hebash3xx"),
            ("he${PWD?}${NULL?}", "he/home"),
            (r"he${XXX:-\${PWD}z}xx", "he${PWDz}xx"),
            ("${aaa:-bbb}}", "bbb}"),
            ("${aaa:-bbb {foo}", "bbb {foo"),
            ("${XXX?}", "error XXX: is not allowed to be unset"),
            ("${NULL:?}", "error NULL: is not allowed to be empty"),
            ("${XXX:?say $SHELL}", "error XXX: say bash"),
            ("${}", "error syntax error: bad substitution"),
            ("${{aaa}", "error syntax error: bad substitution"),
            ("${:-bbb}", "error syntax error: bad substitution"),
            ("he${PWD", "error syntax error: missing '}'"),
            ("${aaa:-bbb ${foo}", "error syntax error: missing '}'"),
            ("he${PWD:=000}xx", "error unsupported modifier (:=) in substitution"),
            ("${XXX:YYY}", "error unsupported modifier (:Y) in substitution"),
            ("${FOO=aaa}", "error unsupported modifier (=) in substitution"),
            ("${FOO:#}", "error unsupported modifier (:#) in substitution"),
            ("he${.}", "error unsupported modifier (.) in substitution"),
            ("$BIG$BIG$BIG", "error the outcome is longer than 1048576 bytes"),
        ] {
            assert_eq!(expand(word), wanted, "{word}");
        }
        let deep = format!("{}x{}", "${A:-".repeat(100), "}".repeat(100));
        assert_eq!(
            expand(&deep).split("\": ").last(),
            Some("error more than 32 substitutions within one another")
        );
    }

    #[test]
    fn patterns() {
        for (word, wanted) in [
            ("${FILE#*.}", "tar.gz"),
            ("${FILE##*.}", "gz"),
            ("${FILE%.*}", "archive.tar"),
            ("${FILE%%.*}", "archive"),
            ("${FILE#?rch}", "ive.tar.gz"),
            ("${FILE#$NULL}${FILE#}", "archive.tar.gzarchive.tar.gz"),
            ("${FILE/tar/zip}", "archive.zip.gz"),
            ("${FILE//a/A}", "Archive.tAr.gz"),
            ("${FILE/a*r/X}", "X.gz"),
            ("${FILE//nothing/X}", "archive.tar.gz"),
            (r"${URL#*:\/\/}", "example.org/a/b"),
            (r"${URL//\//_}", "https:__example.org_a_b"),
            (r"${SPECIAL#()[]{\}^$.\*\?|\\}", "x"),
            (r"${STARS%%\**\*}", "a"),
            ("${XXX#a}${XXX/a/b}", ""),
            ("${FILE/tar}", "error syntax error: missing '/' in ${}"),
            ("${FILE/tar/zip", "error syntax error: missing '}'"),
            (r"${FILE#\x}", r"error invalid pattern (\x) in substitution: invalid escape '\x'"),
        ] {
            assert_eq!(expand(word), wanted, "{word}");
        }
    }

    #[test]
    fn words_split_at_bare_spaces_only() {
        for (text, wanted) in [
            ("hello${SPACE}bye", &["helloabc", "defbye"][..]),
            ("hello\"${SPACE}\"bye", &["helloabc  defbye"]),
            ("hello  there ", &["hello", "there"]),
            (r"hello\ there", &["hello there"]),
            ("hel'lo there'", &["hello there"]),
            ("a${XXX:-b}c", &["abc"]),
        ] {
            assert_eq!(Lexer::new('\\', &lookup).expand(text).unwrap().words, wanted, "{text}");
        }
        let unset = Lexer { skip_unset: true, raw_quotes: true, ..Lexer::new('\\', &lookup) };
        let kept = "\"$A\" ${A} ${A:-b} ${A%b} ${A//b/c} /home";
        assert_eq!(unset.expand("\"$A\" ${A} ${A:-b} ${A%b} ${A//b/c} $PWD").unwrap().text, kept);
        let undefined = Lexer::new('\\', &lookup).expand("$A ${B:-c} ${D#e} $1").unwrap().undefined;
        assert_eq!(undefined, ["A", "D"]);
        assert_eq!(Lexer::new('`', &lookup).expand("`$PWD c:\\d").unwrap().text, "$PWD c:\\d");
    }
}
