//! Creating and changing stored objects: the one path that every write takes.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/registry/generic/registry/store.go, …/registry/rest/{create,update}.go.
//! The order is upstream's: (decoded and defaulted by the caller) managed fields, mutating admission, defaults
//! again, strategy, validation, validating admission, store. Everything here works on the stored version.
use bytes::Bytes;
use sampan_kinds::{FieldError, Path, Rest, meta};
use sampan_schema::apply;
use sampan_store::{Expect, Write, WriteError};
use sampan_world::{clock, random};
use serde_json::Value;

use crate::admit::{self, Operation};
use crate::cache::store_failed;
use crate::call::{Call, WriteOptions};
use crate::certificates;
use crate::service_ip;
use crate::status::{GroupResource, OPTIMISTIC_LOCK, Result, Status};
use crate::storage;

/// Upstream's attempts at finding a free generated name.
const GENERATED_NAMES_MAX: usize = 8;
/// Random characters of a generated name, and how long its base may be.
const SUFFIX_LENGTH: usize = 5;
const BASE_MAX: usize = 63 - SUFFIX_LENGTH;
/// A write that keeps losing the race gives up after so many rounds.
const ROUNDS_MAX: usize = 64;
/// A service whose address another server's service may have been given meanwhile waits up to so long, and looks again.
const TURN_PAUSE_MS: u64 = 40;

/// An object as it was stored (or would have been, in a dry run).
#[derive(Clone, Debug)]
pub struct Written {
    pub bytes: Bytes,
    pub revision: u64,
    pub created: bool,
}

/// What is updated, and by whose rules.
pub struct Target<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub rest: &'a Rest,
    /// For admission and managed fields: "status", "scale", …; "" is the object itself.
    pub subresource: &'a str,
    /// Create what isn't there.
    pub create: bool,
    /// An update without resourceVersion overwrites.
    pub unconditional: bool,
    /// A uid in the new object that isn't the present one's is a precondition that failed (PUT), or else a change
    /// of what can't be changed (PATCH).
    pub uid_is_precondition: bool,
}

impl<'a> Target<'a> {
    /// The object that the request names.
    pub fn of(call: &'a Call) -> Self {
        let rules = &call.resource.storage.rules;
        Self {
            namespace: &call.info.namespace,
            name: &call.info.name,
            rest: &rules.rest,
            subresource: "",
            create: false,
            unconditional: rules.unconditional_update,
            uid_is_precondition: true,
        }
    }
}

/// Makes the new state of an object from the present one (None: there is none), both in the stored version.
pub type Update<'a> = dyn Fn(Option<&Value>) -> Result<Value> + Send + Sync + 'a;

pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

fn meta_of(object: &mut Value) -> Result<&mut serde_json::Map<String, Value>> {
    let fields =
        object.as_object_mut().ok_or_else(|| Status::bad_request("the object is not a JSON object"))?;
    let meta = fields.entry("metadata").or_insert_with(|| Value::Object(Default::default()));
    if meta.is_null() {
        *meta = Value::Object(Default::default());
    }
    meta.as_object_mut().ok_or_else(|| Status::bad_request("metadata is not an object"))
}

/// Stores a new object, which the caller has decoded, defaulted and whose fields' manager it has noted.
pub async fn create(call: &Call, object: Value, options: &WriteOptions) -> Result<Written> {
    if text(&object, "/metadata/resourceVersion").parse::<u64>().is_ok_and(|version| version != 0) {
        return Err(Status::new(500, "", "resourceVersion should not be set on objects to be created"));
    }
    let generated =
        text(&object, "/metadata/name").is_empty() && !text(&object, "/metadata/generateName").is_empty();
    let attempts = if generated { GENERATED_NAMES_MAX } else { 1 };
    for attempt in 1..=attempts {
        match create_in_turn(call, &object, options).await {
            Err(status) if status.0.reason == "AlreadyExists" && attempt < attempts => {}
            Err(status) if status.0.reason == "AlreadyExists" && generated => {
                let of = call.resource.group_resource();
                return Err(Status::generate_name_conflict(of, text(&object, "/metadata/generateName")));
            }
            result => return result,
        }
    }
    Err(Status::internal("no attempt was made"))
}

/// Why an attempt to create did not succeed.
enum NotCreated {
    Failed(Status),
    /// Another server gave away addresses or ports since they were chosen here.
    Outdated,
}

