//! Label and field selectors.
//!
//! Upstream counterparts: k8s.io/apimachinery/pkg/labels/selector.go, k8s.io/apimachinery/pkg/fields/selector.go.
use sampan_kinds::field::go_quote;
use sampan_kinds::names;

use crate::status::{Result, Status};

/// One requirement on a label.
#[derive(Clone, Debug, PartialEq)]
enum Requirement {
    Exists(String),
    Absent(String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Greater(String, i64),
    Less(String, i64),
}

/// A label selector; the empty one selects everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelSelector(Vec<Requirement>);

impl LabelSelector {
    pub fn parse(text: &str) -> Result<Self> {
        let mut lexer = Lexer { rest: text };
        let mut requirements = Vec::new();
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        loop {
            requirements.push(
                lexer
                    .requirement()
                    .map_err(|e| Status::bad_request(format!("unable to parse requirement: {e}")))?,
            );
            match lexer.next() {
                Token::Comma if lexer.peek() != Token::End => {}
                Token::End => return Ok(Self(requirements)),
                other => {
                    let found = other.text();
                    return Err(Status::bad_request(format!(
                        "found '{found}', expected: ',' or 'end of string'"
                    )));
                }
            }
        }
    }

    /// From a `LabelSelector` object (`matchLabels`, `matchExpressions`); None selects nothing.
    pub fn from_object(selector: &serde_json::Value) -> Option<Self> {
        let mut requirements = Vec::new();
        for (key, value) in selector.get("matchLabels").and_then(|m| m.as_object()).into_iter().flatten() {
            requirements.push(Requirement::In(key.clone(), vec![value.as_str()?.to_string()]));
        }
        for expression in selector.get("matchExpressions").and_then(|e| e.as_array()).into_iter().flatten() {
            let key = expression.get("key")?.as_str()?.to_string();
            let values = expression.get("values").and_then(|v| v.as_array()).into_iter().flatten();
            let values = values.filter_map(|v| v.as_str().map(str::to_string)).collect();
            requirements.push(match expression.get("operator")?.as_str()? {
                "In" => Requirement::In(key, values),
                "NotIn" => Requirement::NotIn(key, values),
                "Exists" => Requirement::Exists(key),
                "DoesNotExist" => Requirement::Absent(key),
                _ => return None,
            });
        }
        Some(Self(requirements))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `label` answers a key with its value.
    pub fn matches<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::Exists(key) => label(key).is_some(),
            Requirement::Absent(key) => label(key).is_none(),
            Requirement::In(key, values) => label(key).is_some_and(|v| values.iter().any(|w| w == v)),
            Requirement::NotIn(key, values) => label(key).is_none_or(|v| !values.iter().any(|w| w == v)),
            Requirement::Greater(key, than) => {
                label(key).and_then(|v| v.parse().ok()).is_some_and(|v: i64| v > *than)
            }
            Requirement::Less(key, than) => {
                label(key).and_then(|v| v.parse().ok()).is_some_and(|v: i64| v < *than)
            }
        })
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token<'a> {
    End,
    Comma,
    Open,
    Close,
    Operator(&'a str),
    Word(&'a str),
}

impl Token<'_> {
    fn text(&self) -> &str {
        match self {
            Token::End => "",
            Token::Comma => ",",
            Token::Open => "(",
            Token::Close => ")",
            Token::Operator(text) | Token::Word(text) => text,
        }
    }
}

struct Lexer<'a> {
    rest: &'a str,
}

