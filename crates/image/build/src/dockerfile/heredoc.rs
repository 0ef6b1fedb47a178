//! `<<EOF` in a line.
//!
//! Upstream counterpart: `ParseHeredoc` and its surroundings in buildkit `parser/parser.go`. As there, the word that
//! ends a heredoc is read with the shell's quoting whatever the file's escape character is.
use super::expand::Lexer;
use super::{CommandLine, Heredoc, Run, Script};

/// `<<EOF`, `<<-EOF`, `<<"EOF"`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    pub name: String,
    pub expand: bool,
    pub chomp: bool,
}

/// A heredoc as the whole word `word`; None if it is anything else.
pub(super) fn opening(word: &str) -> Option<Opening> {
    // A file descriptor may stand before; like upstream, nothing depends on which.
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (chomp, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let rest = rest.trim_start();
    if rest.is_empty() || rest.contains('<') {
        return None;
    }
    let lookup = |_: &str| None;
    let lexer = Lexer { skip_unset: true, ..Lexer::new('\\', &lookup) };
    let [name] = &lexer.expand(rest).ok()?.words[..] else { return None };
    let raw = Lexer { raw_quotes: true, ..lexer };
    let [quoted] = &raw.expand(rest).ok()?.words[..] else { return None };
    let quotes = |text: &str| text.matches(['\'', '"']).count();
    Some(Opening { name: name.clone(), expand: quotes(name) == quotes(quoted), chomp })
}

/// All heredocs that a line opens, in order.
pub(super) fn openings(line: &str) -> Vec<Opening> {
    if !line.contains("<<") {
        return Vec::new();
    }
    let lookup = |_: &str| None;
    let lexer = Lexer { raw_quotes: true, raw_escapes: true, skip_unset: true, ..Lexer::new('\\', &lookup) };
    // A line that is no shell (a lone quote) opens none.
    let words = lexer.expand(line).map(|e| e.words).unwrap_or_default();
    words.iter().filter_map(|word| opening(word)).collect()
}

impl Heredoc {
    /// The contents, for `<<-` without the leading tabs of its lines.
    pub fn text(&self) -> String {
        if !self.chomp {
            return self.contents.clone();
        }
        self.contents.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
    }
}

impl Run {
    /// What is executed: a line that is nothing but a heredoc is its contents; otherwise the shell reads the heredocs
    /// itself.
    pub fn script(&self) -> Script {
        let line = match &self.command {
            CommandLine::Exec(words) => return Script::Exec(words.clone()),
            CommandLine::Shell(line) => line,
        };
        let Some(first) = self.heredocs.first() else { return Script::Shell(line.clone()) };
        if opening(line).is_some() {
            let contents = first.text();
            return match contents.starts_with("#!") {
                true => Script::File { name: first.name.clone(), contents },
                false => Script::Shell(contents),
            };
        }
        let mut script = line.clone();
        for heredoc in &self.heredocs {
            script.push('\n');
            script.push_str(&heredoc.contents);
            script.push_str(&heredoc.name);
        }
        Script::Shell(script)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heredocs_are_recognised() {
        let one = |name: &str, expand, chomp| Opening { name: name.into(), expand, chomp };
        for (line, wanted) in [
            ("RUN <<EOF", vec![one("EOF", true, false)]),
            ("RUN << EOF", vec![one("EOF", true, false)]),
            ("RUN <<-EOF", vec![one("EOF", true, true)]),
            ("RUN <<'EOF' cat", vec![one("EOF", false, false)]),
            ("RUN <<\"E OF\"", vec![one("E OF", false, false)]),
            ("RUN 3<<EOF cat /dev/fd/3", vec![one("EOF", true, false)]),
            ("COPY <<a.txt <<\"b.txt\" /d/", vec![one("a.txt", true, false), one("b.txt", false, false)]),
            ("RUN cat <<$A", vec![one("$A", true, false)]),
            ("RUN echo '<<EOF'", vec![]),
            ("RUN echo \\<<EOF", vec![]),
            ("RUN cat <<<word", vec![]),
            ("RUN a<<EOF", vec![]),
            ("RUN echo $((1<<2))", vec![]),
            ("RUN echo it's <<EOF", vec![]),
            ("RUN x <", vec![]),
        ] {
            assert_eq!(openings(line), wanted, "{line}");
        }
    }

    #[test]
    fn scripts_of_heredocs() {
        let heredoc = |chomp, contents: &str| Heredoc {
            name: "E".into(),
            expand: true,
            chomp,
            contents: contents.into(),
        };
        let run = |line: &str, heredoc| Run {
            command: CommandLine::Shell(line.into()),
            heredocs: vec![heredoc],
            mounts: vec![],
            network: Default::default(),
            security: Default::default(),
            mount_flags: vec![],
        };
        assert_eq!(run("<<E", heredoc(false, "a\n\tb\n")).script(), Script::Shell("a\n\tb\n".into()));
        assert_eq!(run("<<-E", heredoc(true, "\ta\n\t\tb\n")).script(), Script::Shell("a\nb\n".into()));
        let file = Script::File { name: "E".into(), contents: "#!/usr/bin/python\nprint(1)\n".into() };
        assert_eq!(run("<<E", heredoc(false, "#!/usr/bin/python\nprint(1)\n")).script(), file);
        assert_eq!(run("cat <<E", heredoc(false, "a\n")).script(), Script::Shell("cat <<E\na\nE".into()));
    }
}
