//! `/openapi/v2` and `/openapi/v3`.
//!
//! Upstream counterpart: k8s.io/kube-openapi/pkg/handler{,3}. Documents are made when asked for and kept nowhere: a
//! client that has one asks with its ETag and is told that nothing has changed.
use http::request::Parts;
use http::{HeaderValue, Response, header};
use sampan_schema::{ResourceFact, openapi};

use crate::Server;
use crate::body::{self, Body};
use crate::reply;
use crate::status::{Result, Status};

const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
const V2_PROTOBUF_OLD: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";

pub fn serve(server: &Server, rest: &[&str], parts: &Parts) -> Result<Response<Body>> {
    let served = server.registry.facts();
    match *rest {
        ["v2"] => Ok(v2(&served, parts)),
        ["v3"] => Ok(reply::bytes(200, "application/json", body::full(openapi::v3_index(&served)))),
        ["v3", "api", version] => v3(version, &served, parts),
        ["v3", "apis", group, version] => v3(&format!("{group}/{version}"), &served, parts),
        _ => Err(Status::no_such_path()),
    }
}

fn v2(served: &[ResourceFact], parts: &Parts) -> Response<Body> {
    let accept = parts.headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or("");
    let protobuf = accept.contains(V2_PROTOBUF) || accept.contains(V2_PROTOBUF_OLD);
    let hash = format!("{}{}", openapi::v2_hash(served), if protobuf { "P" } else { "" });
    // always the newer name: the older, which old clients ask for, is no media type that Go parses
    let media_type = if protobuf { V2_PROTOBUF } else { "application/json" };
    answer(parts, &hash, media_type, || {
        if protobuf { openapi::v2_protobuf(served) } else { openapi::v2(served) }
    })
}

fn v3(group_version: &str, served: &[ResourceFact], parts: &Parts) -> Result<Response<Body>> {
    if !served.iter().any(|fact| fact.group_version() == group_version) {
        return Err(Status::no_such_path());
    }
    let hash = openapi::v3_hash(group_version, served);
    Ok(answer(parts, &hash, "application/json", || openapi::v3(group_version, served).unwrap_or_default()))
}

fn answer(
    parts: &Parts,
    hash: &str,
    media_type: &'static str,
    make: impl FnOnce() -> Vec<u8>,
) -> Response<Body> {
    let etag = format!("\"{hash}\"");
    let same = parts.headers.get(header::IF_NONE_MATCH).is_some_and(|tag| tag.as_bytes() == etag.as_bytes());
    let mut response = match same {
        true => reply::bytes(304, media_type, body::empty()),
        false => reply::bytes(200, media_type, body::full(make())),
    };
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    response
}
