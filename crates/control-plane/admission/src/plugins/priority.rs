//! Priority: a pod's priority is that of its class. Upstream counterpart: plugin/pkg/admission/priority.
use async_trait::async_trait;
use k8s_openapi::api::scheduling::v1::PriorityClass;
use sampan_client::Informer;
use serde_json::{Value, json};

use crate::{Context, Operation, Plugin, Rejection, Request};

const GROUP: &str = "scheduling.k8s.io";

struct Priority {
    context: Context,
    classes: Informer<PriorityClass>,
}

pub fn new(context: &Context) -> Box<dyn Plugin> {
    Box::new(Priority { classes: context.informers.of(), context: context.clone() })
}

#[async_trait]
impl Plugin for Priority {
    fn name(&self) -> &'static str {
        "Priority"
    }

    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool {
        matches!(resource, "pods" | "priorityclasses")
            && subresource.is_empty()
            && matches!(operation, Operation::Create | Operation::Update)
    }

    async fn admit(
        &self,
        request: &Request<'_>,
        pod: &mut Value,
        old: Option<&Value>,
    ) -> Result<(), Rejection> {
        if !request.is_for("", "pods") || !pod["spec"].is_object() {
            return Ok(());
        }
        let spec = &mut pod["spec"];
        if request.operation == Operation::Update {
            for field in ["priority", "preemptionPolicy"] {
                let kept = old.and_then(|old| old["spec"].get(field)).filter(|v| !v.is_null());
                if let Some(kept) = kept.filter(|_| spec.get(field).is_none_or(Value::is_null)) {
                    spec[field] = kept.clone();
                }
            }
            return Ok(());
        }
        let name = spec.get("priorityClassName").and_then(Value::as_str).unwrap_or_default().to_string();
        let class = match name.as_str() {
            "" => self.default_class(),
            name => Some(self.class(name).await?),
        };
        let (value, policy) = match &class {
            Some(class) => (i64::from(class.value.unwrap_or(0)), class.preemption_policy.clone()),
            None => (0, Some("PreemptLowerPriority".to_string())),
        };
        if let Some(class) = class.and_then(|c| c.metadata.name) {
            spec["priorityClassName"] = json!(class);
        }
        if let Some(given) = spec.get("priority").and_then(Value::as_i64).filter(|given| *given != value) {
            return Err(Rejection::forbidden(format!(
                "the integer value of priority ({given}) must not be provided in pod spec; priority admission \
                 controller computed {value} from the given PriorityClass name"
            )));
        }
        spec["priority"] = json!(value);
        if let Some(policy) = policy {
            let given = spec.get("preemptionPolicy").and_then(Value::as_str);
            if let Some(given) = given.filter(|given| *given != policy) {
                return Err(Rejection::forbidden(format!(
                    "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority \
                     admission controller computed {policy} from the given PriorityClass name"
                )));
            }
            spec["preemptionPolicy"] = json!(policy);
        }
        Ok(())
    }

    async fn validate(
        &self,
        request: &Request<'_>,
        object: Option<&Value>,
        _: Option<&Value>,
    ) -> Result<(), Rejection> {
        let wants_default = object.is_some_and(|class| class["globalDefault"] == true);
        if !request.is_for(GROUP, "priorityclasses") || !wants_default {
            return Ok(());
        }
        let Some(current) = self.default_class().and_then(|c| c.metadata.name) else { return Ok(()) };
        if request.operation == Operation::Create || current != request.name {
            let words =
                format!("PriorityClass {current} is already marked as default. Only one default can exist");
            return Err(Rejection::forbidden(words));
        }
        Ok(())
    }
}

impl Priority {
    /// The one with the lowest value, should there be several.
    fn default_class(&self) -> Option<PriorityClass> {
        let classes = self.classes.list();
        let defaults = classes.iter().filter(|c| c.global_default == Some(true));
        defaults.min_by_key(|c| c.value).map(|c| (**c).clone())
    }

    async fn class(&self, name: &str) -> Result<PriorityClass, Rejection> {
        if let Some(class) = self.classes.get("", name) {
            return Ok((*class).clone());
        }
        match self.context.get(&format!("/apis/{GROUP}/v1/priorityclasses/{name}")).await? {
            Some(class) => serde_json::from_value(class).map_err(|e| Rejection::Internal(e.to_string())),
            None => Err(Rejection::forbidden(format!("no PriorityClass with name {name} was found"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::tests::{Cluster, request};

    #[tokio::test]
    async fn the_class_decides() {
        let cluster = Cluster::default();
        cluster.put(
            "/apis/scheduling.k8s.io/v1/priorityclasses/high",
            json!({"metadata": {"name": "high"}, "value": 1000, "preemptionPolicy": "Never"}),
        );
        let plugin = new(&cluster.context());
        let create = request(Operation::Create, "pods", "ns", "p");
        let cases = [
            (json!({}), Ok((0, "PreemptLowerPriority"))),
            (json!({"priorityClassName": "high"}), Ok((1000, "Never"))),
            (json!({"priorityClassName": "gone"}), Err("no PriorityClass with name gone was found")),
            (
                json!({"priority": 5}),
                Err(
                    "the integer value of priority (5) must not be provided in pod spec; priority admission controller computed 0 from the given PriorityClass name",
                ),
            ),
        ];
        for (spec, want) in cases {
            let mut pod = json!({"spec": spec});
            match (plugin.admit(&create, &mut pod, None).await, want) {
                (Ok(()), Ok((value, policy))) => {
                    assert_eq!(
                        (&pod["spec"]["priority"], &pod["spec"]["preemptionPolicy"]),
                        (&json!(value), &json!(policy))
                    );
                }
                (got, want) => assert_eq!(got, want.map(|_| ()).map_err(Rejection::forbidden)),
            }
        }
    }
}
