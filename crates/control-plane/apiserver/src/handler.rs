//! The way of every request, from the network or from memory.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/server/config.go (DefaultBuildHandlerChain) and the filters it names.
use std::future::poll_fn;
use std::sync::Arc;

use futures::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header, request::Parts};
use parking_lot::Mutex;
use sampan_client::Identity;
use sampan_world::{clock, random};
use tokio::sync::OwnedSemaphorePermit;
use tower::Service;

use crate::access::{Attributes, Decision};
use crate::authn::{self, impersonation};
use crate::body::{self, Body};
use crate::call::Call;
use crate::config::ExtraRouter;
use crate::negotiate::Output;
use crate::query::Query;
use crate::request_info::RequestInfo;
use crate::status::{Result, Status};
use crate::{Server, nonresource, reply, rest};

const AUDIT_ID: HeaderName = HeaderName::from_static("audit-id");
/// Upstream's deprecated versions of kinds among those served, and what every request for them is warned of.
const DEPRECATED: [(&str, &str); 2] = [
    ("componentstatuses", "v1 ComponentStatus is deprecated in v1.19+"),
    ("endpoints", "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice"),
];
/// Warnings beyond this much text are left out, as upstream does.
const WARNINGS_BYTES_MAX: usize = 4 * 1024;

/// Answers one request.
pub fn handle(server: Arc<Server>, request: Request<Body>) -> BoxFuture<'static, Response<Body>> {
    match extra_route(&server, request.uri().path()) {
        Some(extra) => pass_on(extra, request),
        None => Box::pin(answer(server, request)),
    }
}

fn pass_on(mut extra: ExtraRouter, request: Request<Body>) -> BoxFuture<'static, Response<Body>> {
    Box::pin(async move {
        let answered = match poll_fn(|cx| extra.poll_ready(cx)).await {
            Ok(()) => extra.call(request).await,
            Err(never) => Err(never),
        };
        answered.unwrap_or_else(|never| match never {})
    })
}

async fn answer(server: Arc<Server>, request: Request<Body>) -> Response<Body> {
    let began = clock::monotonic();
    let (parts, body) = request.into_parts();
    let query = Query::parse(parts.uri.query());
    let info = RequestInfo::parse(&parts.method, parts.uri.path(), &query);
    let audit_id = audit_id(&parts.headers);
    let streams = matches!(info.verb.as_str(), "list" | "watch");
    let output = Output::parse(&parts.headers, &query, has_tables(&server, &info), streams);
    let accepted = parts.headers.clone();
    let verb = info.verb.clone();
    let resource = info.resource.clone();
    let request = Incoming { info, query, parts, output: output.clone(), body };
    let result = process(server.clone(), request).await;
    let mut response = match result {
        Ok(response) => response,
        Err(status) => {
            let mut response = reply::failure(&status, output.unwrap_or(Output::JSON));
            if status.0.code == 403 {
                let nosniff = HeaderValue::from_static("nosniff");
                response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
            }
            response
        }
    };
    response.headers_mut().insert(AUDIT_ID, audit_id);
    server.metrics.count(&verb, &resource, response.status().as_u16(), began.elapsed());
    body::compress(&accepted, response).await
}

/// The request's own limit has to be one, whatever is made of it.
fn check_timeout(text: &str) -> Result<()> {
    if text.is_empty() || is_duration(text) {
        return Ok(());
    }
    let why = format!("time: invalid duration {text:?}");
    Err(Status::bad_request(format!("invalid timeout specified in the request URL - {why}")))
}

/// Go's durations: `0`, or numbers with units, as in `1h30m` and `1.5s`.
fn is_duration(text: &str) -> bool {
    let mut rest = text.strip_prefix(['+', '-']).unwrap_or(text);
    if rest == "0" {
        return true;
    }
    let mut parts = 0;
    while !rest.is_empty() {
        let number = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let digits = &rest[..rest.len() - number.len()];
        if !digits.contains(|c: char| c.is_ascii_digit()) || digits.matches('.').count() > 1 {
            return false;
        }
        let next = number.trim_start_matches(|c: char| !c.is_ascii_digit() && c != '.');
        if !["ns", "us", "µs", "μs", "ms", "s", "m", "h"].contains(&&number[..number.len() - next.len()]) {
            return false;
        }
        rest = next;
        parts += 1;
    }
    parts > 0
}

/// Reviews, evictions, tokens and the like have no columns.
fn has_tables(server: &Server, info: &RequestInfo) -> bool {
    let resource = server.registry.find(&info.group, &info.version, &info.resource);
    match info.subresource.as_str() {
        "" => !resource.is_some_and(|resource| rest::subresource::is_virtual(&resource)),
        "status" | "scale" => info.resource != "resourceclaims",
        _ => false,
    }
}

/// A request after its head was read.
struct Incoming {
    info: RequestInfo,
    query: Query,
    parts: Parts,
    output: Result<Output>,
    body: Body,
}

async fn process(server: Arc<Server>, request: Incoming) -> Result<Response<Body>> {
    let Incoming { info, query, mut parts, output, body } = request;
    // Paths outside resources negotiate for themselves, and proxies pass everything on.
    let passes = !info.is_resource || matches!(info.subresource.as_str(), "proxy" | "log");
    let _permit = admit_in_flight(&server, &info)?;
    let identity = identify(&server, &mut parts, &info).await?;
    authorize(&server, &identity, &info).await?;
    if info.is_resource && !info.is_long_running() {
        check_timeout(query.get("timeout"))?;
    }
    let output = if passes { output.unwrap_or(Output::JSON) } else { output? };
    route(server.clone(), identity, info, query, parts, output, body).await
}

