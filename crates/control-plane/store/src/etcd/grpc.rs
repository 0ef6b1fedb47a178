//! gRPC over one HTTP/2 connection: a request with one answer, and a request with a stream of them.
//!
//! Upstream counterpart: google.golang.org/grpc, as etcd's client uses it. It stands on the hyper that serves the API
//! anyway; what gRPC adds is a prefix of five bytes a message, a few headers and a status in the trailers. What stays
//! true: the caller always learns whether a request may have reached the server ([`CallError`]), because a
//! write that may have happened must not be sent again. Every answer has its deadline, and a connection
//! whose other end has vanished is noticed by pings while something is awaited.
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, Response, Version, header};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// A server that does not answer pings while something is awaited from it is gone. (etcd takes one every 5 s.)
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;
const PREFIX_BYTES: usize = 5;
/// A message may be as big as a page of the biggest objects; a longer one is no message.
const MESSAGE_LIMIT_BYTES: usize = 1 << 30;
/// How much later than the server we give a request up.
const GRACE: Duration = Duration::from_millis(500);

/// gRPC's code for a server that cannot serve now.
pub(super) const UNAVAILABLE: u32 = 14;

/// A call that brought nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CallError {
    /// The server has not seen it.
    #[error("{0}")]
    Unsent(String),
    /// The server may have done it.
    #[error("{0}")]
    Unanswered(String),
    /// The server says no.
    #[error("{message}")]
    Status { code: u32, message: String },
}

/// Where a server is and how it is spoken to.
pub(super) struct Target<'a> {
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) tls: Option<Arc<rustls::ClientConfig>>,
}

/// With TLS or without: HTTP/2 is compiled once for both.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// One connection; clones share it. It ends with the last of them.
#[derive(Clone)]
pub(super) struct Connection {
    sender: SendRequest<OneMessage>,
    base: Arc<str>,
    _task: Arc<Task>,
}

struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Connection {
    /// Connects. That the server speaks HTTP/2 shows with the first call only.
    pub(super) async fn open(target: Target<'_>) -> Result<Self, CallError> {
        let unsent = |e: std::io::Error| CallError::Unsent(e.to_string());
        let bare = target.host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((bare, target.port)).await.map_err(unsent)?;
        stream.set_nodelay(true).map_err(unsent)?;
        let scheme = if target.tls.is_some() { "https" } else { "http" };
        let base = format!("{scheme}://{}:{}", target.host, target.port).into();
        match target.tls {
            None => Self::over(Box::new(stream), base).await,
            Some(config) => {
                let name = rustls::pki_types::ServerName::try_from(bare.to_owned())
                    .map_err(|e| CallError::Unsent(format!("{bare}: {e}")))?;
                let connector = tokio_rustls::TlsConnector::from(config);
                let stream = connector.connect(name, stream).await.map_err(unsent)?;
                Self::over(Box::new(stream), base).await
            }
        }
    }

    async fn over(stream: Box<dyn Stream>, base: Arc<str>) -> Result<Self, CallError> {
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        let (sender, connection) =
            builder.handshake(TokioIo::new(stream)).await.map_err(|e| CallError::Unsent(whole(&e)))?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = whole(&error), "a connection to etcd ended");
            }
        });
        Ok(Self { sender, base, _task: Arc::new(Task(task)) })
    }

    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// One request, one answer.
    pub(super) async fn unary<A: Message + Default + Clone>(
        &self,
        path: &str,
        request: &impl Message,
        patience: Duration,
    ) -> Result<A, CallError> {
        let answered = timeout(patience + GRACE, async {
            let response = self.send(path, request, Some(patience), None).await?;
            let mut messages = Messages::new(response, None);
            let answer = messages.next::<A>().await;
            // the status comes last, and may still be a failure
            let end = if answer.is_ok() { messages.next::<A>().await } else { answer.clone() };
            match (answer, end) {
                (Ok(answer), Err(CallError::Status { code: 0, .. })) => Ok(answer),
                (_, Err(CallError::Status { code: 0, .. })) | (_, Ok(_)) => {
                    Err(CallError::Unanswered("not one answer to one request".to_owned()))
                }
                (_, Err(e)) => Err(e),
            }
        });
        let late = || CallError::Unanswered(format!("no answer within {} s", patience.as_secs()));
        answered.await.unwrap_or_else(|_| Err(late()))
    }

    /// One request, answers for as long as both sides live.
    pub(super) async fn stream(
        &self,
        path: &str,
        request: &impl Message,
        patience: Duration,
    ) -> Result<Messages, CallError> {
        let (wanted, open) = oneshot::channel();
        let response = timeout(patience, self.send(path, request, None, Some(open))).await;
        let late = || CallError::Unanswered(format!("no answer within {} s", patience.as_secs()));
        let response = response.unwrap_or_else(|_| Err(late()))?;
        Ok(Messages::new(response, Some(wanted)))
    }

    async fn send(
        &self,
        path: &str,
        request: &impl Message,
        patience: Option<Duration>,
        open: Option<oneshot::Receiver<Infallible>>,
    ) -> Result<Response<Incoming>, CallError> {
        let mut bytes = BytesMut::with_capacity(PREFIX_BYTES + request.encoded_len());
        bytes.put_u8(0);
        bytes.put_u32(u32::try_from(request.encoded_len()).unwrap_or(u32::MAX));
        let unsent = |e: &dyn std::error::Error| CallError::Unsent(whole(e));
        request.encode(&mut bytes).map_err(|e| unsent(&e))?;
        let mut builder = Request::post(format!("{}{path}", self.base))
            .version(Version::HTTP_2)
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            // a member cut off from the others must not answer with what it last knew
            .header("hasleader", "true");
        if let Some(patience) = patience {
            builder = builder.header("grpc-timeout", format!("{}m", patience.as_millis()));
        }
        let message = OneMessage { bytes: Some(bytes.freeze()), open };
        let request = builder.body(message).map_err(|e| unsent(&e))?;
        let sent = self.sender.clone().try_send_request(request).await;
        let response = sent.map_err(|mut e| {
            let (unsent, why) = (e.take_message().is_some(), whole(e.error()));
            if unsent { CallError::Unsent(why) } else { CallError::Unanswered(why) }
        })?;
        if response.status() != http::StatusCode::OK {
            return Err(CallError::Unanswered(format!("it answers {}", response.status())));
        }
        match status(response.headers()) {
            // an answer without a body
            Some(e) => Err(e),
            None => Ok(response),
        }
    }
}

