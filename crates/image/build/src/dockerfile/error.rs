//! What is wrong in a Dockerfile, where, and the lines around it.
//!
//! Upstream counterparts: buildkit `parser/errors.go`, `solver/errdefs/source.go` (the excerpt) and `util/suggest`.
//! What stays true: text from the file never reaches a terminal with control characters in it. Deliberate differences: a
//! column and a caret below it; two swapped letters are one slip, not two.
use std::fmt;

/// Lines of an excerpt on either side of the wrong one.
const EXCERPT_LINES: usize = 4;
const EXCERPT_COLUMNS: usize = 200;
/// What messages quote of the file at most.
const MESSAGE_CHARS: usize = 2_000;
/// How many edits away a suggestion may be, as upstream.
const SUGGESTION_DISTANCE: usize = 2;

/// Line and column, both counted from one, columns in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Something odd that does not stop the build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// None when it concerns no line, such as build arguments that nothing takes.
    pub at: Option<Position>,
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.at {
            Some(at) => write!(f, "[Warning] line {}: {}", at.line, printable(&self.message)),
            None => write!(f, "[Warning] {}", printable(&self.message)),
        }
    }
}

/// A Dockerfile that cannot be built; shown with an excerpt.
#[derive(Clone, Debug)]
pub struct Error(Box<Report>);

#[derive(Clone, Debug)]
struct Report {
    file: String,
    at: Position,
    parsing: bool,
    message: String,
    expected: Option<String>,
    /// Number, whether it belongs to the instruction, text.
    excerpt: Vec<(usize, bool, String)>,
}

impl Error {
    /// Without place and excerpt.
    pub fn message(&self) -> String {
        match self.0.parsing {
            // As Docker says it of what its parser refuses.
            true => format!("dockerfile parse error on line {}: {}", self.0.at.line, self.0.message),
            false => self.0.message.clone(),
        }
    }

    /// Line 0 when it concerns no line, such as a target that does not exist.
    pub fn at(&self) -> Position {
        self.0.at
    }

    /// Says what would have been right there.
    pub(super) fn expecting(mut self, expected: impl Into<String>) -> Error {
        self.0.expected = Some(expected.into());
        self
    }

    /// Says that the text was refused, rather than what it asks for.
    pub(super) fn while_parsing(mut self) -> Error {
        self.0.parsing = true;
        self
    }

    /// The message alone, to be put into another.
    pub(super) fn bare_message(&self) -> &str {
        &self.0.message
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let report = &*self.0;
        let message: String = self.message().chars().take(MESSAGE_CHARS).collect();
        let file = printable(&report.file);
        match report.at.line {
            0 => write!(f, "{file}: {}", printable(&message))?,
            _ => write!(f, "{file}:{}: {}", report.at, printable(&message))?,
        }
        if report.excerpt.is_empty() {
            return Ok(());
        }
        write!(f, "\n--------------------")?;
        for (number, ours, text) in &report.excerpt {
            let mark = if *ours { ">>>" } else { "   " };
            let shown: String = text.chars().take(EXCERPT_COLUMNS).collect();
            write!(f, "\n {number:>3} | {mark} {}", printable(&shown))?;
            if *number == report.at.line && report.at.column <= EXCERPT_COLUMNS + 1 {
                let before = text.chars().take(report.at.column - 1);
                let indent: String = before.map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
                write!(f, "\n     |     {indent}^")?;
            }
        }
        write!(f, "\n--------------------")?;
        match &report.expected {
            Some(expected) => write!(f, "\nexpected: {}", printable(expected)),
            None => Ok(()),
        }
    }
}

