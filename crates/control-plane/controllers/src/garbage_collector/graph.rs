//! Who owns whom, by UID. Upstream counterpart: pkg/controller/garbagecollector/graph_builder.go, graph.go.
//!
//! Kept small: an object without owners that is not being deleted is only a UID among those present.
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// Look at the object of that UID: delete it when its owners are gone, or go on with its foreground deletion.
    Delete(String),
    /// Take the object of that UID out of its dependents.
    Orphan(String),
    /// Look for new kinds.
    Discover,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    pub group: String,
    pub kind: String,
    pub namespace: String,
    pub name: String,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub uid: Box<str>,
    pub place: Arc<Place>,
    /// UIDs of owners, and whether this object blocks their deletion.
    pub owners: Vec<(Box<str>, bool)>,
    pub deleting: bool,
    /// Being deleted, and waiting for its dependents.
    pub foreground: bool,
    /// Being deleted, and to be taken out of its dependents.
    pub orphan: bool,
}

impl Node {
    pub fn blocks(&self, owner: &str) -> bool {
        self.owners.iter().any(|(uid, blocks)| *blocks && &**uid == owner)
    }

    fn is_interesting(&self) -> bool {
        !self.owners.is_empty() || self.deleting
    }
}

#[derive(Default)]
pub struct Graph {
    /// Every object there is, with a number for its kind.
    present: HashMap<Box<str>, u32>,
    kinds: Vec<(String, String)>,
    nodes: HashMap<Box<str>, Node>,
    dependents: HashMap<Box<str>, HashSet<Box<str>>>,
}

impl Graph {
    pub fn get(&self, uid: &str) -> Option<Node> {
        self.nodes.get(uid).cloned()
    }

    pub fn dependents(&self, uid: &str) -> Vec<Node> {
        let uids = self.dependents.get(uid).into_iter().flatten();
        uids.filter_map(|u| self.nodes.get(u).cloned()).collect()
    }

    /// What to look at when nothing is known about what was done.
    pub fn everything(&self) -> Vec<Task> {
        self.nodes.values().flat_map(|n| self.tasks_of(n)).collect()
    }

    fn kind_number(&mut self, group: &str, kind: &str) -> u32 {
        let known = self.kinds.iter().position(|(g, k)| g == group && k == kind);
        let number = known.unwrap_or_else(|| {
            self.kinds.push((group.to_string(), kind.to_string()));
            self.kinds.len() - 1
        });
        number as u32
    }

    /// Takes in an object's state; returns what follows from it.
    pub fn apply(&mut self, node: Node) -> Vec<Task> {
        if node.uid.is_empty() {
            return Vec::new();
        }
        let number = self.kind_number(&node.place.group, &node.place.kind);
        self.present.insert(node.uid.clone(), number);
        let old = self.nodes.remove(&node.uid);
        let mut tasks = Vec::new();
        for (owner, _) in old.iter().flat_map(|o| &o.owners) {
            if node.blocks(owner) {
                continue;
            }
            if !node.owners.iter().any(|(uid, _)| uid == owner) {
                self.unlink(owner, &node.uid);
            }
            // the owner may have waited for this one
            if self.nodes.get(owner).is_some_and(|o| o.foreground) {
                tasks.push(Task::Delete(owner.to_string()));
            }
        }
        for (owner, _) in &node.owners {
            self.dependents.entry(owner.clone()).or_default().insert(node.uid.clone());
        }
        tasks.extend(self.tasks_of(&node));
        if node.foreground && !old.is_some_and(|o| o.foreground) {
            tasks.extend(self.dependents(&node.uid).iter().map(|d| Task::Delete(d.uid.to_string())));
        }
        if node.is_interesting() {
            self.nodes.insert(node.uid.clone(), node);
        }
        tasks
    }