impl<'a> Lexer<'a> {
    fn peek(&self) -> Token<'a> {
        Lexer { rest: self.rest }.next()
    }

    fn next(&mut self) -> Token<'a> {
        self.rest = self.rest.trim_start();
        let special = |c: char| matches!(c, ',' | '(' | ')' | '=' | '!' | '<' | '>');
        let Some(first) = self.rest.chars().next() else { return Token::End };
        let length = match first {
            ',' | '(' | ')' | '<' | '>' => 1,
            '=' if self.rest.starts_with("==") => 2,
            '!' if self.rest.starts_with("!=") => 2,
            '=' | '!' => 1,
            _ => self.rest.find(|c: char| special(c) || c.is_whitespace()).unwrap_or(self.rest.len()),
        };
        let (token, rest) = self.rest.split_at(length);
        self.rest = rest;
        match token {
            "," => Token::Comma,
            "(" => Token::Open,
            ")" => Token::Close,
            "=" | "==" | "!=" | "!" | "<" | ">" => Token::Operator(token),
            word => Token::Word(word),
        }
    }

    fn requirement(&mut self) -> std::result::Result<Requirement, String> {
        let mut negated = false;
        let key = match self.next() {
            Token::Operator("!") => {
                negated = true;
                match self.next() {
                    Token::Word(word) => word,
                    other => return Err(format!("found '{}', expected: identifier", other.text())),
                }
            }
            Token::Word(word) => word,
            other => return Err(format!("found '{}', expected: !, identifier, or ','", other.text())),
        };
        check_key(key)?;
        let key = key.to_string();
        if negated {
            return Ok(Requirement::Absent(key));
        }
        match self.peek() {
            Token::End | Token::Comma => return Ok(Requirement::Exists(key)),
            _ => {}
        }
        match self.next() {
            Token::Operator("=" | "==") => Ok(Requirement::In(key.clone(), vec![self.value(&key)?])),
            Token::Operator("!=") => Ok(Requirement::NotIn(key.clone(), vec![self.value(&key)?])),
            Token::Operator(">") => Ok(Requirement::Greater(key.clone(), self.number(&key)?)),
            Token::Operator("<") => Ok(Requirement::Less(key.clone(), self.number(&key)?)),
            Token::Word("in") => Ok(Requirement::In(key.clone(), self.values(&key)?)),
            Token::Word("notin") => Ok(Requirement::NotIn(key.clone(), self.values(&key)?)),
            other => Err(format!("found '{}', expected: in, notin, =, ==, !=, gt, lt", other.text())),
        }
    }

    /// One value, possibly empty.
    fn value(&mut self, key: &str) -> std::result::Result<String, String> {
        match self.peek() {
            Token::End | Token::Comma => Ok(String::new()),
            Token::Word(word) => {
                self.next();
                check_value(key, 0, word)?;
                Ok(word.to_string())
            }
            other => Err(format!("found '{}', expected: identifier", other.text())),
        }
    }

    fn number(&mut self, key: &str) -> std::result::Result<i64, String> {
        let text = self.value(key)?;
        text.parse().map_err(|_| {
            let why = "for 'Gt', 'Lt' operators, the value must be an integer";
            format!("values[0]: Invalid value: {}: {why}", go_quote(&text))
        })
    }

    fn values(&mut self, key: &str) -> std::result::Result<Vec<String>, String> {
        match self.next() {
            Token::Open => {}
            other => return Err(format!("found '{}' expected: '('", other.text())),
        }
        let mut values = Vec::new();
        loop {
            match self.next() {
                Token::Close => {
                    if values.is_empty() {
                        values.push(String::new());
                    }
                    return Ok(values);
                }
                Token::Comma => {
                    if matches!(self.peek(), Token::Comma | Token::Close) || values.is_empty() {
                        values.push(String::new());
                    }
                }
                Token::Word(word) => {
                    check_value(key, values.len(), word)?;
                    values.push(word.to_string());
                }
                other => return Err(format!("found '{}', expected: ',' or ')'", other.text())),
            }
        }
    }
}

fn check_key(key: &str) -> std::result::Result<(), String> {
    match names::qualified_name(key).first() {
        Some(why) => Err(format!("<nil>: Invalid value: {}: {why}", go_quote(key))),
        None => Ok(()),
    }
}

/// `at` is the place among the operator's values.
fn check_value(key: &str, at: usize, value: &str) -> std::result::Result<(), String> {
    match names::label_value(value).first() {
        Some(why) => Err(format!("values[{at}][{key}]: Invalid value: {}: {why}", go_quote(value))),
        None => Ok(()),
    }
}

/// A field selector: terms that must all hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FieldSelector(Vec<Term>);

#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    pub field: String,
    pub value: String,
    pub equal: bool,
}

