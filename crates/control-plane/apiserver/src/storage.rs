//! How objects lie in the store: keys, and bytes that answers can copy.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/storage/etcd3. What stays true: a stored value is the storage
//! version's canonical JSON that begins with `{"metadata":{` and has no apiVersion, kind or resourceVersion, so
//! an answer puts those in front and copies the rest. Deliberately different from upstream: no envelope and no
//! protobuf in the store; core resources lie under `/registry/core/`.
use bytes::{Bytes, BytesMut};
use sampan_kinds::Kind;
use sampan_store::Class;
use serde_json::{Map, Value};

use crate::status::{Result, Status};

/// Where every object lies.
pub const PREFIX: &str = "/registry/";

/// Keys whose writes may be deferred: what `sampan_store::Options::deferred` is to be given.
pub const DEFERRED_PREFIXES: [&str; 2] = ["/registry/core/events/", "/registry/coordination.k8s.io/leases/"];

/// The place of one resource's objects, shared by all versions that it is served in.
pub struct Storage {
    pub group: String,
    pub resource: String,
    pub kind: String,
    /// The version that objects are stored in, with its group.
    pub api_version: String,
    /// `/registry/apps/deployments/`.
    pub prefix: String,
    pub namespaced: bool,
    /// The rules of the stored version's kind.
    pub rules: Kind,
}

impl Storage {
    pub fn new(
        group: &'static str,
        version: &'static str,
        resource: &str,
        kind: &'static str,
        namespaced: bool,
    ) -> Self {
        Self {
            rules: sampan_kinds::registry::find(group, version, kind)
                .copied()
                .unwrap_or(Kind::plain(group, version, kind)),
            group: group.into(),
            resource: resource.into(),
            kind: kind.into(),
            api_version: api_version(group, version),
            prefix: format!("{PREFIX}{}/{resource}/", if group.is_empty() { "core" } else { group }),
            namespaced,
        }
    }

    pub fn key(&self, namespace: &str, name: &str) -> String {
        match self.namespaced {
            true => format!("{}{namespace}/{name}", self.prefix),
            false => format!("{}{name}", self.prefix),
        }
    }

    /// What all keys of a namespace begin with; "" is every namespace.
    pub fn namespace_prefix(&self, namespace: &str) -> String {
        match namespace {
            "" => self.prefix.clone(),
            _ => format!("{}{namespace}/", self.prefix),
        }
    }

    /// Events, and lease updates that only renew, may reach the disk later than their answer.
    pub fn class(&self, new: &Value, old: Option<&Value>) -> Class {
        match (self.group.as_str(), self.resource.as_str(), old) {
            ("", "events", _) => Class::Deferred,
            ("coordination.k8s.io", "leases", Some(old)) if only_renews(new, old) => Class::Deferred,
            _ => Class::Durable,
        }
    }
}

/// `v1`, `apps/v1`.
pub fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_string() } else { format!("{group}/{version}") }
}

fn only_renews(new: &Value, old: &Value) -> bool {
    let spec = |object: &Value| {
        let mut spec = object.get("spec").and_then(Value::as_object).cloned().unwrap_or_default();
        spec.remove("renewTime");
        spec
    };
    let meta = |object: &Value| {
        let mut meta = object.get("metadata").and_then(Value::as_object).cloned().unwrap_or_default();
        meta.remove("resourceVersion");
        meta.remove("managedFields");
        meta
    };
    spec(new) == spec(old) && meta(new) == meta(old)
}

/// The first bytes of every stored object.
const HEAD: &[u8] = b"{\"metadata\":{";

/// An object's stored form.
pub fn encode(object: &Value) -> Result<Bytes> {
    let empty = Map::new();
    let fields = object.as_object().unwrap_or(&empty);
    let meta = fields.get("metadata").and_then(Value::as_object).unwrap_or(&empty);
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(HEAD);
    write_members(&mut out, meta, &["resourceVersion", "selfLink"])?;
    out.push(b'}');
    let mut rest = Vec::new();
    write_members(&mut rest, fields, &["apiVersion", "kind", "metadata"])?;
    if !rest.is_empty() {
        out.push(b',');
        out.append(&mut rest);
    }
    out.push(b'}');
    Ok(out.into())
}

