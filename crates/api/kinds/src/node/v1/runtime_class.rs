//! RuntimeClass.
//!
//! Upstream counterpart: pkg/registry/node/runtimeclass, ValidateRuntimeClass in pkg/apis/node/validation.
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::Value;

use crate::apps::v1::workload::immutable;
use crate::core::v1::pod_spec::{resources::validate_overhead, tolerations};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::validate_labels;
use crate::names;
use crate::object::{items, read, text};
use crate::quantity::round_up_to_milli;
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let (mut errors, handler) = (ErrorList::new(), text(object, "/handler"));
    match handler {
        "" => errors.push(FieldError::required(&Path::new("handler"), "")),
        _ => {
            let messages = names::dns1123_label(handler);
            errors.extend(FieldError::invalid_each(&Path::new("handler"), handler, messages));
        }
    }
    let at = Path::new("overhead");
    if let Some(overhead) = object.pointer("/overhead/podFixed").filter(|o| !o.is_null()) {
        match read::<BTreeMap<String, Quantity>>(Some(overhead), &at) {
            Ok(overhead) => validate_overhead(&overhead, &at, &mut errors),
            Err(error) => errors.push(error),
        }
    }
    let at = Path::new("scheduling");
    if let Some(labels) = object.pointer("/scheduling/nodeSelector").filter(|l| !l.is_null()) {
        match read::<BTreeMap<String, String>>(Some(labels), &at) {
            Ok(labels) => errors.extend(validate_labels(Some(&labels), &at.child("nodeSelector"))),
            Err(error) => errors.push(error),
        }
    }
    let (at, listed) = (at.child("tolerations"), items(object, "/scheduling/tolerations"));
    match read::<Vec<Toleration>>(object.pointer("/scheduling/tolerations"), &at) {
        Ok(parsed) => tolerations::validate(&parsed, &at, &mut errors),
        Err(error) if !listed.is_empty() => errors.push(error),
        Err(_) => {}
    }
    let key =
        |t: &Value| ["key", "operator", "value", "effect"].map(|k| text(t, &format!("/{k}")).to_string());
    for (i, toleration) in listed.iter().enumerate() {
        if listed[..i].iter().any(|other| key(other) == key(toleration)) {
            errors.push(FieldError::duplicate(&at.index(i), toleration.clone()));
        }
    }
    errors
}

pub const KIND: Kind = Kind {
    defaults: |object| round_up_to_milli(object.pointer_mut("/overhead/podFixed")),
    rest: Rest {
        validate,
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            immutable(new, old, "/handler", &Path::new("handler"), &mut errors);
            errors
        },
        ..Rest::ANY
    },
    create_on_update: true,
    unconditional_update: false,
    columns: &[Column::NAME, Column::string("Handler", "What runs the pods."), Column::AGE],
    row: |object, now| vec![table::name(object), text(object, "/handler").into(), table::age(object, now)],
    ..Kind::plain("node.k8s.io", "v1", "RuntimeClass")
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules() {
        let texts =
            |object: Value| -> Vec<String> { validate(&object).iter().map(ToString::to_string).collect() };
        assert_eq!(texts(json!({"handler": "runc"})), Vec::<String>::new());
        let toleration = json!({"key": "a", "operator": "Exists"});
        let errors = texts(json!({"handler": "", "scheduling": {"tolerations": [toleration, toleration]}}));
        assert_eq!(errors[0], "handler: Required value");
        assert!(errors[1].starts_with("scheduling.tolerations[1]: Duplicate value: "), "{errors:?}");
    }
}
