//! `$(NAME)` in commands, arguments, environment variables and subPathExpr.
//!
//! Upstream counterpart: third_party/forked/golang/expansion. `$$` is a dollar sign; what names nothing stays.

/// Expands `text` by `lookup`; names that it does not know are added to `missing`.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>, missing: &mut Vec<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match rest.as_bytes().first() {
            Some(b'$') => {
                out.push('$');
                rest = &rest[1..];
            }
            Some(b'(') => match rest.find(')') {
                Some(end) => {
                    let name = &rest[1..end];
                    match lookup(name) {
                        Some(value) => out.push_str(&value),
                        None => {
                            missing.push(name.to_string());
                            out.push_str(&format!("$({name})"));
                        }
                    }
                    rest = &rest[end + 1..];
                }
                None => out.push('$'),
            },
            _ => out.push('$'),
        }
    }
    out.push_str(rest);
    out
}

/// Expands by a list of variables; the last of a name counts.
pub fn expand_env(text: &str, env: &[(String, String)]) -> String {
    let lookup = |name: &str| env.iter().rev().find(|(n, _)| n == name).map(|(_, v)| v.clone());
    expand(text, lookup, &mut Vec::new())
}

#[cfg(test)]
mod tests {
    #[test]
    fn dollar_signs() {
        let env = vec![("A".to_string(), "1".to_string()), ("B".to_string(), "$(A)".to_string())];
        for (text, want) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$(B)", "$(A)"),
            ("$$(A)", "$(A)"),
            ("$(C)", "$(C)"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
            ("$$$(A)", "$1"),
            ("é$(A)", "é1"),
        ] {
            assert_eq!(super::expand_env(text, &env), want, "{text}");
        }
    }
}
