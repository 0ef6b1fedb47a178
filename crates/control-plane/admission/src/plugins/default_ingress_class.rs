//! DefaultIngressClass: ingresses without a class get the default one.
//! Upstream counterpart: plugin/pkg/admission/network/defaultingressclass.
use async_trait::async_trait;
use k8s_openapi::api::networking::v1::IngressClass;
use sampan_client::Informer;
use serde_json::{Value, json};

use crate::{Context, Operation, Plugin, Rejection, Request};

const DEFAULT_ANNOTATION: &str = "ingressclass.kubernetes.io/is-default-class";
const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";

struct DefaultIngressClass {
    classes: Informer<IngressClass>,
}

pub fn new(context: &Context) -> Box<dyn Plugin> {
    Box::new(DefaultIngressClass { classes: context.informers.of() })
}

#[async_trait]
impl Plugin for DefaultIngressClass {
    fn name(&self) -> &'static str {
        "DefaultIngressClass"
    }

    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool {
        operation == Operation::Create && resource == "ingresses" && subresource.is_empty()
    }

    async fn admit(
        &self,
        request: &Request<'_>,
        ingress: &mut Value,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        let classed = ingress["metadata"]["annotations"].get(CLASS_ANNOTATION).is_some()
            || ingress["spec"].get("ingressClassName").is_some_and(|c| !c.is_null());
        if request.group != "networking.k8s.io" || classed || !ingress["spec"].is_object() {
            return Ok(());
        }
        let classes = self.classes.list();
        let marked = classes.iter().filter(|class| {
            let annotations = class.metadata.annotations.as_ref();
            annotations.and_then(|all| all.get(DEFAULT_ANNOTATION)).is_some_and(|v| v == "true")
        });
        // the newest, then the first by name
        let newest = marked.max_by(|a, b| {
            let age = |c: &IngressClass| c.metadata.creation_timestamp.as_ref().map(|t| t.0);
            age(a).cmp(&age(b)).then_with(|| b.metadata.name.cmp(&a.metadata.name))
        });
        if let Some(name) = newest.and_then(|class| class.metadata.name.clone()) {
            ingress["spec"]["ingressClassName"] = json!(name);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::tests::request;

    #[tokio::test]
    async fn only_where_there_is_none() {
        let classes = Informer::detached();
        let class = json!({"metadata": {"name": "main", "annotations": {DEFAULT_ANNOTATION: "true"}}});
        classes.put(serde_json::from_value::<IngressClass>(class).unwrap());
        let plugin = DefaultIngressClass { classes };
        for (ingress, want) in [
            (json!({"spec": {}}), json!("main")),
            (json!({"spec": {"ingressClassName": "own"}}), json!("own")),
            (json!({"metadata": {"annotations": {CLASS_ANNOTATION: "x"}}, "spec": {}}), Value::Null),
        ] {
            let mut ingress = ingress;
            let request = request(Operation::Create, "ingresses", "ns", "i");
            plugin.admit(&request, &mut ingress, None).await.unwrap();
            assert_eq!(ingress["spec"]["ingressClassName"], want);
        }
    }
}
