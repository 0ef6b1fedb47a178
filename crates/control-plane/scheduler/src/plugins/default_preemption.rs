//! Finds pods of lower priority whose removal makes room for a pod that fits nowhere, and removes them.
//! Upstream counterparts: pkg/scheduler/framework/plugins/defaultpreemption, pkg/scheduler/framework/preemption.
use std::cmp::Reverse;
use std::sync::Arc;

use k8s_openapi::api::policy::v1::PodDisruptionBudget;

use crate::framework::{
    CycleState, NodeInfo, NodeVerdicts, Plugin, PodInfo, PostFilter, PostFilterCycle, PostFilterResult,
    Selector, Verdict,
};
use crate::plugins::Descriptor;
use crate::preemptor::Preemptor;
use crate::sources::Sources;

pub const DESCRIPTOR: Descriptor = Descriptor {
    name: "DefaultPreemption",
    weight: 0,
    new: |cx| Box::new(DefaultPreemption { sources: cx.sources.clone(), preemptor: cx.preemptor.clone() }),
};

/// At least so many candidates are looked for, and this part of the nodes.
const MIN_CANDIDATES: usize = 100;
const MIN_CANDIDATES_PERCENT: usize = 10;

struct DefaultPreemption {
    sources: Sources,
    preemptor: Arc<Preemptor>,
}

/// A node and the pods, most important first, that must go from it.
struct Candidate {
    node: String,
    victims: Vec<Arc<PodInfo>>,
    violations: usize,
}

impl Plugin for DefaultPreemption {
    fn name(&self) -> &'static str {
        DESCRIPTOR.name
    }
    fn as_post_filter(&self) -> Option<&dyn PostFilter> {
        Some(self)
    }
}

impl PostFilter for DefaultPreemption {
    fn post_filter(
        &self,
        cx: &PostFilterCycle<'_>,
        state: &CycleState,
        pod: &Arc<PodInfo>,
    ) -> PostFilterResult {
        let refused = |nominated, reason: &str| PostFilterResult {
            nominated,
            verdict: Verdict::unschedulable(format!("preemption: {reason}")),
        };
        if let Err(reason) = self.eligible(cx, pod) {
            return refused(None, reason);
        }
        match self.candidates(cx, state, pod) {
            Ok(candidates) => match best(candidates) {
                Some(best) => {
                    let verdict = Verdict::Success;
                    self.preemptor.evict(pod, &best.node, &best.victims);
                    PostFilterResult { nominated: Some(best.node), verdict }
                }
                None => refused(None, "no candidate node for preemption"),
            },
            Err(verdicts) => {
                let message = verdicts.message(cx.snapshot.nodes.len(), "", "");
                refused(Some(String::new()), &message)
            }
        }
    }
}

