//! CertificateSigningRequest.
//!
//! Upstream counterpart: pkg/registry/certificates/certificates, pkg/apis/certificates/validation. What stays true: the
//! requester's identity is never the client's to write: it is removed here, and the API server, which knows the user,
//! sets it afterwards. Left out: the request's signature and the certificate's content.
use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sampan_world::clock;
use serde_json::{Value, json};

use crate::apps::v1::workload::immutable;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, NameRule, Rest};
use crate::names;
use crate::object::{child, count, integer, is_unset, items, items_mut, keep, remove, text};
use crate::table;

const USAGES: &[&str] = &[
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];
const DECISIONS: [&str; 2] = ["Approved", "Denied"];

fn validate_create(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let path = Path::new("spec");
    let request = text(object, "/spec/request");
    let decoded = STANDARD.decode(request).unwrap_or_default();
    let pem = String::from_utf8_lossy(&decoded);
    if !pem.contains("-----BEGIN CERTIFICATE REQUEST-----")
        && !pem.contains("-----BEGIN NEW CERTIFICATE REQUEST-----")
    {
        let detail = "PEM block type must be CERTIFICATE REQUEST";
        errors.push(FieldError::invalid(&path.child("request"), request, detail));
    }
    let usages: Vec<&str> = items(object, "/spec/usages").iter().filter_map(Value::as_str).collect();
    let at = path.child("usages");
    if usages.is_empty() {
        errors.push(FieldError::required(&at, ""));
    }
    let mut seen = BTreeSet::new();
    for (i, usage) in usages.iter().enumerate() {
        if !USAGES.contains(usage) {
            errors.push(FieldError::not_supported(&at.index(i), *usage, USAGES));
        }
        if !seen.insert(*usage) {
            errors.push(FieldError::duplicate(&at.index(i), *usage));
        }
    }
    validate_signer_name(text(object, "/spec/signerName"), &path.child("signerName"), &mut errors);
    let seconds = object.pointer("/spec/expirationSeconds").and_then(Value::as_i64);
    if let Some(seconds) = seconds.filter(|s| *s < 600) {
        let detail = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.push(FieldError::invalid(&path.child("expirationSeconds"), seconds, detail));
    }
    validate_conditions(object, &mut errors);
    errors
}

/// `example.com/signer`.
fn validate_signer_name(name: &str, path: &Path, errors: &mut ErrorList) {
    if name.is_empty() {
        return errors.push(FieldError::required(path, ""));
    }
    if name == "kubernetes.io/legacy-unknown" {
        let detail = "the legacy signerName is not allowed via this API version";
        return errors.push(FieldError::invalid(path, name, detail));
    }
    let Some((domain, signer)) = name.split_once('/').filter(|(_, signer)| !signer.contains('/')) else {
        let detail = "must be a fully qualified domain and path of the form 'example.com/signer-name'";
        return errors.push(FieldError::invalid(path, name, detail));
    };
    errors.extend(FieldError::invalid_each(path, domain, names::dns1123_subdomain(domain)));
    errors.extend(FieldError::invalid_each(path, signer, names::dns1123_subdomain(signer)));
    if !domain.contains('.') {
        let detail = "should be a domain with at least two segments separated by dots";
        errors.push(FieldError::invalid(path, domain, detail));
    }
}

fn validate_conditions(object: &Value, errors: &mut ErrorList) {
    let path = Path::new("status").child("conditions");
    let mut seen = BTreeSet::new();
    for (i, condition) in items(object, "/status/conditions").iter().enumerate() {
        let (at, kind, status) = (path.index(i), text(condition, "/type"), text(condition, "/status"));
        if kind.is_empty() {
            errors.push(FieldError::required(&at.child("type"), ""));
        }
        if status.is_empty() {
            errors.push(FieldError::required(&at.child("status"), ""));
        } else if ["Approved", "Denied", "Failed"].contains(&kind) && status != "True" {
            errors.push(FieldError::not_supported(&at.child("status"), status, &["True"]));
        }
        if !seen.insert(kind) {
            errors.push(FieldError::duplicate(&at.child("type"), kind));
        }
    }
    if DECISIONS.iter().all(|kind| seen.contains(kind)) {
        let at = path.index(count(object, "/status/conditions").saturating_sub(1)).child("type");
        let detail = "Approved and Denied conditions are mutually exclusive";
        errors.push(FieldError::invalid(&at, "Denied", detail));
    }
}

fn conditions_of<'a>(object: &'a Value, kinds: &[&str]) -> Vec<&'a Value> {
    items(object, "/status/conditions").iter().filter(|c| kinds.contains(&text(c, "/type"))).collect()
}

/// What every update keeps: the spec, and who decided what unless `approving`.
fn validate_update(new: &Value, old: &Value, approving: bool, issuing: bool) -> ErrorList {
    let mut errors = ErrorList::new();
    validate_conditions(new, &mut errors);
    let at = Path::new("status").child("conditions");
    for kind in ["Approved", "Denied", "Failed"] {
        let [before, after] = [old, new].map(|object| conditions_of(object, &[kind]).len());
        if after < before {
            let detail = format!("updates may not remove a condition of type \"{kind}\"");
            errors.push(FieldError::forbidden(&at, detail));
        } else if after > before && DECISIONS.contains(&kind) && !approving {
            let detail = format!("updates may not add a condition of type \"{kind}\"");
            errors.push(FieldError::forbidden(&at, detail));
        }
    }
    let (was, is) = (text(old, "/status/certificate"), text(new, "/status/certificate"));
    if was != is && (!issuing || !was.is_empty()) {
        let detail = match was.is_empty() {
            true => "updates may not set certificate content",
            false => "updates may not modify existing certificate content",
        };
        errors.push(FieldError::forbidden(&Path::new("status").child("certificate"), detail));
    }
    immutable(new, old, "/spec", &Path::new("spec"), &mut errors);
    errors
}

