//! Physical lines to logical ones: parser directives, comments, continuations; heredocs' contents.
//!
//! Upstream counterpart: buildkit `parser/parser.go` and `parser/directives.go`. What stays true: a [`Line`] knows for
//! each of its bytes where it stood in the file.
use super::error::{Error, File, Position, Warning};
use super::heredoc::Opening;
use super::{Heredoc, limits};

/// An instruction with its continuation lines joined.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub text: String,
    /// Where pieces of `text` came from: offset in `text`, place in the file. In order; the first offset is 0.
    pieces: Vec<(usize, Position)>,
    /// Set for text that is not the file's: every offset has this place.
    fixed: bool,
}

impl Line {
    /// Text from elsewhere (an ONBUILD trigger of a base image), for which `at` stands.
    pub fn fixed(text: String, at: Position) -> Line {
        Line { text, pieces: vec![(0, at)], fixed: true }
    }

    /// Where the byte at `offset` stands.
    pub fn position(&self, offset: usize) -> Position {
        let after = self.pieces.partition_point(|(start, _)| *start <= offset);
        let (start, at) = self.pieces[after.saturating_sub(1)];
        if self.fixed {
            return at;
        }
        let chars = self.text.get(start..offset).map_or(0, |t| t.chars().count());
        Position { line: at.line, column: at.column + chars }
    }

    /// Where `word` stands first; the line's start if it is not there as such.
    pub fn find(&self, word: &str) -> Position {
        let start = self.text.len() - self.text.trim_start().len();
        self.position(if word.is_empty() { start } else { self.text.find(word).unwrap_or(start) })
    }
}

/// Goes through a file's lines once.
pub(super) struct Reader<'a> {
    lines: std::str::SplitInclusive<'a, char>,
    /// Of the line read last; 0 before the first.
    pub number: usize,
    pub file: &'a File,
    pub escape: char,
    pub syntax: Option<String>,
    pub check: Option<String>,
    escape_given: bool,
    directives_done: bool,
    pub warnings: Vec<Warning>,
}

impl<'a> Reader<'a> {
    pub fn new(file: &'a File) -> Reader<'a> {
        Reader {
            lines: file.text.split_inclusive('\n'),
            number: 0,
            file,
            escape: '\\',
            syntax: None,
            check: None,
            escape_given: false,
            directives_done: false,
            warnings: Vec::new(),
        }
    }

    fn physical(&mut self) -> Option<&'a str> {
        let line = self.lines.next()?;
        self.number += 1;
        Some(line)
    }

