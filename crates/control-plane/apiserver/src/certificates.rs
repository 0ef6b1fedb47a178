//! What certificate signing requests ask of the server besides their own rules: who requests, whether the request is
//! well-formed, and who may approve or sign.
//!
//! Upstream counterparts: pkg/registry/certificates/certificates/strategy.go (PrepareForCreate),
//! pkg/apis/certificates/validation (validateCSR), pkg/certauthorization and the admission plugins
//! plugin/pkg/admission/certificates/{approval,signing,subjectrestriction}. What stays true: the requester in the spec
//! is who authenticated, never what a client wrote. Deliberately different: the three plugins are one function here,
//! because they need the authorizer, and what is wrong within a request's DER is told in one sentence.
use sampan_client::Identity;
use sampan_kinds::FieldError;
use sampan_kinds::Path;
use serde_json::{Map, Value};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::pem::parse_x509_pem;
use x509_parser::prelude::FromDer;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::access::{Attributes, Decision};
use crate::call::Call;
use crate::selector::{FieldSelector, LabelSelector};
use crate::status::{Result, Status};
use crate::write::text;

const GROUP: &str = "certificates.k8s.io";
const RESOURCE: &str = "certificatesigningrequests";
/// Its certificates are trusted by the API server itself.
const API_CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client";

fn is_request(call: &Call) -> bool {
    call.resource.storage.group == GROUP && call.resource.storage.resource == RESOURCE
}

/// Notes in a new request who makes it.
pub fn set_requester(call: &Call, object: &mut Value) {
    if is_request(call)
        && let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut)
    {
        write_requester(spec, &call.identity);
    }
}

fn write_requester(spec: &mut Map<String, Value>, identity: &Identity) {
    let groups = (!identity.groups.is_empty()).then(|| Value::from(identity.groups.clone()));
    let extra: Map<String, Value> =
        identity.extra.iter().map(|(key, values)| (key.clone(), values.clone().into())).collect();
    let text = |text: &str| (!text.is_empty()).then(|| Value::from(text));
    let fields = [
        ("username", text(&identity.username)),
        ("uid", text(&identity.uid)),
        ("groups", groups),
        ("extra", (!extra.is_empty()).then_some(Value::Object(extra))),
    ];
    for (name, value) in fields {
        match value {
            Some(value) => spec.insert(name.into(), value),
            None => spec.remove(name),
        };
    }
}

/// What is wrong with a new request's PKCS#10 content.
pub fn validate(call: &Call, object: &Value) -> Option<FieldError> {
    if !is_request(call) {
        return None;
    }
    let request = text(object, "/spec/request");
    // A wrong PEM block is the kind's own finding.
    let der = der_of(request)?;
    let why = match X509CertificationRequest::from_der(&der) {
        Err(error) => format!("asn1: structure error: {error}"),
        Ok((rest, _)) if !rest.is_empty() => "asn1: syntax error: trailing data".to_string(),
        Ok((_, parsed)) => match parsed.verify_signature() {
            Ok(()) => return None,
            Err(_) => "x509: the signature of the request does not verify".to_string(),
        },
    };
    Some(FieldError::invalid(&Path::new("spec").child("request"), request, why))
}

fn der_of(request: &str) -> Option<Vec<u8>> {
    let pem = STANDARD.decode(request).ok()?;
    let (_, block) = parse_x509_pem(&pem).ok()?;
    (block.label == "CERTIFICATE REQUEST").then_some(block.contents)
}

/// Who may approve, who may sign, and which subject nobody may ask for.
pub async fn admit(call: &Call, subresource: &str, object: &Value, old: Option<&Value>) -> Result<()> {
    if !is_request(call) {
        return Ok(());
    }
    let forbidden = |why: String| {
        let name = if call.info.name.is_empty() { text(object, "/metadata/name") } else { &call.info.name };
        Err(Status::forbidden(call.resource.group_resource(), name, why))
    };
    match (subresource, old) {
        ("", None) if asks_for_masters(object) => {
            forbidden(format!("use of {API_CLIENT_SIGNER} signer with system:masters group is not allowed"))
        }
        ("approval", Some(old)) => match text(old, "/spec/signerName") {
            signer if is_allowed(call, "approve", signer).await => Ok(()),
            signer => forbidden(format!("user not permitted to approve requests with signerName {signer:?}")),
        },
        ("status", Some(old)) if decides(object, old) => match text(old, "/spec/signerName") {
            signer if is_allowed(call, "sign", signer).await => Ok(()),
            signer => forbidden(format!("user not permitted to sign requests with signerName {signer:?}")),
        },
        _ => Ok(()),
    }
}

/// Whether a status update changes the certificate or the conditions.
fn decides(object: &Value, old: &Value) -> bool {
    let conditions = |object: &Value| {
        object.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default()
    };
    text(object, "/status/certificate") != text(old, "/status/certificate")
        || conditions(object) != conditions(old)
}

fn asks_for_masters(object: &Value) -> bool {
    if text(object, "/spec/signerName") != API_CLIENT_SIGNER {
        return false;
    }
    let Some(der) = der_of(text(object, "/spec/request")) else { return false };
    let Ok((_, parsed)) = X509CertificationRequest::from_der(&der) else { return false };
    let subject = &parsed.certification_request_info.subject;
    subject.iter_organization().any(|name| name.as_str().is_ok_and(|name| name == Identity::MASTERS))
}

/// For this signer, or for all of its domain.
async fn is_allowed(call: &Call, verb: &str, signer: &str) -> bool {
    if call.identity.is_in(Identity::MASTERS) {
        return true;
    }
    let Some(authorizer) = call.server.authorizer.get() else { return false };
    let domain = format!("{}/*", signer.split('/').next().unwrap_or_default());
    for name in [signer, &domain] {
        let attributes = Attributes {
            identity: &call.identity,
            verb,
            group: GROUP,
            version: "*",
            resource: "signers",
            subresource: "",
            namespace: "",
            name,
            path: "",
            is_resource: true,
            field_selector: &FieldSelector::default(),
            label_selector: &LabelSelector::default(),
        };
        if authorizer.authorize(&attributes).await == Decision::Allow {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_requester_is_who_calls() {
        let mut object = json!({"username": "forged", "uid": "1", "groups": ["g"], "extra": {"a": ["b"]}});
        let identity = Identity::new("bob", &["devs"]);
        write_requester(object.as_object_mut().unwrap(), &identity);
        assert_eq!(object, json!({"username": "bob", "groups": ["devs", "system:authenticated"]}));
    }

    #[test]
    fn only_decisions_need_a_signer() {
        let old = json!({"status": {"conditions": []}});
        let cases = [
            (json!({"status": {}}), false),
            (json!({"metadata": {"labels": {"a": "b"}}, "status": {"conditions": []}}), false),
            (json!({"status": {"conditions": [{"type": "Failed"}]}}), true),
            (json!({"status": {"certificate": "x"}}), true),
        ];
        for (object, want) in cases {
            assert_eq!(decides(&object, &old), want, "{object}");
        }
    }
}