/// Notes when conditions changed, where the client has not.
fn stamp(new: &mut Value, old: &Value) {
    let now = clock::now_seconds().to_string();
    let stored = items(old, "/status/conditions").to_vec();
    for condition in items_mut(new, "/status/conditions") {
        if is_unset(condition.get("lastUpdateTime")) {
            condition["lastUpdateTime"] = now.clone().into();
        }
        if is_unset(condition.get("lastTransitionTime")) {
            let same =
                |c: &&Value| ["/type", "/status"].iter().all(|part| text(c, part) == text(condition, part));
            let before =
                stored.iter().find(same).and_then(|c| c.get("lastTransitionTime")).filter(|t| !t.is_null());
            condition["lastTransitionTime"] = before.cloned().unwrap_or_else(|| now.clone().into());
        }
    }
}

/// A status update leaves the decisions as they are; adding or removing one is validation's to refuse.
fn keep_decisions(new: &mut Value, old: &Value) {
    for kind in DECISIONS {
        let stored: Vec<Value> = conditions_of(old, &[kind]).into_iter().cloned().collect();
        if stored.len() == conditions_of(new, &[kind]).len() {
            let conditions = items_mut(new, "/status/conditions").iter_mut();
            conditions.filter(|c| text(c, "/type") == kind).zip(stored).for_each(|(c, old)| *c = old);
        }
    }
}

/// Only the conditions of an approval count.
fn prepare_approval(new: &mut Value, old: &Value) {
    stamp(new, old);
    let conditions = new.pointer("/status/conditions").cloned();
    keep(new, old, "spec");
    keep(new, old, "status");
    if let Some(conditions) = conditions {
        child(new, "status")["conditions"] = conditions;
    }
}

fn state(object: &Value) -> String {
    let has = |kind: &str| !conditions_of(object, &[kind]).is_empty();
    let mut state = match () {
        () if has("Denied") => "Denied",
        () if has("Approved") => "Approved",
        () => "Pending",
    }
    .to_string();
    if has("Failed") {
        state.push_str(",Failed");
    }
    if !text(object, "/status/certificate").is_empty() {
        state.push_str(",Issued");
    }
    state
}

fn row(object: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let seconds = integer(object, "/spec/expirationSeconds");
    let wanted = if seconds == 0 { "<none>".to_string() } else { table::human_duration(seconds) };
    vec![
        table::name(object),
        table::age(object, now),
        table::or_none(text(object, "/spec/signerName")),
        text(object, "/spec/username").into(),
        wanted.into(),
        state(object).into(),
    ]
}

pub const KIND: Kind = Kind {
    // Upstream takes any name here; what makes no key is refused.
    name_rule: NameRule::PathSegment,
    rest: Rest {
        prepare_create: |object| {
            let spec = child(object, "spec");
            ["username", "uid", "groups", "extra"].iter().for_each(|key| drop(remove(spec, key)));
            object["status"] = json!({});
        },
        prepare_update: |new, old| {
            keep(new, old, "spec");
            keep(new, old, "status");
        },
        validate: validate_create,
        validate_update: |new, old| validate_update(new, old, false, false),
        ..Rest::ANY
    },
    status: Some(Rest {
        prepare_update: |new, old| {
            keep(new, old, "spec");
            keep_decisions(new, old);
            stamp(new, old);
        },
        validate_update: |new, old| validate_update(new, old, false, true),
        ..Rest::ANY
    }),
    subresources: &[(
        "approval",
        Rest {
            prepare_update: prepare_approval,
            validate_update: |new, old| validate_update(new, old, true, false),
            ..Rest::ANY
        },
    )],
    columns: &[
        Column::NAME,
        Column::AGE,
        Column::string("SignerName", "Who is to sign."),
        Column::string("Requestor", "Who asks for the certificate."),
        Column::string("RequestedDuration", "For how long the certificate is to be valid."),
        Column::string("Condition", "Whether it is approved, denied, failed or issued."),
    ],
    row,
    selectable: |object| vec![("spec.signerName", text(object, "/spec/signerName").to_string())],
    ..Kind::plain("certificates.k8s.io", "v1", "CertificateSigningRequest")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn approval_changes_conditions_only() {
        let mut old = json!({"spec": {"username": "forged", "request": STANDARD.encode(
            "-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----"),
            "signerName": "example.com/a", "usages": ["client auth"]}});
        (KIND.rest.prepare_create)(&mut old);
        assert!(old["spec"].get("username").is_none());
        assert_eq!(validate_create(&old), Vec::new());
        let mut new = old.clone();
        new["spec"]["signerName"] = "example.com/b".into();
        new["status"] = json!({"certificate": "x", "conditions": [{"type": "Approved", "status": "True"}]});
        let (_, approval) = KIND.subresources[0];
        let mut approved = new.clone();
        (approval.prepare_update)(&mut approved, &old);
        assert_eq!((approval.validate_update)(&approved, &old), Vec::new());
        assert_eq!(
            (text(&approved, "/spec/signerName"), state(&approved)),
            ("example.com/a", "Approved".to_string())
        );
        let status = KIND.status.unwrap();
        (status.prepare_update)(&mut new, &old);
        let errors = (status.validate_update)(&new, &old);
        assert_eq!(
            errors[0].to_string(),
            "status.conditions: Forbidden: updates may not add a condition of type \"Approved\""
        );
    }
}
