//! The new replica set, its revision and annotations. Upstream counterpart: pkg/controller/deployment/sync.go.
use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;

use super::arithmetic::{DESIRED_REPLICAS, MAX_REPLICAS, max_surge, new_size, replicas, sizes};
use super::{DeploymentController, ReplicaSets, progress};
use crate::controller::SyncError;
use crate::controller_ref::{controller_reference, is_controlled_by, name, namespace, uid};
use crate::{api_error, template_hash};

pub const POD_TEMPLATE_HASH: &str = "pod-template-hash";
pub const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const REVISION_HISTORY_CHARS: usize = 2000;

/// Annotations that a deployment does not hand down.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
    "deprecated.deployment.rollback.to",
];

pub fn revision(set: &ReplicaSet) -> i64 {
    set.metadata.annotations.as_ref().and_then(|a| a.get(REVISION)).and_then(|r| r.parse().ok()).unwrap_or(0)
}

/// Whether two templates are the same but for the hash label.
fn same_template(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    let without_hash = |t: &PodTemplateSpec| {
        let mut t = t.clone();
        let metadata = t.metadata.get_or_insert_with(ObjectMeta::default);
        let mut labels = metadata.labels.take().unwrap_or_default();
        labels.remove(POD_TEMPLATE_HASH);
        metadata.labels = (!labels.is_empty()).then_some(labels);
        metadata.annotations = metadata.annotations.take().filter(|a| !a.is_empty());
        metadata.creation_timestamp = None;
        t
    };
    without_hash(a) == without_hash(b)
}

/// Splits a deployment's replica sets into the oldest with its template, and the others.
fn split(deployment: &Deployment, mut sets: Vec<ReplicaSet>) -> ReplicaSets {
    let created = |s: &ReplicaSet| (s.metadata.creation_timestamp.clone(), s.metadata.name.clone());
    sets.sort_by_key(created);
    let template = deployment.spec.as_ref().map(|s| &s.template);
    let is_new = |s: &ReplicaSet| {
        let own = s.spec.as_ref().and_then(|s| s.template.as_ref());
        own.zip(template).is_some_and(|(a, b)| same_template(a, b))
    };
    let new = sets.iter().position(is_new).map(|i| sets.remove(i));
    ReplicaSets { new, old: sets }
}

/// Gives a replica set the annotations of its deployment and its revision; tells whether anything changed.
fn annotate(deployment: &Deployment, set: &mut ReplicaSet, new_revision: i64, exists: bool) -> bool {
    let annotations = set.metadata.annotations.get_or_insert_with(BTreeMap::new);
    let before = annotations.clone();
    for (k, v) in deployment.metadata.annotations.iter().flatten() {
        if !NOT_COPIED.contains(&k.as_str()) {
            annotations.insert(k.clone(), v.clone());
        }
    }
    let old_revision = annotations.get(REVISION).cloned();
    let old_number = old_revision.as_deref().map_or(Some(0), |r| r.parse::<i64>().ok());
    let Some(old_number) = old_number else { return false };
    if old_number < new_revision {
        annotations.insert(REVISION.to_string(), new_revision.to_string());
        if let Some(old) = old_revision {
            let history = annotations.get(REVISION_HISTORY).map(String::as_str).unwrap_or_default();
            if let Some(longer) = longer_history(history, &old) {
                annotations.insert(REVISION_HISTORY.to_string(), longer);
            }
        }
    }
    if !exists {
        let wanted = replicas(deployment);
        annotations.insert(DESIRED_REPLICAS.to_string(), wanted.to_string());
        annotations.insert(MAX_REPLICAS.to_string(), (wanted + max_surge(deployment)).to_string());
    }
    *annotations != before
}

/// `history` with `revision` at its end, shortened from its start to the limit.
fn longer_history(history: &str, revision: &str) -> Option<String> {
    let mut revisions: Vec<&str> = history.split(',').filter(|r| !r.is_empty()).collect();
    revisions.push(revision);
    while revisions.len() > 1
        && revisions.iter().map(|r| r.len() + 1).sum::<usize>() > REVISION_HISTORY_CHARS + 1
    {
        revisions.remove(0);
    }
    let joined = revisions.join(",");
    (joined.len() <= REVISION_HISTORY_CHARS).then_some(joined)
}

