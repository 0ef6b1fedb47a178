//! The subresources that change a pod's spec: `ephemeralcontainers` and `resize`.
//!
//! Upstream counterpart: podEphemeralContainersStrategy and podResizeStrategy; ValidatePodEphemeralContainersUpdate.
//! Deliberately different: resize is refused with a clear error, since no node of this release resizes.
use serde_json::Value;

use super::super::pod_spec::annotations::MIRROR;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::Rest;
use crate::object::{child, items, keep, remove, same, text};

const KEPT: &[&str] = &[
    "deletionTimestamp",
    "generation",
    "selfLink",
    "labels",
    "annotations",
    "finalizers",
    "ownerReferences",
];

fn prepare_ephemeral(new: &mut Value, old: &Value) {
    let containers = new.pointer("/spec/ephemeralContainers").cloned();
    keep(new, old, "spec");
    keep(new, old, "status");
    super::keep_metadata(new, old, KEPT);
    match containers {
        Some(containers) => child(new, "spec")["ephemeralContainers"] = containers,
        None => drop(remove(child(new, "spec"), "ephemeralContainers")),
    }
    super::bump(new, old);
}

fn validate_ephemeral(new: &Value, old: &Value) -> ErrorList {
    if old.pointer("/metadata/annotations").is_some_and(|a| a.get(MIRROR).is_some()) {
        let detail = "static pods do not support ephemeral containers";
        return vec![FieldError::forbidden(&Path::new(""), detail)];
    }
    let (_, mut errors) = super::validate_spec(new);
    let path = Path::new("spec").child("ephemeralContainers");
    let list = items(new, "/spec/ephemeralContainers");
    for stored in items(old, "/spec/ephemeralContainers") {
        let name = text(stored, "/name");
        match list.iter().find(|c| text(c, "/name") == name) {
            None => {
                let detail = format!("existing ephemeral containers \"{name}\" may not be removed\n");
                errors.push(FieldError::forbidden(&path, detail));
            }
            Some(sent) if !same(Some(sent), Some(stored)) => {
                let diff = super::update::diff(stored, sent);
                let detail = format!("existing ephemeral containers \"{name}\" may not be changed\n{diff}");
                errors.push(FieldError::forbidden(&path, detail));
            }
            Some(_) => {}
        }
    }
    errors
}

pub const EPHEMERAL_CONTAINERS: Rest =
    Rest { prepare_update: prepare_ephemeral, validate_update: validate_ephemeral, ..Rest::ANY };

pub const RESIZE: Rest = Rest {
    prepare_update: |new, old| {
        keep(new, old, "status");
        super::keep_metadata(new, old, KEPT);
    },
    validate_update: |_, _| {
        let detail = "resizing pods in place is not supported by this cluster's nodes";
        vec![FieldError::forbidden(&Path::new("spec"), detail)]
    },
    ..Rest::ANY
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ephemeral_containers_stay() {
        let old = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}],
            "ephemeralContainers": [{"name": "e", "image": "i"}]}});
        let mut new = old.clone();
        new["spec"].as_object_mut().unwrap().remove("ephemeralContainers");
        prepare_ephemeral(&mut new, &old);
        let errors = validate_ephemeral(&new, &old);
        let gone =
            "spec.ephemeralContainers: Forbidden: existing ephemeral containers \"e\" may not be removed\n";
        assert!(errors.iter().any(|error| error.to_string() == gone), "{errors:?}");
    }
}
