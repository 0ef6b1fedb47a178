//! A SPDY connection: its streams, each with a bounded pipe inwards.
//!
//! Upstream counterpart: vendor/github.com/moby/spdystream. As there, no windows are kept: no Kubernetes client sends
//! WINDOW_UPDATE, and one that waited for it would stall. The transport's own flow control bounds what is on its way.
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, DuplexStream,
};
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

use super::channels::{CHUNK_BYTES, Input, Output, PIPE_BYTES};
use super::spdy::{self, Control, Decoder, Encoder, Head, Headers};

const STREAMS_MAX: usize = 512;
/// Above this, streams that nobody reads any more are looked for.
const STREAMS_SWEEP: usize = 32;
const LINGER: Duration = Duration::from_secs(5);

/// The connection's writing side.
#[derive(Clone)]
pub struct Wire(Arc<Mutex<WriteSide>>);

struct WriteSide {
    io: Box<dyn AsyncWrite + Send + Unpin>,
    encoder: Encoder,
    buffer: Vec<u8>,
}

impl Wire {
    async fn write(&self, frame: impl FnOnce(&mut Encoder, &mut Vec<u8>)) -> io::Result<()> {
        let side = &mut *self.0.lock().await;
        side.buffer.clear();
        frame(&mut side.encoder, &mut side.buffer);
        side.io.write_all(&side.buffer).await?;
        side.io.flush().await
    }

    pub async fn data(&self, id: u32, is_last: bool, bytes: &[u8]) -> io::Result<()> {
        self.write(|_, out| spdy::data(out, id, is_last, bytes)).await
    }

    pub async fn reset(&self, id: u32, status: u32) -> io::Result<()> {
        self.write(|_, out| spdy::reset(out, id, status)).await
    }
}

/// A stream that the client opened. It is neither accepted nor refused yet.
pub struct Stream {
    pub id: u32,
    pub headers: Headers,
    pub input: Input,
    pub output: Output,
    /// The client gave the stream up, or the connection is gone.
    pub gone: CancellationToken,
    /// The reader keeps a stream as long as this is held.
    pub held: Arc<()>,
    wire: Wire,
}

impl Stream {
    pub fn header(&self, name: &str) -> &str {
        spdy::header(&self.headers, name)
    }

    pub async fn accept(&self) -> io::Result<()> {
        self.wire.write(|encoder, out| encoder.syn_reply(out, self.id, &Headers::new())).await
    }

    pub async fn refuse(&self) {
        let _ = self.wire.reset(self.id, spdy::REFUSED_STREAM).await;
    }
}

pub struct Connection {
    pub incoming: mpsc::Receiver<Stream>,
    /// The client is gone.
    pub gone: CancellationToken,
    wire: Wire,
}

impl Connection {
    /// The connection, and the future that reads it: it ends when the client does.
    pub fn new<I>(io: I) -> (Self, impl Future<Output = ()> + Send)
    where
        I: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(io);
        let side = WriteSide { io: Box::new(write), encoder: Encoder::default(), buffer: Vec::new() };
        let wire = Wire(Arc::new(Mutex::new(side)));
        let (sender, incoming) = mpsc::channel(8);
        let gone = CancellationToken::new();
        let reader = ReadSide {
            io: BufReader::with_capacity(CHUNK_BYTES, read),
            decoder: Decoder::default(),
            streams: HashMap::new(),
            last_id: 0,
            sender: Some(sender),
            wire: wire.clone(),
            gone: gone.clone(),
        };
        (Self { incoming, gone, wire }, reader.run())
    }

    /// Says good-bye, and waits a while for the client to hang up.
    pub async fn close(self) {
        let _ = self.wire.write(|_, out| spdy::go_away(out, 0)).await;
        let _ = self.wire.0.lock().await.io.shutdown().await;
        let _ = tokio::time::timeout(LINGER, self.gone.cancelled()).await;
    }
}

struct Entry {
    pipe: Option<DuplexStream>,
    gone: CancellationToken,
    held: Weak<()>,
}

