//! WebSocket (RFC 6455), the server's side.
//!
//! Upstream counterpart: k8s.io/streaming/pkg/httpstream/wsstream. Messages are handed on in pieces as they arrive, so
//! that a message of any length takes no more memory than a piece. Extensions are not offered. Pings are answered, and
//! none are sent: the connection below knows whether the other end lives.
use std::io;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, header};
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, DuplexStream,
};
use tokio::sync::Mutex;

use super::channels::{CHUNK_BYTES, PIPE_BYTES};

pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
const CONTINUATION: u8 = 0;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const CONTROL_BYTES_MAX: usize = 125;
/// How long the other end may take to close after we did.
const LINGER: Duration = Duration::from_secs(5);

/// Whether the request asks for a WebSocket.
pub fn is_wanted(headers: &HeaderMap) -> bool {
    super::upgrade_of(headers).is_some_and(|protocol| protocol.eq_ignore_ascii_case("websocket"))
}

/// The subprotocols that the client offers, best first.
pub fn protocols(headers: &HeaderMap) -> Vec<&str> {
    let values = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|p| !p.is_empty()).collect()
}

/// The answer to the client's key; `None` where the handshake is none.
pub fn accept(headers: &HeaderMap) -> Option<String> {
    if headers.get(header::SEC_WEBSOCKET_VERSION)?.as_bytes() != b"13" {
        return None;
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?.as_bytes();
    let mut digest = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    digest.update(key);
    digest.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    Some(STANDARD.encode(digest.finish()))
}

/// A part of a message.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    pub bytes: Bytes,
    /// It begins, and ends, the message.
    pub is_first: bool,
    pub is_last: bool,
}

struct Frame {
    left: u64,
    mask: [u8; 4],
    at: usize,
    is_first: bool,
    is_final: bool,
}

pub struct Reader<R> {
    io: BufReader<R>,
    frame: Option<Frame>,
    is_within_message: bool,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("websocket: {what}"))
}

fn unmask(bytes: &mut [u8], mask: [u8; 4], at: usize) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte ^= mask[(at + i) % 4];
    }
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub fn new(io: R) -> Self {
        Self { io: BufReader::with_capacity(CHUNK_BYTES, io), frame: None, is_within_message: false }
    }

    /// The next piece; `None` when the client closed. Answers pings on the way.
    pub async fn next(&mut self, writer: &Writer) -> io::Result<Option<Piece>> {
        loop {
            if let Some(frame) = &mut self.frame {
                let available = self.io.fill_buf().await?;
                if available.is_empty() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let n = (available.len() as u64).min(frame.left) as usize;
                let mut bytes = available[..n].to_vec();
                self.io.consume(n);
                unmask(&mut bytes, frame.mask, frame.at);
                frame.at = (frame.at + n) % 4;
                frame.left -= n as u64;
                let is_first = std::mem::take(&mut frame.is_first);
                let is_last = frame.left == 0 && frame.is_final;
                if frame.left == 0 {
                    self.frame = None;
                }
                return Ok(Some(Piece { bytes: bytes.into(), is_first, is_last }));
            }
            if self.io.fill_buf().await?.is_empty() {
                return Ok(None);
            }
            let (code, mut frame) = self.head().await?;
            match code {
                CONTINUATION | TEXT | BINARY => {
                    frame.is_first = code != CONTINUATION;
                    if frame.is_first == self.is_within_message {
                        return Err(invalid("a message within a message"));
                    }
                    self.is_within_message = !frame.is_final;
                    if frame.left == 0 {
                        let (is_first, is_last) = (frame.is_first, frame.is_final);
                        return Ok(Some(Piece { bytes: Bytes::new(), is_first, is_last }));
                    }
                    self.frame = Some(frame);
                }
                CLOSE | PING | PONG => {
                    if frame.left > CONTROL_BYTES_MAX as u64 || !frame.is_final {
                        return Err(invalid("a control frame that is too long"));
                    }
                    let mut payload = vec![0; frame.left as usize];
                    self.io.read_exact(&mut payload).await?;
                    unmask(&mut payload, frame.mask, 0);
                    match code {
                        PING => writer.send(PONG, &[&payload]).await?,
                        CLOSE => return Ok(None),
                        _ => {}
                    }
                }
                _ => return Err(invalid("an unknown frame")),
            }
        }
    }

    async fn head(&mut self) -> io::Result<(u8, Frame)> {
        let mut head = [0; 2];
        self.io.read_exact(&mut head).await?;
        if head[0] & 0x70 != 0 {
            return Err(invalid("an extension that was not agreed upon"));
        }
        if head[1] & 0x80 == 0 {
            return Err(invalid("a client's frame without a mask"));
        }
        let left = match head[1] & 0x7f {
            126 => u64::from(self.io.read_u16().await?),
            127 => self.io.read_u64().await?,
            length => u64::from(length),
        };
        if left > i64::MAX as u64 {
            return Err(invalid("a frame that is too long"));
        }
        let mut mask = [0; 4];
        self.io.read_exact(&mut mask).await?;
        Ok((head[0] & 0x0f, Frame { left, mask, at: 0, is_first: false, is_final: head[0] & 0x80 != 0 }))
    }
}

