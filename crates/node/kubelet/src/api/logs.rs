//! `/containerLogs`: which log is meant, and how it is sent.
//!
//! Upstream counterparts: pkg/kubelet/server/server.go (getContainerLogs), pkg/registry/core/pod/rest/log.go, whose
//! WebSocket form is served here since the API server passes upgrades on. Deliberately different: errors are Status
//! objects, because the API server hands them to clients as they are.
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, Method, Response};
use http_body_util::StreamBody;
use hyper::body::Frame;
use k8s_openapi::api::core::v1::Pod;
use sampan_world::clock;
use tokio::io::{AsyncRead, AsyncWrite};

use super::log_file::{LogReader, Options, Source};
use super::query::Query;
use super::websocket::{self, Reader, Writer};
use super::{Answer, Api, Body, Refused};

const PROTOCOLS: [&str; 2] = ["binary.k8s.io", "base64.binary.k8s.io"];

/// The options and whether the previous container is meant.
pub fn options(query: &Query) -> Result<(Options, bool), Refused> {
    let undecodable = || Refused::bad_request("Unable to decode query.");
    let number = |name: &str, least: i64| match query.get(name) {
        "" => Ok(None),
        text => match text.parse::<i64>() {
            Ok(value) if value >= least => Ok(Some(value as u64)),
            Ok(_) => Err(Refused::new(422, "Invalid request.")),
            Err(_) => Err(undecodable()),
        },
    };
    let tail_lines = match query.get("tail") {
        "" => number("tailLines", 0)?,
        "all" => None,
        _ => number("tail", 0)?,
    };
    let since = match (number("sinceSeconds", 1)?, query.get("sinceTime")) {
        (Some(_), time) if !time.is_empty() => return Err(Refused::new(422, "Invalid request.")),
        (Some(seconds), _) => clock::now().checked_sub(Duration::from_secs(seconds)).ok(),
        (None, "") => None,
        (None, time) => Some(time.parse().map_err(|_| undecodable())?),
    };
    let source = match query.get("stream") {
        "" | "All" => None,
        "Stdout" => Some(Source::Stdout),
        "Stderr" => Some(Source::Stderr),
        _ => return Err(Refused::new(422, "Invalid request.")),
    };
    let options = Options {
        tail_lines,
        limit_bytes: number("limitBytes", 1)?,
        since,
        follow: query.flag("follow"),
        timestamps: query.flag("timestamps"),
        source,
    };
    Ok((options, query.flag("previous")))
}

fn has_container(pod: &Pod, name: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let mut main = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    main.any(|c| c.name == name) || spec.ephemeral_containers.iter().flatten().any(|c| c.name == name)
}

impl Api {
    /// Opens the log, so that what is wrong is known before the answer begins.
    async fn open_log(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        query: &Query,
    ) -> Result<LogReader, Refused> {
        let (options, is_previous) = options(query)?;
        let found = self.pods().pod(namespace, pod);
        let found = found.ok_or_else(|| Refused::new(404, format!("pod {pod:?} does not exist")))?;
        if !has_container(&found, container) {
            return Err(Refused::new(404, format!("container {container:?} not found in pod {pod:?}")));
        }
        let container = self.pods().container(namespace, pod, container, is_previous);
        let container = container.map_err(|error| Refused::bad_request(error.to_string()))?;
        let runtime = self.runtime().clone();
        let path = container.log_path;
        LogReader::open(&path, options, runtime, container.id, container.pod_uid)
            .await
            .map_err(|error| Refused::bad_request(format!("failed to open log file {path:?}: {error}")))
    }

