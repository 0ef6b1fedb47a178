//! HTTP requests of probes and hooks. Upstream counterparts: pkg/probe/http, pkg/kubelet/lifecycle/handlers.go.
//!
//! Certificates are not checked, as upstream. Redirects are followed within the host, ten at most; one that leads away
//! ends a probe with a warning. Errors read as Go's client writes them, since people grep for those.
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::{Outcome, port};

const BODY_BYTES: usize = 10 * 1024;

/// A GET.
#[derive(Clone, Debug)]
pub struct Request {
    pub is_https: bool,
    pub host: String,
    pub port: u16,
    pub path: String,
    pub headers: Vec<(String, String)>,
}

impl Request {
    pub fn new(
        action: &HTTPGetAction,
        container: &Container,
        ip: Option<IpAddr>,
        agent: &str,
    ) -> Result<Self, String> {
        let host = action.host.clone().filter(|h| !h.is_empty()).or(ip.map(|ip| ip.to_string()));
        let path = action.path.clone().unwrap_or_default();
        let mut headers: Vec<(String, String)> =
            action.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect();
        let has = |name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
        let (agent_set, accept_set) = (has("user-agent"), has("accept"));
        if !agent_set {
            headers.push(("User-Agent".into(), agent.into()));
        }
        if !accept_set {
            headers.push(("Accept".into(), "*/*".into()));
        }
        // an empty value is how a header is left out
        headers.retain(|(_, value)| !value.is_empty());
        Ok(Self {
            is_https: action.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https")),
            host: host.unwrap_or_default(),
            port: port(&action.port, container)?,
            path: if path.starts_with('/') { path } else { format!("/{path}") },
            headers,
        })
    }

    fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{host}:{}", self.port)
    }

    pub fn url(&self) -> String {
        format!("{}://{}{}", if self.is_https { "https" } else { "http" }, self.authority(), self.path)
    }

    /// Where a redirect leads; `Err` where that is another host.
    fn redirected(&self, location: &str) -> Result<Self, ()> {
        let mut next = self.clone();
        let Some((scheme, rest)) = location.split_once("://") else {
            let folder = self.path.rsplit_once('/').map_or("", |(f, _)| f);
            next.path =
                if location.starts_with('/') { location.to_string() } else { format!("{folder}/{location}") };
            return Ok(next);
        };
        let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
        next.is_https = scheme.eq_ignore_ascii_case("https");
        next.path = path.to_string();
        let default = if next.is_https { 443 } else { 80 };
        let parsed: http::uri::Authority = authority.parse().map_err(|_| ())?;
        next.port = parsed.port_u16().unwrap_or(default);
        if parsed.host().trim_matches(['[', ']']) != self.host {
            return Err(());
        }
        Ok(next)
    }
}

/// A TCP connection, with Go's words for what goes wrong.
pub async fn connect(host: &str, port: u16, timeout: Duration) -> Result<TcpStream, String> {
    let shown = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    match tokio::time::timeout(timeout, TcpStream::connect((host, port))).await {
        Err(_) => Err(format!("dial tcp {shown}: i/o timeout")),
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(match error.kind() {
            std::io::ErrorKind::ConnectionRefused => format!("dial tcp {shown}: connect: connection refused"),
            std::io::ErrorKind::HostUnreachable => format!("dial tcp {shown}: connect: no route to host"),
            _ => format!("dial tcp {shown}: {error}"),
        }),
    }
}

/// Status, body (cut) and, for a redirect, where to.
async fn exchange(request: &Request, timeout: Duration) -> Result<(u16, String, Option<String>), String> {
    let stream = connect(&request.host, request.port, timeout).await?;
    if !request.is_https {
        return speak(stream, request).await;
    }
    let connector =
        tokio_rustls::TlsConnector::from(sampan_pki::unverified::client_config().map_err(|e| e.to_string())?);
    let name = ServerName::try_from(request.host.clone()).map_err(|e| e.to_string())?;
    let stream = connector.connect(name, stream).await.map_err(|e| e.to_string())?;
    speak(stream, request).await
}

