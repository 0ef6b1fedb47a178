//! What the server answers besides the API: `GET /cacerts`, `POST /v1-sampan/join` and the agents'
//! `GET /v1-sampan/connect` and `GET /v1-sampan/authority`, and other servers' `GET /v1-sampan/bootstrap`.
use std::convert::Infallible;
use std::sync::Arc;

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::PostParams;
use sampan_apiserver::authn::Authenticator;
use sampan_apiserver::{Body, Status, body};
use sampan_tunnel::Nodes;
use tower::service_fn;
use tower::util::BoxCloneSyncService;

use crate::certificate::server::ServerCertificates;
use crate::join::{AUTHORITY_CHANGES, AUTHORITY_PATH, Cluster, JoinAnswer, JoinRequest};
use crate::members::{self, join::Offers};
use crate::mirror::Directory;
use crate::programs::{self, Programs};

/// Of the answer to a tunnel: where this server's API is, as the cluster lists it. What a node named may be another name
/// of it, or lead to another server each time.
pub const SERVER: &str = "sampan-server";
/// Who has the servers' own token; other servers may join by it.
pub const JOIN_USER: &str = "system:sampan:join";
/// Members of this group may join nodes: upstream's group of bootstrap tokens.
pub const JOINERS: &str = "system:bootstrappers";
/// What is answered here and not by the API server.
pub const PREFIXES: &[&str] = &["/v1-sampan/", AUTHORITY_PATH];

pub struct Endpoint {
    pub certificates: Arc<ServerCertificates>,
    pub nodes: Arc<Nodes>,
    pub cluster: Cluster,
    /// Known once the API server is; before that everything here is unavailable.
    pub access: std::sync::OnceLock<Access>,
    pub programs: Arc<Programs>,
    /// Where this server's API is, as the cluster lists it.
    pub advertise: std::net::SocketAddr,
    /// What other servers are told that want to join.
    pub offers: Offers,
}

pub struct Access {
    pub authenticator: Arc<Authenticator>,
    pub client: kube::Client,
    /// Where nodes find each other's images, when they share them.
    pub images: Option<Arc<Directory>>,
}

impl Endpoint {
    pub fn router(self: &Arc<Self>) -> sampan_apiserver::config::ExtraRouter {
        let endpoint = self.clone();
        BoxCloneSyncService::new(service_fn(move |request: Request<Body>| {
            let endpoint = endpoint.clone();
            async move { Ok::<_, Infallible>(endpoint.answer(request).await.unwrap_or_else(refusal)) }
        }))
    }

    async fn answer(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        if request.uri().path() == AUTHORITY_PATH {
            return Ok(Response::new(body::full(
                self.certificates.authority().certificate_pem().to_string(),
            )));
        }
        let Some(access) = self.access.get() else {
            return Err(Status::unavailable("the server is starting"));
        };
        let (parts, request_body) = request.into_parts();
        let identity = access.authenticator.authenticate(&parts).await?.ok_or_else(Status::unauthorized)?;
        let node = identity.username.strip_prefix("system:node:").map(str::to_string);
        match (parts.method.clone(), parts.uri.path()) {
            (Method::POST, crate::join::PATH) => {
                let bytes = body::read(request_body).await?;
                let asked: JoinRequest =
                    serde_json::from_slice(&bytes).map_err(|e| Status::bad_request(e.to_string()))?;
                let same_node = node.as_deref() == Some(asked.node_name.as_str());
                if !same_node && !identity.is_in(JOINERS) {
                    return Err(Status::unauthorized());
                }
                let answer = self.join(access, &asked).await?;
                let text = serde_json::to_vec(&answer).map_err(|e| Status::internal(e.to_string()))?;
                Ok(Response::new(body::full(text)))
            }
            (Method::GET, sampan_tunnel::PATH) => {
                let Some(node) = node else { return Err(Status::unauthorized()) };
                Ok(self.connect(node, Request::from_parts(parts, request_body)))
            }
            (Method::GET, path) if path.starts_with(programs::PATH) => {
                if !identity.is_in("system:nodes") {
                    return Err(Status::unauthorized());
                }
                self.programs.answer(path).await
            }
            (Method::GET, path) if path.starts_with(crate::mirror::PATH) => {
                let node =
                    node.filter(|_| identity.is_in("system:nodes")).ok_or_else(Status::unauthorized)?;
                match &access.images {
                    Some(images) => images.answer(&node, &parts).await,
                    None => Err(Status::bad_request("the cluster has no embedded registry")),
                }
            }
            (Method::GET, members::join::PATH) => {
                if identity.username != JOIN_USER {
                    return Err(Status::unauthorized());
                }
                let offer = self.offers.offer().await.map_err(|e| Status::unavailable(format!("{e:#}")))?;
                let text = serde_json::to_vec(&offer).map_err(|e| Status::internal(e.to_string()))?;
                Ok(Response::new(body::full(text)))
            }
            (Method::GET, AUTHORITY_CHANGES) => {
                if node.is_none() {
                    return Err(Status::unauthorized());
                }
                let query = parts.uri.query().unwrap_or_default();
                let known = query.strip_prefix("known=").unwrap_or_default();
                let pem = self.certificates.other_bundle(known).await;
                Ok(Response::new(body::full(pem.unwrap_or_default())))
            }
            (_, path) => Err(Status::bad_request(format!("there is no {path} here"))),
        }
    }

