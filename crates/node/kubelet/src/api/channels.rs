//! The ends of a connection that carries several byte streams, whichever protocol it speaks.
//!
//! What comes in lands in a bounded pipe; what goes out is written under the connection's lock. A pipe that is full
//! holds up the whole connection: neither protocol can tell a client to wait for one stream only (upstream's SPDY has no
//! flow control either), and memory stays bounded.
use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncRead, AsyncReadExt, DuplexStream};

use super::{multiplex, websocket};

/// What a stream holds before its connection has to wait.
pub const PIPE_BYTES: usize = 64 * 1024;
pub const CHUNK_BYTES: usize = 16 * 1024;

/// Ends when the client ends the stream, or the connection.
pub type Input = DuplexStream;

/// Where bytes for the client go.
#[derive(Clone)]
pub enum Output {
    Spdy { wire: multiplex::Wire, id: u32 },
    WebSocket { writer: websocket::Writer, channel: u8, is_base64: bool },
}

impl Output {
    pub async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Spdy { wire, id } => wire.data(*id, false, bytes).await,
            Self::WebSocket { writer, channel, is_base64: false } => {
                writer.send(websocket::BINARY, &[&[*channel], bytes]).await
            }
            Self::WebSocket { writer, channel, is_base64: true } => {
                let text = STANDARD.encode(bytes);
                writer.send(websocket::TEXT, &[&[b'0' + *channel], text.as_bytes()]).await
            }
        }
    }

    /// No more will come. Over a WebSocket only the connection's end says so.
    pub async fn finish(&self) {
        if let Self::Spdy { wire, id } = self {
            let _ = wire.data(*id, true, &[]).await;
        }
    }

    /// Something went wrong with the stream.
    pub async fn reset(&self) {
        if let Self::Spdy { wire, id } = self {
            let _ = wire.reset(*id, super::spdy::CANCEL).await;
        }
    }
}

/// Copies to the client until `from` ends or the client is gone.
pub async fn pump(mut from: impl AsyncRead + Unpin, to: &Output) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        to.send(&buffer[..n]).await?;
    }
}
