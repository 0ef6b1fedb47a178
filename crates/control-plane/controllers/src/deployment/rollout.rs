//! The two strategies, scaling, and the limit of the history. Upstream counterpart: pkg/controller/deployment/rolling.go,
//! recreate.go, sync.go.
use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use kube::api::{DeleteParams, PostParams};

use super::arithmetic::{
    DESIRED_REPLICAS, MAX_REPLICAS, available, is_saturated, max_scaled_down, max_surge, max_unavailable,
    new_size, proportional_sizes, replicas, scaled_down, size, sizes, strategy, without_unhealthy,
};
use super::revision::revision;
use super::{DeploymentController, ReplicaSets, progress};
use crate::controller::{SyncError, SyncResult};
use crate::controller_ref::{is_deleting, name, uid};
use crate::{api_error, pod_state};

impl DeploymentController {
    pub(super) async fn rolling_update(
        &self,
        deployment: &mut Deployment,
        sets: Vec<ReplicaSet>,
    ) -> SyncResult {
        let mut sets = self.with_revisions(deployment, sets, true).await?;
        let Some(new) = sets.new.as_ref() else { return Ok(()) };
        let target = match size(new) {
            n if n >= replicas(deployment) => replicas(deployment),
            n => new_size(deployment, sizes(sets.all()), n),
        };
        if target != size(new) {
            sets.new = Some(self.resize(deployment, new, target, false).await?);
            return self.sync_rollout_status(deployment, &sets).await;
        }
        if self.shrink_old(deployment, &mut sets).await? {
            return self.sync_rollout_status(deployment, &sets).await;
        }
        self.finish(deployment, &sets).await
    }

    /// Cleans up a complete rollout and writes the status.
    async fn finish(&self, deployment: &mut Deployment, sets: &ReplicaSets) -> SyncResult {
        if progress::is_complete(deployment, &deployment.status.clone().unwrap_or_default()) {
            self.clean_up(deployment, &sets.old).await?;
        }
        self.sync_rollout_status(deployment, sets).await
    }

    /// Takes from the old replica sets what availability allows, first what is not available anyway.
    async fn shrink_old(&self, deployment: &Deployment, sets: &mut ReplicaSets) -> Result<bool, SyncError> {
        let Some(new) = sets.new.as_ref() else { return Ok(false) };
        let most = max_scaled_down(deployment, sizes(sets.all()), new);
        if sizes(&sets.old) == 0 || most <= 0 {
            return Ok(false);
        }
        let targets = without_unhealthy(&sets.old, most);
        let cleaned = self.resize_all(deployment, &mut sets.old, &targets).await?;
        let min_available = replicas(deployment) - max_unavailable(deployment);
        let spare = sets.all().map(available).sum::<i32>() - min_available;
        if spare <= 0 {
            return Ok(cleaned);
        }
        let targets = scaled_down(&sets.old, spare);
        Ok(self.resize_all(deployment, &mut sets.old, &targets).await? || cleaned)
    }

    async fn resize_all(
        &self,
        deployment: &Deployment,
        sets: &mut [ReplicaSet],
        targets: &[i32],
    ) -> Result<bool, SyncError> {
        let mut changed = false;
        for (set, target) in sets.iter_mut().zip(targets) {
            if size(set) != *target {
                *set = self.resize(deployment, set, *target, false).await?;
                changed = true;
            }
        }
        Ok(changed)
    }

    pub(super) async fn recreate(&self, deployment: &mut Deployment, all: Vec<ReplicaSet>) -> SyncResult {
        let mut sets = self.with_revisions(deployment, all.clone(), false).await?;
        let zeros = vec![0; sets.old.len()];
        if self.resize_all(deployment, &mut sets.old, &zeros).await? || self.old_pods_running(&sets) {
            return self.sync_rollout_status(deployment, &sets).await;
        }
        if sets.new.is_none() {
            sets = self.with_revisions(deployment, all, true).await?;
        }
        let Some(new) = sets.new.as_ref() else { return Ok(()) };
        if size(new) != replicas(deployment) {
            sets.new = Some(self.resize(deployment, new, replicas(deployment), false).await?);
        }
        self.finish(deployment, &sets).await
    }

    fn old_pods_running(&self, sets: &ReplicaSets) -> bool {
        let reported = sets.old.iter().any(|s| s.status.as_ref().is_some_and(|s| s.replicas > 0));
        reported
            || sets
                .old
                .iter()
                .any(|s| self.pods.controlled_by(uid(s)).iter().any(|p| !pod_state::is_terminal(p)))
    }