    async fn join(&self, access: &Access, asked: &JoinRequest) -> Result<JoinAnswer, Status> {
        let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        if asked.node_name.is_empty() || asked.node_name.len() > 253 || !asked.node_name.chars().all(label) {
            return Err(Status::bad_request(format!(
                "nodeName {:?}: a lowercase RFC 1123 subdomain is expected; set --node-name",
                asked.node_name
            )));
        }
        check_password(&access.client, asked).await?;
        let user = format!("system:node:{}", asked.node_name);
        let authority = self.certificates.authority();
        let certificate = authority
            .sign_client(&asked.certificate_request, &user, &["system:nodes"])
            .map_err(|e| Status::bad_request(format!("certificateRequest: {e}")))?;
        tracing::info!(node = asked.node_name, "node joins, or renews its certificate");
        let authority = Some(authority.certificate_pem().to_string());
        Ok(JoinAnswer { certificate, cluster: self.cluster.clone(), authority })
    }

    fn connect(&self, node: String, request: Request<Body>) -> Response<Body> {
        let nodes = self.nodes.clone();
        tokio::spawn(async move {
            match hyper::upgrade::on(request).await {
                Ok(upgraded) => nodes.hold(&node, TokioIo::new(upgraded)).await,
                Err(error) => tracing::debug!(node, %error, "the node's connection was not upgraded"),
            }
        });
        let mut response = Response::new(body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(sampan_tunnel::PROTOCOL));
        let shared = if self.cluster.embedded_registry { "true" } else { "false" };
        response.headers_mut().insert(crate::mirror::SETTING, HeaderValue::from_static(shared));
        let myself = crate::join::url_of(&self.advertise.ip().to_string(), self.advertise.port());
        if let Ok(myself) = HeaderValue::try_from(myself) {
            response.headers_mut().insert(SERVER, myself);
        }
        response
    }
}

/// The first to use a node's name sets its password; all others must know it.
async fn check_password(client: &kube::Client, asked: &JoinRequest) -> Result<(), Status> {
    let secrets = Api::<Secret>::namespaced(client.clone(), "kube-system");
    let name = format!("{}.node-password.sampan", asked.node_name);
    let hash = sampan_pki::sha256_hex(asked.node_password.as_bytes());
    let mut secret = Secret::default();
    secret.metadata.name = Some(name.clone());
    secret.immutable = Some(true);
    secret.data = Some([("hash".to_string(), ByteString(hash.clone().into_bytes()))].into());
    let internal = |e: kube::Error| Status::internal(format!("node password of {}: {e}", asked.node_name));
    match secrets.create(&PostParams::default(), &secret).await {
        Ok(_) => return Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => return Err(internal(error)),
    }
    let stored = secrets.get(&name).await.map_err(internal)?.data.unwrap_or_default().remove("hash");
    match stored {
        Some(stored) if sampan_pki::same_secret(&String::from_utf8_lossy(&stored.0), &hash) => Ok(()),
        _ => Err(Status::new(
            403,
            "Forbidden",
            format!(
                "node {0} has joined before from another machine (its node-password differs); \
                 take another --node-name, or delete the Secret kube-system/{name}",
                asked.node_name
            ),
        )),
    }
}

fn refusal(status: Status) -> Response<Body> {
    let code = status.0.code;
    let text = serde_json::to_vec(&status.body()).unwrap_or_default();
    let mut response = Response::new(body::full(text));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
