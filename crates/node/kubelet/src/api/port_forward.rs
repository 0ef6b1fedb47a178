//! Port forwarding: over SPDY, over SPDY within a WebSocket, and over a WebSocket with two channels a port.
//!
//! Upstream counterparts: k8s.io/cri-streaming/pkg/streaming/portforward, k8s.io/apiserver/pkg/util/proxy/streamtunnel.go.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sampan_drivers::Runtime;
use sampan_world::clock;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::channels::{CHUNK_BYTES, Input, Output, PIPE_BYTES};
use super::multiplex::{Connection, Stream};
use super::websocket::{self, Reader, Writer};

pub const PROTOCOL: &str = "portforward.k8s.io";
/// What a WebSocket's subprotocol begins with when SPDY goes through it.
pub const TUNNEL_PREFIX: &str = "SPDY/3.1+";
pub const WEBSOCKET_PROTOCOLS: [&str; 2] = ["v4.channel.k8s.io", "v4.base64.channel.k8s.io"];
pub const PORTS_MAX: usize = 64;

const CREATION: Duration = Duration::from_secs(30);
const PENDING_MAX: usize = 256;
/// How long a client may go on after the pod's side ended.
const HALF_CLOSED: Duration = Duration::from_secs(10);

/// The pod whose ports are meant.
#[derive(Clone)]
pub struct Pod {
    pub runtime: Arc<dyn Runtime>,
    pub sandbox_id: String,
    pub name: String,
    pub uid: String,
}

impl Pod {
    /// Carries one connection; `Err` has the message for the error stream.
    async fn forward(
        &self,
        port: u16,
        from: Input,
        to: &Output,
        gone: &CancellationToken,
    ) -> Result<(), String> {
        let why = |error: String| {
            format!("error forwarding port {port} to pod {}, uid {}: {error}", self.name, self.uid)
        };
        let connected =
            self.runtime.port_forward(&self.sandbox_id, port).await.map_err(|e| why(e.to_string()))?;
        let (mut read, mut write) = tokio::io::split(connected);
        let mut from = from;
        let inwards = async {
            let copied = tokio::io::copy(&mut from, &mut write).await;
            let _ = write.shutdown().await;
            copied
        };
        let outwards = async {
            let mut buffer = vec![0; CHUNK_BYTES];
            let result = loop {
                // given up between frames only: a frame that is cut off would spoil the connection
                let n = tokio::select! {
                    n = read.read(&mut buffer) => match n {
                        Ok(n) => n,
                        Err(error) => break Err(error.to_string()),
                    },
                    () = gone.cancelled() => 0,
                };
                if n == 0 || to.send(&buffer[..n]).await.is_err() {
                    break Ok(());
                }
            };
            to.finish().await;
            result
        };
        tokio::pin!(inwards);
        tokio::pin!(outwards);
        tokio::select! {
            _ = &mut inwards => outwards.await.map_err(why),
            result = &mut outwards => {
                tokio::select! {
                    _ = tokio::time::timeout(HALF_CLOSED, inwards) => {}
                    () = gone.cancelled() => {}
                }
                result.map_err(why)
            }
        }
    }
}

/// A port in a stream's header or in a query.
pub fn parse_port(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(0) => Err(format!("port {text:?} must be > 0")),
        Ok(port) => Ok(port),
        Err(_) => Err(format!("unable to parse {text:?} as a port")),
    }
}

/// The streams of a request that have come so far.
struct Pair {
    since: Instant,
    data: Option<Stream>,
    error: Option<Stream>,
}

/// Serves one client that speaks SPDY.
pub async fn spdy<I>(io: I, pod: Pod)
where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut connection, read) = Connection::new(io);
    let serve = async {
        let (mut forwards, mut pending) = (JoinSet::new(), HashMap::<String, Pair>::new());
        loop {
            let deadline = pending.values().map(|pair| pair.since).min().map(|since| since + CREATION);
            let overdue = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                stream = connection.incoming.recv() => match stream {
                    Some(stream) => opened(stream, &mut pending, &mut forwards, &pod).await,
                    None => break,
                },
                () = overdue => expire(&mut pending).await,
                // takes in those that are done
                Some(_) = forwards.join_next() => {}
            }
        }
    };
    tokio::join!(serve, read);
    connection.close().await;
}

/// Tells the error streams of pairs that never became whole.
async fn expire(pending: &mut HashMap<String, Pair>) {
    let now = clock::monotonic();
    let (old, young) = pending.drain().partition(|(_, pair)| now >= pair.since + CREATION);
    *pending = young;
    let old: Vec<(String, Pair)> = HashMap::into_iter(old).collect();
    for (request, pair) in old {
        if let Some(error) = pair.error {
            let text = format!("(request={request}) timed out waiting for streams");
            let _ = error.output.send(text.as_bytes()).await;
            error.output.finish().await;
        }
        if let Some(data) = pair.data {
            data.output.reset().await;
        }
    }
}

