//! Words of a command line: a string split as a shell does, and arguments quoted for one.

/// Splits `text` at blanks, with single and double quotes and backslashes as in a shell; nothing is expanded.
pub fn split(text: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut inside) = (Vec::new(), String::new(), false);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\'' => loop {
                inside = true;
                match chars.next() {
                    Some('\'') => break,
                    Some(c) => word.push(c),
                    None => return Err(format!("{text}: a ' is not closed")),
                }
            },
            '"' => loop {
                inside = true;
                match chars.next() {
                    Some('"') => break,
                    Some('\\') => word.extend(chars.next()),
                    Some(c) => word.push(c),
                    None => return Err(format!("{text}: a \" is not closed")),
                }
            },
            '\\' => {
                inside = true;
                word.extend(chars.next());
            }
            c if c.is_whitespace() => {
                if inside {
                    words.push(std::mem::take(&mut word));
                }
                inside = false;
            }
            c => {
                inside = true;
                word.push(c);
            }
        }
    }
    if inside {
        words.push(word);
    }
    Ok(words)
}

/// One word for a POSIX shell.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

pub fn quote_all<S: AsRef<str>>(words: &[S]) -> String {
    words.iter().map(|w| quote(w.as_ref())).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_as_a_shell_does() {
        for (text, want) in [
            ("", &[][..]),
            ("  a  b ", &["a", "b"]),
            ("--x='a b' c", &["--x=a b", "c"]),
            (r#"--x "a \"b" '' \'"#, &["--x", "a \"b", "", "'"]),
            ("--node-taint key=value:NoExecute", &["--node-taint", "key=value:NoExecute"]),
        ] {
            assert_eq!(split(text).unwrap(), want, "{text}");
        }
        assert!(split("'a").is_err() && split("\"a").is_err());
    }

    #[test]
    fn quotes_survive_splitting() {
        for word in ["", "a", "a b", "it's", "$HOME", "a\"b", "--x=1"] {
            assert_eq!(split(&quote(word)).unwrap(), [word], "{word}");
        }
        assert_eq!(quote_all(&["a", "b c"]), "a 'b c'");
    }
}