impl DefaultPreemption {
    fn eligible(&self, cx: &PostFilterCycle<'_>, pod: &PodInfo) -> Result<(), &'static str> {
        if pod.spec().preemption_policy.as_deref() == Some("Never") {
            return Err("not eligible due to preemptionPolicy=Never.");
        }
        if self.preemptor.is_preempting(&pod.uid) {
            return Err("waiting for the preemption for this pod to be finished");
        }
        let nominated = pod.nominated_node_name();
        if nominated.is_empty() || matches!(cx.verdicts.get(nominated), Verdict::Unresolvable(_)) {
            return Ok(());
        }
        let leaving = |p: &Arc<PodInfo>| p.priority < pod.priority && is_leaving_by_preemption(p);
        match cx.snapshot.get(nominated).is_some_and(|n| n.pods.iter().any(leaving)) {
            true => Err("not eligible due to a terminating pod on the nominated node."),
            false => Ok(()),
        }
    }

    /// Nodes where preemption helps; where there is none, what was said of each.
    fn candidates(
        &self,
        cx: &PostFilterCycle<'_>,
        state: &CycleState,
        pod: &PodInfo,
    ) -> Result<Vec<Candidate>, NodeVerdicts> {
        let helped = |n: &&Arc<NodeInfo>| matches!(cx.verdicts.get(&n.name), Verdict::Unschedulable(_));
        let nodes: Vec<&Arc<NodeInfo>> = cx.snapshot.nodes.iter().filter(helped).collect();
        let budgets = self.sources.budgets.list();
        let wanted = (nodes.len() * MIN_CANDIDATES_PERCENT / 100).max(MIN_CANDIDATES).min(nodes.len());
        let offset =
            if nodes.is_empty() { 0 } else { sampan_world::random::below(nodes.len() as u64) as usize };
        let mut found = Vec::new();
        let mut verdicts = NodeVerdicts {
            absent: Verdict::unresolvable("Preemption is not helpful for scheduling"),
            ..NodeVerdicts::default()
        };
        for i in 0..nodes.len() {
            let node = nodes[(offset + i) % nodes.len()];
            match select_victims(cx, state, pod, node, &budgets) {
                Ok(candidate) => found.push(candidate),
                Err(verdict) => {
                    verdicts.nodes.insert(node.name.clone(), verdict);
                }
            }
            if found.len() >= wanted && found.iter().any(|c: &Candidate| c.violations == 0) {
                break;
            }
        }
        if found.is_empty() { Err(verdicts) } else { Ok(found) }
    }
}

fn is_leaving_by_preemption(pod: &PodInfo) -> bool {
    let conditions = pod.pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let preempted = |c: &k8s_openapi::api::core::v1::PodCondition| {
        c.type_ == "DisruptionTarget"
            && c.status == "True"
            && c.reason.as_deref() == Some("PreemptionByScheduler")
    };
    pod.terminating && conditions.into_iter().flatten().any(preempted)
}

/// Most important first: higher priority, then longer running.
fn sort_by_importance(pods: &mut [Arc<PodInfo>]) {
    pods.sort_by_cached_key(|p| (Reverse(p.priority), p.start_time()));
}

/// The fewest pods whose removal lets `pod` run on `node`.
fn select_victims(
    cx: &PostFilterCycle<'_>,
    state: &CycleState,
    pod: &PodInfo,
    node: &NodeInfo,
    budgets: &[Arc<PodDisruptionBudget>],
) -> Result<Candidate, Verdict> {
    let (mut node, mut state) = (node.clone(), state.clone());
    let mut potential: Vec<Arc<PodInfo>> =
        node.pods.iter().filter(|p| p.priority < pod.priority).cloned().collect();
    if potential.is_empty() {
        return Err(Verdict::unresolvable("No preemption victims found for incoming pod"));
    }
    for victim in &potential {
        node.remove_pod(&victim.uid);
        cx.framework.remove_pod(&mut state, pod, victim, &node);
    }
    if let Some(rejection) = cx.framework.filter_with_nominated(cx.snapshot, &state, pod, &node) {
        return Err(rejection.verdict);
    }
    sort_by_importance(&mut potential);
    let (violating, others) = split_by_budgets(potential, budgets);
    let (mut victims, mut violations) = (Vec::new(), 0);
    // spare as many as possible, those first whose budgets would be violated
    let marked = violating.into_iter().map(|p| (p, true)).chain(others.into_iter().map(|p| (p, false)));
    for (spared, violates) in marked {
        node.add_pod(spared.clone());
        cx.framework.add_pod(&mut state, pod, &spared, &node);
        if cx.framework.filter_with_nominated(cx.snapshot, &state, pod, &node).is_some() {
            node.remove_pod(&spared.uid);
            cx.framework.remove_pod(&mut state, pod, &spared, &node);
            violations += usize::from(violates);
            victims.push(spared);
        }
    }
    if victims.is_empty() {
        return Err(Verdict::Error(format!("expected at least one victim pod on node \"{}\"", node.name)));
    }
    sort_by_importance(&mut victims);
    Ok(Candidate { node: node.name, victims, violations })
}

/// Pods whose removal exceeds what their budgets allow, and the others; both in order.
fn split_by_budgets(
    pods: Vec<Arc<PodInfo>>,
    budgets: &[Arc<PodDisruptionBudget>],
) -> (Vec<Arc<PodInfo>>, Vec<Arc<PodInfo>>) {
    let mut allowed: Vec<i32> =
        budgets.iter().map(|b| b.status.as_ref().and_then(|s| s.disruptions_allowed).unwrap_or(0)).collect();
    pods.into_iter().partition(|pod| {
        let mut violates = false;
        for (budget, allowed) in budgets.iter().zip(&mut allowed) {
            let selector = Selector::of(budget.spec.as_ref().and_then(|s| s.selector.as_ref()));
            let covers = budget.metadata.namespace.as_deref() == Some(&*pod.namespace)
                && !pod.labels().is_empty()
                && !selector.is_empty()
                && selector.matches(pod.labels());
            let disrupted = budget.status.as_ref().and_then(|s| s.disrupted_pods.as_ref());
            if !covers || disrupted.is_some_and(|d| d.contains_key(&pod.name)) {
                continue;
            }
            *allowed -= 1;
            violates |= *allowed < 0;
        }
        violates
    })
}

/// The candidate that hurts least: fewest violated budgets, then the lowest highest priority, the lowest sum of
/// priorities, the fewest pods, and the latest start of the most important ones.
fn best(candidates: Vec<Candidate>) -> Option<Candidate> {
    candidates.into_iter().min_by_key(|c| {
        let highest = c.victims.iter().map(|v| v.priority).max().unwrap_or(i32::MIN);
        let sum: i64 = c.victims.iter().map(|v| i64::from(v.priority) + i64::from(i32::MAX) + 1).sum();
        let important = c.victims.iter().filter(|v| v.priority == highest);
        let earliest = important.map(|v| v.start_time()).min();
        (c.violations, highest, sum, c.victims.len(), Reverse(earliest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;
    use serde_json::json;

    fn with_priority(name: &str, priority: i32) -> Arc<PodInfo> {
        pod(
            name,
            json!({"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [], "priority": priority}}),
        )
    }

    #[test]
    fn the_candidate_that_hurts_least_is_chosen() {
        let candidate = |node: &str, priorities: &[i32], violations| Candidate {
            node: node.to_string(),
            victims: priorities.iter().map(|p| with_priority("v", *p)).collect(),
            violations,
        };
        for (candidates, wanted) in [
            (vec![candidate("a", &[1], 1), candidate("b", &[100], 0)], "b"),
            (vec![candidate("a", &[10], 0), candidate("b", &[5, 5, 5], 0)], "b"),
            (vec![candidate("a", &[5, 5], 0), candidate("b", &[5, 4], 0)], "b"),
            (vec![candidate("a", &[-1, -1], 0), candidate("b", &[-1], 0)], "b"),
        ] {
            assert_eq!(best(candidates).unwrap().node, wanted);
        }
    }

    #[test]
    fn budgets_count_each_victim() {
        let budget = json!({"metadata": {"name": "b", "namespace": "ns"},
            "spec": {"selector": {"matchLabels": {"app": "a"}}},
            "status": {"disruptionsAllowed": 1, "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1}});
        let budget = Arc::new(serde_json::from_value(budget).unwrap());
        let pods = vec![with_priority("x", 1), with_priority("y", 1)];
        let (violating, others) = split_by_budgets(pods, &[budget]);
        assert_eq!((violating.len(), others.len()), (1, 1));
        assert_eq!(others[0].name, "x");
    }
}
