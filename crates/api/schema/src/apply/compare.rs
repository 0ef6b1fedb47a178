//! What changed between two versions of an object.
//!
//! Upstream: structured-merge-diff/v6/typed/compare.go. One pass, which builds sets only where something
//! differs. Added and modified fields are one set here, since nothing asks for them apart.
//! What stays true: a field that Go writes whether set or not (a struct held by value, anything without
//! omitempty) counts as there, with its zero, on both sides. So nobody owns its mere presence.

use serde_json::{Map, Value, json};

use super::place::{Container, Form, Place};
use super::scalar::equal;
use super::set::{FieldSet, PathElement};
use super::validate::{Problem, check_scalar};
use crate::types::{Field, ListKind, Omit, Shape};

#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Added or modified.
    pub(crate) touched: FieldSet,
    pub(crate) removed: FieldSet,
}

impl Changes {
    pub(crate) fn is_empty(&self) -> bool {
        self.touched.is_empty() && self.removed.is_empty()
    }
}

/// What changes on the way from `left` to `right`.
pub(crate) fn compare(place: Place<'_>, left: &Value, right: &Value) -> Result<Changes, Problem> {
    Ok(Walk::new().value(place, Some(left), Some(right))?.below)
}

/// What was found at one place and below it.
#[derive(Default)]
struct Level {
    touched: bool,
    removed: bool,
    below: Changes,
}

impl Level {
    fn put(&mut self, element: impl Fn() -> PathElement, level: Level) {
        self.below.touched.put(&element, level.touched, level.below.touched);
        self.below.removed.put(&element, level.removed, level.below.removed);
    }
}

/// Holds the zeros that absent fields stand for.
struct Walk {
    null: Value,
    object: Value,
    number: Value,
    text: Value,
    quantity: Value,
    flag: Value,
}

impl Walk {
    fn new() -> Walk {
        Walk {
            null: Value::Null,
            object: Value::Object(Map::new()),
            number: json!(0),
            text: json!(""),
            quantity: json!("0"),
            flag: json!(false),
        }
    }

    /// What Go writes for this field where nothing is set; None where it leaves the field out.
    fn zero(&self, field: &Field) -> Option<&Value> {
        let never = field.omit == Omit::Never;
        if field.pointer {
            return never.then_some(&self.null);
        }
        let by_value = field.omit != Omit::Zero;
        match &field.shape {
            Shape::Object(_) => by_value.then_some(&self.object),
            Shape::Quantity => by_value.then_some(&self.quantity),
            Shape::IntOrString => by_value.then_some(&self.number),
            Shape::Time | Shape::MicroTime | Shape::RawExtension => by_value.then_some(&self.null),
            Shape::Boolean => never.then_some(&self.flag),
            Shape::Int32 | Shape::Int64 | Shape::Double => never.then_some(&self.number),
            Shape::String => never.then_some(&self.text),
            _ => never.then_some(&self.null),
        }
    }

    fn value(&self, place: Place<'_>, left: Option<&Value>, right: Option<&Value>) -> Result<Level, Problem> {
        let mut level = Level::default();
        let left_form = place.form(left);
        let right_form = place.form(right);
        let is_leaf = if right.is_none() {
            self.form(place, &left_form, left, right, &mut level)?
        } else if left.is_none() || left_form.kind() == right_form.kind() {
            self.form(place, &right_form, left, right, &mut level)?
        } else {
            // The value became another kind of thing: seen once as the old kind and once as the new one.
            self.form(place, &left_form, left, right, &mut level)?;
            self.form(place, &right_form, left, right, &mut level)?
        };
        if !is_leaf {
            level.touched |= left.is_none();
            level.removed |= left.is_some() && right.is_none();
        }
        Ok(level)
    }

    /// True where the place is a leaf.
    fn form(
        &self,
        place: Place<'_>,
        form: &Form<'_>,
        left: Option<&Value>,
        right: Option<&Value>,
        level: &mut Level,
    ) -> Result<bool, Problem> {
        match form {
            Form::Scalar(scalar) => {
                let left_problem = left.and_then(|value| check_scalar(*scalar, value, "lhs: "));
                let right_problem = right.and_then(|value| check_scalar(*scalar, value, "rhs: "));
                if let (Some(problem), Some(_)) = (left_problem, right_problem) {
                    return Err(Problem::here(problem));
                }
            }
            Form::Atomic(Container::List | Container::Object) => {}
            Form::List(kind) => {
                let left = left.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                let right = right.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                if !left.is_empty() || !right.is_empty() {
                    self.list(place, kind, left, right, level)?;
                    return Ok(false);
                }
            }
            Form::Object => {
                let left = left.and_then(Value::as_object);
                let right = right.and_then(Value::as_object);
                if left.is_some_and(|left| !left.is_empty()) || right.is_some_and(|right| !right.is_empty()) {
                    self.object(place, left, right, level)?;
                    return Ok(false);
                }
            }
        }
        match (left, right) {
            (None, _) => level.touched = true,
            (_, None) => level.removed = true,
            (Some(left), Some(right)) => level.touched |= !equal(left, right),
        }
        Ok(true)
    }

