//! DELETE of one object and of a collection.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/endpoints/handlers/delete.go, …/registry/rest/delete.go,
//! …/registry/generic/registry/store.go, pkg/registry/core/{pod/strategy.go,namespace/storage}. An object goes in one
//! write when nothing holds it; else that write says since when and for how long it is being deleted.
use std::sync::Arc;

use http::Response;
use jiff::{SignedDuration, Timestamp};
use sampan_kinds::{ErrorList, FieldError, Path};
use sampan_store::{Expect, Write, WriteError};
use sampan_world::clock;
use serde_json::{Value, json};

use crate::admit::{self, Operation};
use crate::body::{self, Body};
use crate::cache::{Object, store_failed};
use crate::call::{Call, FieldValidation, WriteOptions, dry_run};
use crate::codec::{self, Expected};
use crate::negotiate::Output;
use crate::reply;
use crate::rest::list;
use crate::status::{GroupResource, Result, Status, success};
use crate::storage;
use crate::write::text;

const DELETE_OPTIONS: &str = "DeleteOptions";
const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";
/// A delete that keeps losing the race gives up after so many rounds.
const ROUNDS_MAX: usize = 64;

/// `DeleteOptions`.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    pub grace_period_seconds: Option<i64>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
    pub orphan_dependents: Option<bool>,
    pub propagation: Option<String>,
    pub dry_run: bool,
}

impl DeleteOptions {
    /// From the body where there is one, else from the query.
    pub fn parse(call: &Call, bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() {
            let query = &call.query;
            let mut errors = ErrorList::new();
            let options = Self {
                grace_period_seconds: query.integer("gracePeriodSeconds")?,
                orphan_dependents: query.optional_flag("orphanDependents"),
                propagation: query
                    .has("propagationPolicy")
                    .then(|| query.get("propagationPolicy").to_string()),
                dry_run: dry_run(query, &mut errors),
                ..Self::default()
            };
            return options.checked(errors);
        }
        let ty =
            codec::meta_type("DeleteOptions").ok_or_else(|| Status::internal("no type DeleteOptions"))?;
        let expected = Expected { group: "", version: "v1", kind: DELETE_OPTIONS, ty };
        let value = codec::read(call, bytes, &expected, FieldValidation::Ignore)?;
        Self::from_value(&value)
    }

    pub fn from_value(value: &Value) -> Result<Self> {
        let string = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).map(str::to_string);
        let dry: Vec<Value> = value.get("dryRun").and_then(Value::as_array).cloned().unwrap_or_default();
        let mut errors = ErrorList::new();
        if dry.iter().any(|value| value != "All") {
            errors.push(FieldError::not_supported(&Path::new("dryRun"), Value::Array(dry.clone()), &["All"]));
        }
        let options = Self {
            grace_period_seconds: value.get("gracePeriodSeconds").and_then(Value::as_i64),
            uid: string("/preconditions/uid"),
            resource_version: string("/preconditions/resourceVersion"),
            orphan_dependents: value.get("orphanDependents").and_then(Value::as_bool),
            propagation: string("/propagationPolicy"),
            dry_run: !dry.is_empty(),
        };
        options.checked(errors)
    }

    fn checked(self, mut errors: ErrorList) -> Result<Self> {
        let path = Path::new("propagationPolicy");
        if let Some(policy) = &self.propagation {
            if self.orphan_dependents.is_some() {
                let detail = "orphanDependents and deletionPropagation cannot be both set";
                errors.push(FieldError::invalid(&path, policy.as_str(), detail));
            }
            if !matches!(policy.as_str(), "Foreground" | "Background" | "Orphan") {
                let supported = ["Foreground", "Background", "Orphan", "nil"];
                errors.push(FieldError::not_supported_as_listed(&path, policy.as_str(), &supported));
            }
        }
        match errors.is_empty() {
            true => Ok(self),
            false => Err(Status::invalid("meta.k8s.io", "DeleteOptions", "", &errors)),
        }
    }

    fn as_write(&self) -> WriteOptions {
        WriteOptions {
            dry_run: self.dry_run,
            validation: FieldValidation::Ignore,
            manager: String::new(),
            force: None,
        }
    }
}

/// How a delete ended.
pub struct Deleted {
    /// The last state, as stored.
    pub bytes: bytes::Bytes,
    pub revision: u64,
    /// The object is gone, rather than marked.
    pub gone: bool,
}

pub async fn serve(call: &Call, body: Body) -> Result<Response<Body>> {
    let bytes = body::read(body).await?;
    let options = DeleteOptions::parse(call, &bytes)?;
    let deleted = delete(call, &call.info.name, &options).await?;
    let code = if !deleted.gone && options.orphan_dependents == Some(false) { 202 } else { 200 };
    if deleted.gone && !returns_object(call) {
        let stored = storage::decode(&call.resource.storage, &deleted.bytes, deleted.revision)?;
        let of = call.resource.group_resource();
        let status = success(of, &call.info.name, text(&stored, "/metadata/uid"));
        let output = Output { transform: crate::negotiate::Transform::None, ..call.output };
        return reply::typed_value(code, &status, codec::status_type(), output);
    }
    reply::object(call, code, &deleted.bytes, deleted.revision)
}