    /// Sets a replica set's size and the annotations that tell what it was made for.
    async fn resize(
        &self,
        deployment: &Deployment,
        set: &ReplicaSet,
        target: i32,
        even_if_same: bool,
    ) -> Result<ReplicaSet, SyncError> {
        let wanted = replicas(deployment);
        let annotations = [
            (DESIRED_REPLICAS, wanted.to_string()),
            (MAX_REPLICAS, (wanted + max_surge(deployment)).to_string()),
        ];
        let own = set.metadata.annotations.as_ref();
        let annotated = annotations.iter().all(|(k, v)| own.and_then(|a| a.get(*k)) == Some(v));
        let before = size(set);
        if before == target && (annotated || !even_if_same) {
            return Ok(set.clone());
        }
        let mut changed = set.clone();
        if let Some(spec) = changed.spec.as_mut() {
            spec.replicas = Some(target);
        }
        let own = changed.metadata.annotations.get_or_insert_with(BTreeMap::new);
        own.extend(annotations.into_iter().map(|(k, v)| (k.to_string(), v)));
        let updated = self.sets_api(deployment).replace(name(set), &PostParams::default(), &changed).await?;
        if before != target {
            let way = if before < target { "up" } else { "down" };
            let message = format!("Scaled {way} replica set {} from {before} to {target}", name(set));
            self.events.normal(deployment, "ScalingReplicaSet", message);
        }
        Ok(updated)
    }

    /// Follows a change of the deployment's size without hastening a rollout.
    pub(super) async fn scale(&self, deployment: &Deployment, sets: &mut ReplicaSets) -> SyncResult {
        let wanted = replicas(deployment);
        let active: Vec<&ReplicaSet> = sets.all().filter(|s| size(s) > 0).collect();
        // the only active one, or the newest where there is none
        let single = match active.as_slice() {
            [] => sets.new.as_ref().or(sets.old.last()),
            [only] => Some(*only),
            _ => None,
        };
        if let Some(set) = single.cloned() {
            let resized = self.resize(deployment, &set, wanted, false).await?;
            replace(sets, resized);
            return Ok(());
        }
        if active.is_empty() {
            return Ok(());
        }
        if sets.new.as_ref().is_some_and(|new| is_saturated(deployment, new)) {
            let zeros = vec![0; sets.old.len()];
            self.resize_all(deployment, &mut sets.old, &zeros).await?;
            return Ok(());
        }
        if strategy(deployment) == "RollingUpdate" {
            let mut active: Vec<ReplicaSet> = active.into_iter().cloned().collect();
            let targets = proportional_sizes(deployment, &mut active);
            for (set, target) in active.iter().zip(targets) {
                let resized = self.resize(deployment, set, target, true).await?;
                replace(sets, resized);
            }
        }
        Ok(())
    }

    /// Deletes the oldest revisions beyond the limit, as far as they have no pods.
    pub(super) async fn clean_up(&self, deployment: &Deployment, old: &[ReplicaSet]) -> SyncResult {
        let Some(limit) =
            deployment.spec.as_ref().and_then(|s| s.revision_history_limit).filter(|l| *l != i32::MAX)
        else {
            return Ok(());
        };
        for set in beyond_limit(old, limit) {
            match self.sets_api(deployment).delete(name(set), &DeleteParams::default()).await {
                Err(e) if !api_error::is_not_found(&e) => return Err(e.into()),
                _ => {}
            }
        }
        Ok(())
    }
}

fn beyond_limit(old: &[ReplicaSet], limit: i32) -> Vec<&ReplicaSet> {
    let mut alive: Vec<&ReplicaSet> = old.iter().filter(|s| !is_deleting(*s)).collect();
    let excess = alive.len().saturating_sub(limit.max(0) as usize);
    alive.sort_by_key(|s| (revision(s), s.metadata.creation_timestamp.clone()));
    alive.truncate(excess);
    alive.retain(|s| {
        let status = s.status.clone().unwrap_or_default();
        status.replicas == 0 && size(s) == 0 && s.metadata.generation <= status.observed_generation
    });
    alive
}

fn replace(sets: &mut ReplicaSets, set: ReplicaSet) {
    if let Some(slot) = sets.old.iter_mut().chain(&mut sets.new).find(|s| uid(*s) == uid(&set)) {
        *slot = set;
    }
}

#[cfg(test)]
mod tests {
    use super::super::arithmetic::tests::set;
    use super::*;

    #[test]
    fn history_keeps_the_newest_and_what_has_pods() {
        let with = |name: &str, revision: &str, size| {
            let mut s = set(name, size, size);
            s.metadata.annotations =
                Some([(super::super::revision::REVISION.to_string(), revision.to_string())].into());
            s
        };
        let old = [with("c", "3", 0), with("a", "1", 0), with("b", "2", 1)];
        let names =
            |limit| beyond_limit(&old, limit).iter().map(|s| name(*s).to_string()).collect::<Vec<_>>();
        assert_eq!(names(2), ["a"]);
        assert_eq!(names(0), ["a", "c"]);
        assert!(names(3).is_empty());
    }
}
