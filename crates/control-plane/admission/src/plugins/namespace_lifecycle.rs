//! NamespaceLifecycle: nothing is created where there is no namespace or in one that is being deleted, and the system's
//! namespaces stay. Upstream counterpart: k8s.io/apiserver/pkg/admission/plugin/namespace/lifecycle.
//!
//! What stays true: a namespace that was created a moment ago is found, because a miss in the cache is followed by a
//! read of the store; one whose deletion was just asked for is looked up there too.
use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Namespace;
use parking_lot::Mutex;
use sampan_client::Informer;
use sampan_world::clock;
use serde_json::Value;
use tokio::time::Instant;

use crate::{Cause, Context, Operation, Plugin, Rejection, Request};

const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];
/// How long a namespace whose deletion was asked for is looked up in the store.
const LOOKUP_FOR: Duration = Duration::from_secs(30);
const LOOKUP_MAX: usize = 100;

struct NamespaceLifecycle {
    context: Context,
    namespaces: Informer<Namespace>,
    deleted_until: Mutex<HashMap<String, Instant>>,
}

pub fn new(context: &Context) -> Box<dyn Plugin> {
    Box::new(NamespaceLifecycle {
        namespaces: context.informers.of(),
        context: context.clone(),
        deleted_until: Mutex::default(),
    })
}

#[async_trait]
impl Plugin for NamespaceLifecycle {
    fn name(&self) -> &'static str {
        "NamespaceLifecycle"
    }

    fn handles(&self, operation: Operation, _: &str, _: &str) -> bool {
        operation != Operation::Connect
    }

    async fn admit(&self, request: &Request<'_>, _: &mut Value, _: Option<&Value>) -> Result<(), Rejection> {
        let is_namespace = request.group.is_empty() && request.kind == "Namespace";
        let review =
            request.group == "authorization.k8s.io" && request.resource == "localsubjectaccessreviews";
        if request.namespace.is_empty() || is_namespace || review {
            return Ok(());
        }
        let cached = self.namespaces.get("", request.namespace);
        let phase = cached.map(|n| n.status.as_ref().and_then(|s| s.phase.clone()).unwrap_or_default());
        let phase = match phase {
            Some(phase) if phase == "Terminating" || !self.was_deleted(request.namespace) => phase,
            _ => self.stored_phase(request.namespace).await?,
        };
        if request.operation == Operation::Create && phase == "Terminating" {
            let namespace = request.namespace;
            return Err(Rejection::Forbidden {
                why: format!(
                    "unable to create new content in namespace {namespace} because it is being terminated"
                ),
                cause: Some(Cause {
                    reason: "NamespaceTerminating",
                    message: format!("namespace {namespace} is being terminated"),
                    field: "metadata.namespace",
                }),
            });
        }
        Ok(())
    }

    async fn validate(
        &self,
        request: &Request<'_>,
        _: Option<&Value>,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        let deletes = request.operation == Operation::Delete && request.is_for("", "namespaces");
        if !deletes {
            return Ok(());
        }
        if IMMORTAL.contains(&request.name) {
            return Err(Rejection::forbidden("this namespace may not be deleted"));
        }
        self.mark_deleted(request.name);
        Ok(())
    }
}

impl NamespaceLifecycle {
    async fn stored_phase(&self, namespace: &str) -> Result<String, Rejection> {
        let Some(found) = self.context.get(&format!("/api/v1/namespaces/{namespace}")).await? else {
            return Err(Rejection::NotFound { resource: "namespaces", name: namespace.to_string() });
        };
        Ok(found["status"]["phase"].as_str().unwrap_or_default().to_string())
    }

    fn mark_deleted(&self, namespace: &str) {
        let now = clock::monotonic();
        let mut deleted = self.deleted_until.lock();
        if deleted.len() >= LOOKUP_MAX {
            deleted.retain(|_, until| *until > now);
        }
        if deleted.len() < LOOKUP_MAX {
            deleted.insert(namespace.to_string(), now + LOOKUP_FOR);
        }
    }

    fn was_deleted(&self, namespace: &str) -> bool {
        self.deleted_until.lock().get(namespace).is_some_and(|until| *until > clock::monotonic())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::tests::{Cluster, request};
    use serde_json::json;

    fn refused(result: Result<(), Rejection>) -> String {
        match result {
            Err(rejection) => rejection.message(&request(Operation::Create, "pods", "ns", "p")),
            Ok(()) => "admitted".to_string(),
        }
    }

    #[tokio::test]
    async fn guards_namespaces() {
        let cluster = Cluster::default();
        cluster.put("/api/v1/namespaces/fresh", json!({"status": {"phase": "Active"}}));
        cluster.put("/api/v1/namespaces/dying", json!({"status": {"phase": "Terminating"}}));
        let plugin = new(&cluster.context());
        for (namespace, want) in [
            ("fresh", "admitted"),
            ("gone", r#"namespaces "gone" not found"#),
            (
                "dying",
                r#"pods "p" is forbidden: unable to create new content in namespace dying because it is being terminated"#,
            ),
        ] {
            let request = request(Operation::Create, "pods", namespace, "p");
            assert_eq!(refused(plugin.admit(&request, &mut json!({}), None).await), want);
        }
        let update = request(Operation::Update, "pods", "dying", "p");
        assert_eq!(plugin.admit(&update, &mut json!({}), None).await, Ok(()));
        let delete = |name| request(Operation::Delete, "namespaces", name, name);
        let kept = plugin.validate(&delete("kube-system"), None, None).await.unwrap_err();
        assert_eq!(
            kept.message(&delete("kube-system")),
            r#"namespaces "kube-system" is forbidden: this namespace may not be deleted"#
        );
        assert_eq!(plugin.validate(&delete("fresh"), None, None).await, Ok(()));
    }
}
