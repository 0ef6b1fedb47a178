//! RuntimeClass: a pod gets the overhead and the node selection of its runtime class.
//! Upstream counterpart: plugin/pkg/admission/runtimeclass.
use async_trait::async_trait;
use k8s_openapi::api::node::v1::RuntimeClass as Class;
use sampan_client::Informer;
use serde_json::{Value, json};

use crate::pod::items;
use crate::{Context, Operation, Plugin, Rejection, Request};

struct RuntimeClass {
    context: Context,
    classes: Informer<Class>,
}

pub fn new(context: &Context) -> Box<dyn Plugin> {
    Box::new(RuntimeClass { classes: context.informers.of(), context: context.clone() })
}

#[async_trait]
impl Plugin for RuntimeClass {
    fn name(&self) -> &'static str {
        "RuntimeClass"
    }

    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool {
        operation == Operation::Create && resource == "pods" && subresource.is_empty()
    }

    async fn admit(
        &self,
        request: &Request<'_>,
        pod: &mut Value,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        let Some(class) = self.class_of(request, pod).await? else { return Ok(()) };
        if let Some(overhead) = class.overhead.as_ref().and_then(|o| o.pod_fixed.as_ref()) {
            pod["spec"]["overhead"] = json!(overhead);
        }
        let Some(scheduling) = class.scheduling else { return Ok(()) };
        for (key, value) in scheduling.node_selector.iter().flatten() {
            let selector = &mut pod["spec"]["nodeSelector"];
            if selector.get(key).is_some_and(|given| given != value) {
                return Err(Rejection::forbidden(format!(
                    "conflict: runtimeClass.scheduling.nodeSelector[{key}] = {value}; pod.spec.nodeSelector[{key}] = {}",
                    selector[key.as_str()].as_str().unwrap_or_default()
                )));
            }
            if !selector.is_object() {
                *selector = json!({});
            }
            selector[key.as_str()] = json!(value);
        }
        for toleration in scheduling.tolerations.iter().flatten() {
            let toleration = serde_json::to_value(toleration).unwrap_or_default();
            if items(&pod["spec"], "tolerations").any(|t| *t == toleration) {
                continue;
            }
            match pod["spec"].get_mut("tolerations").and_then(Value::as_array_mut) {
                Some(tolerations) => tolerations.push(toleration),
                None => pod["spec"]["tolerations"] = json!([toleration]),
            }
        }
        Ok(())
    }

    async fn validate(
        &self,
        request: &Request<'_>,
        pod: Option<&Value>,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        let Some(pod) = pod else { return Ok(()) };
        let overhead = &pod["spec"]["overhead"];
        let has_overhead = overhead.as_object().is_some_and(|o| !o.is_empty());
        match self.class_of(request, pod).await? {
            None if has_overhead => Err(Rejection::forbidden(
                "pod rejected: Pod Overhead set without corresponding RuntimeClass Overhead",
            )),
            Some(class) if has_overhead && class.overhead.is_none() => Err(Rejection::forbidden(
                "pod rejected: Pod Overhead set without corresponding RuntimeClass Overhead",
            )),
            _ => Ok(()),
        }
    }
}

impl RuntimeClass {
    async fn class_of(&self, request: &Request<'_>, pod: &Value) -> Result<Option<Class>, Rejection> {
        let name = pod["spec"]["runtimeClassName"].as_str().unwrap_or_default();
        if name.is_empty() || !request.group.is_empty() {
            return Ok(None);
        }
        if let Some(class) = self.classes.get("", name) {
            return Ok(Some((*class).clone()));
        }
        match self.context.get(&format!("/apis/node.k8s.io/v1/runtimeclasses/{name}")).await? {
            Some(class) => {
                serde_json::from_value(class).map(Some).map_err(|e| Rejection::Internal(e.to_string()))
            }
            None => Err(Rejection::forbidden(format!("pod rejected: RuntimeClass {name:?} not found"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::tests::{Cluster, request};

    #[tokio::test]
    async fn brings_overhead_and_selection() {
        let cluster = Cluster::default();
        cluster.put(
            "/apis/node.k8s.io/v1/runtimeclasses/vm",
            json!({"metadata": {"name": "vm"}, "handler": "h", "overhead": {"podFixed": {"cpu": "1"}},
                "scheduling": {"nodeSelector": {"vm": "yes"}, "tolerations": [{"key": "vm"}]}}),
        );
        let plugin = new(&cluster.context());
        let create = request(Operation::Create, "pods", "ns", "p");
        let mut pod = json!({"spec": {"runtimeClassName": "vm"}});
        plugin.admit(&create, &mut pod, None).await.unwrap();
        assert_eq!(pod["spec"]["overhead"], json!({"cpu": "1"}));
        assert_eq!(pod["spec"]["nodeSelector"], json!({"vm": "yes"}));
        assert_eq!(pod["spec"]["tolerations"], json!([{"key": "vm"}]));
        assert_eq!(plugin.validate(&create, Some(&pod), None).await, Ok(()));
        let mut conflict = json!({"spec": {"runtimeClassName": "vm", "nodeSelector": {"vm": "no"}}});
        assert!(plugin.admit(&create, &mut conflict, None).await.is_err());
        let gone =
            plugin.admit(&create, &mut json!({"spec": {"runtimeClassName": "x"}}), None).await.unwrap_err();
        assert_eq!(
            gone.message(&create),
            r#"pods "p" is forbidden: pod rejected: RuntimeClass "x" not found"#
        );
        let own = json!({"spec": {"overhead": {"cpu": "1"}}});
        assert!(plugin.validate(&create, Some(&own), None).await.is_err());
    }
}