/// The messages of an answer.
pub(super) struct Messages {
    body: Incoming,
    buffer: BytesMut,
    /// Dropped with this, it ends the request.
    _wanted: Option<oneshot::Sender<Infallible>>,
}

impl Messages {
    fn new(response: Response<Incoming>, wanted: Option<oneshot::Sender<Infallible>>) -> Self {
        Self { body: response.into_body(), buffer: BytesMut::new(), _wanted: wanted }
    }

    /// The next message; the end, a good one too, is an error. Dropping the future loses nothing.
    pub(super) async fn next<A: Message + Default>(&mut self) -> Result<A, CallError> {
        let broken = |e: &dyn std::error::Error| CallError::Unanswered(whole(e));
        loop {
            if let Some(message) = split(&mut self.buffer)? {
                return A::decode(message).map_err(|e| broken(&e));
            }
            let frame = match self.body.frame().await {
                Some(frame) => frame.map_err(|e| broken(&e))?,
                None => return Err(CallError::Unanswered("the answer was cut off".to_owned())),
            };
            match frame.into_data() {
                Ok(data) => self.buffer.extend_from_slice(&data),
                Err(frame) => {
                    let ended = frame.trailers_ref().and_then(status);
                    let none = || CallError::Unanswered("the answer has no status".to_owned());
                    return Err(ended.unwrap_or_else(none));
                }
            }
        }
    }
}

/// Takes a whole message off the front.
fn split(buffer: &mut BytesMut) -> Result<Option<Bytes>, CallError> {
    let Some(mut prefix) = buffer.get(..PREFIX_BYTES) else { return Ok(None) };
    let (compressed, size_bytes) = (prefix.get_u8(), prefix.get_u32() as usize);
    if compressed != 0 || size_bytes > MESSAGE_LIMIT_BYTES {
        return Err(CallError::Unanswered("the answer is not understood".to_owned()));
    }
    if buffer.len() < PREFIX_BYTES + size_bytes {
        buffer.reserve(PREFIX_BYTES + size_bytes - buffer.len());
        return Ok(None);
    }
    buffer.advance(PREFIX_BYTES);
    Ok(Some(buffer.split_to(size_bytes).freeze()))
}

/// gRPC's status, where these headers have it.
fn status(headers: &HeaderMap) -> Option<CallError> {
    let code = headers.get("grpc-status")?.to_str().ok().and_then(|c| c.parse().ok());
    let message = headers.get("grpc-message").map(|m| unescape(m.as_bytes())).unwrap_or_default();
    // 2 is "unknown"
    Some(CallError::Status { code: code.unwrap_or(2), message })
}

/// The text of a `grpc-message`, which has `%XX` for what is no plain ASCII.
fn unescape(text: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let escaped = match tail {
            [high, low, ..] if *first == b'%' => {
                let digit = |d: u8| char::from(d).to_digit(16);
                digit(*high).zip(digit(*low)).and_then(|(high, low)| u8::try_from(high * 16 + low).ok())
            }
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// An error with what caused it: hyper's own words alone say little.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let more = e.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = e.source();
    }
    text
}

/// The body of a request: one message. A stream's stays open as long as its answers are wanted: its end would be
/// the request's.
struct OneMessage {
    bytes: Option<Bytes>,
    open: Option<oneshot::Receiver<Infallible>>,
}

impl Body for OneMessage {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(bytes) = self.bytes.take() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        if let Some(open) = &mut self.open {
            std::task::ready!(Pin::new(open).poll(context)).ok();
            self.open = None;
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none() && self.open.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_out_of_frames() {
        let mut buffer = BytesMut::from(&[0, 0, 0, 0, 2, b'a', b'b', 0, 0, 0, 0][..]);
        assert_eq!(split(&mut buffer).unwrap().unwrap(), "ab");
        assert_eq!(split(&mut buffer).unwrap(), None);
        buffer.extend_from_slice(&[1]);
        assert_eq!(split(&mut buffer).unwrap(), None);
        buffer.extend_from_slice(b"c");
        assert_eq!(split(&mut buffer).unwrap().unwrap(), "c");
        for refused in [[1, 0, 0, 0, 0], [0, 0xff, 0, 0, 0]] {
            assert!(split(&mut BytesMut::from(&refused[..])).is_err(), "{refused:?}");
        }
    }

    #[test]
    fn statuses_are_read() {
        for (code, message, want) in [
            ("0", "", CallError::Status { code: 0, message: String::new() }),
            ("14", "no%20leader%", CallError::Status { code: 14, message: "no leader%".into() }),
            ("x", "100%zz", CallError::Status { code: 2, message: "100%zz".into() }),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-status", code.parse().unwrap());
            headers.insert("grpc-message", message.parse().unwrap());
            assert_eq!(status(&headers), Some(want));
        }
        assert_eq!(status(&HeaderMap::new()), None);
    }
}