/// The replica set that a deployment's template asks for.
fn make_new(deployment: &Deployment, revision: i64, old: &[ReplicaSet]) -> Option<ReplicaSet> {
    let spec = deployment.spec.as_ref()?;
    let collisions = deployment.status.as_ref().and_then(|s| s.collision_count);
    let hash = template_hash::compute(&spec.template, collisions);
    let mut template = spec.template.clone();
    let metadata = template.metadata.get_or_insert_with(ObjectMeta::default);
    metadata.labels.get_or_insert_with(BTreeMap::new).insert(POD_TEMPLATE_HASH.to_string(), hash.clone());
    let labels = metadata.labels.clone();
    let mut selector = spec.selector.clone();
    selector
        .match_labels
        .get_or_insert_with(BTreeMap::new)
        .insert(POD_TEMPLATE_HASH.to_string(), hash.clone());
    let base: String = name(deployment).chars().take(253 - 1 - hash.len()).collect();
    let mut set = ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{base}-{hash}")),
            namespace: Some(namespace(deployment).to_string()),
            owner_references: Some(vec![controller_reference(deployment)]),
            labels,
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(new_size(deployment, sizes(old), 0)),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    };
    annotate(deployment, &mut set, revision, false);
    Some(set)
}

/// Sets the deployment's revision annotation; tells whether it changed.
fn set_revision(deployment: &mut Deployment, revision: &str) -> bool {
    let annotations = deployment.metadata.annotations.get_or_insert_with(BTreeMap::new);
    annotations.insert(REVISION.to_string(), revision.to_string()).as_deref() != Some(revision)
}

impl DeploymentController {
    /// Finds, and with `create` makes, the new replica set, and keeps revisions in step.
    pub(super) async fn with_revisions(
        &self,
        deployment: &mut Deployment,
        sets: Vec<ReplicaSet>,
        create: bool,
    ) -> Result<ReplicaSets, SyncError> {
        let mut sets = split(deployment, sets);
        let next = sets.old.iter().map(revision).max().unwrap_or(0) + 1;
        if let Some(new) = sets.new.take() {
            sets.new = Some(self.existing(deployment, new, next).await?);
        } else if create {
            sets.new = self.created(deployment, &sets.old, next).await?;
        }
        Ok(sets)
    }

    async fn existing(
        &self,
        deployment: &mut Deployment,
        new: ReplicaSet,
        next: i64,
    ) -> Result<ReplicaSet, SyncError> {
        let mut set = new;
        let annotated = annotate(deployment, &mut set, next, true);
        let min_ready = deployment.spec.as_ref().and_then(|s| s.min_ready_seconds);
        let own_min_ready = set.spec.as_ref().and_then(|s| s.min_ready_seconds);
        if annotated || own_min_ready.unwrap_or(0) != min_ready.unwrap_or(0) {
            if let Some(spec) = set.spec.as_mut() {
                spec.min_ready_seconds = min_ready;
            }
            let api = self.sets_api(deployment);
            return Ok(api.replace(name(&set), &PostParams::default(), &set).await?);
        }
        let own =
            set.metadata.annotations.as_ref().and_then(|a| a.get(REVISION)).cloned().unwrap_or_default();
        let mut changed = set_revision(deployment, &own);
        let has_deadline = progress::has_deadline(deployment);
        let status = deployment.status.get_or_insert_with(DeploymentStatus::default);
        if has_deadline && progress::condition(status, "Progressing").is_none() {
            let message = format!("Found new replica set \"{}\"", name(&set));
            progress::set_condition(
                status,
                progress::new_condition("Progressing", "True", "FoundNewReplicaSet", message),
            );
            changed = true;
        }
        if changed {
            self.write_status(deployment).await?;
        }
        Ok(set)
    }

