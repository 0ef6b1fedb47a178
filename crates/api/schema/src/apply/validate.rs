//! Whether a configuration has the form that its type asks for.
//!
//! Upstream: structured-merge-diff/v6/typed/validate.go. Its wording is what kubectl users read.

use std::fmt;

use serde_json::Value;

use super::place::{Container, Form, Place, Scalar};
use super::set::PathElement;
use crate::patch::wording::{go_type, plain, syntax};
use crate::types::ListKind;

/// One complaint and the place it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    path: String,
    text: String,
}

impl Problem {
    pub(crate) fn here(text: impl Into<String>) -> Problem {
        Problem { path: String::new(), text: text.into() }
    }

    pub(crate) fn below(mut self, element: &PathElement) -> Problem {
        self.path.insert_str(0, &element.to_string());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            out.write_str(&self.text)
        } else {
            write!(out, "{}: {}", self.path, self.text)
        }
    }
}

/// Several complaints in one text.
pub(crate) fn join(problems: &[Problem]) -> String {
    match problems {
        [one] => one.to_string(),
        many => {
            let mut out = String::from("errors:");
            for problem in many {
                out.push_str("\n  ");
                out.push_str(&problem.to_string());
            }
            out
        }
    }
}

/// Checks `value`; duplicates in sets and keyed lists are complained about unless allowed.
pub(crate) fn validate(place: Place<'_>, value: &Value, allow_duplicates: bool) -> Vec<Problem> {
    let mut problems = Vec::new();
    check(place, value, allow_duplicates, &mut problems);
    problems
}

fn check(place: Place<'_>, value: &Value, allow_duplicates: bool, problems: &mut Vec<Problem>) {
    match place.form(Some(value)) {
        Form::Scalar(scalar) => problems.extend(check_scalar(scalar, value, "").map(Problem::here)),
        Form::Atomic(Container::List) => {
            check_list(place, &ListKind::Atomic, value, allow_duplicates, problems)
        }
        Form::List(kind) => check_list(place, kind, value, allow_duplicates, problems),
        Form::Object | Form::Atomic(Container::Object) => {
            check_object(place, value, allow_duplicates, problems)
        }
    }
}

fn check_object(place: Place<'_>, value: &Value, allow_duplicates: bool, problems: &mut Vec<Problem>) {
    let members = match value {
        Value::Null => return,
        Value::Object(members) => members,
        other => {
            problems.push(Problem::here(format!("expected map, got &{{{}}}", plain(other))));
            return;
        }
    };
    for (name, member) in members {
        let element = PathElement::field(name);
        if !place.allows(name) {
            problems.push(Problem::here("field not declared in schema").below(&element));
            return;
        }
        let found = validate(place.member(name).0, member, allow_duplicates);
        problems.extend(found.into_iter().map(|problem| problem.below(&element)));
    }
}

fn check_list(
    place: Place<'_>,
    kind: &ListKind,
    value: &Value,
    allow_duplicates: bool,
    problems: &mut Vec<Problem>,
) {
    let items = match value {
        Value::Null => return,
        Value::Array(items) => items,
        other => {
            problems.push(Problem::here(format!("expected list, got &{{{}}}", plain(other))));
            return;
        }
    };
    let mut seen = std::collections::BTreeSet::new();
    for (at, item) in items.iter().enumerate() {
        let element = if *kind == ListKind::Atomic {
            PathElement::Index(at as i64)
        } else {
            match place.item(kind, item) {
                Ok(element) => {
                    if !allow_duplicates && seen.contains(&element) {
                        problems.push(Problem::here(format!("duplicate entries for key {element}")));
                    }
                    seen.insert(element.clone());
                    element
                }
                Err(problem) => {
                    problems.push(Problem::here(format!("element {at}: {problem}")));
                    return;
                }
            }
        };
        let found = validate(place.items(), item, allow_duplicates);
        problems.extend(found.into_iter().map(|problem| problem.below(&element)));
    }
}

pub(crate) fn check_scalar(scalar: Scalar, value: &Value, prefix: &str) -> Option<String> {
    match (scalar, value) {
        (_, Value::Null)
        | (Scalar::Number, Value::Number(_))
        | (Scalar::String, Value::String(_))
        | (Scalar::Boolean, Value::Bool(_))
        | (Scalar::Any, Value::Number(_) | Value::String(_) | Value::Bool(_)) => None,
        (Scalar::Number, other) => {
            Some(format!("{prefix}expected numeric (int or float), got {}", go_type(other)))
        }
        (Scalar::String, other) => {
            Some(format!("{prefix}expected string, got &value.valueUnstructured{{Value:{}}}", syntax(other)))
        }
        (Scalar::Boolean, other) => Some(format!("{prefix}expected boolean, got &{{{}}}", plain(other))),
        (Scalar::Any, other) => Some(format!("{prefix}expected any scalar, got &{{{}}}", plain(other))),
    }
}