impl FieldSelector {
    pub fn parse(text: &str) -> Result<Self> {
        let mut terms = Vec::new();
        for part in split_terms(text) {
            if part.is_empty() {
                continue;
            }
            let (field, value, equal) = split_term(part).ok_or_else(|| {
                Status::bad_request(format!("invalid selector: '{text}'; can't understand '{part}'"))
            })?;
            terms.push(Term { field: field.to_string(), value: unescape(value)?, equal });
        }
        Ok(Self(terms))
    }

    pub fn name(name: &str) -> Self {
        Self(vec![Term { field: "metadata.name".into(), value: name.into(), equal: true }])
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn terms(&self) -> &[Term] {
        &self.0
    }

    /// The value that a field must have.
    pub fn requires(&self, field: &str) -> Option<&str> {
        self.0.iter().find(|term| term.equal && term.field == field).map(|term| term.value.as_str())
    }

    /// `field` answers a field's value; "" for fields that aren't set.
    pub fn matches<'a>(&self, field: impl Fn(&str) -> &'a str) -> bool {
        self.0.iter().all(|term| (field(&term.field) == term.value) == term.equal)
    }
}

impl FromIterator<Term> for FieldSelector {
    fn from_iter<T: IntoIterator<Item = Term>>(terms: T) -> Self {
        Self(terms.into_iter().collect())
    }
}

/// Splits at commas that no backslash precedes.
fn split_terms(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn split_term(term: &str) -> Option<(&str, &str, bool)> {
    for (at, _) in term.char_indices() {
        let rest = &term[at..];
        for (operator, equal) in [("!=", false), ("==", true), ("=", true)] {
            if let Some(value) = rest.strip_prefix(operator) {
                return Some((&term[..at], value, equal));
            }
        }
    }
    None
}

fn unescape(value: &str) -> Result<String> {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(c @ ('\\' | ',' | '=')) => out.push(c),
                _ => {
                    return Err(Status::bad_request("invalid field selector: invalid escape sequence: \\"));
                }
            },
            '=' => {
                return Err(Status::bad_request("invalid field selector: unescaped character in value: 61"));
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_selectors() {
        let labels = [("app", "web"), ("tier", "5"), ("a.b/c", "")];
        let get = |key: &str| labels.iter().find(|(k, _)| *k == key).map(|(_, v)| *v);
        let cases = [
            ("", true),
            ("app", true),
            ("!app", false),
            ("none", false),
            ("!none", true),
            ("app=web", true),
            ("app==web,tier=5", true),
            ("app!=web", false),
            ("none!=x", true),
            ("app in (web, api)", true),
            ("app notin (web)", false),
            ("none notin (web)", true),
            ("tier>4,tier<6", true),
            ("tier>5", false),
            ("a.b/c=", true),
            ("a.b/c", true),
            ("a.b/c in (,x)", true),
        ];
        for (text, want) in cases {
            assert_eq!(LabelSelector::parse(text).unwrap().matches(get), want, "{text}");
        }
        for text in ["=", "a=b=c", "a in b", "a in (b", "-a=b", "a=-b", "a,,b", "a>x", "x y"] {
            assert!(LabelSelector::parse(text).is_err(), "{text}");
        }
        let object = serde_json::json!({"matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "tier", "operator": "In", "values": ["5"]}]});
        assert!(LabelSelector::from_object(&object).unwrap().matches(get));
    }

    #[test]
    fn field_selectors() {
        let get = |field: &str| if field == "metadata.name" { "x" } else { "" };
        let cases = [
            ("", true),
            ("metadata.name=x", true),
            ("metadata.name!=x", false),
            ("spec.nodeName=", true),
            ("metadata.name==x,spec.nodeName!=a", true),
            ("metadata.name=x\\,y", false),
        ];
        for (text, want) in cases {
            assert_eq!(FieldSelector::parse(text).unwrap().matches(get), want, "{text}");
        }
        assert!(FieldSelector::parse("oops").is_err());
        assert_eq!(FieldSelector::parse("metadata.name=x").unwrap().requires("metadata.name"), Some("x"));
    }
}