struct ReadSide<R> {
    io: BufReader<R>,
    decoder: Decoder,
    streams: HashMap<u32, Entry>,
    last_id: u32,
    /// `None` when streams are no longer wanted.
    sender: Option<mpsc::Sender<Stream>>,
    wire: Wire,
    gone: CancellationToken,
}

fn invalid(error: spdy::SpdyError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<R: AsyncRead + Unpin> ReadSide<R> {
    async fn run(mut self) {
        let _gone = self.gone.clone().drop_guard();
        loop {
            match self.frame().await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::debug!(%error, "SPDY connection ended");
                    return;
                }
            }
        }
    }

    /// Reads one frame; `false` at the end.
    async fn frame(&mut self) -> io::Result<bool> {
        if self.io.fill_buf().await?.is_empty() {
            return Ok(false);
        }
        let mut head = [0; Head::BYTES];
        self.io.read_exact(&mut head).await?;
        match Head::parse(head).map_err(invalid)? {
            Head::Data { id, is_last, length } => self.data(id, is_last, length).await.map(|()| true),
            Head::Control { kind, flags, length } => {
                let mut payload = vec![0; length];
                self.io.read_exact(&mut payload).await?;
                let control = self.decoder.control(kind, flags, &payload).map_err(invalid)?;
                self.control(control).await
            }
        }
    }

    async fn data(&mut self, id: u32, is_last: bool, mut left: usize) -> io::Result<()> {
        let entry = self.streams.get_mut(&id);
        let mut pipe = entry.and_then(|entry| entry.pipe.as_mut());
        while left > 0 {
            let available = self.io.fill_buf().await?;
            if available.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let n = available.len().min(left);
            if let Some(to) = &mut pipe
                && to.write_all(&available[..n]).await.is_err()
            {
                // nobody reads it any more
                pipe = None;
            }
            self.io.consume(n);
            left -= n;
        }
        if is_last {
            self.ended(id);
        }
        Ok(())
    }

    fn ended(&mut self, id: u32) {
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.pipe = None;
        }
    }

    async fn control(&mut self, control: Control) -> io::Result<bool> {
        match control {
            Control::SynStream { id, is_last, headers } => self.open(id, is_last, headers).await?,
            Control::Reset { id, .. } => {
                if let Some(entry) = self.streams.remove(&id) {
                    entry.gone.cancel();
                }
            }
            Control::Headers { id, is_last: true, .. } | Control::SynReply { id, is_last: true, .. } => {
                self.ended(id)
            }
            // the client's are odd; an even one would answer a ping of ours
            Control::Ping(id) if id % 2 == 1 => self.wire.write(|_, out| spdy::ping(out, id)).await?,
            Control::GoAway { .. } => return Ok(false),
            _ => {}
        }
        Ok(true)
    }

    async fn open(&mut self, id: u32, is_last: bool, headers: Headers) -> io::Result<()> {
        if id.is_multiple_of(2) || id <= self.last_id {
            return self.wire.reset(id, spdy::PROTOCOL_ERROR).await;
        }
        self.last_id = id;
        if self.streams.len() >= STREAMS_SWEEP {
            self.streams.retain(|_, entry| entry.held.strong_count() > 0);
        }
        let Some(sender) = self.sender.as_ref().filter(|_| self.streams.len() < STREAMS_MAX) else {
            return self.wire.reset(id, spdy::REFUSED_STREAM).await;
        };
        let (input, pipe) = tokio::io::duplex(PIPE_BYTES);
        let (gone, held) = (self.gone.child_token(), Arc::new(()));
        let entry =
            Entry { pipe: (!is_last).then_some(pipe), gone: gone.clone(), held: Arc::downgrade(&held) };
        let (wire, output) = (self.wire.clone(), Output::Spdy { wire: self.wire.clone(), id });
        if sender.send(Stream { id, headers, input, output, gone, held, wire }).await.is_err() {
            self.sender = None;
            return self.wire.reset(id, spdy::REFUSED_STREAM).await;
        }
        self.streams.insert(id, entry);
        Ok(())
    }
}