/// Kinds whose delete answers with the object; the others say `Success`.
fn returns_object(call: &Call) -> bool {
    let resource = call.resource.storage.resource.as_str();
    match call.resource.storage.group.as_str() {
        "" => matches!(
            resource,
            "resourcequotas"
                | "persistentvolumes"
                | "persistentvolumeclaims"
                | "serviceaccounts"
                | "namespaces"
                | "pods"
                | "services"
                | "podtemplates"
        ),
        "storage.k8s.io" => resource != "csistoragecapacities",
        "resource.k8s.io" => true,
        _ => false,
    }
}

/// Deletes one object of the request's namespace.
pub async fn delete(call: &Call, name: &str, options: &DeleteOptions) -> Result<Deleted> {
    let resource = &call.resource;
    let key = resource.storage.key(&call.info.namespace, name);
    let cache = call.cache().await?;
    let write_options = options.as_write();
    for _ in 0..ROUNDS_MAX {
        call.server.caches.catch_up().await?;
        let not_found = || Status::not_found(resource.group_resource(), name);
        let existing: Arc<Object> = cache.get(&key).ok_or_else(not_found)?;
        let mut object = existing.value(&resource.storage)?;
        preconditions(call, &object, options)?;
        admit::validate(call, Operation::Delete, "", None, Some(&object), &write_options).await?;
        let step = step(call, &mut object, options);
        let (value, gone) = match step {
            Step::Pending => {
                let (bytes, revision) = (existing.bytes.clone(), existing.revision);
                return Ok(Deleted { bytes, revision, gone: false });
            }
            Step::Mark => (Some(storage::encode(&object)?), false),
            Step::Remove => (None, true),
        };
        // What is returned of a removed object carries the marks of its deletion.
        let bytes = storage::encode(&object)?;
        if options.dry_run {
            return Ok(Deleted { bytes, revision: existing.revision, gone });
        }
        if value.as_ref() == Some(&existing.bytes) {
            return Ok(Deleted { bytes, revision: existing.revision, gone: false });
        }
        let class = resource.storage.class(&object, None);
        let write = Write { key: key.clone(), expect: Expect::Revision(existing.revision), value, class };
        match call.server.caches.store().write(write).await {
            Ok(revision) => return Ok(Deleted { bytes, revision, gone }),
            Err(WriteError::Conflict { .. }) => {}
            Err(WriteError::Store(error)) => return Err(store_failed(error)),
        }
    }
    Err(Status::conflict(resource.group_resource(), name, crate::status::OPTIMISTIC_LOCK))
}

fn preconditions(call: &Call, object: &Value, options: &DeleteOptions) -> Result<()> {
    let name = text(object, "/metadata/name");
    // Upstream names the kind here.
    let of = GroupResource { group: &call.resource.storage.group, resource: &call.resource.storage.kind };
    let conflict = |why: String| Err(Status::conflict(of, name, why));
    let (uid, version) = (text(object, "/metadata/uid"), text(object, "/metadata/resourceVersion"));
    if let Some(wanted) = options.uid.as_deref().filter(|wanted| *wanted != uid) {
        return conflict(format!(
            "the UID in the precondition ({wanted}) does not match the UID in record ({uid}). The object might have \
             been deleted and then recreated"
        ));
    }
    if let Some(wanted) = options.resource_version.as_deref().filter(|wanted| *wanted != version) {
        return conflict(format!(
            "the ResourceVersion in the precondition ({wanted}) does not match the ResourceVersion in record \
             ({version}). The object might have been modified"
        ));
    }
    Ok(())
}

enum Step {
    /// The deletion is under way, nothing changes.
    Pending,
    /// The object now says that it is being deleted.
    Mark,
    /// Nothing holds the object.
    Remove,
}

fn step(call: &Call, object: &mut Value, options: &DeleteOptions) -> Step {
    let is_namespace =
        call.resource.storage.resource == "namespaces" && call.resource.storage.group.is_empty();
    let graceful = call.resource.storage.rules.graceful
        && match begin_gracefully(object, options) {
            Grace::Pending => return Step::Pending,
            Grace::Period(seconds) => {
                if seconds > 0 {
                    set_finalizers(call, object, options);
                    return Step::Mark;
                }
                true
            }
            Grace::Over => false,
        };
    set_finalizers(call, object, options);
    let held =
        object.pointer("/metadata/finalizers").and_then(Value::as_array).is_some_and(|f| !f.is_empty());
    let kept_by_spec = is_namespace
        && object.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|f| !f.is_empty());
    if !held && !kept_by_spec {
        return Step::Remove;
    }
    if is_namespace {
        object["status"]["phase"] = "Terminating".into();
    }
    if !graceful {
        mark(object, is_namespace);
    }
    Step::Mark
}