fn write_members(out: &mut Vec<u8>, members: &Map<String, Value>, without: &[&str]) -> Result<()> {
    let mut first = true;
    for (key, value) in members.iter().filter(|(key, _)| !without.contains(&key.as_str())) {
        if !std::mem::take(&mut first) {
            out.push(b',');
        }
        serde_json::to_writer(&mut *out, key).map_err(Status::internal)?;
        out.push(b':');
        serde_json::to_writer(&mut *out, value).map_err(Status::internal)?;
    }
    Ok(())
}

/// A stored object as a value: of the storage version, with its apiVersion, kind and resourceVersion.
pub fn decode(storage: &Storage, bytes: &[u8], revision: u64) -> Result<Value> {
    let mut object: Value = serde_json::from_slice(bytes)
        .map_err(|e| Status::internal(format!("stored object of {} is damaged: {e}", storage.prefix)))?;
    object["apiVersion"] = storage.api_version.as_str().into();
    object["kind"] = storage.kind.as_str().into();
    if revision > 0 {
        object["metadata"]["resourceVersion"] = revision.to_string().into();
    }
    Ok(object)
}

/// Appends the object as JSON. With `type_meta` (apiVersion, kind) as an answer has it, without as a list's item.
/// What a dry run would have created has no revision (0).
pub fn splice(out: &mut BytesMut, type_meta: Option<(&str, &str)>, revision: u64, stored: &[u8]) {
    use std::fmt::Write;
    out.reserve(stored.len() + 96);
    let written = match type_meta {
        Some((api_version, kind)) => {
            write!(out, "{{\"kind\":\"{kind}\",\"apiVersion\":\"{api_version}\",\"metadata\":{{")
        }
        None => write!(out, "{{\"metadata\":{{"),
    };
    debug_assert!(written.is_ok());
    let rest = stored.strip_prefix(HEAD).unwrap_or(b"}}");
    if revision > 0 {
        let more = if rest.first() == Some(&b'}') { "" } else { "," };
        let written = write!(out, "\"resourceVersion\":\"{revision}\"{more}");
        debug_assert!(written.is_ok());
    }
    out.extend_from_slice(rest);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn stored_bytes_splice_into_answers() {
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "b"},
            "metadata": {"name": "x", "resourceVersion": "4", "uid": "u"}});
        let bytes = encode(&object).unwrap();
        assert!(bytes.starts_with(br#"{"metadata":{"name":"x","uid":"u"},"data":"#), "{bytes:?}");
        let storage = Storage::new("", "v1", "configmaps", "ConfigMap", true);
        assert_eq!(decode(&storage, &bytes, 4).unwrap(), object);
        let mut out = BytesMut::new();
        splice(&mut out, Some(("v1", "ConfigMap")), 4, &bytes);
        assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), object);
        let mut dry = BytesMut::new();
        splice(&mut dry, None, 0, &bytes);
        assert!(dry.starts_with(br#"{"metadata":{"name":"x","uid":"u"},"#), "{dry:?}");
        assert_eq!(storage.key("ns", "x"), "/registry/core/configmaps/ns/x");
    }

    #[test]
    fn a_lease_that_only_renews_is_deferred() {
        let storage = Storage::new("coordination.k8s.io", "v1", "leases", "Lease", true);
        let lease = |holder: &str, renewed: &str| json!({"metadata": {"name": "a"}, "spec": {"holderIdentity": holder, "renewTime": renewed}});
        assert_eq!(storage.class(&lease("a", "2"), Some(&lease("a", "1"))), Class::Deferred);
        assert_eq!(storage.class(&lease("b", "2"), Some(&lease("a", "1"))), Class::Durable);
        assert_eq!(storage.class(&lease("a", "1"), None), Class::Durable);
    }
}
