//! Paths outside the API's resources: health, version, metrics, discovery and OpenAPI.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/server/{healthz,routes}.
use std::fmt::Write;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderValue, Method, Response, header};
use serde_json::json;

use crate::body::{self, Body};
use crate::negotiate::Output;
use crate::query::Query;
use crate::request_info::RequestInfo;
use crate::status::{Result, Status};
use crate::{Server, discovery, metrics, openapi, reply};

pub async fn serve(
    server: &Server,
    info: &RequestInfo,
    query: &Query,
    parts: &Parts,
    output: Output,
) -> Result<Response<Body>> {
    let segments = info.segments();
    let reads = match segments.as_slice() {
        // Upstream's router looks at the methods of these only.
        ["version" | "api" | "apis" | "openapi" | ".well-known", ..] => parts.method == Method::GET,
        _ => true,
    };
    if !reads && is_served(server, &info.path) {
        return Err(Status::method_unknown());
    }
    match segments.as_slice() {
        [] => Ok(reply::json_value(200, &json!({"paths": discovery::paths(server)}))),
        ["healthz" | "livez" | "readyz", rest @ ..] if rest.len() <= 1 => {
            health(server, query, &segments).await
        }
        ["version"] => Ok(reply::json_value(200, &server.config.version.value())),
        ["metrics"] => {
            let mut response = reply::text(200, metrics::page(server));
            let version = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, version);
            Ok(response)
        }
        [".well-known", "openid-configuration"] => match &server.config.openid {
            Some(openid) => Ok(discovery_document(&openid.configuration, "application/json")),
            None => Err(Status::no_such_path()),
        },
        ["openid", "v1", "jwks"] => match &server.config.openid {
            Some(openid) => Ok(discovery_document(&openid.keys.jwks(), "application/jwk-set+json")),
            None => Err(Status::no_such_path()),
        },
        ["openapi", rest @ ..] => openapi::serve(server, rest, parts),
        ["api" | "apis", ..] => discovery::serve(server, &segments, parts, output)
            .map_err(|status| if status.is_not_found() { not_found(server, &info.path) } else { status }),
        _ => Err(not_found(server, &info.path)),
    }
}

/// Whether a group or another root that a path begins with is there.
fn is_served(server: &Server, path: &str) -> bool {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    match (parts.next(), parts.next()) {
        (Some("apis"), Some(group)) => server.registry.all().iter().any(|resource| resource.group == group),
        (first, _) => matches!(first, Some("api" | "apis" | "version" | "openapi" | ".well-known")),
    }
}

/// What a path without an answer gets: a page where not even the group is served, else a Status.
pub fn not_found(server: &Server, path: &str) -> Status {
    if is_served(server, path) { Status::no_such_path() } else { Status::no_such_page() }
}

/// A document of the service account issuer, which anybody may keep for an hour.
fn discovery_document(document: &serde_json::Value, media_type: &'static str) -> Response<Body> {
    let mut response = reply::bytes(200, media_type, body::full(document.to_string()));
    let cached = HeaderValue::from_static("public, max-age=3600");
    response.headers_mut().insert(header::CACHE_CONTROL, cached);
    response
}

/// `/healthz`, `/livez`, `/readyz` and one check of them; `?verbose` lists the checks, `?exclude=` leaves some out.
async fn health(server: &Server, query: &Query, segments: &[&str]) -> Result<Response<Body>> {
    let endpoint = segments.first().copied().unwrap_or("healthz");
    let ready = endpoint == "readyz";
    let mut checks: Vec<(&str, bool)> = vec![("ping", true)];
    match server.config.store.is_shared() {
        false => checks.push(("store", !is_closed(server))),
        true => {
            let answers = datastore_answers(server).await;
            checks.push(("etcd", answers));
            if ready {
                checks.push(("etcd-readiness", answers));
            }
        }
    }
    checks.push(("poststarthook/bootstrap", !ready || server.bootstrapped.get().is_some()));
    if ready {
        checks.push(("shutdown", !server.shutdown.is_cancelled()));
    }
    if let Some(wanted) = segments.get(1) {
        checks.retain(|(name, _)| name == wanted);
        if checks.is_empty() {
            return Err(Status::no_such_page());
        }
    }
    let excluded: Vec<&str> = query.all("exclude").collect();
    checks.retain(|(name, _)| !excluded.contains(name));
    let healthy = checks.iter().all(|(_, fine)| *fine);
    if healthy && !query.has("verbose") {
        return Ok(reply::text(200, "ok"));
    }
    let mut page = String::new();
    for (name, fine) in &checks {
        let _ = match fine {
            true => writeln!(page, "[+]{name} ok"),
            false => writeln!(page, "[-]{name} failed: reason withheld"),
        };
    }
    let _ = writeln!(page, "{endpoint} check {}", if healthy { "passed" } else { "failed" });
    Ok(reply::text(if healthy { 200 } else { 500 }, page))
}

/// How long the datastore may take to be called well, as upstream.
const HEALTH_LIMIT: Duration = Duration::from_secs(2);

async fn datastore_answers(server: &Server) -> bool {
    matches!(tokio::time::timeout(HEALTH_LIMIT, server.config.store.latest()).await, Ok(Ok(_)))
}

fn is_closed(server: &Server) -> bool {
    // The store's own watch ends with it; a revision is always there while it lives.
    server.config.store.revision() < server.caches.progress()
}
