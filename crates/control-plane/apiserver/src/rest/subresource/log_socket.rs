//! A pod's log over a WebSocket, for callers that ask for one.
//!
//! Upstream counterpart: k8s.io/streaming/pkg/httpstream/wsstream (Reader), used by StreamObject. The kubelet is asked
//! as for any log; each piece of its answer becomes a message: as it is (`binary.k8s.io`, or no protocol asked for), or
//! in base64 (`base64.binary.k8s.io`). An empty message comes first, and whatever the client sends is passed over.
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::{Message, handshake::derive_accept_key};

use crate::body::{self, Body};
use crate::call::Call;
use crate::status::{Result, Status};

const BINARY: &str = "binary.k8s.io";
const BASE64: &str = "base64.binary.k8s.io";

/// A handshake that can be answered.
struct Handshake {
    accept: HeaderValue,
    protocol: Option<&'static str>,
}

/// Whether the client asks for a WebSocket.
pub fn is_wanted(headers: &HeaderMap) -> bool {
    let has = |name: header::HeaderName, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
        values.flat_map(|v| v.split(',')).any(|found| found.trim().eq_ignore_ascii_case(word))
    };
    has(header::CONNECTION, "upgrade") && has(header::UPGRADE, "websocket")
}

/// Sends a log over the WebSocket that the call asks for; an answer that is no log stays what it is.
pub fn answer(call: &Call, log: Response<Body>) -> Result<Response<Body>> {
    if log.status() != StatusCode::OK {
        return Ok(log);
    }
    let handshake = Handshake::read(&call.parts.headers)?;
    let Some(upgrade) = call.parts.extensions.get::<OnUpgrade>().cloned() else {
        return Err(Status::bad_request("this connection can't be upgraded"));
    };
    let mut response = Response::new(body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, handshake.accept);
    if let Some(protocol) = handshake.protocol {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    let shutdown = call.server.shutdown.clone();
    tokio::spawn(async move {
        let Ok(client) = upgrade.await else { return };
        let copied = copy(TokioIo::new(client), log.into_body(), handshake.protocol == Some(BASE64));
        tokio::select! {
            () = copied => {}
            () = shutdown.cancelled() => {}
        }
    });
    Ok(response)
}

impl Handshake {
    fn read(headers: &HeaderMap) -> Result<Self> {
        let bad = || Status::bad_request("the WebSocket handshake is malformed");
        if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
            return Err(bad());
        }
        let key = headers.get(header::SEC_WEBSOCKET_KEY).ok_or_else(bad)?;
        let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes())).map_err(|_| bad())?;
        let asked = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|v| v.to_str().ok());
        let asked: Vec<&str> =
            asked.flat_map(|v| v.split(',')).map(str::trim).filter(|p| !p.is_empty()).collect();
        let protocol = asked.iter().find_map(|wanted| [BINARY, BASE64].into_iter().find(|p| p == wanted));
        if protocol.is_none() && !asked.is_empty() {
            let message =
                format!("requested protocol(s) are not supported: {asked:?}; supports [{BASE64} {BINARY}]");
            return Err(Status::bad_request(message));
        }
        Ok(Self { accept, protocol })
    }
}

/// Sends the body's pieces until it ends or the client goes.
async fn copy(client: impl AsyncRead + AsyncWrite + Unpin, mut log: Body, in_base64: bool) {
    let message = |bytes: bytes::Bytes| match in_base64 {
        true => Message::text(STANDARD.encode(&bytes)),
        false => Message::Binary(bytes),
    };
    let socket = WebSocketStream::from_raw_socket(client, Role::Server, None).await;
    let (mut sender, mut receiver) = socket.split();
    if sender.send(message(bytes::Bytes::new())).await.is_err() {
        return;
    }
    loop {
        tokio::select! {
            frame = log.frame() => {
                let Some(Ok(frame)) = frame else { break };
                let Ok(data) = frame.into_data() else { continue };
                if !data.is_empty() && sender.send(message(data)).await.is_err() {
                    return;
                }
            }
            received = receiver.next() => match received {
                Some(Ok(Message::Close(_)) | Err(_)) | None => break,
                Some(Ok(_)) => {}
            },
        }
    }
    drop(sender.close().await);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshakes_choose_a_protocol() {
        let with = |protocols: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONNECTION, HeaderValue::from_static("keep-alive, Upgrade"));
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
            headers.insert(header::SEC_WEBSOCKET_KEY, key);
            if !protocols.is_empty() {
                headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocols));
            }
            headers
        };
        assert!(is_wanted(&with("")) && !is_wanted(&HeaderMap::new()));
        for (protocols, want) in
            [("", None), (BINARY, Some(BINARY)), ("x, base64.binary.k8s.io", Some(BASE64))]
        {
            let handshake = Handshake::read(&with(protocols)).unwrap();
            assert_eq!(handshake.protocol, want);
            assert_eq!(handshake.accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        }
        assert!(Handshake::read(&with("v9.channel.k8s.io")).is_err());
    }

    #[tokio::test]
    async fn pieces_become_messages() {
        for in_base64 in [false, true] {
            let (client, server) = tokio::io::duplex(1 << 16);
            let log = body::stream(futures::stream::iter(["a\n", "b\n"].map(bytes::Bytes::from)));
            let sending = tokio::spawn(copy(server, log, in_base64));
            let mut socket = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
            let mut received = Vec::new();
            while let Some(Ok(message)) = socket.next().await {
                match message {
                    Message::Binary(bytes) => received.push(String::from_utf8(bytes.to_vec()).unwrap()),
                    Message::Text(text) => received.push(text.to_string()),
                    _ => {}
                }
            }
            let want = if in_base64 { ["", "YQo=", "Ygo="] } else { ["", "a\n", "b\n"] };
            assert_eq!(received, want);
            sending.await.unwrap();
        }
    }
}
