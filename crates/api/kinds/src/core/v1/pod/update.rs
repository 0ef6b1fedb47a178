//! What an update of a pod may change.
//!
//! Upstream counterpart: ValidatePodUpdate in validation.go.
use serde_json::Value;

use super::super::pod_spec::annotations;
use crate::field::{ErrorList, FieldError, Path};
use crate::names::in_range;
use crate::object::{count, entries, integer, items, items_mut, keep, metadata, remove, same, same_in, text};

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
`spec.tolerations` (only additions to existing tolerations),\
`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";
const REQUIRED_TERMS: &str =
    "/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms";

pub(super) fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let (_, mut errors) = super::validate_spec(new);
    let (new_meta, old_meta) = (metadata(new), metadata(old));
    let at = Path::new("metadata").child("annotations");
    annotations::validate_update(
        new_meta.annotations.as_ref(),
        old_meta.annotations.as_ref(),
        &at,
        &mut errors,
    );
    let path = Path::new("spec");
    for list in ["containers", "initContainers"] {
        if count(new, &format!("/spec/{list}")) != count(old, &format!("/spec/{list}")) {
            let detail = "pod updates may not add or remove containers";
            errors.push(FieldError::forbidden(&path.child(list), detail));
            return errors;
        }
    }
    if !deadline(new, old, &path.child("activeDeadlineSeconds"), &mut errors) {
        return errors;
    }
    only_added_tolerations(new, old, &path.child("tolerations"), &mut errors);
    only_deleted_gates(new, old, &path.child("schedulingGates"), &mut errors);
    if same_in(new, old, "/spec") {
        return errors;
    }
    let stored = old.get("spec").cloned().unwrap_or_default();
    let munged = munge(new, &stored, &mut errors);
    if !same(Some(&munged), Some(&stored)) {
        let diff = diff(&stored, &munged);
        let detail = format!("pod updates may not change fields other than {UPDATABLE}\n{diff}");
        errors.push(FieldError::forbidden(&path, detail));
    }
    errors
}

/// The new spec with all that may change set back to the stored.
fn munge(new: &Value, stored: &Value, errors: &mut ErrorList) -> Value {
    let mut munged = new.get("spec").cloned().unwrap_or_default();
    for list in ["/containers", "/initContainers"] {
        for (container, old) in items_mut(&mut munged, list).iter_mut().zip(items(stored, list)) {
            keep(container, old, "image");
        }
    }
    for key in ["activeDeadlineSeconds", "schedulingGates", "tolerations"] {
        keep(&mut munged, stored, key);
    }
    if integer(stored, "/terminationGracePeriodSeconds") < 0
        && integer(&munged, "/terminationGracePeriodSeconds") == 1
    {
        keep(&mut munged, stored, "terminationGracePeriodSeconds");
    }
    if !items(stored, "/schedulingGates").is_empty() {
        gated(&mut munged, stored, errors);
    }
    munged
}

/// A pod that is still gated may narrow where it goes.
fn gated(munged: &mut Value, stored: &Value, errors: &mut ErrorList) {
    let path = Path::new("spec");
    let new_selector = munged.get("nodeSelector");
    if entries(stored, "/nodeSelector").any(|(k, v)| new_selector.and_then(|s| s.get(k)) != Some(v)) {
        let detail = "only additions to spec.nodeSelector are allowed (no mutations or deletions)";
        let value = new_selector.cloned().unwrap_or_default();
        errors.push(FieldError::invalid(&path.child("nodeSelector"), value, detail));
    }
    keep(munged, stored, "nodeSelector");
    let terms_path = path
        .child("affinity")
        .child("nodeAffinity")
        .child("requiredDuringSchedulingIgnoredDuringExecution")
        .child("nodeSelectorTerms");
    let (old_terms, new_terms) = (items(stored, REQUIRED_TERMS), items(munged, REQUIRED_TERMS));
    if !old_terms.is_empty() && old_terms.len() != new_terms.len() {
        let detail = "no additions/deletions to non-empty NodeSelectorTerms list are allowed";
        errors.push(FieldError::invalid(&terms_path, new_terms.to_vec(), detail));
    } else {
        for (i, (new, _)) in
            new_terms.iter().zip(old_terms).enumerate().filter(|(_, (n, o))| !only_adds(n, o))
        {
            let detail = "only additions are allowed (no mutations or deletions)";
            errors.push(FieldError::invalid(&terms_path.index(i), new.clone(), detail));
        }
    }
    let stored_affinity = stored.get("affinity").cloned().unwrap_or_default();
    if let Some(affinity) = munged.get_mut("affinity").filter(|a| a.is_object()) {
        keep(affinity, &stored_affinity, "nodeAffinity");
    } else if let Some(node) = stored_affinity.get("nodeAffinity") {
        munged["affinity"] = serde_json::json!({"nodeAffinity": node});
    }
    if count(munged, "/affinity") == 0 {
        remove(munged, "affinity");
    }
}

fn only_adds(new: &Value, old: &Value) -> bool {
    let lists = ["/matchExpressions", "/matchFields"];
    if lists.iter().all(|list| count(old, list) == 0) {
        return lists.iter().all(|list| count(new, list) == 0);
    }
    lists.iter().all(|list| {
        let (new, old) = (items(new, list), items(old, list));
        new.len() >= old.len() && new.iter().zip(old).all(|(n, o)| same(Some(n), Some(o)))
    })
}

/// False where upstream stops.
fn deadline(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) -> bool {
    let of = |pod: &Value| pod.pointer("/spec/activeDeadlineSeconds").and_then(Value::as_i64);
    match (of(new), of(old)) {
        (Some(new), old) => {
            let messages = in_range(new, 0, i64::from(i32::MAX));
            let refused = !messages.is_empty();
            errors.extend(messages.into_iter().map(|m| FieldError::invalid(path, new, m)));
            if !refused && old.is_some_and(|old| old < new) {
                let detail = "must be less than or equal to previous value";
                errors.push(FieldError::invalid(path, new, detail));
                return false;
            }
            !refused
        }
        (None, Some(_)) => {
            let detail = "must not update from a positive integer to nil value";
            errors.push(FieldError::invalid(path, Value::Null, detail));
            true
        }
        (None, None) => true,
    }
}

fn only_added_tolerations(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    let without_seconds = |toleration: &Value| {
        let mut toleration = toleration.clone();
        remove(&mut toleration, "tolerationSeconds");
        toleration
    };
    let new_tolerations: Vec<Value> = items(new, "/spec/tolerations").iter().map(without_seconds).collect();
    for old in items(old, "/spec/tolerations").iter().map(without_seconds) {
        if !new_tolerations.iter().any(|new| same(Some(new), Some(&old))) {
            let detail = "existing toleration can not be modified except its tolerationSeconds";
            errors.push(FieldError::forbidden(path, detail));
            return;
        }
    }
}

fn only_deleted_gates(new: &Value, old: &Value, path: &Path, errors: &mut ErrorList) {
    let old = items(old, "/spec/schedulingGates");
    for (i, gate) in items(new, "/spec/schedulingGates").iter().enumerate() {
        let name = text(gate, "/name");
        if !old.iter().any(|gate| text(gate, "/name") == name) {
            let detail = format!("only deletion is allowed, but found new scheduling gate '{name}'");
            errors.push(FieldError::forbidden(&path.index(i).child("name"), detail));
        }
    }
}

/// The lines that differ, as upstream shows them: `-` what is stored, `+` what was sent.
pub(super) fn diff(old: &Value, new: &Value) -> String {
    let lines = |value: &Value| -> Vec<String> {
        let text = serde_json::to_string_pretty(value).unwrap_or_default();
        text.lines().map(str::to_string).collect()
    };
    let (old, new) = (lines(old), lines(new));
    let start = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let end = old[start..].iter().rev().zip(new[start..].iter().rev()).take_while(|(a, b)| a == b).count();
    let mut out = String::new();
    let mut show = |sign: char, lines: &[String]| {
        lines.iter().for_each(|line| out.push_str(&format!("{sign} {line}\n")));
    };
    show(' ', &old[start.saturating_sub(3)..start]);
    show('-', &old[start..old.len() - end]);
    show('+', &new[start..new.len() - end]);
    show(' ', &old[old.len() - end..(old.len() - end + 3).min(old.len())]);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn updates() {
        let mut old = json!({"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "i"}],
            "tolerations": [{"key": "k", "operator": "Exists"}]}});
        (super::super::KIND.defaults)(&mut old);
        let with = |pointer: &str, value: Value| {
            let mut new = old.clone();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            new.pointer_mut(parent).unwrap()[key] = value;
            validate_update(&new, &old).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let ok = Vec::<String>::new();
        assert_eq!(with("/spec/containers/0/image", json!("j")), ok);
        assert_eq!(with("/spec/activeDeadlineSeconds", json!(5)), ok);
        assert_eq!(with("/spec/hostNetwork", json!(false)), ok);
        let got = with("/spec/priority", json!(5));
        assert!(got[0].starts_with("spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)\n"), "{got:?}");
        assert!(got[0].contains("+   \"priority\": 5"), "{got:?}");
        assert_eq!(
            with("/spec/tolerations", json!([]))[0],
            "spec.tolerations: Forbidden: existing toleration can not be modified except its tolerationSeconds"
        );
        assert_eq!(
            with("/spec/initContainers", json!([{"name": "x", "image": "i"}])).last().unwrap(),
            "spec.initContainers: Forbidden: pod updates may not add or remove containers"
        );
    }
}