    /// The next logical line, None at the end.
    pub fn logical(&mut self) -> Result<Option<Line>, Error> {
        while let Some(physical) = self.physical() {
            let line = physical.trim_end_matches(['\r', '\n']);
            let stripped = line.trim_start();
            let at =
                Position { line: self.number, column: line.chars().count() - stripped.chars().count() + 1 };
            self.directive(stripped, at)?;
            if stripped.is_empty() || stripped.starts_with('#') {
                continue;
            }
            let (text, ends) = self.continued(stripped);
            let mut line = Line { text: text.to_string(), pieces: vec![(0, at)], fixed: false };
            if !ends {
                self.continuation(&mut line)?;
            }
            if line.text.len() > limits::LINE_SIZE_BYTES {
                let message = format!(
                    "dockerfile line greater than max allowed size of {} bytes",
                    limits::LINE_SIZE_BYTES
                );
                return Err(self.error(at, message));
            }
            if !line.text.trim().is_empty() {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }

    fn continuation(&mut self, line: &mut Line) -> Result<(), Error> {
        let mut empty = None;
        while let Some(physical) = self.physical() {
            let next = physical.trim_end_matches(['\r', '\n']);
            if next.trim_start().starts_with('#') {
                continue;
            }
            if next.trim().is_empty() {
                empty.get_or_insert(self.number);
                continue;
            }
            let (text, ends) = self.continued(next);
            line.pieces.push((line.text.len(), Position { line: self.number, column: 1 }));
            line.text.push_str(text);
            if ends || line.text.len() > limits::LINE_SIZE_BYTES {
                break;
            }
        }
        if let Some(number) = empty.filter(|_| self.warnings.len() < limits::WARNINGS) {
            let at = Some(Position { line: number, column: 1 });
            let message =
                "Empty continuation line (these will become errors in a future release)".to_string();
            self.warnings.push(Warning { at, message });
        }
        Ok(())
    }

    /// `line` without an escape character at its end, and whether it ends there. One that is itself escaped does not
    /// continue, as upstream, which looks one character back only.
    fn continued<'l>(&self, line: &'l str) -> (&'l str, bool) {
        match line.trim_end_matches([' ', '\t']).strip_suffix(self.escape) {
            Some(rest) if !rest.ends_with(self.escape) => (rest, false),
            _ => (line, true),
        }
    }

    /// `# name=value` ahead of everything else.
    fn directive(&mut self, line: &str, at: Position) -> Result<(), Error> {
        if self.directives_done {
            return Ok(());
        }
        let Some((name, value)) = line.strip_prefix('#').and_then(directive) else {
            self.directives_done = true;
            return Ok(());
        };
        let twice = match name.as_str() {
            "syntax" => self.syntax.replace(value.to_string()).is_some(),
            "check" => self.check.replace(value.to_string()).is_some(),
            _ => std::mem::replace(&mut self.escape_given, true),
        };
        if twice {
            return Err(self.error(at, format!("only one {name} parser directive can be used")));
        }
        if name == "escape" {
            self.escape = match value {
                "\\" => '\\',
                "`" => '`',
                _ => {
                    let message = format!("invalid escape token '{value}' does not match ` or \\");
                    return Err(self.error(at, message).expecting("# escape=` or # escape=\\"));
                }
            };
        }
        Ok(())
    }

    /// Reads what `openings` announced, one after the other.
    pub fn heredocs(&mut self, openings: Vec<Opening>, at: Position) -> Result<Vec<Heredoc>, Error> {
        let first_line = at.line;
        let mut read = Vec::with_capacity(openings.len());
        for opening in openings {
            let mut contents = String::new();
            loop {
                let Some(physical) = self.physical() else {
                    let message = "unterminated heredoc";
                    let error = self.file.error(at, (first_line, first_line), message).while_parsing();
                    return Err(error.expecting(format!("a line with nothing but {}", opening.name)));
                };
                let line = physical.trim_end_matches(['\r', '\n']);
                let line = if opening.chomp { line.trim_start_matches('\t') } else { line };
                if line == opening.name {
                    break;
                }
                contents.push_str(physical);
                if contents.len() > limits::HEREDOC_SIZE_BYTES {
                    let max = limits::HEREDOC_SIZE_BYTES;
                    let message = format!("heredoc {} is longer than {max} bytes", opening.name);
                    return Err(self.file.error(at, (first_line, first_line), message).while_parsing());
                }
            }
            let Opening { name, expand, chomp } = opening;
            read.push(Heredoc { name, expand, chomp, contents });
        }
        Ok(read)
    }

    fn error(&self, at: Position, message: String) -> Error {
        self.file.error(at, (at.line, self.number), message).while_parsing()
    }
}

/// `name = value` with a name that is a directive's.
fn directive(comment: &str) -> Option<(String, &str)> {
    let (name, value) = comment.trim_start().split_once('=')?;
    let name = name.trim_end();
    let known = ["syntax", "escape", "check"].iter().any(|k| name.eq_ignore_ascii_case(k));
    let value = value.trim();
    (known && !value.is_empty()).then(|| (name.to_ascii_lowercase(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        let file = File { name: "Dockerfile".into(), text: text.into() };
        let mut reader = Reader::new(&file);
        let mut out = Vec::new();
        loop {
            match reader.logical() {
                Ok(Some(line)) => out.push(line.text),
                Ok(None) => break,
                Err(error) => {
                    out.push(format!("{} {}", error.at(), error.message()));
                    break;
                }
            }
        }
        out.extend(reader.warnings.iter().map(|w| format!("warning {}: {}", w.at.unwrap(), w.message)));
        out
    }

    #[test]
    fn continuations_comments_and_directives() {
        let empty = "warning 2:1: Empty continuation line (these will become errors in a future release)";
        for (text, wanted) in [
            ("FROM a\n\n  # c\n  RUN b\n", vec!["FROM a", "RUN b"]),
            ("RUN a \\\n  b\\\nc\n", vec!["RUN a   bc"]),
            ("RUN a \\ \t\n b\n", vec!["RUN a  b"]),
            ("RUN a \\\r\n b\r\n", vec!["RUN a  b"]),
            ("RUN a \\\n# c \\\n b\n", vec!["RUN a  b"]),
            ("RUN a \\\n\n b\n", vec!["RUN a  b", empty]),
            ("RUN a \\\\\nRUN b", vec!["RUN a \\\\", "RUN b"]),
            ("\\\nRUN b \\", vec!["RUN b "]),
            ("\\\n", vec![]),
            ("# escape=`\nRUN a `\n b \\\n", vec!["RUN a  b \\"]),
            ("#Escape = ` \nRUN a `\n b", vec!["RUN a  b"]),
            ("# a comment\n# escape=`\nRUN a `\n", vec!["RUN a `"]),
            ("\n# escape=`\nRUN a `\n", vec!["RUN a `"]),
            ("# syntax=docker/dockerfile:1\n# escape=`\nRUN a `\nb", vec!["RUN a b"]),
            ("# unknown=1\n# escape=`\nRUN a `\n", vec!["RUN a `"]),
            (
                "# escape=x\n",
                vec!["1:1 dockerfile parse error on line 1: invalid escape token 'x' does not match ` or \\"],
            ),
            (
                "# escape=`\n # escape=\\\n",
                vec!["2:2 dockerfile parse error on line 2: only one escape parser directive can be used"],
            ),
        ] {
            assert_eq!(lines(text), wanted, "{text:?}");
        }
        let long = format!("RUN {}", "x".repeat(limits::LINE_SIZE_BYTES));
        assert!(
            lines(&long)[0].starts_with("1:1 dockerfile parse error on line 1: dockerfile line greater than")
        );
    }

    #[test]
    fn offsets_lead_back_to_the_file() {
        let file = File { name: "Dockerfile".into(), text: "#\n\n  RUN é \\\n\n\t# c\n\t  b c\n".into() };
        let line = Reader::new(&file).logical().unwrap().unwrap();
        assert_eq!(line.text, "RUN é \t  b c");
        for (word, at) in [("RUN", "3:3"), ("é", "3:7"), ("b", "6:4"), ("c", "6:6"), ("absent", "3:3")] {
            assert_eq!(line.find(word).to_string(), at, "{word}");
        }
    }
}
