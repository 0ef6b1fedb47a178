//! The agent's end: serves streams that the API server opens.
use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use sampan_drivers::tunnel::Stream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::linger::Lingering;
use crate::{KUBELET, MAX_STREAMS, PING_INTERVAL, PING_TIMEOUT};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves the connection until it ends. `kubelet` serves the kubelet's API on one stream.
pub async fn serve<S, F, Fut>(stream: S, kubelet: F) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Fn(Box<dyn Stream>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let kubelet = kubelet.clone();
        async move { Ok::<_, Infallible>(open(request, kubelet).await) }
    });
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn open<F, Fut>(request: Request<Incoming>, kubelet: F) -> Response<Full<Bytes>>
where
    F: Fn(Box<dyn Stream>) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let refuse = |status: StatusCode, message: String| {
        let mut response = Response::new(Full::new(Bytes::from(message)));
        *response.status_mut() = status;
        response
    };
    let authority = request.uri().authority().map(ToString::to_string).unwrap_or_default();
    if request.method() != Method::CONNECT {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "a tunnel takes CONNECT only".to_string());
    }
    if authority == KUBELET {
        tokio::spawn(async move {
            if let Ok(upgraded) = hyper::upgrade::on(request).await {
                kubelet(Box::new(Lingering::new(TokioIo::new(upgraded)))).await;
            }
        });
        return Response::new(Full::default());
    }
    let connected = match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&authority)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            return refuse(StatusCode::BAD_GATEWAY, format!("dial tcp {authority}: connect: {error}"));
        }
        Err(_) => return refuse(StatusCode::GATEWAY_TIMEOUT, format!("dial tcp {authority}: i/o timeout")),
    };
    tokio::spawn(async move {
        let mut far = connected;
        far.set_nodelay(true).ok();
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(upgraded), &mut far).await;
        }
    });
    Response::new(Full::default())
}