/// The object says that it is being deleted from now on, without grace.
fn mark(object: &mut Value, is_namespace: bool) {
    let now = clock::now_seconds();
    let meta = &mut object["metadata"];
    let set = meta.get("deletionTimestamp").and_then(Value::as_str).and_then(|t| t.parse::<Timestamp>().ok());
    if set.is_none()
        && let Some(generation) = meta.get("generation").and_then(Value::as_i64).filter(|g| *g > 0)
    {
        meta["generation"] = (generation + 1).into();
    }
    if set.is_none_or(|set| set > now) {
        meta["deletionTimestamp"] = now.to_string().into();
    }
    if !is_namespace {
        meta["deletionGracePeriodSeconds"] = 0.into();
    }
}

enum Grace {
    /// Being deleted already, and no sooner for this request.
    Pending,
    /// Deletion is noted, with this grace.
    Period(i64),
    /// Being deleted already, without grace.
    Over,
}

/// Upstream's BeforeDelete for kinds with a grace period (pods).
fn begin_gracefully(object: &mut Value, options: &DeleteOptions) -> Grace {
    let requested = options.grace_period_seconds.map(|seconds| if seconds < 0 { 1 } else { seconds });
    let now = clock::now_seconds();
    let time = |meta: &Value| text(meta, "/deletionTimestamp").parse::<Timestamp>().ok();
    let later = |from: Timestamp, seconds: i64| {
        from.saturating_add(SignedDuration::from_secs(seconds)).unwrap_or(from)
    };
    if let Some(set) = time(&object["metadata"]) {
        let present =
            object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
        if present == 0 {
            return Grace::Over;
        }
        let Some(mut period) = requested.filter(|period| *period < present) else { return Grace::Pending };
        let mut at = later(later(set, -present), period);
        if at < now {
            at = now;
            period = period.min(1);
        }
        object["metadata"]["deletionTimestamp"] = at.to_string().into();
        object["metadata"]["deletionGracePeriodSeconds"] = period.into();
        return Grace::Period(period);
    }
    let own = object.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64);
    let mut period = requested.or(own).unwrap_or(0);
    if text(object, "/spec/nodeName").is_empty()
        || matches!(text(object, "/status/phase"), "Failed" | "Succeeded")
    {
        period = 0;
    }
    if period < 0 {
        period = 1;
    }
    let meta = &mut object["metadata"];
    meta["deletionTimestamp"] = later(now, period).to_string().into();
    meta["deletionGracePeriodSeconds"] = period.into();
    if let Some(generation) = meta.get("generation").and_then(Value::as_i64).filter(|g| *g > 0) {
        meta["generation"] = (generation + 1).into();
    }
    Grace::Period(period)
}

/// Adds or takes away the garbage collector's finalizers as the options say.
fn set_finalizers(call: &Call, object: &mut Value, options: &DeleteOptions) {
    let storage = &call.resource.storage;
    if storage.resource == "events" {
        return;
    }
    let present: Vec<String> = object
        .pointer("/metadata/finalizers")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|finalizer| finalizer.as_str().map(str::to_string))
        .collect();
    let has = |name: &str| present.iter().any(|finalizer| finalizer == name);
    let orphans_by_default = matches!(
        (storage.group.as_str(), storage.resource.as_str()),
        ("batch", "jobs") | ("", "replicationcontrollers")
    );
    let (orphan, foreground) = match (options.orphan_dependents, options.propagation.as_deref()) {
        (Some(orphan), _) => (orphan, false),
        (None, Some("Orphan")) => (true, false),
        (None, Some("Foreground")) => (false, true),
        (None, Some(_)) => (false, false),
        (None, None) if has(ORPHAN) => (true, false),
        (None, None) if has(FOREGROUND) => (false, true),
        (None, None) => (orphans_by_default, false),
    };
    if orphan == has(ORPHAN) && foreground == has(FOREGROUND) {
        return;
    }
    let mut finalizers: Vec<Value> =
        present.into_iter().filter(|f| f != ORPHAN && f != FOREGROUND).map(Value::from).collect();
    if orphan {
        finalizers.push(ORPHAN.into());
    }
    if foreground {
        finalizers.push(FOREGROUND.into());
    }
    match finalizers.is_empty() {
        true => drop(object["metadata"].as_object_mut().and_then(|meta| meta.remove("finalizers"))),
        false => object["metadata"]["finalizers"] = finalizers.into(),
    }
}

/// Deletes what a list with the same options would show.
pub async fn serve_collection(call: &Call, body: Body) -> Result<Response<Body>> {
    let bytes = body::read(body).await?;
    let options = DeleteOptions::parse(call, &bytes)?;
    let listed = list::list(call).await?;
    for object in &listed.objects {
        match delete(call, object.name(), &options).await {
            Ok(_) => {}
            Err(status) if status.is_not_found() => {}
            Err(status) => return Err(status),
        }
    }
    reply::list(call, listed.objects, &listed.meta)
}

/// `Success` without details.
pub fn plain_success() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
}
