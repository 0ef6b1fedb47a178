//! The gRPC health check (grpc.health.v1.Health/Check). Upstream counterpart: pkg/probe/grpc.
//!
//! The one request and answer are small enough to be coded by hand over HTTP/2.
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::{Outcome, http};

const SERVING: u8 = 1;

pub async fn probe(host: &str, port: u16, service: &str, timeout: Duration) -> Outcome {
    let address = format!("{host}:{port}");
    let no_connection = || {
        Outcome::Failure(format!(
            "timeout: failed to connect service {address:?} within {}s: context deadline exceeded",
            timeout.as_secs()
        ))
    };
    let Ok(stream) = http::connect(host, port, timeout).await else { return no_connection() };
    match tokio::time::timeout(timeout, check(stream, &address, service)).await {
        Err(_) => {
            Outcome::Failure(format!("timeout: health rpc did not complete within {}s", timeout.as_secs()))
        }
        Ok(Ok(SERVING)) => Outcome::Success,
        Ok(Ok(status)) => {
            let name = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"].get(usize::from(status));
            Outcome::Failure(format!("service unhealthy (responded with {:?})", name.unwrap_or(&"UNKNOWN")))
        }
        Ok(Err(error)) => Outcome::Failure(format!("error: health rpc probe failed: {error}")),
    }
}

async fn check(stream: tokio::net::TcpStream, address: &str, service: &str) -> Result<u8, String> {
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|e| e.to_string())?;
    let connection = tokio::spawn(connection);
    let request = ::http::Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "kube-probe/1.36")
        .body(Full::new(message(service)?))
        .map_err(|e| e.to_string())?;
    let result = async {
        let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let (parts, body) = answer.into_parts();
        let body = Limited::new(body, 64 * 1024).collect().await.map_err(|e| e.to_string())?;
        let status =
            body.trailers().and_then(|t| t.get("grpc-status")).or(parts.headers.get("grpc-status")).cloned();
        match status.as_ref().and_then(|s| s.to_str().ok()).unwrap_or("0") {
            "0" => Ok(serving_status(&body.to_bytes())),
            "12" => {
                Err("this server does not implement the grpc health protocol (grpc.health.v1.Health)"
                    .to_string())
            }
            code => Err(format!("rpc error: code = {code}")),
        }
    }
    .await;
    connection.abort();
    result
}

/// One uncompressed frame with a HealthCheckRequest.
fn message(service: &str) -> Result<Bytes, String> {
    let length =
        u8::try_from(service.len()).ok().filter(|l| *l < 126).ok_or("the service's name is too long")?;
    let mut frame = vec![0, 0, 0, 0, 0];
    if length > 0 {
        frame[4] = length + 2;
        frame.extend([0x0a, length]);
        frame.extend(service.as_bytes());
    }
    Ok(frame.into())
}

/// Field 1 of the HealthCheckResponse in the first frame; 0 where it is not set.
fn serving_status(body: &[u8]) -> u8 {
    match body.get(5..7) {
        Some([0x08, status]) => *status,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn frames() {
        assert_eq!(&super::message("").unwrap()[..], [0, 0, 0, 0, 0]);
        assert_eq!(&super::message("ab").unwrap()[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(super::serving_status(&[0, 0, 0, 0, 2, 8, 1]), 1);
        assert_eq!(super::serving_status(&[0, 0, 0, 0, 0]), 0);
    }
}
