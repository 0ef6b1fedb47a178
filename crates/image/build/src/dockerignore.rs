//! `.dockerignore`, and the patterns of `COPY --exclude`.
//!
//! Upstream counterparts: moby/patternmatcher and its `ignorefile`: Go's `filepath.Match` with `**`, `!` exceptions, the
//! last pattern that matches a path or one of its parents decides. Matching walks all places of a pattern at once, so
//! its cost is path times pattern whatever the pattern is. Deliberate difference: a range like `[z-a]` is refused when
//! the file is read, not when it is first used.

/// Bounds of a file; Docker has none.
pub const FILE_SIZE_BYTES: usize = 1 << 20;
pub const PATTERNS: usize = 10_000;
pub const PATTERN_CHARS: usize = 4_096;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IgnoreError {
    #[error("line {line}: syntax error in pattern: {pattern:?}: {why}")]
    Pattern { line: usize, pattern: String, why: &'static str },
    #[error("line {line}: illegal exclusion pattern: \"!\"")]
    Exclamation { line: usize },
    #[error("longer than {FILE_SIZE_BYTES} bytes")]
    Size,
    #[error("more than {PATTERNS} patterns")]
    Patterns,
}

/// What of a build context, or of a source, is not wanted.
#[derive(Clone, Debug, Default)]
pub struct Ignore(Vec<Pattern>);

#[derive(Clone, Debug)]
struct Pattern {
    exception: bool,
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Literal(char),
    /// `?`
    One,
    /// `*`
    Star,
    /// `**` at an end
    Any,
    /// `**/`: nothing, or whole folders; followed by [`Piece::Inside`].
    Folders,
    /// Within what `**/` matches, up to a slash.
    Inside,
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
}

/// Reads a file's patterns.
pub fn parse(text: &str) -> Result<Ignore, IgnoreError> {
    if text.len() > FILE_SIZE_BYTES {
        return Err(IgnoreError::Size);
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with('#'));
    collect(lines.map(|(i, line)| (i + 1, line)))
}

fn collect<'a>(lines: impl Iterator<Item = (usize, &'a str)>) -> Result<Ignore, IgnoreError> {
    let mut patterns = Vec::new();
    for (line, text) in lines {
        let text = text.trim();
        if text.is_empty() {
            continue;
        }
        if patterns.len() == PATTERNS {
            return Err(IgnoreError::Patterns);
        }
        let (exception, given) = match text.strip_prefix('!') {
            Some("") => return Err(IgnoreError::Exclamation { line }),
            Some(rest) => (true, rest.trim()),
            None => (false, text),
        };
        let cleaned = clean(given);
        let pattern = cleaned.strip_prefix('/').filter(|p| !p.is_empty()).unwrap_or(&cleaned);
        let bad = |why| IgnoreError::Pattern { line, pattern: text.chars().take(200).collect(), why };
        patterns.push(Pattern { exception, pieces: pieces(pattern).map_err(bad)? });
    }
    Ok(Ignore(patterns))
}

