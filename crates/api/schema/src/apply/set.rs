//! Sets of fields, as tries: which places of an object someone owns.
//!
//! Upstream: structured-merge-diff/v6/fieldpath (set.go, element.go). What stays true: nodes are sorted by
//! [`PathElement`]'s order and none is empty, so an empty set has no nodes and equality is structural.
//! Difference: members and children are one list of nodes, where upstream keeps two that repeat each other.

use std::cmp::Ordering;
use std::fmt;

use serde_json::Value;

use super::place::Place;
use super::scalar;

/// One step of a path. The order of the variants is the order of a set.
#[derive(Debug, Clone)]
pub enum PathElement {
    Field(Box<str>),
    /// A list's item by its key fields, sorted by name.
    Key(Vec<(Box<str>, Value)>),
    /// A set's item.
    Value(Value),
    Index(i64),
}

impl PathElement {
    pub fn field(name: &str) -> PathElement {
        PathElement::Field(name.into())
    }

    fn rank(&self) -> u8 {
        match self {
            PathElement::Field(_) => 0,
            PathElement::Key(_) => 1,
            PathElement::Value(_) => 2,
            PathElement::Index(_) => 3,
        }
    }
}

impl Ord for PathElement {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (PathElement::Field(left), PathElement::Field(right)) => left.cmp(right),
            (PathElement::Key(left), PathElement::Key(right)) => {
                let pairs = left.iter().zip(right);
                let mut orders = pairs.map(|(l, r)| l.0.cmp(&r.0).then_with(|| scalar::compare(&l.1, &r.1)));
                orders.find(|order| order.is_ne()).unwrap_or_else(|| left.len().cmp(&right.len()))
            }
            (PathElement::Value(left), PathElement::Value(right)) => scalar::compare(left, right),
            (PathElement::Index(left), PathElement::Index(right)) => left.cmp(right),
            _ => self.rank().cmp(&other.rank()),
        }
    }
}

impl PartialOrd for PathElement {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for PathElement {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for PathElement {}

impl fmt::Display for PathElement {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PathElement::Field(name) => write!(out, ".{name}"),
            PathElement::Key(fields) => {
                for (at, (name, value)) in fields.iter().enumerate() {
                    write!(out, "{}{name}={}", if at == 0 { "[" } else { "," }, scalar::show(value))?;
                }
                out.write_str(if fields.is_empty() { "[]" } else { "]" })
            }
            PathElement::Value(value) => write!(out, "[={}]", scalar::show(value)),
            PathElement::Index(at) => write!(out, "[{at}]"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) element: PathElement,
    /// The path up to here is in the set.
    pub(crate) member: bool,
    /// What is in the set below here.
    pub(crate) children: FieldSet,
}

/// A set of paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet {
    pub(crate) nodes: Vec<Node>,
}

impl FieldSet {
    /// Of paths written with dots: `["status", "metadata.name"]`.
    pub fn of_paths<'a>(paths: impl IntoIterator<Item = &'a str>) -> FieldSet {
        let mut set = FieldSet::default();
        for path in paths {
            let path: Vec<_> = path.split('.').map(PathElement::field).collect();
            set.insert(&path);
        }
        set
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub(crate) fn find(&self, element: &PathElement) -> Option<&Node> {
        self.nodes.binary_search_by(|node| node.element.cmp(element)).ok().map(|at| &self.nodes[at])
    }

    /// The node of `element`, made where it isn't there. The caller fills it.
    pub(crate) fn node(&mut self, element: PathElement) -> &mut Node {
        let at = match self.nodes.last() {
            // Walks go in order, so this is the usual case.
            Some(last) if last.element < element => Err(self.nodes.len()),
            _ => self.nodes.binary_search_by(|node| node.element.cmp(&element)),
        };
        let at = at.unwrap_or_else(|at| {
            self.nodes.insert(at, Node { element, member: false, children: FieldSet::default() });
            at
        });
        &mut self.nodes[at]
    }

    /// Adds what a walk found at and below `element`, if it found anything.
    pub(crate) fn put(&mut self, element: impl FnOnce() -> PathElement, member: bool, children: FieldSet) {
        if !member && children.is_empty() {
            return;
        }
        let node = self.node(element());
        node.member |= member;
        if node.children.is_empty() {
            node.children = children;
        } else {
            node.children.union(children);
        }
    }

    pub fn insert(&mut self, path: &[PathElement]) {
        let Some((first, rest)) = path.split_first() else { return };
        let node = self.node(first.clone());
        if rest.is_empty() {
            node.member = true;
        } else {
            node.children.insert(rest);
        }
    }

    pub fn contains(&self, path: &[PathElement]) -> bool {
        let Some((first, rest)) = path.split_first() else { return false };
        match self.find(first) {
            None => false,
            Some(node) if rest.is_empty() => node.member,
            Some(node) => node.children.contains(rest),
        }
    }

    pub fn union(&mut self, other: FieldSet) {
        if self.nodes.is_empty() {
            *self = other;
            return;
        }
        for Node { element, member, children } in other.nodes {
            self.put(|| element, member, children);
        }
    }

    /// Takes the members of `other` out; what lies below one of them stays. True where that changed anything.
    pub fn subtract(&mut self, other: &FieldSet) -> bool {
        if other.is_empty() {
            return false;
        }
        let mut changed = false;
        self.nodes.retain_mut(|node| {
            let Some(gone) = other.find(&node.element) else { return true };
            if node.member && gone.member {
                node.member = false;
                changed = true;
            }
            changed |= node.children.subtract(&gone.children);
            node.member || !node.children.is_empty()
        });
        changed
    }

    /// Takes the members of `other` out together with everything below them.
    pub fn subtract_recursive(&mut self, other: &FieldSet) {
        if other.is_empty() {
            return;
        }
        self.nodes.retain_mut(|node| {
            let Some(gone) = other.find(&node.element) else { return true };
            if gone.member {
                return false;
            }
            node.children.subtract_recursive(&gone.children);
            node.member || !node.children.is_empty()
        });
    }

    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        let mut out = FieldSet::default();
        for node in &self.nodes {
            if let Some(same) = other.find(&node.element) {
                let children = node.children.intersection(&same.children);
                out.put(|| node.element.clone(), node.member && same.member, children);
            }
        }
        out
    }

