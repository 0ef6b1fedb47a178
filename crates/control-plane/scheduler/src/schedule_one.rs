//! One pod's way to a node. Upstream counterpart: pkg/scheduler/schedule_one.go.
//!
//! Finding a node is synchronous and alone; binding goes on beside it, as the pod counts as placed from then on.
use std::sync::Arc;

use crate::cache::Cache;
use crate::event_recorder::{EventRecorder, NORMAL, WARNING};
use crate::framework::{ClusterEvent, PodInfo};
use crate::framework::{
    Cycle, CycleState, Framework, NodeInfo, NodeVerdicts, PluginSet, PostFilterCycle, Rejection, Snapshot,
    Verdict,
};
use crate::queue::{Queue, QueuedPod};
use crate::sources::Sources;
use crate::status_writer::StatusWriter;

/// Fewer nodes than this are all looked at.
const MIN_FEASIBLE_NODES: usize = 100;
const MIN_FEASIBLE_PERCENT: usize = 5;

/// The loop's own state.
pub struct Cycles {
    pub framework: Arc<Framework>,
    pub cache: Arc<Cache>,
    pub queue: Arc<Queue>,
    pub sources: Sources,
    pub recorder: EventRecorder,
    pub statuses: Arc<StatusWriter>,
}

/// What changes from cycle to cycle.
#[derive(Default)]
pub struct Progress {
    pub snapshot: Snapshot,
    /// Where the next search for nodes starts, so that all get their turn.
    next_start: usize,
}

/// Why no node was found.
enum Failure {
    NoNodes,
    Unfit { message: String, rejectors: PluginSet, nominated: Option<String> },
    Error(String),
}

/// A pod that was placed and is to be bound.
pub struct Placement {
    pub pod: QueuedPod,
    pub node: String,
}

impl Cycles {
    /// Tries one pod; the caller binds what comes back.
    pub fn schedule(&self, progress: &mut Progress, pod: QueuedPod) -> Option<Placement> {
        let info = pod.info.clone();
        if info.terminating || self.cache.is_assumed(&info.uid) {
            self.queue.done();
            return None;
        }
        self.cache.update(&mut progress.snapshot);
        match self.find_node(progress, &info) {
            Ok((node, mut state)) => {
                if !self.cache.assume(&info, &node) {
                    self.queue.done();
                    return None;
                }
                self.cache.nominate(&info, "");
                if let Some(rejection) = self.framework.reserve(&mut state, &info, &node) {
                    self.cache.forget(&info.uid);
                    let mut rejectors = PluginSet::default();
                    rejectors.insert(rejection.plugin);
                    let message = rejection.verdict.message();
                    self.fail(pod, Failure::Unfit { message, rejectors, nominated: Some(String::new()) });
                    return None;
                }
                self.queue.done();
                Some(Placement { pod, node })
            }
            Err(failure) => {
                self.fail(pod, failure);
                None
            }
        }
    }

    /// Binds a placed pod, or takes everything back.
    pub async fn bind(&self, placement: Placement) {
        let Placement { mut pod, node } = placement;
        let info = pod.info.clone();
        match self.framework.bind(&info, &node).await {
            Verdict::Success => {
                let note = format!("Successfully assigned {}/{} to {node}", info.namespace, info.name);
                self.recorder.record(&info, NORMAL, "Scheduled", "Binding", note);
            }
            verdict => {
                self.framework.unreserve(&info, &node);
                self.cache.forget(&info.uid);
                self.queue.on_event(&ClusterEvent::AssignedPodDeleted(info.clone()));
                // it may be gone or bound meanwhile
                let Some(latest) = self.sources.pods.get(&info.namespace, &info.name) else { return };
                let latest = PodInfo::new(latest);
                if latest.uid == info.uid && latest.node_name().is_empty() {
                    pod.info = latest;
                    self.fail(pod, Failure::Error(verdict.message()));
                }
            }
        }
    }

    fn fail(&self, pod: QueuedPod, failure: Failure) {
        let (message, reason, nominated, back) = match failure {
            Failure::NoNodes => {
                let message = "no nodes available to schedule pods".to_string();
                (message, "Unschedulable", Some(String::new()), self.queue.set_aside(pod))
            }
            Failure::Unfit { message, rejectors, nominated } => {
                (message, "Unschedulable", nominated, self.queue.put_back(pod, rejectors))
            }
            Failure::Error(message) => {
                let back = self.queue.put_back(pod, PluginSet::default());
                (message, "SchedulerError", Some(String::new()), back)
            }
        };
        let Some(info) = back else { return };
        if let Some(node) = &nominated {
            self.cache.nominate(&info, node);
        }
        self.recorder.record(&info, WARNING, "FailedScheduling", "Scheduling", message.clone());
        self.statuses.write(&info, Some((reason, message)), nominated);
    }