    fn tasks_of(&self, node: &Node) -> Vec<Task> {
        let mut tasks = Vec::new();
        if node.orphan {
            tasks.push(Task::Orphan(node.uid.to_string()));
        }
        let absent_or_going = |(owner, _): &(Box<str>, bool)| {
            !self.present.contains_key(owner) || self.nodes.get(owner).is_some_and(|o| o.foreground)
        };
        if node.foreground || (!node.deleting && node.owners.iter().any(absent_or_going)) {
            tasks.push(Task::Delete(node.uid.to_string()));
        }
        tasks
    }

    fn unlink(&mut self, owner: &str, dependent: &str) {
        if let Some(dependents) = self.dependents.get_mut(owner) {
            dependents.remove(dependent);
            if dependents.is_empty() {
                self.dependents.remove(owner);
            }
        }
    }

    /// Takes out an object that is gone; returns what follows from it.
    pub fn remove(&mut self, uid: &str) -> Vec<Task> {
        self.present.remove(uid);
        let mut tasks = Vec::new();
        if let Some(node) = self.nodes.remove(uid) {
            for (owner, _) in &node.owners {
                self.unlink(owner, uid);
                if self.nodes.get(owner).is_some_and(|o| o.foreground) {
                    tasks.push(Task::Delete(owner.to_string()));
                }
            }
        }
        tasks.extend(self.dependents(uid).iter().map(|d| Task::Delete(d.uid.to_string())));
        tasks
    }

    /// After a list: takes out all objects of a kind that were not in it.
    pub fn retain(&mut self, group: &str, kind: &str, listed: Vec<String>) -> Vec<Task> {
        let number = self.kind_number(group, kind);
        let listed: HashSet<String> = listed.into_iter().collect();
        let mine = self.present.iter().filter(|(uid, n)| **n == number && !listed.contains(&***uid));
        let gone: Vec<Box<str>> = mine.map(|(uid, _)| uid.clone()).collect();
        gone.iter().flat_map(|uid| self.remove(uid)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(uid: &str, owners: &[(&str, bool)]) -> Node {
        let place =
            Place { group: String::new(), kind: "Pod".into(), namespace: "ns".into(), name: uid.into() };
        Node {
            uid: uid.into(),
            place: Arc::new(place),
            owners: owners.iter().map(|(o, b)| ((*o).into(), *b)).collect(),
            deleting: false,
            foreground: false,
            orphan: false,
        }
    }

    fn delete(uid: &str) -> Task {
        Task::Delete(uid.into())
    }

    #[test]
    fn dependents_follow_their_owner() {
        let mut graph = Graph::default();
        assert!(graph.apply(node("owner", &[])).is_empty());
        assert!(graph.nodes.is_empty(), "an object without owners is only a UID");
        assert!(graph.apply(node("child", &[("owner", true)])).is_empty());
        assert_eq!(graph.apply(node("stray", &[("nobody", false)])), [delete("stray")]);
        assert_eq!(graph.remove("owner"), [delete("child")]);
        assert!(graph.remove("child").is_empty());
        assert!(!graph.dependents.contains_key("owner"));
    }

    #[test]
    fn foreground_deletion_wakes_both_sides() {
        let mut graph = Graph::default();
        graph.apply(node("owner", &[]));
        graph.apply(node("child", &[("owner", true)]));
        let going = Node { deleting: true, foreground: true, ..node("owner", &[]) };
        assert_eq!(graph.apply(going.clone()), [delete("owner"), delete("child")]);
        assert_eq!(graph.apply(node("late", &[("owner", true)])), [delete("late")]);
        assert_eq!(graph.apply(node("late", &[("owner", false)])), [delete("owner"), delete("late")]);
        assert_eq!(graph.remove("child"), [delete("owner")]);
    }

    #[test]
    fn orphaning_and_relists() {
        let mut graph = Graph::default();
        graph.apply(node("child", &[("owner", false)]));
        let going = Node { deleting: true, orphan: true, ..node("owner", &[]) };
        assert_eq!(graph.apply(going), [Task::Orphan("owner".into())]);
        assert_eq!(graph.retain("", "Pod", vec!["child".into()]), [delete("child")]);
    }
}