fn extra_route(server: &Server, path: &str) -> Option<ExtraRouter> {
    let extra = server.config.extra.as_ref()?;
    server.config.extra_prefixes.iter().any(|prefix| path.starts_with(prefix.as_str())).then(|| extra.clone())
}

fn audit_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(&AUDIT_ID).filter(|id| !id.is_empty() && id.len() <= 64).cloned();
    given
        .or_else(|| HeaderValue::from_str(&random::uuid()).ok())
        .unwrap_or_else(|| HeaderValue::from_static("-"))
}

/// Takes a place among the requests in flight; those that last long and superusers in memory take none.
fn admit_in_flight(server: &Server, info: &RequestInfo) -> Result<Option<OwnedSemaphorePermit>> {
    if info.is_long_running() || !info.is_resource {
        return Ok(None);
    }
    let places = if info.is_mutating() { &server.writes } else { &server.reads };
    places
        .clone()
        .try_acquire_owned()
        .map(Some)
        .map_err(|_| Status::too_many_requests("Too many requests, please try again later.", 1))
}

/// The caller: whom the request carries when it comes from memory, else whom authentication finds.
async fn identify(server: &Server, parts: &mut Parts, info: &RequestInfo) -> Result<Identity> {
    let identity = match parts.extensions.get::<Identity>() {
        Some(identity) => identity.clone(),
        None => match server.authenticator.get() {
            Some(authenticator) => authenticator.authenticate(parts).await?,
            None if is_health(&info.path) => Identity::default(),
            None => return Err(Status::unavailable("the server is starting")),
        },
    };
    authn::strip(&mut parts.headers);
    impersonate(server, identity, &mut parts.headers).await
}

fn is_health(path: &str) -> bool {
    ["/healthz", "/livez", "/readyz"].iter().any(|prefix| path.starts_with(prefix))
}

/// `kubectl --as`: another identity, if the caller may use all of it.
async fn impersonate(server: &Server, identity: Identity, headers: &mut HeaderMap) -> Result<Identity> {
    let Some(wanted) = impersonation::requested(headers, &identity)? else { return Ok(identity) };
    for check in &wanted.checks {
        decide(server, &Attributes::from(check)).await?;
    }
    impersonation::strip(headers);
    Ok(wanted.identity)
}

async fn authorize(server: &Server, identity: &Identity, info: &RequestInfo) -> Result<()> {
    decide(server, &Attributes::of(identity, info)).await
}

async fn decide(server: &Server, attributes: &Attributes<'_>) -> Result<()> {
    if attributes.identity.is_in(Identity::MASTERS) {
        return Ok(());
    }
    let decision = match server.authorizer.get() {
        Some(authorizer) => authorizer.authorize(attributes).await,
        None if is_health(attributes.path) => Decision::Allow,
        None => Decision::Deny("the server is starting".into()),
    };
    match decision {
        Decision::Allow => Ok(()),
        Decision::Deny(reason) => Err(attributes.forbidden(&reason)),
    }
}

async fn route(
    server: Arc<Server>,
    identity: Identity,
    info: RequestInfo,
    query: Query,
    parts: Parts,
    output: Output,
    body: Body,
) -> Result<Response<Body>> {
    if !info.is_resource {
        return nonresource::serve(&server, &info, &query, &parts, output).await;
    }
    let Some(resource) = server.registry.find(&info.group, &info.version, &info.resource) else {
        return Err(nonresource::not_found(&server, &info.path));
    };
    if info.verb.is_empty() {
        return Err(Status::method_unknown());
    }
    if !resource.namespaced && !info.namespace.is_empty() && info.resource != "namespaces" {
        return Err(Status::no_such_path());
    }
    let deprecated = DEPRECATED.iter().filter(|(name, _)| info.group.is_empty() && info.resource == *name);
    let warnings: Vec<String> = deprecated.map(|(_, warning)| (*warning).to_string()).collect();
    let warnings = Arc::new(Mutex::new(warnings));
    let call = Call { server, info, resource, identity, query, parts, output, warnings: warnings.clone() };
    let result = rest::serve(call, body).await;
    let mut response = result.unwrap_or_else(|status| reply::failure(&status, output));
    add_warnings(response.headers_mut(), &warnings.lock());
    Ok(response)
}

fn add_warnings(headers: &mut HeaderMap, warnings: &[String]) {
    let mut left = WARNINGS_BYTES_MAX;
    for warning in warnings {
        let quoted: String = warning.chars().filter(|c| !c.is_control()).collect();
        let quoted = quoted.replace('\\', "\\\\").replace('"', "\\\"");
        if quoted.len() > left {
            break;
        }
        left -= quoted.len();
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            headers.append(header::WARNING, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_durations() {
        for text in ["", "0", "5s", "1h30m", "1.5s", "-1ms", "300us"] {
            assert!(check_timeout(text).is_ok(), "{text}");
        }
        for text in ["5", "foo", "1x", ".s", "1..5s", "s", "1s5"] {
            assert!(check_timeout(text).is_err(), "{text}");
        }
    }
}