    fn find_node(
        &self,
        progress: &mut Progress,
        pod: &Arc<PodInfo>,
    ) -> Result<(String, CycleState), Failure> {
        let mut state = CycleState::default();
        let nodes = progress.snapshot.nodes.len();
        if nodes == 0 {
            return Err(Failure::NoNodes);
        }
        let mut verdicts = NodeVerdicts::default();
        let mut rejectors = PluginSet::default();
        let mut pre_filter = String::new();
        let feasible = self.feasible_nodes(progress, &mut state, pod, &mut verdicts, &mut rejectors);
        let feasible = match feasible {
            Ok(feasible) => feasible,
            Err(Rejection { verdict: Verdict::Error(message), .. }) => return Err(Failure::Error(message)),
            Err(rejection) => {
                rejectors.insert(rejection.plugin);
                pre_filter = rejection.verdict.message();
                verdicts.absent = rejection.verdict;
                Vec::new()
            }
        };
        let snapshot = &progress.snapshot;
        match feasible.as_slice() {
            [] => {
                let cycle = PostFilterCycle { snapshot, framework: &self.framework, verdicts: &verdicts };
                let result = self.framework.post_filter(&cycle, &state, pod);
                let post_filter = result.verdict.message();
                let message = verdicts.message(nodes, &pre_filter, &post_filter);
                Err(Failure::Unfit { message, rejectors, nominated: result.nominated })
            }
            [one] => Ok((one.name.clone(), state)),
            _ => {
                let scores = self.framework.score(&Cycle { snapshot }, &mut state, pod, &feasible);
                let scores = scores.map_err(|v| Failure::Error(v.message()))?;
                let max = scores.iter().copied().max().unwrap_or(0);
                let best: Vec<usize> = (0..scores.len()).filter(|i| scores[*i] == max).collect();
                let pick = best[sampan_world::random::below(best.len() as u64) as usize];
                Ok((feasible[pick].name.clone(), state))
            }
        }
    }

    fn feasible_nodes(
        &self,
        progress: &mut Progress,
        state: &mut CycleState,
        pod: &PodInfo,
        verdicts: &mut NodeVerdicts,
        rejectors: &mut PluginSet,
    ) -> Result<Vec<Arc<NodeInfo>>, Rejection> {
        let Progress { snapshot, next_start } = progress;
        let (names, namers) = self.framework.pre_filter(&Cycle { snapshot }, state, pod)?;
        let nominated = self.cache.nomination_of(&pod.uid);
        let nominated = nominated.as_deref().unwrap_or(pod.nominated_node_name());
        if let Some(node) = snapshot.get(nominated)
            && self.framework.filter_with_nominated(snapshot, state, pod, node).is_none()
        {
            return Ok(vec![node.clone()]);
        }
        let nodes: std::borrow::Cow<'_, [Arc<NodeInfo>]> = match &names {
            None => snapshot.nodes.as_slice().into(),
            Some(names) => {
                let reason = format!("node(s) didn't satisfy plugin(s) [{}]", namers.join(" "));
                verdicts.absent = Verdict::unresolvable(reason);
                names.iter().filter_map(|n| snapshot.get(n).cloned()).collect()
            }
        };
        let wanted = nodes_to_find(nodes.len());
        let mut feasible = Vec::with_capacity(wanted.min(nodes.len()));
        let mut looked_at = 0;
        for i in 0..nodes.len() {
            let node = &nodes[(*next_start + i) % nodes.len()];
            looked_at += 1;
            match self.framework.filter_with_nominated(snapshot, state, pod, node) {
                None => feasible.push(node.clone()),
                Some(rejection) if matches!(rejection.verdict, Verdict::Error(_)) => return Err(rejection),
                Some(rejection) => {
                    rejectors.insert(rejection.plugin);
                    verdicts.nodes.insert(node.name.clone(), rejection.verdict);
                }
            }
            if feasible.len() >= wanted {
                break;
            }
        }
        *next_start = (*next_start + looked_at) % snapshot.nodes.len().max(1);
        if names.is_some() {
            // what names nodes also rejects the others
            (0..64)
                .filter(|i| namers.contains(&self.framework.name_of(*i)))
                .for_each(|i| rejectors.insert(i));
        }
        Ok(feasible)
    }
}

/// After how many feasible nodes the search ends: all of few, 50 % of hundreds, down to 5 % of thousands.
fn nodes_to_find(nodes: usize) -> usize {
    if nodes < MIN_FEASIBLE_NODES {
        return nodes;
    }
    let percent = 50usize.saturating_sub(nodes / 125).max(MIN_FEASIBLE_PERCENT);
    (nodes * percent / 100).max(MIN_FEASIBLE_NODES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_of_more_nodes_are_looked_at() {
        for (nodes, wanted) in [(3, 3), (99, 99), (100, 100), (400, 188), (1000, 420), (6000, 300)] {
            assert_eq!(nodes_to_find(nodes), wanted, "{nodes}");
        }
    }
}
