//! Fills ClusterRoles with an aggregationRule from the roles it selects. Upstream counterpart:
//! pkg/controller/clusterroleaggregation.
use std::sync::Arc;

use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use sampan_client::{Informer, WorkQueue};
use serde_json::json;

use crate::Scope;
use crate::controller::{Controller, Descriptor, SyncResult, run};
use crate::controller_ref::name;
use crate::label_selector::{labels_of, matches};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "clusterrole-aggregation-controller",
    service_account: "clusterrole-aggregation-controller",
    component: "clusterrole-aggregation-controller",
    build: |scope| run(ClusterRoleAggregationController::new(&scope)),
};

struct ClusterRoleAggregationController {
    client: Client,
    roles: Informer<ClusterRole>,
    queue: WorkQueue<String>,
}

impl ClusterRoleAggregationController {
    fn new(scope: &Scope) -> Arc<Self> {
        let roles: Informer<ClusterRole> = scope.informers.of();
        let this = Arc::new(Self { client: scope.client.clone(), roles, queue: WorkQueue::new() });
        let me = this.clone();
        // any role may be part of any aggregate
        this.roles.on_event(move |_| me.all().into_iter().for_each(|r| me.queue.add(r)));
        this
    }
}

/// The rules of all roles that `role` selects, each once, in the order of the roles' names.
fn aggregated(role: &ClusterRole, all: &[Arc<ClusterRole>]) -> Option<Vec<PolicyRule>> {
    let selectors = role.aggregation_rule.as_ref()?.cluster_role_selectors.as_deref().unwrap_or_default();
    let mut sorted: Vec<&Arc<ClusterRole>> = all.iter().filter(|r| name(&***r) != name(role)).collect();
    sorted.sort_by_key(|r| name(&***r).to_string());
    let mut rules: Vec<PolicyRule> = Vec::new();
    for selector in selectors {
        let selected = sorted.iter().filter(|r| matches(Some(selector), labels_of(&r.metadata.labels)));
        for rule in selected.flat_map(|r| r.rules.iter().flatten()) {
            if !rules.contains(rule) {
                rules.push(rule.clone());
            }
        }
    }
    Some(rules)
}

impl Controller for ClusterRoleAggregationController {
    type Key = String;
    const WORKERS: usize = 1;

    fn queue(&self) -> &WorkQueue<String> {
        &self.queue
    }

    async fn synced(&self) {
        self.roles.synced().await;
    }

    fn all(&self) -> Vec<String> {
        let roles = self.roles.list();
        roles.iter().filter(|r| r.aggregation_rule.is_some()).map(|r| name(&**r).to_string()).collect()
    }

    async fn sync(&self, key: String) -> SyncResult {
        let Some(role) = self.roles.get("", &key) else { return Ok(()) };
        let Some(rules) = aggregated(&role, &self.roles.list()) else { return Ok(()) };
        if role.rules.as_deref().unwrap_or_default() == rules {
            return Ok(());
        }
        let patch = json!({"metadata": {"resourceVersion": role.metadata.resource_version}, "rules": rules});
        let api: Api<ClusterRole> = Api::all(self.client.clone());
        api.patch(&key, &PatchParams::default(), &Patch::Merge(&patch)).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_joined_once() {
        let role = |name: &str, label: &str, verb: &str| -> Arc<ClusterRole> {
            let role =
                json!({"metadata": {"name": name, "labels": {"to": label}}, "rules": [{"verbs": [verb]}]});
            Arc::new(serde_json::from_value(role).unwrap())
        };
        let sum: ClusterRole = serde_json::from_value(json!({"metadata": {"name": "sum"},
            "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"to": "sum"}}]}}))
        .unwrap();
        let all = [
            role("b", "sum", "get"),
            role("a", "sum", "list"),
            role("c", "sum", "get"),
            role("d", "x", "all"),
        ];
        let verbs: Vec<String> = aggregated(&sum, &all).unwrap().into_iter().flat_map(|r| r.verbs).collect();
        assert_eq!(verbs, ["list", "get"]);
        assert!(aggregated(&all[0], &all).is_none());
    }
}
