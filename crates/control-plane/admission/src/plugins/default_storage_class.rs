//! DefaultStorageClass: claims without a class get the default one.
//! Upstream counterpart: plugin/pkg/admission/storage/storageclass/setdefault.
use async_trait::async_trait;
use k8s_openapi::api::storage::v1::StorageClass;
use sampan_client::Informer;
use serde_json::{Value, json};

use crate::{Context, Operation, Plugin, Rejection, Request};

const ANNOTATIONS: [&str; 2] =
    ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
const CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";

struct DefaultStorageClass {
    classes: Informer<StorageClass>,
}

pub fn new(context: &Context) -> Box<dyn Plugin> {
    Box::new(DefaultStorageClass { classes: context.informers.of() })
}

#[async_trait]
impl Plugin for DefaultStorageClass {
    fn name(&self) -> &'static str {
        "DefaultStorageClass"
    }

    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool {
        operation == Operation::Create && resource == "persistentvolumeclaims" && subresource.is_empty()
    }

    async fn admit(
        &self,
        request: &Request<'_>,
        claim: &mut Value,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        let classed = claim["metadata"]["annotations"].get(CLASS_ANNOTATION).is_some()
            || claim["spec"].get("storageClassName").is_some_and(|c| !c.is_null());
        if !request.group.is_empty() || classed || !claim["spec"].is_object() {
            return Ok(());
        }
        if let Some(name) = default_class(&self.classes) {
            claim["spec"]["storageClassName"] = json!(name);
        }
        Ok(())
    }
}

/// The newest of those marked as default; of equally old ones the first by name.
fn default_class(classes: &Informer<StorageClass>) -> Option<String> {
    let classes = classes.list();
    let marked = classes.iter().filter(|class| {
        let annotations = class.metadata.annotations.as_ref();
        ANNOTATIONS.iter().any(|a| annotations.and_then(|all| all.get(*a)).is_some_and(|v| v == "true"))
    });
    let newest = marked.max_by(|a, b| {
        let age = |c: &StorageClass| c.metadata.creation_timestamp.as_ref().map(|t| t.0);
        age(a).cmp(&age(b)).then_with(|| b.metadata.name.cmp(&a.metadata.name))
    });
    newest.and_then(|class| class.metadata.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_default_wins() {
        let classes = Informer::detached();
        assert_eq!(default_class(&classes), None);
        for (name, at, default) in [("a", 1, "true"), ("b", 2, "true"), ("c", 2, "true"), ("d", 3, "false")] {
            let at = format!("2026-01-01T00:00:0{at}Z");
            let class = json!({"metadata": {"name": name, "creationTimestamp": at, "annotations": {ANNOTATIONS[0]: default}},
                "provisioner": "p"});
            classes.put(serde_json::from_value::<StorageClass>(class).unwrap());
        }
        assert_eq!(default_class(&classes).as_deref(), Some("b"));
    }
}
