//! JSON laid out as Go's encoding/json does: scripts compare docker's output byte by byte.
//!
//! Upstream counterpart: Go's `json.Indent` and `json.MarshalIndent`. The text given is kept as it is written (order of
//! keys, spelling of numbers), only the space between changes.

/// `json.Indent`: the text is known to be JSON.
pub fn indent(raw: &str, unit: &str) -> String {
    let trimmed = raw.trim_end_matches([' ', '\t', '\r', '\n']);
    let mut out = lay_out(trimmed, unit, false);
    // Go keeps the space at the end.
    out.push_str(&raw[trimmed.len()..]);
    out
}

/// `json.MarshalIndent`: as above, and what HTML knows is escaped.
pub fn marshal_indent(raw: &str, unit: &str) -> String {
    lay_out(raw.trim_end(), unit, true)
}

fn lay_out(raw: &str, unit: &str, escape: bool) -> String {
    let mut out = String::with_capacity(raw.len() * 2);
    let (mut depth, mut in_string, mut escaped, mut just_opened) = (0usize, false, false, false);
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        (0..depth).for_each(|_| out.push_str(unit));
    };
    for c in raw.chars() {
        if in_string {
            match c {
                '<' | '>' | '&' | '\u{2028}' | '\u{2029}' if escape => {
                    out.push_str(&format!("\\u{:04x}", u32::from(c)));
                }
                _ => out.push(c),
            }
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
            continue;
        }
        if matches!(c, ' ' | '\t' | '\r' | '\n') {
            continue;
        }
        if just_opened && !matches!(c, '}' | ']') {
            depth += 1;
            line(&mut out, depth);
        }
        let empty = std::mem::replace(&mut just_opened, matches!(c, '{' | '['));
        match c {
            '}' | ']' if !empty => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            _ => out.push(c),
        }
        in_string = c == '"';
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_laid_out_as_go_does() {
        let raw = "{\"b\":[1.50, {}],\"a\" : \"x<\\\"y\\\\\", \"e\":[ ]}\n";
        let wanted = "{\n\t\"b\": [\n\t\t1.50,\n\t\t{}\n\t],\n\t\"a\": \"x<\\\"y\\\\\",\n\t\"e\": []\n}\n";
        assert_eq!(indent(raw, "\t"), wanted);
        assert_eq!(marshal_indent(raw, "\t"), wanted.trim_end().replace('<', "\\u003c"));
    }
}
