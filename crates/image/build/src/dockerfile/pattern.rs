//! The shell's patterns in `${VAR#pattern}` and its like: `*`, `?` and escapes.
//!
//! Upstream counterpart: `convertShellPatternToRegex` and its users in buildkit `shell/lex.go`. Matching walks all
//! places of the pattern at once, so it never backtracks; steps are bounded by [`limits::PATTERN_STEPS`].
use super::limits;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    Literal(char),
    /// `?`
    One,
    /// `*`
    Any,
}

#[derive(Debug)]
pub(super) struct Pattern(Vec<Piece>);

impl Pattern {
    pub fn parse(text: &str) -> Result<Pattern, String> {
        let mut pieces = Vec::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            pieces.push(match c {
                '*' => Piece::Any,
                '?' => Piece::One,
                '\\' => match chars.next() {
                    // The first two only have to be escaped because they end a part of ${…}.
                    Some(c @ ('}' | '/' | '*' | '?' | '\\')) => Piece::Literal(c),
                    Some(c) => return Err(format!("invalid escape '\\{c}'")),
                    None => return Err("invalid escape '\\' at its end".to_string()),
                },
                c => Piece::Literal(c),
            });
        }
        Ok(Pattern(pieces))
    }

    /// `value` without what matches at its start.
    pub fn trim_start(&self, value: &str, longest: bool) -> Result<String, String> {
        let chars: Vec<char> = value.chars().collect();
        let end = self.end(&chars, longest, &mut 0)?;
        Ok(chars[end.unwrap_or(0)..].iter().collect())
    }

    /// `value` without what matches at its end.
    pub fn trim_end(&self, value: &str, longest: bool) -> Result<String, String> {
        let chars: Vec<char> = value.chars().rev().collect();
        let backwards = Pattern(self.0.iter().rev().copied().collect());
        let end = backwards.end(&chars, longest, &mut 0)?;
        Ok(chars[end.unwrap_or(0)..].iter().rev().collect())
    }

    /// `value` with the first or every longest match replaced.
    pub fn replace(&self, value: &str, replacement: &str, all: bool) -> Result<String, String> {
        let chars: Vec<char> = value.chars().collect();
        let (mut out, mut at, mut steps) = (String::new(), 0, 0);
        if chars.is_empty() && !self.0.is_empty() && self.end(&chars, true, &mut steps)?.is_some() {
            return Ok(replacement.to_string());
        }
        while at < chars.len() {
            match self.end(&chars[at..], true, &mut steps)?.filter(|end| *end > 0) {
                Some(end) => {
                    out.push_str(replacement);
                    at += end;
                    if !all {
                        break;
                    }
                }
                None => {
                    out.push(chars[at]);
                    at += 1;
                }
            }
            if out.len() > limits::EXPANDED_SIZE_BYTES {
                return Err(format!("the outcome is longer than {} bytes", limits::EXPANDED_SIZE_BYTES));
            }
        }
        out.extend(&chars[at..]);
        Ok(out)
    }

    /// Where the shortest or longest match that starts with `chars` ends.
    fn end(&self, chars: &[char], longest: bool, steps: &mut usize) -> Result<Option<usize>, String> {
        let last = self.0.len();
        let mut places = vec![false; last + 1];
        places[0] = true;
        self.over_stars(&mut places);
        let mut found = None;
        for at in 0..=chars.len() {
            if places[last] {
                found = Some(at);
                if !longest {
                    break;
                }
            }
            let Some(c) = chars.get(at) else { break };
            let mut next = vec![false; last + 1];
            for (i, piece) in self.0.iter().enumerate().filter(|(i, _)| places[*i]) {
                // As in upstream's regular expressions, wildcards end with the line.
                match piece {
                    Piece::Literal(wanted) => next[i + 1] |= wanted == c,
                    Piece::One => next[i + 1] |= *c != '\n',
                    Piece::Any => next[i] |= *c != '\n',
                }
            }
            *steps += last + 1;
            if *steps > limits::PATTERN_STEPS {
                return Err("it takes too long to match".to_string());
            }
            self.over_stars(&mut next);
            if !next.contains(&true) {
                break;
            }
            places = next;
        }
        Ok(found)
    }

    /// A star also matches nothing.
    fn over_stars(&self, places: &mut [bool]) {
        for (i, piece) in self.0.iter().enumerate() {
            places[i + 1] |= places[i] && *piece == Piece::Any;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_patterns_end() {
        let pattern = Pattern::parse(&"*a".repeat(200)).unwrap();
        assert_eq!(
            pattern.replace(&"a".repeat(100_000), "", true).unwrap_err(),
            "it takes too long to match"
        );
        let value = "a".repeat(1000) + "b";
        assert_eq!(Pattern::parse("*a*a*a*a*b").unwrap().trim_start(&value, true).unwrap(), "");
    }

    #[test]
    fn edges() {
        let replaced =
            |pattern: &str, value: &str| Pattern::parse(pattern).unwrap().replace(value, "X", true).unwrap();
        assert_eq!(replaced("*", "abc"), "X");
        assert_eq!(replaced("*", ""), "X");
        assert_eq!(replaced("", "abc"), "abc");
        assert_eq!(replaced("?", "añ"), "XX");
        assert_eq!(replaced("*", "a\nb"), "X\nX");
        assert!(Pattern::parse("a\\").is_err());
    }
}