impl From<Status> for NotCreated {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

/// Creates the object, with another choice as long as another server's services come in between.
async fn create_in_turn(call: &Call, object: &Value, options: &WriteOptions) -> Result<Written> {
    for _ in 0..ROUNDS_MAX {
        match create_once(call, object.clone(), options).await {
            Ok(written) => return Ok(written),
            Err(NotCreated::Failed(status)) => return Err(status),
            Err(NotCreated::Outdated) => pause().await,
        }
    }
    Err(Status::internal("other servers' services keep coming in between"))
}

async fn pause() {
    tokio::time::sleep(std::time::Duration::from_millis(random::below(TURN_PAUSE_MS))).await;
}

/// Whether a conflict says that a service's address or port has to be chosen again.
fn is_outdated(error: &WriteError) -> bool {
    matches!(error, WriteError::Conflict { key, .. } if key == service_ip::TURN_KEY)
}

/// Stores `write`, together with what says that an allocation took place.
async fn store(
    call: &Call,
    write: Write,
    allocation: Option<service_ip::Allocation>,
) -> std::result::Result<u64, WriteError> {
    let store = call.server.caches.store();
    match allocation.as_ref().and_then(service_ip::Allocation::turn) {
        None => store.write(write).await,
        Some(turn) => {
            let revisions = store.write_many(Vec::new(), vec![write, turn]).await?;
            Ok(revisions.first().copied().unwrap_or_default())
        }
    }
}

async fn create_once(
    call: &Call,
    mut object: Value,
    options: &WriteOptions,
) -> std::result::Result<Written, NotCreated> {
    let resource = &call.resource;
    let rules = &resource.storage.rules;
    let object_meta = meta_of(&mut object)?;
    for field in ["resourceVersion", "selfLink", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        object_meta.remove(field);
    }
    object_meta.insert("uid".into(), random::uuid().into());
    object_meta.insert("creationTimestamp".into(), clock::now_seconds().to_string().into());
    match resource.namespaced {
        true => object_meta.insert("namespace".into(), call.info.namespace.as_str().into()),
        false => object_meta.remove("namespace"),
    };
    let name = object_meta.get("name").and_then(Value::as_str).unwrap_or("");
    if name.is_empty() {
        let base = object_meta.get("generateName").and_then(Value::as_str).unwrap_or("");
        if !base.is_empty() {
            let base: String = base.chars().take(BASE_MAX).collect();
            object_meta.insert("name".into(), format!("{base}{}", random::suffix(SUFFIX_LENGTH)).into());
        }
    }
    admit::mutate(call, Operation::Create, "", &mut object, None, options).await?;
    (rules.defaults)(&mut object);
    (rules.rest.prepare_create)(&mut object);
    certificates::set_requester(call, &mut object);
    let allocation = service_ip::before_create(call, &mut object).await?;
    let name = text(&object, "/metadata/name").to_string();
    let mut errors = meta::validate(&object, resource.namespaced, rules.name_rule);
    match own_rules(call) {
        Some((rest, convert)) => errors.extend((rest.validate)(&convert(object.clone()))),
        None => errors.extend((rules.rest.validate)(&object)),
    }
    errors.extend(certificates::validate(call, &object));
    if !errors.is_empty() {
        return Err(call.invalid(&name, &errors).into());
    }
    for warning in (rules.rest.warnings)(&object, None) {
        call.warn(warning);
    }
    check_escalation(call, None, &object)?;
    admit::validate(call, Operation::Create, "", Some(&object), None, options).await?;
    certificates::admit(call, "", &object, None).await?;
    let bytes = storage::encode(&object)?;
    let key = resource.storage.key(&call.info.namespace, &name);
    let exists = || Status::already_exists(resource.group_resource(), &name);
    if options.dry_run {
        let cache = call.cache().await?;
        call.server.caches.catch_up().await?;
        return match cache.get(&key) {
            Some(_) => Err(exists().into()),
            None => Ok(Written { bytes, revision: 0, created: true }),
        };
    }
    let write = Write {
        key,
        expect: Expect::Absent,
        value: Some(bytes.clone()),
        class: resource.storage.class(&object, None),
    };
    match store(call, write, allocation).await {
        Ok(revision) => Ok(Written { bytes, revision, created: true }),
        Err(error) if is_outdated(&error) => Err(NotCreated::Outdated),
        Err(WriteError::Conflict { .. }) => Err(exists().into()),
        Err(WriteError::Store(error)) => Err(store_failed(error).into()),
    }
}

/// Changes an object, again and again while others change it in between.
pub async fn update(
    call: &Call,
    target: &Target<'_>,
    make: &Update<'_>,
    options: &WriteOptions,
) -> Result<Written> {
    let resource = &call.resource;
    let cache = call.cache().await?;
    let key = resource.storage.key(target.namespace, target.name);
    for _ in 0..ROUNDS_MAX {
        call.server.caches.catch_up().await?;
        let Some(existing) = cache.get(&key) else {
            if !target.create {
                return Err(Status::not_found(resource.group_resource(), target.name));
            }
            match create_in_turn(call, &make(None)?, options).await {
                Err(status) if status.0.reason == "AlreadyExists" && !options.dry_run => continue,
                result => return result,
            }
        };
        let stored = existing.value(&resource.storage)?;
        let mut object = make(Some(&stored))?;
        let conflict = |why: &str| Status::conflict(resource.group_resource(), target.name, why);
        if target.uid_is_precondition {
            check_uid(call, &object, &stored, &key)?;
        }
        match text(&object, "/metadata/resourceVersion") {
            "" | "0" if target.unconditional => {
                let version = stored.pointer("/metadata/resourceVersion").cloned().unwrap_or_default();
                meta_of(&mut object)?.insert("resourceVersion".into(), version);
            }
            "" | "0" => {
                let path = Path::new("metadata").child("resourceVersion");
                let errors = vec![FieldError::invalid(&path, 0, "must be specified for an update")];
                let of = resource.group_resource();
                return Err(Status::invalid(of.group, of.resource, target.name, &errors));
            }
            version if version == text(&stored, "/metadata/resourceVersion") => {}
            version if version.parse::<u64>().is_err() => {
                let why = unsigned_error(version);
                return Err(Status::new(500, "", format!("strconv.ParseUint: parsing {version:?}: {why}")));
            }
            _ => return Err(conflict(OPTIMISTIC_LOCK)),
        }
        admit::mutate(call, Operation::Update, target.subresource, &mut object, Some(&stored), options)
            .await?;
        (resource.storage.rules.defaults)(&mut object);
        let allocation = settle(call, target, &mut object, &stored).await?;
        check_escalation(call, Some(&stored), &object)?;
        admit::validate(call, Operation::Update, target.subresource, Some(&object), Some(&stored), options)
            .await?;
        certificates::admit(call, target.subresource, &object, Some(&stored)).await?;
        apply::revert_timestamps(&mut object, &stored);
        let bytes = storage::encode(&object)?;
        if is_finished(&object, &stored) {
            if !options.dry_run {
                remove(call, &key, existing.revision).await?;
            }
            return Ok(Written { bytes, revision: existing.revision, created: false });
        }
        if bytes == existing.bytes || options.dry_run {
            return Ok(Written { bytes, revision: existing.revision, created: false });
        }
        let write = Write {
            key: key.clone(),
            expect: Expect::Revision(existing.revision),
            value: Some(bytes.clone()),
            class: resource.storage.class(&object, Some(&stored)),
        };
        match store(call, write, allocation).await {
            Ok(revision) => return Ok(Written { bytes, revision, created: false }),
            Err(error) if is_outdated(&error) => pause().await,
            Err(WriteError::Conflict { .. }) => {}
            Err(WriteError::Store(error)) => return Err(store_failed(error)),
        }
    }
    Err(Status::conflict(resource.group_resource(), target.name, OPTIMISTIC_LOCK))
}

/// The rules of the served version, where they aren't the stored one's, and how an object gets there.
fn own_rules(call: &Call) -> Option<(&Rest, fn(Value) -> Value)> {
    let convert = call.resource.convert.as_ref().filter(|convert| convert.own_rules)?;
    Some((&call.resource.rules.rest, convert.from_storage))
}

/// Nobody grants by RBAC what they don't have.
fn check_escalation(call: &Call, old: Option<&Value>, object: &Value) -> Result<()> {
    let storage = &call.resource.storage;
    match call.server.authorizer.get() {
        Some(authorizer) if storage.group == "rbac.authorization.k8s.io" => {
            let namespace = &call.info.namespace;
            authorizer.check_escalation(&call.identity, &storage.resource, namespace, old, object)
        }
        _ => Ok(()),
    }
}

/// Upstream's BeforeUpdate: what an update can't change is put back, then all is validated.
async fn settle(
    call: &Call,
    target: &Target<'_>,
    object: &mut Value,
    stored: &Value,
) -> Result<Option<service_ip::Allocation>> {
    let resource = &call.resource;
    let object_meta = meta_of(object)?;
    match resource.namespaced {
        true => object_meta.insert("namespace".into(), target.namespace.into()),
        false => object_meta.remove("namespace"),
    };
    let old = |field: &str| stored.pointer(&format!("/metadata/{field}")).cloned();
    match old("generation") {
        Some(generation) => object_meta.insert("generation".into(), generation),
        None => object_meta.remove("generation"),
    };
    (target.rest.prepare_update)(object, stored);
    let object_meta = meta_of(object)?;
    if object_meta.get("uid").and_then(Value::as_str).unwrap_or("").is_empty()
        && let Some(uid) = old("uid")
    {
        object_meta.insert("uid".into(), uid);
    }
    for field in ["creationTimestamp", "deletionTimestamp"] {
        if let Some(time) = old(field) {
            object_meta.insert(field.into(), time);
        }
    }
    if !object_meta.contains_key("deletionGracePeriodSeconds")
        && let Some(seconds) = old("deletionGracePeriodSeconds")
    {
        object_meta.insert("deletionGracePeriodSeconds".into(), seconds);
    }
    object_meta.remove("selfLink");
    let allocation = match target.subresource {
        "" => service_ip::before_update(call, object, stored).await?,
        _ => None,
    };
    let mut errors = meta::validate(object, resource.namespaced, resource.storage.rules.name_rule);
    errors.retain(|error| error.field != "metadata.name");
    errors.extend(meta::validate_update(object, stored));
    match own_rules(call) {
        Some((rest, convert)) => {
            errors.extend((rest.validate_update)(&convert(object.clone()), &convert(stored.clone())));
        }
        None => errors.extend((target.rest.validate_update)(object, stored)),
    }
    if !errors.is_empty() {
        return Err(call.invalid(target.name, &errors));
    }
    for warning in (target.rest.warnings)(object, Some(stored)) {
        call.warn(warning);
    }
    Ok(allocation)
}

fn check_uid(call: &Call, object: &Value, stored: &Value, key: &str) -> Result<()> {
    let (wanted, present) = (text(object, "/metadata/uid"), text(stored, "/metadata/uid"));
    if wanted.is_empty() || wanted == present {
        return Ok(());
    }
    // Upstream's core resources lie right below the prefix.
    let key = key.replacen("/registry/core/", "/registry/", 1);
    let why = format!(
        "StorageError: invalid object, Code: 4, Key: {key}, ResourceVersion: 0, AdditionalErrorMsg: Precondition \
         failed: UID in precondition: {wanted}, UID in object meta: {present}"
    );
    Err(Status::conflict(call.resource.group_resource(), text(stored, "/metadata/name"), why))
}

/// What Go says of a text that is no 64-bit number.
pub fn unsigned_error(text: &str) -> &'static str {
    match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => "value out of range",
        false => "invalid syntax",
    }
}

