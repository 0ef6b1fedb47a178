//! The scheduling framework: extension points as small traits, and how the plugins of one point are run.
//!
//! Upstream counterpart: staging/src/k8s.io/kube-scheduler/framework/interface.go and
//! pkg/scheduler/framework/runtime/framework.go. A verdict is a value, never an error; weights and order are those of
//! the registry. Deliberate difference: a plugin's queueing hints are one function over a typed event.
use std::any::{Any, TypeId};
use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;

pub mod event;
pub mod node_info;
pub mod pod_info;
pub mod resources;
pub mod selector;
pub mod snapshot;
pub mod verdict;

pub use event::{ClusterEvent, NodeChange, PodChange};
pub use node_info::NodeInfo;
pub use pod_info::PodInfo;
pub use resources::Resources;
pub use selector::Selector;
pub use snapshot::Snapshot;
pub use verdict::{NodeVerdicts, Verdict};

/// The highest score a plugin may give a node after normalising.
pub const MAX_NODE_SCORE: i64 = 100;

/// Names of nodes; what a PreFilter narrows the search to.
pub type NodeNames = BTreeSet<String>;

/// A plugin: its name, which points it takes part in, and what may help pods it rejected.
pub trait Plugin: Send + Sync {
    fn name(&self) -> &'static str;

    /// Whether `event` may make `pod` schedulable, which this plugin rejected.
    fn may_help(&self, _pod: &PodInfo, _event: &ClusterEvent) -> bool {
        false
    }

    fn as_pre_enqueue(&self) -> Option<&dyn PreEnqueue> {
        None
    }
    fn as_pre_filter(&self) -> Option<&dyn PreFilter> {
        None
    }
    fn as_filter(&self) -> Option<&dyn Filter> {
        None
    }
    fn as_post_filter(&self) -> Option<&dyn PostFilter> {
        None
    }
    fn as_pre_score(&self) -> Option<&dyn PreScore> {
        None
    }
    fn as_score(&self) -> Option<&dyn Score> {
        None
    }
    fn as_reserve(&self) -> Option<&dyn Reserve> {
        None
    }
    fn as_bind(&self) -> Option<&dyn Bind> {
        None
    }
}

/// Decides whether a pod may enter the active queue. Called with the queue locked: it must only look.
pub trait PreEnqueue: Send + Sync {
    fn pre_enqueue(&self, pod: &PodInfo) -> Verdict;
}

/// Looks at the pod once a cycle, before nodes are filtered.
pub trait PreFilter: Send + Sync {
    /// `Skip` leaves the plugin's Filter out; the names narrow the nodes that are looked at.
    fn pre_filter(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
    ) -> (Verdict, Option<NodeNames>);
    /// Changes what was computed as if `added` ran on `node`.
    fn add_pod(&self, _state: &mut CycleState, _pod: &PodInfo, _added: &PodInfo, _node: &NodeInfo) {}
    /// Changes what was computed as if `removed` no longer ran on `node`.
    fn remove_pod(&self, _state: &mut CycleState, _pod: &PodInfo, _removed: &PodInfo, _node: &NodeInfo) {}
}

/// Says whether a pod may run on a node.
pub trait Filter: Send + Sync {
    fn filter(&self, state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> Verdict;
}

/// Tries to make room for a pod that fits nowhere.
pub trait PostFilter: Send + Sync {
    fn post_filter(
        &self,
        cx: &PostFilterCycle<'_>,
        state: &CycleState,
        pod: &Arc<PodInfo>,
    ) -> PostFilterResult;
}

/// Prepares scoring; `Skip` leaves the plugin's Score out.
pub trait PreScore: Send + Sync {
    fn pre_score(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
        nodes: &[Arc<NodeInfo>],
    ) -> Verdict;
}

/// Ranks the nodes that passed.
pub trait Score: Send + Sync {
    fn score(&self, state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> i64;
    /// Brings the scores into 0..=100; `nodes` are in the scores' order.
    fn normalize(&self, _state: &CycleState, _scores: &mut [i64], _nodes: &[Arc<NodeInfo>]) {}
}

/// Told when a pod is assumed on a node, and when that comes to nothing.
pub trait Reserve: Send + Sync {
    fn reserve(&self, state: &mut CycleState, pod: &PodInfo, node: &str) -> Verdict;
    fn unreserve(&self, pod: &PodInfo, node: &str);
}

/// Binds a pod to its node; `Skip` leaves it to the next plugin.
#[async_trait]
pub trait Bind: Send + Sync {
    async fn bind(&self, pod: &PodInfo, node: &str) -> Verdict;
}

/// What a cycle works on.
pub struct Cycle<'a> {
    pub snapshot: &'a Snapshot,
}

/// What a PostFilter works on.
pub struct PostFilterCycle<'a> {
    pub snapshot: &'a Snapshot,
    pub framework: &'a Framework,
    pub verdicts: &'a NodeVerdicts,
}

