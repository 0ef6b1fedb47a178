//! The client of callers in the server's own process: the API server's router, called in memory.
//!
//! There is no TLS, no socket and no second code path: the router gets the same requests as from the network,
//! with the caller's [`Identity`] in the extensions instead of a certificate.
use std::convert::Infallible;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::combinators::UnsyncBoxBody;
use kube::client::Body;
use tower::Service;
use tower::util::BoxCloneSyncService;

use crate::Identity;

/// An answer's body. (`kube::client::Body` cannot be made from a stream outside of kube.)
pub type ResponseBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// The API server's router as the client sees it.
pub type Router = BoxCloneSyncService<Request<Body>, Response<ResponseBody>, Infallible>;

/// A client that calls `router` as `identity`; `user_agent` names the field manager.
pub fn client(router: Router, identity: Identity, user_agent: &'static str) -> kube::Client {
    kube::Client::new(Caller { router, identity, user_agent }, "default")
}

#[derive(Clone)]
struct Caller {
    router: Router,
    identity: Identity,
    user_agent: &'static str,
}

impl Service<Request<Body>> for Caller {
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = <Router as Service<Request<Body>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.router.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        request.extensions_mut().insert(self.identity.clone());
        request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static(self.user_agent));
        self.router.call(request)
    }
}