/// Whether the update took the last finalizer from an object that is being deleted.
fn is_finished(object: &Value, stored: &Value) -> bool {
    let no_finalizers = |object: &Value| {
        object.pointer("/metadata/finalizers").and_then(Value::as_array).is_none_or(Vec::is_empty)
    };
    let grace = stored.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64);
    // A namespace has finalizers of its own in its spec.
    let own = |object: &Value| {
        object.pointer("/spec/finalizers").and_then(Value::as_array).is_none_or(Vec::is_empty)
    };
    let is_namespace = text(stored, "/kind") == "Namespace" && text(stored, "/apiVersion") == "v1";
    stored.pointer("/metadata/deletionTimestamp").is_some_and(|time| !time.is_null())
        && no_finalizers(object)
        && grace.unwrap_or(0) == 0
        && (!is_namespace || own(object))
}

/// Removes an object that is as of `revision`.
pub async fn remove(call: &Call, key: &str, revision: u64) -> Result<Option<u64>> {
    let mut write = Write::delete(key, Expect::Revision(revision));
    if call.resource.storage.resource == "events" {
        write = write.deferred();
    }
    match call.server.caches.store().write(write).await {
        Ok(revision) => Ok(Some(revision)),
        Err(WriteError::Conflict { .. }) => Ok(None),
        Err(WriteError::Store(error)) => Err(store_failed(error)),
    }
}

/// The group and resource for messages about something else than the request's own resource.
pub fn of<'a>(group: &'a str, resource: &'a str) -> GroupResource<'a> {
    GroupResource { group, resource }
}