/// What a PostFilter came to: `nominated` is `Some("")` to clear the nomination, `None` to leave it.
pub struct PostFilterResult {
    pub nominated: Option<String>,
    pub verdict: Verdict,
}

/// What plugins keep for the length of a cycle.
pub trait StateData: Any + Send + Sync {
    fn boxed(&self) -> Box<dyn StateData>;
    fn as_any(&self) -> &dyn Any;
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

impl<T: Any + Clone + Send + Sync> StateData for T {
    fn boxed(&self) -> Box<dyn StateData> {
        Box::new(self.clone())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// The plugins' data of one cycle, one value a type.
#[derive(Default)]
pub struct CycleState {
    data: Vec<(TypeId, Box<dyn StateData>)>,
    /// Plugins whose Filter is left out in this cycle.
    skip_filter: PluginSet,
    skip_score: PluginSet,
}

impl Clone for CycleState {
    fn clone(&self) -> Self {
        let data = self.data.iter().map(|(id, d)| (*id, (**d).boxed())).collect();
        Self { data, skip_filter: self.skip_filter, skip_score: self.skip_score }
    }
}

impl CycleState {
    pub fn write<T: StateData + Clone>(&mut self, value: T) {
        let id = TypeId::of::<T>();
        self.data.retain(|(i, _)| *i != id);
        self.data.push((id, Box::new(value)));
    }

    pub fn read<T: StateData>(&self) -> Option<&T> {
        let id = TypeId::of::<T>();
        let (_, data) = self.data.iter().find(|(i, _)| *i == id)?;
        (**data).as_any().downcast_ref()
    }

    pub fn get_mut<T: StateData>(&mut self) -> Option<&mut T> {
        let id = TypeId::of::<T>();
        let (_, data) = self.data.iter_mut().find(|(i, _)| *i == id)?;
        (**data).as_any_mut().downcast_mut()
    }
}

/// A set of plugins by their place in the registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PluginSet(u64);

impl PluginSet {
    pub fn insert(&mut self, plugin: usize) {
        self.0 |= 1 << plugin;
    }
    pub fn contains(self, plugin: usize) -> bool {
        self.0 & (1 << plugin) != 0
    }
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..64).filter(move |i| self.contains(*i))
    }
}

/// The plugins in their order, and their weights.
pub struct Framework {
    plugins: Vec<(Box<dyn Plugin>, i64)>,
    filters: Vec<usize>,
}

/// A rejection, with the plugin that spoke it.
pub struct Rejection {
    pub plugin: usize,
    pub verdict: Verdict,
}

impl Framework {
    pub fn new(plugins: Vec<(Box<dyn Plugin>, i64)>) -> Self {
        let filters = (0..plugins.len()).filter(|i| plugins[*i].0.as_filter().is_some()).collect();
        Self { plugins, filters }
    }

    pub fn name_of(&self, plugin: usize) -> &'static str {
        self.plugins.get(plugin).map_or("", |(p, _)| p.name())
    }