impl Ignore {
    /// From patterns given one by one, as `--exclude` takes them.
    pub fn from_patterns(patterns: &[String]) -> Result<Ignore, IgnoreError> {
        collect(patterns.iter().enumerate().map(|(i, pattern)| (i + 1, pattern.as_str())))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `path` (with slashes, relative to the context's root) is left out. A file of a folder that is left out
    /// is too, unless an exception takes it in.
    pub fn excluded(&self, path: &str) -> bool {
        self.deciding(path).is_some_and(|(_, pattern)| !pattern.exception)
    }

    /// Whether something below the folder `folder` may be wanted, so that it has to be walked even if it is itself
    /// left out.
    pub fn descend(&self, folder: &str) -> bool {
        let Some((at, _)) = self.deciding(folder).filter(|(_, pattern)| !pattern.exception) else {
            return true;
        };
        let below: Vec<char> = relative(folder).into_iter().chain(['/']).collect();
        // Only an exception after the deciding pattern can take anything in again.
        self.0[at + 1..].iter().any(|pattern| pattern.exception && pattern.walk(&below).contains(&true))
    }

    /// The last pattern that matches the path or one of its parents.
    fn deciding(&self, path: &str) -> Option<(usize, &Pattern)> {
        let path = relative(path);
        if path.is_empty() || path == ['.'] {
            return None;
        }
        let ends = |i: usize| i == path.len() || path[i] == '/';
        let prefixes: Vec<&[char]> = (1..=path.len()).filter(|i| ends(*i)).map(|i| &path[..i]).collect();
        let matches = |pattern: &Pattern| prefixes.iter().any(|prefix| pattern.matches(prefix));
        self.0.iter().enumerate().rev().find(|(_, pattern)| matches(pattern))
    }
}

impl Pattern {
    fn matches(&self, path: &[char]) -> bool {
        // Most patterns begin with a name.
        if let (Some(Piece::Literal(first)), Some(c)) = (self.pieces.first(), path.first())
            && first != c
        {
            return false;
        }
        self.walk(path).last() == Some(&true)
    }

    /// The places in the pattern where one may be after `text`; the last is its end. All false: no match goes on.
    fn walk(&self, text: &[char]) -> Vec<bool> {
        let mut places = vec![false; self.pieces.len() + 1];
        places[0] = true;
        self.skip(&mut places);
        let mut next = vec![false; places.len()];
        for c in text {
            next.fill(false);
            for (i, piece) in self.pieces.iter().enumerate().filter(|(i, _)| places[*i]) {
                match piece {
                    Piece::Literal(wanted) => next[i + 1] |= wanted == c,
                    Piece::One => next[i + 1] |= *c != '/',
                    Piece::Star => next[i] |= *c != '/',
                    Piece::Any => next[i] = true,
                    Piece::Folders => {}
                    Piece::Inside => {
                        next[i] = true;
                        next[i + 1] |= *c == '/';
                    }
                    Piece::Class { negated, ranges } => {
                        next[i + 1] |= ranges.iter().any(|(low, high)| (low..=high).contains(&c)) != *negated;
                    }
                }
            }
            self.skip(&mut next);
            std::mem::swap(&mut places, &mut next);
            if !places.contains(&true) {
                break;
            }
        }
        places
    }

    /// Over what may match nothing.
    fn skip(&self, places: &mut [bool]) {
        for (i, piece) in self.pieces.iter().enumerate() {
            if !places[i] {
                continue;
            }
            match piece {
                Piece::Star | Piece::Any => places[i + 1] = true,
                Piece::Folders => places[i + 1..=i + 2].fill(true),
                _ => {}
            }
        }
    }
}

fn pieces(pattern: &str) -> Result<Vec<Piece>, &'static str> {
    if pattern.chars().count() > PATTERN_CHARS {
        return Err("it is too long");
    }
    // As upstream, `**name` is any path that ends so, while `**na*` is a name in any folder.
    if let Some(rest) = pattern.strip_prefix("**")
        && !rest.starts_with('/')
        && !rest.contains(['*', '?', '[', ']', '\\'])
    {
        return Ok(std::iter::once(Piece::Any).chain(rest.chars().map(Piece::Literal)).collect());
    }
    let mut pieces = Vec::new();
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        let piece = match c {
            '*' if chars.next_if_eq(&'*').is_some() => {
                chars.next_if_eq(&'/');
                if chars.peek().is_some() {
                    pieces.push(Piece::Folders);
                    Piece::Inside
                } else {
                    Piece::Any
                }
            }
            '*' => Piece::Star,
            '?' => Piece::One,
            '\\' => Piece::Literal(chars.next().ok_or("it ends with an escape character")?),
            '[' => class(&mut chars)?,
            c => Piece::Literal(c),
        };
        pieces.push(piece);
    }
    Ok(pieces)
}

/// After `[`.
fn class(chars: &mut std::iter::Peekable<std::str::Chars>) -> Result<Piece, &'static str> {
    let negated = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    let one = |chars: &mut std::iter::Peekable<std::str::Chars>| match chars.next() {
        Some('\\') => chars.next().ok_or("it ends with an escape character"),
        Some('-') => Err("a range without its start"),
        Some(']') => Err("an empty range"),
        Some(c) => Ok(c),
        None => Err("[ without ]"),
    };
    loop {
        if !ranges.is_empty() && chars.next_if_eq(&']').is_some() {
            return Ok(Piece::Class { negated, ranges });
        }
        let low = one(chars)?;
        let high = if chars.next_if_eq(&'-').is_some() { one(chars)? } else { low };
        if high < low {
            return Err("a range that ends before it starts");
        }
        ranges.push((low, high));
    }
}

/// A path as patterns see it: clean, without a slash ahead.
fn relative(path: &str) -> Vec<char> {
    let path = clean(path);
    path.strip_prefix('/').unwrap_or(&path).chars().collect()
}