    fn object(
        &self,
        place: Place<'_>,
        left: Option<&Map<String, Value>>,
        right: Option<&Map<String, Value>>,
        level: &mut Level,
    ) -> Result<(), Problem> {
        let absent = |side: Option<&Map<String, Value>>, name: &str| {
            side.and_then(|_| self.zero(place.built_in_field(name)?))
        };
        let mut member = |name: &str, left: Option<&Value>, right: Option<&Value>| {
            let found = self.value(place.member(name).0, left, right);
            let found = found.map_err(|problem| problem.below(&PathElement::field(name)))?;
            level.put(|| PathElement::field(name), found);
            Ok(())
        };
        for (name, left) in left.into_iter().flatten() {
            match right.and_then(|right| right.get(name)) {
                Some(right) if left == right => {}
                Some(right) => member(name, Some(left), Some(right))?,
                None => member(name, Some(left), absent(right, name))?,
            }
        }
        for (name, right) in right.into_iter().flatten() {
            if !left.is_some_and(|left| left.contains_key(name)) {
                member(name, absent(left, name), Some(right))?;
            }
        }
        Ok(())
    }

    fn list(
        &self,
        place: Place<'_>,
        kind: &ListKind,
        left: &[Value],
        right: &[Value],
        level: &mut Level,
    ) -> Result<(), Problem> {
        if left == right {
            return Ok(());
        }
        let left = keyed(place, kind, left)?;
        let right = keyed(place, kind, right)?;
        let (mut left, mut right) = (left.as_slice(), right.as_slice());
        loop {
            let element = match (left.first(), right.first()) {
                (None, None) => return Ok(()),
                (Some((left, _)), Some((right, _))) => left.min(right),
                (Some((element, _)), None) | (None, Some((element, _))) => element,
            };
            let (before, rest) = split_run(left, element);
            left = rest;
            let (after, rest) = split_run(right, element);
            right = rest;
            self.items(place.items(), element, before, after, level)?;
        }
    }

    /// The items of one key on either side: usually one each, more where there are duplicates.
    fn items(
        &self,
        place: Place<'_>,
        element: &PathElement,
        before: &[Keyed<'_>],
        after: &[Keyed<'_>],
        level: &mut Level,
    ) -> Result<(), Problem> {
        let one = |left: Option<&Keyed<'_>>, right: Option<&Keyed<'_>>| {
            let found = self.value(place, left.map(|(_, value)| *value), right.map(|(_, value)| *value));
            found.map_err(|problem| problem.below(element))
        };
        let mut found = match (before.len(), after.len()) {
            (0 | 1, 0 | 1) => one(before.first(), after.first())?,
            (0, _) | (_, 0) => Level::default(),
            (1, _) => one(before.first(), None)?,
            (_, 1) => one(None, after.first())?,
            _ => Level::default(),
        };
        if before.len() > 1 && after.len() > 1 {
            let same = before.len() == after.len() && before.iter().zip(after).all(|(l, r)| equal(l.1, r.1));
            found.touched |= !same;
        } else if before.len() > 1 {
            found.removed = true;
        } else if after.len() > 1 {
            found.touched = true;
        }
        level.put(|| element.clone(), found);
        Ok(())
    }
}

type Keyed<'a> = (PathElement, &'a Value);

/// The items with their path elements, in the order of a set; duplicates in the order of the list.
fn keyed<'a>(place: Place<'_>, kind: &ListKind, items: &'a [Value]) -> Result<Vec<Keyed<'a>>, Problem> {
    let mut keyed = Vec::with_capacity(items.len());
    for (at, item) in items.iter().enumerate() {
        let element =
            place.item(kind, item).map_err(|problem| Problem::here(format!("element {at}: {problem}")))?;
        keyed.push((element, item));
    }
    keyed.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(keyed)
}

fn split_run<'a, 'b>(keyed: &'a [Keyed<'b>], element: &PathElement) -> (&'a [Keyed<'b>], &'a [Keyed<'b>]) {
    let len = keyed.iter().take_while(|(other, _)| other == element).count();
    keyed.split_at(len)
}