    /// The first plugin that keeps the pod out of the active queue.
    pub fn pre_enqueue(&self, pod: &PodInfo) -> Option<Rejection> {
        self.plugins.iter().enumerate().find_map(|(plugin, (p, _))| {
            let verdict = p.as_pre_enqueue()?.pre_enqueue(pod);
            (!verdict.is_success()).then_some(Rejection { plugin, verdict })
        })
    }

    /// Whether one of `rejectors` thinks that `event` may help `pod`.
    pub fn may_help(&self, rejectors: PluginSet, pod: &PodInfo, event: &ClusterEvent) -> bool {
        rejectors.iter().any(|i| self.plugins.get(i).is_some_and(|(p, _)| p.may_help(pod, event)))
    }

    /// The nodes to look at (`None` is all) and the plugins that named them, or the rejection.
    pub fn pre_filter(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
    ) -> Result<(Option<NodeNames>, Vec<&'static str>), Rejection> {
        let mut names: Option<NodeNames> = None;
        let mut namers: Vec<&'static str> = Vec::new();
        let mut rejected: Option<Rejection> = None;
        for (plugin, (p, _)) in self.plugins.iter().enumerate() {
            let Some(point) = p.as_pre_filter() else { continue };
            let (verdict, only) = point.pre_filter(cx, state, pod);
            match verdict {
                Verdict::Skip => {
                    state.skip_filter.insert(plugin);
                    continue;
                }
                Verdict::Success => {}
                // another plugin may still say that nothing helps, which saves a vain preemption
                Verdict::Unschedulable(_) => {
                    rejected = Some(Rejection { plugin, verdict });
                    continue;
                }
                verdict => return Err(Rejection { plugin, verdict }),
            }
            if let Some(only) = only {
                namers.push(p.name());
                names = Some(match names {
                    Some(names) => names.intersection(&only).cloned().collect(),
                    None => only,
                });
            }
            if names.as_ref().is_some_and(BTreeSet::is_empty) {
                namers.sort_unstable();
                let message = match namers.as_slice() {
                    [one] => format!("node(s) didn't satisfy plugin {one}"),
                    all => format!("node(s) didn't satisfy plugin(s) [{}] simultaneously", all.join(" ")),
                };
                return Err(Rejection { plugin, verdict: Verdict::unresolvable(message) });
            }
        }
        match rejected {
            Some(rejected) => Err(rejected),
            None => Ok((names, namers)),
        }
    }

    /// The first rejection of the node, if any.
    pub fn filter(&self, state: &CycleState, pod: &PodInfo, node: &NodeInfo) -> Option<Rejection> {
        for &plugin in &self.filters {
            if state.skip_filter.contains(plugin) {
                continue;
            }
            let verdict = match self.plugins[plugin].0.as_filter() {
                Some(point) => point.filter(state, pod, node),
                None => continue,
            };
            if !verdict.is_success() {
                return Some(Rejection { plugin, verdict });
            }
        }
        None
    }

    /// Filters twice where pods of equal or higher priority are nominated to the node: with them, and without, as some
    /// rules (pod affinity) may hold only with pods that are not there yet.
    pub fn filter_with_nominated(
        &self,
        snapshot: &Snapshot,
        state: &CycleState,
        pod: &PodInfo,
        node: &NodeInfo,
    ) -> Option<Rejection> {
        if let Some(nominated) = snapshot.nominated.get(&node.name) {
            let (mut with, mut with_state) = (node.clone(), state.clone());
            let mut added = false;
            for other in nominated.iter().filter(|o| o.priority >= pod.priority && o.uid != pod.uid) {
                with.add_pod(other.clone());
                self.add_pod(&mut with_state, pod, other, &with);
                added = true;
            }
            if added && let Some(rejection) = self.filter(&with_state, pod, &with) {
                return Some(rejection);
            }
        }
        self.filter(state, pod, node)
    }

    pub fn add_pod(&self, state: &mut CycleState, pod: &PodInfo, added: &PodInfo, node: &NodeInfo) {
        for (plugin, (p, _)) in self.plugins.iter().enumerate() {
            if let Some(point) = p.as_pre_filter().filter(|_| !state.skip_filter.contains(plugin)) {
                point.add_pod(state, pod, added, node);
            }
        }
    }

