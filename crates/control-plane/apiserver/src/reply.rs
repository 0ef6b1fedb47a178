//! Answers: objects, lists, tables and errors in the form that the client asked for.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/endpoints/handlers/{response,responsewriters}. A JSON answer of a
//! stored object is its stored bytes behind a new head; everything else goes through the value.
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Response, StatusCode, header};
use sampan_schema::Type;
use serde_json::{Map, Value, json};

use crate::body::{self, Body};
use crate::cache::Object;
use crate::call::Call;
use crate::codec;
use crate::negotiate::{Format, Output, Transform};
use crate::registry::Resource;
use crate::status::{Result, Status};
use crate::storage::{self, splice};
use crate::table;

/// A list's answer is sent in pieces of about this size once it is bigger than that.
const LIST_PIECE: usize = 64 << 10;
const LIST_WHOLE_MAX: usize = 1 << 20;

/// An answer of that code and form.
pub fn bytes(code: u16, media_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// A JSON answer.
pub fn json_value(code: u16, value: &Value) -> Response<Body> {
    bytes(code, "application/json", body::full(value.to_string()))
}

pub fn text(code: u16, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = bytes(code, "text/plain; charset=utf-8", body::full(text));
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

/// An error as the client wants it written.
pub fn failure(status: &Status, output: Output) -> Response<Body> {
    let code = status.0.code;
    if status.0.page {
        return text(code, status.0.message.clone());
    }
    let plain = Output { transform: Transform::None, format: output.errors, ..output };
    let mut response = match typed(&status.body(), codec::status_type(), plain) {
        Ok(encoded) => bytes(code, output.errors.media_type(), body::full(encoded)),
        Err(_) => json_value(code, &status.body()),
    };
    if status.0.retry_after_seconds > 0
        && let Ok(seconds) = HeaderValue::from_str(&status.0.retry_after_seconds.to_string())
    {
        response.headers_mut().insert(header::RETRY_AFTER, seconds);
    }
    response
}

/// A value of a known type (a Status, a review, a Scale) in the wanted format.
pub fn typed_value(code: u16, value: &Value, ty: Option<&Type>, output: Output) -> Result<Response<Body>> {
    let encoded = typed(value, ty, output)?;
    Ok(bytes(code, output.format.media_type(), body::full(encoded)))
}

fn typed(value: &Value, ty: Option<&Type>, output: Output) -> Result<Bytes> {
    match output.format {
        Format::Json if output.pretty => serde_json::to_vec_pretty(value)
            .map(|mut text| {
                text.push(b'\n');
                text.into()
            })
            .map_err(Status::internal),
        Format::Json => serde_json::to_vec(value).map(Bytes::from).map_err(Status::internal),
        Format::Yaml => codec::to_yaml(value),
        Format::Protobuf => codec::to_protobuf(ty, value),
    }
}

/// One object, from its stored form.
pub fn object(call: &Call, code: u16, stored: &[u8], revision: u64) -> Result<Response<Body>> {
    let encoded = encode_object(&call.resource, call.output, stored, revision, &|_| {}, true)?;
    Ok(bytes(code, call.output.format.media_type(), body::full(encoded)))
}

/// One stored object in the wanted form. `adjust` changes the value where one is made; with it, or where the form
/// needs it, the stored bytes aren't copied. `headed` tables carry their column definitions.
pub fn encode_object(
    resource: &Resource,
    output: Output,
    stored: &[u8],
    revision: u64,
    adjust: &dyn Fn(&mut Value),
    headed: bool,
) -> Result<Bytes> {
    if output == Output::JSON && resource.convert.is_none() {
        let type_meta = (resource.api_version(), resource.kind.as_str());
        return Ok(body::build(stored.len() + 128, |out| {
            splice(out, Some((&type_meta.0, type_meta.1)), revision, stored);
        }));
    }
    let mut value = resource.from_storage(storage::decode(&resource.storage, stored, revision)?);
    adjust(&mut value);
    encode_value(resource, output, value, headed)
}

/// One object of the resource's version in the wanted form.
pub fn encode_value(resource: &Resource, output: Output, value: Value, headed: bool) -> Result<Bytes> {
    match output.transform {
        Transform::None => typed(&value, Some(&resource.schema), output),
        Transform::PartialObjectMetadata => {
            typed(&partial(&value, output), codec::meta_type("PartialObjectMetadata"), output)
        }
        Transform::PartialObjectMetadataList => Err(not_a_list(resource)),
        Transform::Table => {
            let include = table::Include::default();
            typed(&table::of(resource, output, std::slice::from_ref(&value), include, headed), None, output)
        }
    }
}

fn not_a_list(resource: &Resource) -> Status {
    let message = format!(
        "you requested PartialObjectMetadataList, but the requested object is not a list (*{}.{})",
        codec::package(&resource.group),
        resource.kind
    );
    Status::new(406, "NotAcceptable", message)
}

/// `PartialObjectMetadata` of an object.
pub fn partial(value: &Value, output: Output) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": output.meta_version(),
        "metadata": value.get("metadata").cloned().unwrap_or_default(),
    })
}