/// The shortest path that means the same, as Go's `path.Clean`.
pub(crate) fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    match (rooted, parts.is_empty()) {
        (true, _) => format!("/{}", parts.join("/")),
        (false, true) => ".".to_string(),
        (false, false) => parts.join("/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_mobys() {
        for (pattern, path, wanted) in [
            ("**", "dir/file", true),
            ("**/", "file", true),
            ("**/**", "dir/file", true),
            ("dir/**", "dir/dir2/file", true),
            ("dir/**", "dir", false),
            ("**/dir", "dir/file", true),
            ("**/dir2/*", "dir/dir2/file", true),
            ("**/dir2/**", "dir/dir2/dir3/file", true),
            ("**file", "dir/afile", true),
            ("**/file", "dir/dir/file", true),
            ("**/file", "dir/afile", false),
            ("**/file*txt", "dir/dir/file.txt", true),
            ("**/**/*.txt", "file.txt", true),
            ("**/**/*.txt2", "dir/dir/file.txt", false),
            ("a**/*.txt", "a/dir/dir/file.txt", true),
            ("a/*.txt", "a/dir/file.txt", false),
            ("a/*.txt**", "a/file.txt", true),
            ("a[b-d]e", "ace", true),
            ("a[b-d]e", "ae", false),
            ("a[^b-d]e", "aze", true),
            ("a[\\]x]b", "a]b", true),
            (".*", ".foo", true),
            (".*", "foo", false),
            ("abc.def", "abcZdef", false),
            ("abc?def", "abcZdef", true),
            ("a\\\\", "a\\", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "ab", false),
            ("a(b)c/def", "a(b)c/def", true),
            ("a.|)$(}+{bc", "a.|)$(}+{bc", true),
            ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", false),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a?b", "a☺b", true),
            ("a?b", "a/b", false),
            ("a*", "ab/c", true),
            ("/a/b", "a/b", true),
            ("a/../b/", "b/c", true),
            ("./node_modules", "node_modules/x/y", true),
            ("a", "./a/", true),
            ("*", ".", false),
            ("  a  ", "a", true),
            ("#a", "#a", false),
            (" #a", "#a", true),
        ] {
            let ignore = parse(pattern).unwrap();
            assert_eq!(ignore.excluded(path), wanted, "{pattern} on {path}");
        }
    }

    #[test]
    fn the_last_match_decides_and_exceptions_open_folders() {
        let text = "\u{feff}# all but these\n**\n!src\n!docs/*.md\n\n! keep/a/b\r\nsrc/*.tmp\n";
        let ignore = parse(text).unwrap();
        for (path, wanted) in [
            ("src/main.rs", false),
            ("src/a.tmp", true),
            ("src/a.tmp/x", true),
            ("docs/a.md", false),
            ("docs/a/a.md", true),
            ("keep/a/b/c", false),
            ("keep/a/c", true),
            ("other", true),
        ] {
            assert_eq!(ignore.excluded(path), wanted, "{path}");
        }
        for (folder, wanted) in [
            (".", true),
            ("src", true),
            ("src/a.tmp", false),
            ("docs", true),
            ("docs/a", false),
            ("keep", true),
            ("keep/a", true),
            ("keep/b", false),
            ("other", false),
            ("/keep/a/", true),
        ] {
            assert_eq!(ignore.descend(folder), wanted, "{folder}");
        }
        let anywhere = Ignore::from_patterns(&["a".into(), "!**/x".into(), "a/b".into()]).unwrap();
        assert!(anywhere.descend("a") && anywhere.descend("a/c/d") && !anywhere.descend("a/b"));
    }

    #[test]
    fn malformed_patterns_name_their_line() {
        for (text, wanted) in [
            ("a\n!\n", "line 2: illegal exclusion pattern: \"!\""),
            ("[", "line 1: syntax error in pattern: \"[\": [ without ]"),
            ("\n\na[]b", "line 3: syntax error in pattern: \"a[]b\": an empty range"),
            ("[-x]", "line 1: syntax error in pattern: \"[-x]\": a range without its start"),
            ("[z-a]", "line 1: syntax error in pattern: \"[z-a]\": a range that ends before it starts"),
            ("a\\", "line 1: syntax error in pattern: \"a\\\\\": it ends with an escape character"),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), wanted);
        }
        assert_eq!(parse(&"a\n".repeat(PATTERNS + 1)).unwrap_err(), IgnoreError::Patterns);
        assert_eq!(parse(&" ".repeat(FILE_SIZE_BYTES + 1)).unwrap_err(), IgnoreError::Size);
    }

    #[test]
    fn paths_are_cleaned() {
        for (path, wanted) in [
            ("", "."),
            ("a//b/./c/..", "a/b"),
            ("/../a", "/a"),
            ("../a/..", ".."),
            ("a/../..", ".."),
            ("/", "/"),
        ] {
            assert_eq!(clean(path), wanted, "{path}");
        }
    }
}