    pub fn remove_pod(&self, state: &mut CycleState, pod: &PodInfo, removed: &PodInfo, node: &NodeInfo) {
        for (plugin, (p, _)) in self.plugins.iter().enumerate() {
            if let Some(point) = p.as_pre_filter().filter(|_| !state.skip_filter.contains(plugin)) {
                point.remove_pod(state, pod, removed, node);
            }
        }
    }

    /// The first plugin's success, or all that the plugins said.
    pub fn post_filter(
        &self,
        cx: &PostFilterCycle<'_>,
        state: &CycleState,
        pod: &Arc<PodInfo>,
    ) -> PostFilterResult {
        let mut reasons = Vec::new();
        let mut nominated = None;
        for (plugin, _) in &self.plugins {
            let Some(point) = plugin.as_post_filter() else { continue };
            let result = point.post_filter(cx, state, pod);
            if result.verdict.is_success() {
                return result;
            }
            nominated = result.nominated.or(nominated);
            reasons.extend(result.verdict.into_reasons());
        }
        PostFilterResult { nominated, verdict: Verdict::Unschedulable(reasons) }
    }

    /// The nodes' weighted sums, in their order.
    pub fn score(
        &self,
        cx: &Cycle<'_>,
        state: &mut CycleState,
        pod: &PodInfo,
        nodes: &[Arc<NodeInfo>],
    ) -> Result<Vec<i64>, Verdict> {
        for (plugin, (p, _)) in self.plugins.iter().enumerate() {
            let Some(point) = p.as_pre_score() else { continue };
            match point.pre_score(cx, state, pod, nodes) {
                Verdict::Success => {}
                Verdict::Skip => state.skip_score.insert(plugin),
                verdict => return Err(verdict),
            }
        }
        let mut sums = vec![0; nodes.len()];
        let mut scores = Vec::with_capacity(nodes.len());
        for (plugin, (p, weight)) in self.plugins.iter().enumerate() {
            let Some(point) = p.as_score().filter(|_| !state.skip_score.contains(plugin)) else { continue };
            scores.clear();
            scores.extend(nodes.iter().map(|node| point.score(state, pod, node)));
            point.normalize(state, &mut scores, nodes);
            sums.iter_mut().zip(&scores).for_each(|(sum, score)| *sum += score * weight);
        }
        Ok(sums)
    }

    pub fn reserve(&self, state: &mut CycleState, pod: &PodInfo, node: &str) -> Option<Rejection> {
        for (plugin, (p, _)) in self.plugins.iter().enumerate() {
            let Some(point) = p.as_reserve() else { continue };
            let verdict = point.reserve(state, pod, node);
            if !verdict.is_success() {
                self.unreserve(pod, node);
                return Some(Rejection { plugin, verdict });
            }
        }
        None
    }

    pub fn unreserve(&self, pod: &PodInfo, node: &str) {
        for (plugin, _) in self.plugins.iter().rev() {
            if let Some(point) = plugin.as_reserve() {
                point.unreserve(pod, node);
            }
        }
    }

    pub async fn bind(&self, pod: &PodInfo, node: &str) -> Verdict {
        for (plugin, _) in &self.plugins {
            let Some(point) = plugin.as_bind() else { continue };
            match point.bind(pod, node).await {
                Verdict::Skip => {}
                verdict => return verdict,
            }
        }
        Verdict::Error("no plugin binds pods".to_string())
    }
}

/// Scales the scores so that the highest is 100; `reverse` makes the lowest the best.
pub fn default_normalize(scores: &mut [i64], reverse: bool) {
    let max = scores.iter().copied().max().unwrap_or(0);
    for score in scores {
        *score = match (max, reverse) {
            (0, true) => MAX_NODE_SCORE,
            (0, false) => *score,
            (_, true) => MAX_NODE_SCORE - MAX_NODE_SCORE * *score / max,
            (_, false) => MAX_NODE_SCORE * *score / max,
        };
    }
}
