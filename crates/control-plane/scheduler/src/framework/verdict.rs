//! What plugins say, and the sentence made of it. Upstream counterparts: `Status` in kube-scheduler/framework/interface.go,
//! `Diagnosis`, `FitError` and `NodeToStatus` in pkg/scheduler/framework/types.go.
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

pub type Reason = Cow<'static, str>;

/// A plugin's answer. Being unschedulable is no error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Success,
    /// The pod is none of the plugin's business in this cycle.
    Skip,
    /// Rejected; removing pods from the node may change that.
    Unschedulable(Vec<Reason>),
    /// Rejected; preemption cannot help.
    Unresolvable(Vec<Reason>),
    /// Something unexpected: the pod is tried again after a back-off.
    Error(String),
}

impl Verdict {
    pub fn unschedulable(reason: impl Into<Reason>) -> Self {
        Self::Unschedulable(vec![reason.into()])
    }

    pub fn unresolvable(reason: impl Into<Reason>) -> Self {
        Self::Unresolvable(vec![reason.into()])
    }

    pub fn is_success(&self) -> bool {
        *self == Self::Success
    }

    pub fn reasons(&self) -> &[Reason] {
        match self {
            Self::Unschedulable(reasons) | Self::Unresolvable(reasons) => reasons,
            _ => &[],
        }
    }

    pub fn into_reasons(self) -> Vec<Reason> {
        match self {
            Self::Unschedulable(reasons) | Self::Unresolvable(reasons) => reasons,
            Self::Error(message) => vec![message.into()],
            _ => Vec::new(),
        }
    }

    pub fn message(&self) -> String {
        match self {
            Self::Error(message) => message.clone(),
            _ => self.reasons().join(", "),
        }
    }
}

/// What was said about each node, and about those that were not looked at.
#[derive(Clone, Debug)]
pub struct NodeVerdicts {
    pub nodes: HashMap<String, Verdict>,
    pub absent: Verdict,
}

impl Default for NodeVerdicts {
    fn default() -> Self {
        Self { nodes: HashMap::new(), absent: Verdict::Unresolvable(Vec::new()) }
    }
}

impl NodeVerdicts {
    pub fn get(&self, node: &str) -> &Verdict {
        self.nodes.get(node).unwrap_or(&self.absent)
    }

    /// The sentence of a pod that fits nowhere: `0/3 nodes are available: 1 …, 2 …. preemption: …`.
    pub fn message(&self, nodes: usize, pre_filter: &str, post_filter: &str) -> String {
        let mut message = format!("0/{nodes} nodes are available:");
        if pre_filter.is_empty() {
            let counts = self.histogram(nodes);
            if !counts.is_empty() {
                message.push_str(&format!(" {}.", counts.join(", ")));
            }
        } else {
            message.push_str(&format!(" {pre_filter}."));
        }
        if !post_filter.is_empty() {
            message.push_str(&format!(" {post_filter}"));
        }
        message
    }

    fn histogram(&self, nodes: usize) -> Vec<String> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for reason in self.nodes.values().flat_map(Verdict::reasons) {
            *counts.entry(reason).or_default() += 1;
        }
        let absent = nodes.saturating_sub(self.nodes.len());
        for reason in self.absent.reasons().iter().filter(|_| absent > 0) {
            *counts.entry(reason).or_default() += absent;
        }
        let mut lines: Vec<String> = counts.into_iter().map(|(reason, n)| format!("{n} {reason}")).collect();
        lines.sort();
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_upstreams() {
        let mut verdicts = NodeVerdicts::default();
        verdicts.nodes.insert("a".into(), Verdict::unresolvable("node(s) had untolerated taint(s)"));
        for node in ["b", "c"] {
            verdicts.nodes.insert(node.into(), Verdict::unschedulable("Insufficient cpu"));
        }
        assert_eq!(
            verdicts.message(3, "", "preemption: no"),
            "0/3 nodes are available: 1 node(s) had untolerated taint(s), 2 Insufficient cpu. preemption: no"
        );
        assert_eq!(verdicts.message(3, "no claim", ""), "0/3 nodes are available: no claim.");
        verdicts.absent = Verdict::unresolvable("away");
        assert_eq!(
            verdicts.message(5, "", ""),
            "0/5 nodes are available: 1 node(s) had untolerated taint(s), 2 Insufficient cpu, 2 away."
        );
    }
}