    async fn created(
        &self,
        deployment: &mut Deployment,
        old: &[ReplicaSet],
        next: i64,
    ) -> Result<Option<ReplicaSet>, SyncError> {
        let Some(wanted) = make_new(deployment, next, old) else { return Ok(None) };
        let size = super::arithmetic::size(&wanted);
        let (created, existed) = match self.sets_api(deployment).create(&PostParams::default(), &wanted).await
        {
            Ok(created) => (created, false),
            Err(e) if api_error::is_already_exists(&e) => {
                (self.collided(deployment, &wanted, e).await?, true)
            }
            Err(e) if api_error::is_namespace_terminating(&e) => return Err(e.into()),
            Err(e) => {
                self.creation_failed(deployment, &wanted, &e).await;
                return Err(e.into());
            }
        };
        if !existed && size > 0 {
            let message = format!("Scaled up replica set {} from 0 to {size}", name(&created));
            self.events.normal(deployment, "ScalingReplicaSet", message);
        }
        let mut changed = set_revision(deployment, &next.to_string());
        if !existed && progress::has_deadline(deployment) {
            let message = format!("Created new replica set \"{}\"", name(&created));
            let condition = progress::new_condition("Progressing", "True", "NewReplicaSetCreated", message);
            progress::set_condition(
                deployment.status.get_or_insert_with(DeploymentStatus::default),
                condition,
            );
            changed = true;
        }
        if changed {
            self.write_status(deployment).await?;
        }
        Ok(Some(created))
    }

    /// The replica set of that name exists: it is ours already, or another template has the same hash, and the
    /// collision count makes the next hash another one.
    async fn collided(
        &self,
        deployment: &mut Deployment,
        wanted: &ReplicaSet,
        error: kube::Error,
    ) -> Result<ReplicaSet, SyncError> {
        let existing = self.sets_api(deployment).get(name(wanted)).await?;
        let template = |s: &ReplicaSet| s.spec.as_ref().and_then(|s| s.template.clone()).unwrap_or_default();
        if is_controlled_by(&existing, deployment) && same_template(&template(&existing), &template(wanted)) {
            return Ok(existing);
        }
        tracing::debug!(deployment = uid(deployment), "the template's hash is taken, raising collisionCount");
        let status = deployment.status.get_or_insert_with(DeploymentStatus::default);
        status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
        self.write_status(deployment).await?;
        Err(error.into())
    }

    async fn creation_failed(&self, deployment: &mut Deployment, wanted: &ReplicaSet, error: &kube::Error) {
        let message =
            format!("Failed to create new replica set \"{}\": {}", name(wanted), api_error::message(error));
        if progress::has_deadline(deployment) {
            let condition =
                progress::new_condition("Progressing", "False", "ReplicaSetCreateError", message.clone());
            progress::set_condition(
                deployment.status.get_or_insert_with(DeploymentStatus::default),
                condition,
            );
            // the creation's error is what is reported and retried
            let _ = self.write_status(deployment).await;
        }
        self.events.warning(deployment, "ReplicaSetCreateError", message);
    }
}

#[cfg(test)]
mod tests {
    use super::super::arithmetic::tests::deployment;
    use super::*;
    use serde_json::json;

    #[test]
    fn a_new_set_is_recognised_and_annotated() {
        let mut d = deployment(3, json!(1), json!(0));
        d.metadata.annotations =
            Some([("a".to_string(), "b".to_string()), (REVISION.into(), "7".into())].into());
        let set = make_new(&d, 8, &[]).unwrap();
        let annotations = set.metadata.annotations.clone().unwrap();
        assert_eq!((annotations["a"].as_str(), annotations[REVISION].as_str()), ("b", "8"));
        assert_eq!((annotations[DESIRED_REPLICAS].as_str(), annotations[MAX_REPLICAS].as_str()), ("3", "4"));
        let hash = set.metadata.labels.as_ref().unwrap()[POD_TEMPLATE_HASH].clone();
        assert_eq!(set.metadata.name.as_deref(), Some(format!("d-{hash}").as_str()));
        let found = split(&d, vec![set.clone()]);
        assert!(found.new.is_some() && found.old.is_empty());
        d.spec.as_mut().unwrap().template.spec.as_mut().unwrap().containers[0].name = "other".into();
        assert!(split(&d, vec![set.clone()]).new.is_none());
        let mut rolled_back = set;
        assert!(annotate(&d, &mut rolled_back, 10, true));
        assert_eq!(rolled_back.metadata.annotations.unwrap()[REVISION_HISTORY], "8");
    }

    #[test]
    fn collisions_change_the_name() {
        let mut d = deployment(1, json!(1), json!(0));
        let first = make_new(&d, 1, &[]).unwrap();
        d.status = Some(DeploymentStatus { collision_count: Some(1), ..DeploymentStatus::default() });
        assert_ne!(first.metadata.name, make_new(&d, 1, &[]).unwrap().metadata.name);
    }
}