/// A list's own metadata.
#[derive(Clone, Debug, Default)]
pub struct ListMeta {
    pub revision: u64,
    pub continue_token: String,
    pub remaining: Option<u64>,
}

impl ListMeta {
    fn value(&self) -> Value {
        let mut meta = Map::new();
        meta.insert("resourceVersion".into(), self.revision.to_string().into());
        if !self.continue_token.is_empty() {
            meta.insert("continue".into(), self.continue_token.as_str().into());
        }
        if let Some(remaining) = self.remaining {
            meta.insert("remainingItemCount".into(), remaining.into());
        }
        Value::Object(meta)
    }
}

/// A list of stored objects.
pub fn list(call: &Call, objects: Vec<Arc<Object>>, meta: &ListMeta) -> Result<Response<Body>> {
    let resource = &call.resource;
    let media_type = call.output.format.media_type();
    if call.output == Output::JSON && resource.convert.is_none() {
        return Ok(bytes(200, media_type, json_list(resource, objects, meta)));
    }
    let mut values = Vec::with_capacity(objects.len());
    for object in objects {
        values.push(resource.from_storage(object.value(&resource.storage)?));
    }
    let encoded = match call.output.transform {
        Transform::None => {
            for value in &mut values {
                if let Some(fields) = value.as_object_mut() {
                    fields.remove("apiVersion");
                    fields.remove("kind");
                }
            }
            let list = json!({"kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(),
                "metadata": meta.value(), "items": values});
            let ty = codec::type_of(&resource.group, &resource.version, &format!("{}List", resource.kind));
            typed(&list, ty, call.output)?
        }
        Transform::PartialObjectMetadata => {
            let message = format!(
                "you requested PartialObjectMetadata, but the requested object is a list (*{}.{}List)",
                codec::package(&resource.group),
                resource.kind
            );
            return Err(Status::new(406, "NotAcceptable", message));
        }
        Transform::PartialObjectMetadataList => {
            let items: Vec<Value> = values.iter().map(|value| partial(value, call.output)).collect();
            let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": call.output.meta_version(),
                "metadata": meta.value(), "items": items});
            typed(&list, codec::meta_type("PartialObjectMetadataList"), call.output)?
        }
        Transform::Table => {
            let include = table::Include::parse(call.query.get("includeObject"))?;
            let mut table = table::of(resource, call.output, &values, include, true);
            table["metadata"] = meta.value();
            typed(&table, None, call.output)?
        }
    };
    Ok(bytes(200, media_type, body::full(encoded)))
}

/// The list as JSON, the items' bytes copied; a big one is put together while it is sent.
fn json_list(resource: &Resource, objects: Vec<Arc<Object>>, meta: &ListMeta) -> Body {
    let size: usize = objects.iter().map(|object| object.bytes.len() + 64).sum();
    let head = format!(
        "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{},\"items\":[",
        resource.kind,
        resource.api_version(),
        meta.value()
    );
    if size <= LIST_WHOLE_MAX {
        return body::full(body::build(size + head.len() + 2, |out| {
            out.extend_from_slice(head.as_bytes());
            for (at, object) in objects.iter().enumerate() {
                push_item(out, at, object);
            }
            out.extend_from_slice(b"]}");
        }));
    }
    let mut next = 0;
    let mut head = Some(head);
    body::stream(futures::stream::iter(std::iter::from_fn(move || {
        if next > objects.len() {
            return None;
        }
        let mut out = BytesMut::with_capacity(LIST_PIECE + 4096);
        if let Some(head) = head.take() {
            out.extend_from_slice(head.as_bytes());
        }
        while next < objects.len() && out.len() < LIST_PIECE {
            push_item(&mut out, next, &objects[next]);
            next += 1;
        }
        if next == objects.len() {
            out.extend_from_slice(b"]}");
            next += 1;
        }
        Some(out.freeze())
    })))
}

fn push_item(out: &mut BytesMut, at: usize, object: &Object) {
    if at > 0 {
        out.extend_from_slice(b",");
    }
    splice(out, None, object.revision, &object.bytes);
}