async fn speak<S>(stream: S, request: &Request) -> Result<(u16, String, Option<String>), String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let handshake =
        hyper::client::conn::http1::Builder::new().max_buf_size(64 * 1024).handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|e| e.to_string())?;
    let connection = tokio::spawn(connection);
    let mut builder = http::Request::get(&request.path);
    if !request.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("host")) {
        builder = builder.header("Host", request.authority());
    }
    for (name, value) in &request.headers {
        builder = builder.header(name, value);
    }
    let built = builder.body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    let answer = sender
        .send_request(built)
        .await
        .map_err(|e| if e.is_incomplete_message() { "EOF".to_string() } else { e.to_string() });
    let result = match answer {
        Err(error) => Err(error),
        Ok(answer) => {
            let (parts, body) = answer.into_parts();
            let body =
                Limited::new(body, BODY_BYTES).collect().await.map(|b| b.to_bytes()).unwrap_or_default();
            let location = parts.headers.get("location").and_then(|l| l.to_str().ok()).map(str::to_string);
            Ok((parts.status.as_u16(), String::from_utf8_lossy(&body).into_owned(), location))
        }
    };
    connection.abort();
    result
}

/// Sends it and follows redirects within the host.
pub async fn get(request: &Request, timeout: Duration) -> Result<(u16, String), String> {
    let mut current = request.clone();
    for _ in 0..10 {
        let url = current.url();
        let answer = tokio::time::timeout(timeout, exchange(&current, timeout)).await;
        let answer = answer.unwrap_or_else(|_| {
            Err("context deadline exceeded (Client.Timeout exceeded while awaiting headers)".to_string())
        });
        let (status, body, location) = answer.map_err(|error| format!("Get {url:?}: {error}"))?;
        match (status, location) {
            (301 | 302 | 303 | 307 | 308, Some(location)) => match current.redirected(&location) {
                Ok(next) => current = next,
                Err(()) => return Ok((status, body)),
            },
            _ => return Ok((status, body)),
        }
    }
    Err(format!("Get {:?}: stopped after 10 redirects", current.url()))
}

pub async fn probe(request: &Request, timeout: Duration) -> Outcome {
    match get(request, timeout).await {
        Ok((200..=299, _)) => Outcome::Success,
        Ok((300..=399, body)) => {
            Outcome::Warning(format!("Probe terminated redirects, Response body: {body}"))
        }
        Ok((status, _)) => Outcome::Failure(format!("HTTP probe failed with statuscode: {status}")),
        Err(error) => Outcome::Failure(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn statuses_and_redirects() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut buffer = [0; 1024];
                    let n = stream.read(&mut buffer).await.unwrap();
                    let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
                    let answer = match text.split(' ').nth(1).unwrap() {
                        "/ok" => "200 OK\r\n",
                        "/away" => "302 Found\r\nLocation: http://example.com/\r\n",
                        "/near" => "302 Found\r\nLocation: /ok\r\n",
                        _ => "500 Oops\r\n",
                    };
                    let _ = stream
                        .write_all(format!("HTTP/1.1 {answer}Content-Length: 0\r\n\r\n").as_bytes())
                        .await;
                });
            }
        });
        let action = |path: &str, port: u16| -> Request {
            let action: HTTPGetAction =
                serde_json::from_value(serde_json::json!({"path": path, "port": port, "host": "127.0.0.1"}))
                    .unwrap();
            Request::new(&action, &Container::default(), None, "x").unwrap()
        };
        let timeout = Duration::from_secs(5);
        assert_eq!(probe(&action("ok", port), timeout).await, Outcome::Success);
        assert_eq!(probe(&action("/near", port), timeout).await, Outcome::Success);
        assert!(matches!(probe(&action("/away", port), timeout).await, Outcome::Warning(_)));
        let failed = Outcome::Failure("HTTP probe failed with statuscode: 500".into());
        assert_eq!(probe(&action("/x", port), timeout).await, failed);
        let refused = probe(&action("/x", 1), timeout).await;
        let text = "Get \"http://127.0.0.1:1/x\": dial tcp 127.0.0.1:1: connect: connection refused";
        assert_eq!(refused, Outcome::Failure(text.into()));
    }
}