async fn opened(stream: Stream, pending: &mut HashMap<String, Pair>, forwards: &mut JoinSet<()>, pod: &Pod) {
    let (kind, port) = (stream.header("streamtype").to_string(), parse_port(stream.header("port")));
    let is_data = match kind.as_str() {
        "data" => true,
        "error" => false,
        _ => return stream.refuse().await,
    };
    let Ok(port) = port else { return stream.refuse().await };
    let request = match stream.header("requestid") {
        // older clients open the error stream, then the data stream
        "" if is_data => stream.id.saturating_sub(2).to_string(),
        "" => stream.id.to_string(),
        request => request.to_string(),
    };
    if pending.len() >= PENDING_MAX && !pending.contains_key(&request) {
        return stream.refuse().await;
    }
    if stream.accept().await.is_err() {
        return;
    }
    let pair = pending.entry(request.clone());
    let pair = pair.or_insert_with(|| Pair { since: clock::monotonic(), data: None, error: None });
    let place = if is_data { &mut pair.data } else { &mut pair.error };
    if place.is_some() {
        let text = format!("error processing stream for request {request}: {kind} stream already assigned");
        if let Some(error) = &pair.error {
            let _ = error.output.send(text.as_bytes()).await;
        }
        return stream.output.reset().await;
    }
    *place = Some(stream);
    if pair.data.is_none() || pair.error.is_none() {
        return;
    }
    if let Some(Pair { data: Some(data), error: Some(error), .. }) = pending.remove(&request) {
        let pod = pod.clone();
        forwards.spawn(async move {
            let Stream { input, output, gone, held, .. } = data;
            let result = pod.forward(port, input, &output, &gone).await;
            if let Err(message) = &result {
                let _ = error.output.send(message.as_bytes()).await;
                output.reset().await;
            }
            error.output.finish().await;
            drop((held, error));
        });
    }
}

/// Serves one client that speaks SPDY within a WebSocket.
pub async fn tunnelled<I>(io: I, pod: Pod)
where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let (read, write) = tokio::io::split(io);
    let (stream, carry) = websocket::tunnel(Reader::new(read), Writer::new(write));
    tokio::join!(spdy(stream, pod), carry);
}

/// Serves one client with two channels a port: data, and what went wrong.
pub async fn channels<I>(io: I, pod: Pod, ports: Vec<u16>, protocol: String)
where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let (read, write) = tokio::io::split(io);
    let (mut reader, writer) = (Reader::new(read), Writer::new(write));
    let (is_base64, gone) = (protocol.contains("base64"), CancellationToken::new());
    let (mut forwards, mut pipes) = (JoinSet::new(), Vec::new());
    for (i, port) in ports.iter().copied().take(PORTS_MAX).enumerate() {
        let output = |channel| Output::WebSocket { writer: writer.clone(), channel, is_base64 };
        let (data, error) = (output(i as u8 * 2), output(i as u8 * 2 + 1));
        // which port the channel is for
        for channel in [&data, &error] {
            if channel.send(&port.to_le_bytes()).await.is_err() {
                return;
            }
        }
        let (input, pipe) = tokio::io::duplex(PIPE_BYTES);
        pipes.push(Some(pipe));
        let (pod, gone) = (pod.clone(), gone.clone());
        forwards.spawn(async move {
            if let Err(message) = pod.forward(port, input, &data, &gone).await {
                let _ = error.send(message.as_bytes()).await;
            }
        });
    }
    let read = read_channels(&mut reader, &writer, &mut pipes, is_base64);
    let done = async { while forwards.join_next().await.is_some() {} };
    tokio::select! {
        () = read => gone.cancel(),
        () = done => {}
    }
    writer.close().await;
    websocket::linger(&mut reader, &writer).await;
}

async fn read_channels<R: AsyncRead + Unpin>(
    reader: &mut Reader<R>,
    writer: &Writer,
    pipes: &mut [Option<DuplexStream>],
    is_base64: bool,
) {
    let (mut channel, mut carry) = (None, Vec::new());
    while let Ok(Some(piece)) = reader.next(writer).await {
        if piece.is_first {
            (channel, carry) = (None, Vec::new());
        }
        let mut bytes = &piece.bytes[..];
        if channel.is_none()
            && let Some((first, rest)) = bytes.split_first()
        {
            channel = Some(if is_base64 { first.wrapping_sub(b'0') } else { *first });
            bytes = rest;
        }
        let decoded = if is_base64 {
            carry.extend_from_slice(bytes);
            let whole = if piece.is_last { carry.len() } else { carry.len() / 4 * 4 };
            STANDARD.decode(carry.drain(..whole).collect::<Vec<u8>>()).unwrap_or_default()
        } else {
            bytes.to_vec()
        };
        // odd channels are for errors, which only we write
        let pipe = channel.filter(|c| c % 2 == 0).and_then(|c| pipes.get_mut(usize::from(c / 2)));
        if let Some(place) = pipe
            && let Some(pipe) = place
            && pipe.write_all(&decoded).await.is_err()
        {
            *place = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_checked() {
        assert_eq!(parse_port("80"), Ok(80));
        for (bad, why) in [
            ("0", "port \"0\" must be > 0"),
            ("", "unable to parse \"\" as a port"),
            ("65536", "unable to parse \"65536\" as a port"),
        ] {
            assert_eq!(parse_port(bad), Err(why.to_string()));
        }
    }
}