    pub(super) async fn container_logs(
        &self,
        request: &mut http::Request<hyper::body::Incoming>,
        (namespace, pod, container): (&str, &str, &str),
        query: &Query,
    ) -> Answer {
        if request.method() != Method::GET {
            return Refused::new(405, "405: Method Not Allowed").status();
        }
        let reader = match self.open_log(namespace, pod, container, query).await {
            Ok(reader) => reader,
            Err(refused) => return refused.status(),
        };
        if websocket::is_wanted(request.headers()) {
            return match websocket_protocol(request.headers(), &PROTOCOLS) {
                Ok((protocol, response)) => {
                    Answer::upgrade(request, response, move |io| send(io, reader, protocol))
                }
                Err(refused) => refused.status(),
            };
        }
        let chunks = stream::unfold(Some(reader), |reader| async {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(chunk)) => Some((Ok(Frame::data(chunk)), Some(reader))),
                Ok(None) => None,
                // ends the connection: the client sees that the answer is not whole
                Err(error) => Some((Err(error), None)),
            }
        });
        let mut response = Response::new(Body::new(StreamBody::new(chunks)));
        super::content_type(&mut response, "text/plain");
        Answer::plain(response)
    }
}

/// Which of the protocols is spoken, and the answer that says so. A client may offer none.
pub fn websocket_protocol(
    headers: &HeaderMap,
    supported: &[&str],
) -> Result<(String, Response<Body>), Refused> {
    let accept = websocket::accept(headers).ok_or_else(|| Refused::bad_request("bad WebSocket handshake"))?;
    let offered = websocket::protocols(headers);
    let chosen = offered.iter().find(|protocol| supported.contains(protocol)).copied();
    if chosen.is_none() && !offered.is_empty() {
        let why = format!("requested protocol(s) are not supported: {offered:?}; supports {supported:?}");
        return Err(Refused::new(403, why));
    }
    let mut response = Response::builder()
        .status(101)
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Accept", accept);
    if let Some(protocol) = chosen {
        response = response.header("Sec-WebSocket-Protocol", protocol);
    }
    let response = response.body(super::full(Bytes::new())).map_err(|e| Refused::new(500, e.to_string()))?;
    Ok((chosen.unwrap_or_default().to_string(), response))
}

/// Sends the log as messages.
async fn send(io: impl AsyncRead + AsyncWrite + Send + 'static, mut log: LogReader, protocol: String) {
    let (read, write) = tokio::io::split(io);
    let (mut reader, writer) = (Reader::new(read), Writer::new(write));
    let messages = async {
        while let Ok(Some(chunk)) = log.next().await {
            let sent = if protocol.starts_with("base64") {
                writer.send(websocket::TEXT, &[STANDARD.encode(chunk).as_bytes()]).await
            } else {
                writer.send(websocket::BINARY, &[&chunk]).await
            };
            if sent.is_err() {
                return;
            }
        }
    };
    // what the client says does not matter, that it is there does
    let gone = async { while let Ok(Some(_)) = reader.next(&writer).await {} };
    tokio::select! {
        () = messages => {}
        () = gone => return,
    }
    writer.close().await;
    websocket::linger(&mut reader, &writer).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_options_or_refused() {
        let parsed = |query: &str| options(&Query::parse(Some(query)));
        let (options, is_previous) =
            parsed("follow=true&timestamps=1&tailLines=5&limitBytes=9&stream=Stderr&previous=false").unwrap();
        let expected = Options {
            tail_lines: Some(5),
            limit_bytes: Some(9),
            since: None,
            follow: true,
            timestamps: true,
            source: Some(Source::Stderr),
        };
        assert_eq!((options, is_previous), (expected, false));
        assert_eq!(parsed("tail=all&tailLines=3").unwrap().0.tail_lines, None);
        let since = parsed("sinceTime=2026-01-02T03:04:05%2B01:00").unwrap().0.since.unwrap();
        assert_eq!(since.to_string(), "2026-01-02T02:04:05Z");
        for (query, code) in [
            ("tailLines=-1", 422),
            ("tailLines=x", 400),
            ("limitBytes=0", 422),
            ("stream=x", 422),
            ("sinceTime=x", 400),
        ] {
            assert_eq!(parsed(query).unwrap_err().code, code, "{query}");
        }
    }
}
