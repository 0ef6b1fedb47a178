//! Conflicts: fields that an apply would change and that others own.
//!
//! Upstream: structured-merge-diff/v6/merge/conflict.go, apimachinery/pkg/util/managedfields/internal/conflict.go.

use super::owners::{Entry, Operation};
use super::set::{FieldSet, PathElement, show_path};
use crate::patch::wording::quoted;

/// One field and who owns it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The owner as messages show it: `"kubectl-client-side-apply" using apps/v1`.
    pub owner: String,
    pub path: Vec<PathElement>,
}

impl Conflict {
    /// The `field` of the status cause.
    pub fn field(&self) -> String {
        show_path(&self.path)
    }

    /// The `message` of the status cause, whose `reason` is `FieldManagerConflict`.
    pub fn message(&self) -> String {
        format!("conflict with {}", self.owner)
    }
}

/// Conflicts of an applier with the other owners, in the order of the owners.
pub(crate) fn find(entries: &[Entry], applier: &Entry, touched: &FieldSet) -> Vec<Conflict> {
    let others = entries.iter().filter(|entry| !entry.same_owner(applier));
    let mut others: Vec<_> = others.filter(|entry| entry.api_version == applier.api_version).collect();
    others.sort_by(|a, b| a.owner_order(b));
    let mut conflicts = Vec::new();
    for entry in others {
        for path in entry.set.intersection(touched).paths() {
            conflicts.push(Conflict { owner: show_owner(entry), path });
        }
    }
    conflicts
}

fn show_owner(entry: &Entry) -> String {
    let mut out = quoted(&entry.manager);
    if !entry.subresource.is_empty() {
        out.push_str(&format!(" with subresource {}", quoted(&entry.subresource)));
    }
    if entry.operation == Operation::Update {
        out.push_str(&format!(" using {}", entry.api_version));
    }
    out
}

/// The message of the 409.
pub(crate) fn summary(conflicts: &[Conflict]) -> String {
    if let [one] = conflicts {
        return format!("Apply failed with 1 conflict: {}: {}", one.message(), one.field());
    }
    let mut lines = Vec::new();
    let mut owner = None;
    for conflict in conflicts {
        if owner != Some(&conflict.owner) {
            owner = Some(&conflict.owner);
            lines.push(format!("conflicts with {}:", conflict.owner));
        }
        lines.push(format!("- {}", conflict.field()));
    }
    format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
}