struct WriteSide {
    io: Box<dyn AsyncWrite + Send + Unpin>,
    buffer: Vec<u8>,
    is_closed: bool,
}

/// Writes whole messages, one at a time.
#[derive(Clone)]
pub struct Writer(Arc<Mutex<WriteSide>>);

impl Writer {
    pub fn new(io: impl AsyncWrite + Send + Unpin + 'static) -> Self {
        Self(Arc::new(Mutex::new(WriteSide { io: Box::new(io), buffer: Vec::new(), is_closed: false })))
    }

    /// Sends one message made of `parts`.
    pub async fn send(&self, code: u8, parts: &[&[u8]]) -> io::Result<()> {
        let side = &mut *self.0.lock().await;
        if side.is_closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let length: usize = parts.iter().map(|part| part.len()).sum();
        side.buffer.clear();
        side.buffer.push(0x80 | code);
        match length {
            0..126 => side.buffer.push(length as u8),
            126..65536 => {
                side.buffer.push(126);
                side.buffer.extend_from_slice(&(length as u16).to_be_bytes());
            }
            _ => {
                side.buffer.push(127);
                side.buffer.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        parts.iter().for_each(|part| side.buffer.extend_from_slice(part));
        side.is_closed = code == CLOSE;
        side.io.write_all(&side.buffer).await?;
        side.io.flush().await
    }

    /// Says that we are done, and ends our side.
    pub async fn close(&self) {
        let _ = self.send(CLOSE, &[&1000_u16.to_be_bytes()]).await;
        let _ = self.0.lock().await.io.shutdown().await;
    }
}

/// Reads on, for a while, until the client closed too: what it has not read yet would be lost otherwise.
pub async fn linger<R: AsyncRead + Unpin>(reader: &mut Reader<R>, writer: &Writer) {
    let rest = async { while let Ok(Some(_)) = reader.next(writer).await {} };
    let _ = tokio::time::timeout(LINGER, rest).await;
}

/// The bytes within the messages as one stream, for a protocol that is tunnelled. The future carries them; it ends
/// soon after the stream is dropped.
pub fn tunnel<R: AsyncRead + Send + Unpin>(
    mut reader: Reader<R>,
    writer: Writer,
) -> (DuplexStream, impl Future<Output = ()> + Send) {
    let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
    let (mut from, mut to) = tokio::io::split(ours);
    let carry = async move {
        let inwards = async {
            while let Ok(Some(piece)) = reader.next(&writer).await {
                if to.write_all(&piece.bytes).await.is_err() {
                    break;
                }
            }
            let _ = to.shutdown().await;
        };
        let outwards = async {
            let mut buffer = vec![0; CHUNK_BYTES];
            while let Ok(n @ 1..) = from.read(&mut buffer).await {
                if writer.send(BINARY, &[&buffer[..n]]).await.is_err() {
                    break;
                }
            }
            writer.close().await;
        };
        tokio::pin!(inwards);
        tokio::pin!(outwards);
        tokio::select! {
            () = &mut inwards => outwards.await,
            () = &mut outwards => {
                let _ = tokio::time::timeout(LINGER, inwards).await;
            }
        }
    };
    (theirs, carry)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A client's frame: masked.
    pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = vec![first];
        match payload.len() {
            n @ 0..126 => out.push(0x80 | n as u8),
            n => {
                out.push(0x80 | 126);
                out.extend_from_slice(&(n as u16).to_be_bytes());
            }
        }
        let mask = [0xa1, 2, 0x33, 4];
        out.extend_from_slice(&mask);
        let mut masked = payload.to_vec();
        unmask(&mut masked, mask, 0);
        out.extend(masked);
        out
    }

    /// A server's message: (opcode, payload).
    pub async fn message(io: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        io.read_exact(&mut head).await?;
        let length = match head[1] {
            126 => u64::from(io.read_u16().await?),
            127 => io.read_u64().await?,
            n => n.into(),
        };
        let mut payload = vec![0; length as usize];
        io.read_exact(&mut payload).await?;
        Ok((head[0] & 0x0f, payload))
    }

    async fn pieces(bytes: Vec<u8>) -> (Vec<Piece>, Option<io::Error>, Vec<u8>) {
        let (out, mut answers) = tokio::io::duplex(4096);
        let writer = Writer::new(out);
        let (mut reader, mut seen) = (Reader::new(io::Cursor::new(bytes)), Vec::new());
        let error = loop {
            match reader.next(&writer).await {
                Ok(Some(piece)) => seen.push(piece),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        drop(writer);
        let mut answered = Vec::new();
        answers.read_to_end(&mut answered).await.unwrap();
        (seen, error, answered)
    }

    #[tokio::test]
    async fn messages_come_in_pieces_with_pings_between() {
        let bytes =
            [frame(0x02, b"ab"), frame(0x89, b"hi"), frame(0x80, b"c"), frame(0x81, b""), frame(0x88, b"")];
        let (seen, error, answered) = pieces(bytes.concat()).await;
        assert!(error.is_none());
        let piece =
            |bytes: &'static [u8], is_first, is_last| Piece { bytes: bytes.into(), is_first, is_last };
        assert_eq!(seen, [piece(b"ab", true, false), piece(b"c", false, true), piece(b"", true, true)]);
        assert_eq!(answered, b"\x8a\x02hi");
        let (seen, _, _) = pieces(frame(0x82, &vec![7; 60_000])).await;
        assert!(seen.len() > 1 && seen.iter().all(|p| p.bytes.iter().all(|b| *b == 7)));
        assert_eq!(seen.iter().map(|p| p.bytes.len()).sum::<usize>(), 60_000);
    }

    #[tokio::test]
    async fn frames_against_the_rules_are_errors() {
        for bad in [
            b"\x82\x01x".to_vec(),
            frame(0x80, b"a continuation of nothing"),
            [frame(0x02, b"a"), frame(0x02, b"b")].concat(),
            frame(0xc2, b"compressed"),
            frame(0x89, &[0; 200]),
            frame(0x83, b""),
            frame(0x82, b"cut short")[..9].to_vec(),
        ] {
            assert!(pieces(bad.clone()).await.1.is_some(), "{bad:x?}");
        }
    }

    #[test]
    fn the_key_is_answered_as_the_standard_says() {
        let mut headers = HeaderMap::new();
        headers.insert(header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ==".parse().unwrap());
        assert_eq!(accept(&headers), None);
        headers.insert(header::SEC_WEBSOCKET_VERSION, "13".parse().unwrap());
        assert_eq!(accept(&headers).unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        headers
            .insert(header::SEC_WEBSOCKET_PROTOCOL, "v5.channel.k8s.io, v4.channel.k8s.io".parse().unwrap());
        assert_eq!(protocols(&headers), ["v5.channel.k8s.io", "v4.channel.k8s.io"]);
    }
}