/// Control characters other than tabs as U+FFFD; new lines in a message as spaces.
fn printable(text: &str) -> String {
    let one = |c: char| match c {
        '\t' => '\t',
        '\n' => ' ',
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.trim_end_matches(['\r', '\n']).chars().map(one).collect()
}

/// The text that places refer to.
#[derive(Debug)]
pub(super) struct File {
    pub name: String,
    pub text: String,
}

impl File {
    /// An error at `at` in the instruction on `lines` (first and last).
    pub fn error(&self, at: Position, lines: (usize, usize), message: impl fmt::Display) -> Error {
        let (start, end) = (lines.0.min(at.line), lines.1.max(at.line));
        // As BuildKit: a one-line instruction is shown among four others, a longer one among two.
        let around = if start == end { 2 } else { 1 };
        let first = start.saturating_sub(around).max(at.line.saturating_sub(EXCERPT_LINES)).max(1);
        let last = (end + around).min(at.line + EXCERPT_LINES);
        let excerpt = self.text.lines().enumerate().skip(first - 1).take(last + 1 - first);
        let excerpt = excerpt.map(|(i, text)| (i + 1, (start..=end).contains(&(i + 1)), text.to_string()));
        Error(Box::new(Report {
            file: self.name.clone(),
            at,
            parsing: false,
            message: message.to_string(),
            expected: None,
            excerpt: excerpt.collect(),
        }))
    }

    /// An error that concerns no line.
    pub fn error_of_all(&self, message: impl fmt::Display) -> Error {
        let (file, message) = (self.name.clone(), message.to_string());
        let at = Position { line: 0, column: 0 };
        Error(Box::new(Report { file, at, parsing: false, message, expected: None, excerpt: Vec::new() }))
    }
}

/// `message (did you mean X?)` when one of `options` is close to `given`.
pub(super) fn suggest<'a>(
    message: String,
    given: &str,
    options: impl IntoIterator<Item = &'a str>,
) -> String {
    match similar(given, options) {
        Some(option) => format!("{message} (did you mean {option}?)"),
        None => message,
    }
}

pub(super) fn similar<'a>(given: &str, options: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Nothing long is a slip of one or two keys of something short; this also bounds the comparison.
    let length = given.len();
    let near = |option: &&str| {
        (1..256).contains(&length) && length.abs_diff(option.len()) <= 4 * SUGGESTION_DISTANCE
    };
    let options = options.into_iter().filter(near).map(|option| (distance(given, option), option));
    options.filter(|(d, _)| (1..=SUGGESTION_DISTANCE).contains(d)).min_by_key(|(d, _)| *d).map(|(_, o)| o)
}

/// Edits between two words in characters: one more, one less, another, or two neighbours swapped.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let above = &rows[i - 1];
            let mut least =
                (above[j - 1] + usize::from(a[i - 1] != b[j - 1])).min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_excerpt_shows_the_place() {
        let text = "FROM alpine\n\tRUNN \u{1b}[2Jx\nCMD sh\n";
        let file = File { name: "Dockerfile".into(), text: text.into() };
        let error = file.error(Position { line: 2, column: 2 }, (2, 2), "unknown instruction: RUNN");
        let wanted = "Dockerfile:2:2: unknown instruction: RUNN\n--------------------\n   1 |     FROM alpine\n   2 | >>> \
            \tRUNN \u{fffd}[2Jx\n     |     \t^\n   3 |     CMD sh\n--------------------";
        assert_eq!(error.to_string(), wanted);
        let error = error.while_parsing().expecting("RUN");
        assert!(error.to_string().ends_with("--------------------\nexpected: RUN"), "{error}");
        assert_eq!(error.message(), "dockerfile parse error on line 2: unknown instruction: RUNN");
    }

    #[test]
    fn slips_are_recognised() {
        for (given, wanted) in [
            ("RUNN", Some("RUN")),
            ("COYP", Some("COPY")),
            ("RUN", None),
            ("BANANA", None),
            ("CPY", Some("COPY")),
        ] {
            assert_eq!(similar(given, ["ENV", "RUN", "COPY", "CMD"]), wanted, "{given}");
        }
    }
}