    /// With every declared field on the way to a member a member itself.
    pub(crate) fn with_named_members(&self, place: Place<'_>) -> FieldSet {
        let nodes = self.nodes.iter().map(|node| {
            let (below, declared) = match &node.element {
                PathElement::Field(name) => place.member(name),
                PathElement::Key(_) => (place.items(), false),
                PathElement::Value(_) | PathElement::Index(_) => (Place::Deduced, false),
            };
            let children = node.children.with_named_members(below);
            let member = node.member || declared;
            Node { element: node.element.clone(), member, children }
        });
        FieldSet { nodes: nodes.collect() }
    }

    /// Every path, a level's own members before what lies below them, as upstream lists them.
    pub fn paths(&self) -> Vec<Vec<PathElement>> {
        let mut out = Vec::new();
        self.collect_paths(&mut Vec::new(), &mut out);
        out
    }

    fn collect_paths(&self, prefix: &mut Vec<PathElement>, out: &mut Vec<Vec<PathElement>>) {
        for node in self.nodes.iter().filter(|node| node.member) {
            let mut path = prefix.clone();
            path.push(node.element.clone());
            out.push(path);
        }
        for node in self.nodes.iter().filter(|node| !node.children.is_empty()) {
            prefix.push(node.element.clone());
            node.children.collect_paths(prefix, out);
            prefix.pop();
        }
    }
}

/// `.spec.containers[name="a"].image`.
pub fn show_path(path: &[PathElement]) -> String {
    path.iter().map(PathElement::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn algebra() {
        let all = FieldSet::of_paths(["a", "a.b", "a.c", "d.e"]);
        let mut left = all.clone();
        assert!(left.subtract(&FieldSet::of_paths(["a", "d.e", "x"])));
        assert_eq!(left, FieldSet::of_paths(["a.b", "a.c"]), "below a member stays");
        assert!(!left.subtract(&FieldSet::of_paths(["a", "z"])));
        let mut left = all.clone();
        left.subtract_recursive(&FieldSet::of_paths(["a", "d.x"]));
        assert_eq!(left, FieldSet::of_paths(["d.e"]));
        assert_eq!(all.intersection(&FieldSet::of_paths(["a.b", "d", "q"])), FieldSet::of_paths(["a.b"]));
        let mut union = FieldSet::of_paths(["a.b"]);
        union.union(FieldSet::of_paths(["d.e", "a", "a.c"]));
        assert_eq!(union, all);
        let paths: Vec<_> = all.paths().iter().map(|path| show_path(path)).collect();
        assert_eq!(paths, [".a", ".a.b", ".a.c", ".d.e"]);
    }
}
