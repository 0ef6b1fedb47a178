//! exec and attach, over WebSocket and over SPDY.
//!
//! Upstream counterpart: k8s.io/cri-streaming/pkg/streaming/remotecommand. Both protocols end here, since the API
//! server passes the client's upgrade on as it is. When a client goes away, its command is given up.
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sampan_drivers::Runtime;
use sampan_drivers::runtime::{ExecResult, Streams, TerminalSize};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::channels::{self, Input, Output, PIPE_BYTES};
use super::multiplex::Connection;
use super::websocket::{self, Reader, Writer};

/// How long a client has to open the streams it asked for.
const CREATION: Duration = Duration::from_secs(30);
/// How long what is left of the output may take to reach the client.
const FLUSH: Duration = Duration::from_secs(60);
const SIZE_BYTES_MAX: usize = 4096;
const CLOSE_SIGNAL: u8 = 255;

/// Best first.
pub const SPDY_PROTOCOLS: [&str; 4] =
    ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
pub const WEBSOCKET_PROTOCOLS: [&str; 5] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl Options {
    /// From the query's names, the kubelet's or the API's.
    pub fn parse(flag: impl Fn(&str) -> bool) -> Result<Self, &'static str> {
        let tty = flag("tty");
        let options = Self {
            stdin: flag("input") || flag("stdin"),
            stdout: flag("output") || flag("stdout"),
            // a terminal has one output
            stderr: (flag("error") || flag("stderr")) && !tty,
            tty,
        };
        match options {
            Self { stdin: false, stdout: false, stderr: false, .. } => {
                Err("you must specify at least 1 of stdin, stdout, stderr")
            }
            options => Ok(options),
        }
    }
}

/// What is to be done in a container.
#[derive(Clone, Debug)]
pub enum Command {
    Exec {
        container_id: String,
        command: Vec<String>,
    },
    /// Whether there is a terminal is the container's to say.
    Attach {
        container_id: String,
        tty: bool,
    },
}

/// The client's ends.
struct Ends {
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    resize: Option<Input>,
    error: Output,
    /// Protocol v4 and later: a Status, where earlier ones have the message only.
    is_status: bool,
    gone: CancellationToken,
}

impl Ends {
    /// Runs the command to its end, and tells the client how it ended. `false` when the client has gone away.
    async fn serve(self, runtime: &dyn Runtime, command: &Command) -> bool {
        let mut pumps = JoinSet::new();
        let mut outwards = |output: &Option<Output>| {
            let output = output.clone()?;
            let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
            pumps.spawn(async move {
                let _ = channels::pump(ours, &output).await;
            });
            Some(Box::new(theirs) as Box<dyn AsyncWrite + Send + Unpin>)
        };
        let (stdout, stderr) = (outwards(&self.stdout), outwards(&self.stderr));
        let mut sizes = JoinSet::new();
        let resize = self.resize.map(|input| {
            let (sender, receiver) = mpsc::channel(4);
            sizes.spawn(read_sizes(input, sender));
            receiver
        });
        let stdin = self.stdin.map(|input| Box::new(input) as Box<dyn AsyncRead + Send + Unpin>);
        let streams = Streams { stdin, stdout, stderr, tty: false, resize };
        let status = tokio::select! {
            status = run(runtime, command, streams) => status,
            () = self.gone.cancelled() => return false,
        };
        let flushed = async { while pumps.join_next().await.is_some() {} };
        tokio::select! {
            _ = tokio::time::timeout(FLUSH, flushed) => {}
            () = self.gone.cancelled() => return false,
        }
        for output in [&self.stdout, &self.stderr].into_iter().flatten() {
            output.finish().await;
        }
        let text = match (self.is_status, status["status"] == "Success") {
            (true, _) => status.to_string(),
            (false, true) => String::new(),
            (false, false) => status["message"].as_str().unwrap_or_default().to_string(),
        };
        if !text.is_empty() && self.error.send(text.as_bytes()).await.is_err() {
            return false;
        }
        self.error.finish().await;
        true
    }
}

fn internal_error(message: String) -> Value {
    let message = format!("Internal error occurred: {message}");
    json!({"metadata": {}, "status": "Failure", "message": message, "reason": "InternalError", "code": 500})
}

async fn run(runtime: &dyn Runtime, command: &Command, mut streams: Streams) -> Value {
    let success = json!({"metadata": {}, "status": "Success"});
    match command {
        Command::Exec { container_id, command } => {
            streams.tty = streams.resize.is_some();
            let why =
                |error: String| internal_error(format!("error executing command in container: {error}"));
            match runtime.exec(container_id, command, streams).await {
                Ok(ExecResult::Exited(0)) => success,
                Ok(ExecResult::Exited(code)) => json!({
                    "metadata": {},
                    "status": "Failure",
                    "message": format!(
                        "command terminated with non-zero exit code: error executing command [{}], exit code {code}",
                        command.join(" ")
                    ),
                    "reason": "NonZeroExitCode",
                    "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
                }),
                Ok(ExecResult::Failed(error)) => why(error),
                Err(error) => why(error.to_string()),
            }
        }
        Command::Attach { container_id, tty } => {
            streams.tty = *tty;
            if *tty {
                streams.stderr = None;
            } else {
                streams.resize = None;
            }
            match runtime.attach(container_id, streams).await {
                Ok(()) => success,
                Err(error) => internal_error(format!("error attaching to container: {error}")),
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    #[serde(default)]
    width: u16,
    #[serde(default)]
    height: u16,
}

/// JSON objects one after the other.
async fn read_sizes(mut input: DuplexStream, sender: mpsc::Sender<TerminalSize>) {
    let (mut pending, mut buffer) = (Vec::new(), [0; 512]);
    while let Ok(n @ 1..) = input.read(&mut buffer).await {
        pending.extend_from_slice(&buffer[..n]);
        let mut stream = serde_json::Deserializer::from_slice(&pending).into_iter::<Size>();
        let mut sizes = Vec::new();
        let is_sound = loop {
            match stream.next() {
                Some(Ok(size)) => sizes.push(TerminalSize { width: size.width, height: size.height }),
                Some(Err(error)) => break error.is_eof(),
                None => break true,
            }
        };
        let taken = stream.byte_offset();
        pending.drain(..taken);
        for size in sizes {
            if sender.send(size).await.is_err() {
                return;
            }
        }
        if !is_sound || pending.len() > SIZE_BYTES_MAX {
            return;
        }
    }
}

/// Serves one client that speaks SPDY.
pub async fn spdy<I>(io: I, runtime: Arc<dyn Runtime>, command: Command, options: Options, protocol: String)
where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut connection, read) = Connection::new(io);
    let serve = async move {
        let opened = tokio::time::timeout(CREATION, spdy_ends(&mut connection, options, &protocol)).await;
        match opened {
            // what the streams hold is kept until the end: clients take a stream's reset for an error
            Ok(Some((ends, _held))) => {
                ends.serve(runtime.as_ref(), &command).await;
            }
            Ok(None) => {}
            Err(_) => tracing::debug!("timed out waiting for client to create streams"),
        }
        connection.close().await;
    };
    tokio::select! {
        () = serve => {}
        () = endless(read) => {}
    }
}

/// What ends by itself is noticed through `gone`; the other branch has the last word.
async fn endless(read: impl Future<Output = ()>) {
    read.await;
    std::future::pending().await
}

type Held = Vec<Arc<()>>;

/// Waits for the streams that the options call for; `None` when the client goes first.
async fn spdy_ends(connection: &mut Connection, options: Options, protocol: &str) -> Option<(Ends, Held)> {
    let has_resize = options.tty && matches!(protocol, "v4.channel.k8s.io" | "v3.channel.k8s.io");
    let wanted = [true, options.stdin, options.stdout, options.stderr, has_resize];
    let names = ["error", "stdin", "stdout", "stderr", "resize"];
    let mut streams: [Option<super::multiplex::Stream>; 5] = Default::default();
    while (0..5).any(|i| wanted[i] && streams[i].is_none()) {
        let stream = connection.incoming.recv().await?;
        let place = names.iter().position(|name| *name == stream.header("streamtype"));
        match place.filter(|i| streams[*i].is_none()) {
            Some(i) => {
                stream.accept().await.ok()?;
                streams[i] = Some(stream);
            }
            None => stream.refuse().await,
        }
    }
    let [error, mut stdin, stdout, stderr, mut resize] = streams;
    let held =
        [&error, &stdin, &stdout, &stderr, &resize].into_iter().flatten().map(|s| s.held.clone()).collect();
    let input = |stream: &mut Option<super::multiplex::Stream>| stream.take().map(|s| s.input);
    let ends = Ends {
        stdin: if options.stdin { input(&mut stdin) } else { None },
        stdout: stdout.filter(|_| options.stdout).map(|s| s.output),
        stderr: stderr.filter(|_| options.stderr).map(|s| s.output),
        resize: if options.tty { input(&mut resize).or_else(never) } else { None },
        error: error?.output,
        is_status: protocol == "v4.channel.k8s.io",
        gone: connection.gone.clone(),
    };
    Some((ends, held))
}

/// A terminal whose size is never told.
fn never() -> Option<Input> {
    Some(tokio::io::duplex(1).0)
}

/// Serves one client that speaks WebSocket; `protocol` is empty where none was agreed upon.
pub async fn websocket<I>(
    io: I,
    runtime: Arc<dyn Runtime>,
    command: Command,
    options: Options,
    protocol: String,
) where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let (read, write) = tokio::io::split(io);
    let (mut reader, writer) = (Reader::new(read), Writer::new(write));
    let is_base64 = protocol.contains("base64");
    let output = |channel| Output::WebSocket { writer: writer.clone(), channel, is_base64 };
    let pipe = |is_wanted: bool| is_wanted.then(|| tokio::io::duplex(PIPE_BYTES)).unzip();
    let (stdin, to_stdin) = pipe(options.stdin);
    let (resize, to_resize) = pipe(options.tty);
    let gone = CancellationToken::new();
    let ends = Ends {
        stdin,
        stdout: options.stdout.then(|| output(1)),
        stderr: options.stderr.then(|| output(2)),
        resize,
        error: output(3),
        is_status: protocol.starts_with("v5.") || protocol.starts_with("v4."),
        gone: gone.clone(),
    };
    // An empty message tells the client that it is connected.
    let first = [(options.stdout, 1), (options.stderr, 2)].into_iter().find(|(is_wanted, _)| *is_wanted);
    if output(first.map_or(3, |(_, channel)| channel)).send(&[]).await.is_err() {
        return;
    }
    let mut channels = Demultiplexer {
        pipes: [to_stdin, None, None, None, to_resize],
        is_base64,
        has_close: protocol.starts_with("v5."),
        message: Message::default(),
    };
    let read = async {
        channels.run(&mut reader, &writer).await;
        gone.cancel();
    };
    tokio::select! {
        _ = ends.serve(runtime.as_ref(), &command) => {}
        () = endless(read) => {}
    }
    writer.close().await;
    websocket::linger(&mut reader, &writer).await;
}

/// Where the message that is being read belongs.
#[derive(Default)]
struct Message {
    channel: Option<u8>,
    /// After the close signal, the channel that it names is waited for.
    is_close: bool,
    carry: Vec<u8>,
}

/// Client messages: a channel's number, then bytes for it.
struct Demultiplexer {
    pipes: [Option<DuplexStream>; 5],
    is_base64: bool,
    has_close: bool,
    message: Message,
}

impl Demultiplexer {
    /// Until the client is gone, or says something that cannot be.
    async fn run<R: AsyncRead + Unpin>(&mut self, reader: &mut Reader<R>, writer: &Writer) {
        loop {
            match reader.next(writer).await {
                Ok(Some(piece)) => {
                    if !self.piece(&piece).await {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(%error, "remote command's connection ended");
                    return;
                }
            }
        }
    }

    async fn piece(&mut self, piece: &websocket::Piece) -> bool {
        if piece.is_first {
            self.message = Message::default();
        }
        let mut bytes = &piece.bytes[..];
        if self.message.channel.is_none()
            && let Some((first, rest)) = bytes.split_first()
        {
            bytes = rest;
            self.message.is_close = self.has_close && *first == CLOSE_SIGNAL;
            self.message.channel = Some(if self.is_base64 { first.wrapping_sub(b'0') } else { *first });
        }
        let Some(channel) = self.message.channel else { return true };
        if self.message.is_close {
            self.message.carry.extend_from_slice(&bytes[..bytes.len().min(2)]);
            return match (piece.is_last, self.message.carry.as_slice()) {
                (false, _) => self.message.carry.len() <= 1,
                (true, [channel]) => match self.pipes.get_mut(usize::from(*channel)) {
                    Some(pipe) => {
                        *pipe = None;
                        true
                    }
                    None => false,
                },
                (true, _) => false,
            };
        }
        if self.is_base64 {
            self.message.carry.extend_from_slice(bytes);
            let whole =
                if piece.is_last { self.message.carry.len() } else { self.message.carry.len() / 4 * 4 };
            let text: Vec<u8> = self.message.carry.drain(..whole).collect();
            let Ok(decoded) = STANDARD.decode(text) else { return true };
            self.write(channel, &decoded).await;
        } else {
            self.write(channel, bytes).await;
        }
        true
    }

    async fn write(&mut self, channel: u8, bytes: &[u8]) {
        if let Some(Some(pipe)) = self.pipes.get_mut(usize::from(channel))
            && pipe.write_all(bytes).await.is_err()
        {
            // nobody reads it any more
            self.pipes[usize::from(channel)] = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_the_kubelets_and_the_apis() {
        let parse = |query: &str| Options::parse(|name| query.split(' ').any(|word| word == name));
        let options = |stdin, stdout, stderr, tty| Ok(Options { stdin, stdout, stderr, tty });
        assert_eq!(parse("input output error"), options(true, true, true, false));
        assert_eq!(parse("stdin stdout stderr tty"), options(true, true, false, true));
        assert_eq!(parse("error"), options(false, false, true, false));
        assert!(parse("error tty").is_err());
        assert!(parse("").is_err());
    }

    #[tokio::test]
    async fn sizes_are_read_however_they_are_cut() {
        let (mut client, input) = tokio::io::duplex(64);
        let (sender, mut sizes) = mpsc::channel(4);
        tokio::spawn(read_sizes(input, sender));
        for part in ["{\"Width\":80,\"Hei", "ght\":24}\n{\"Width\":100,\"Height\":40}", "nonsense"] {
            client.write_all(part.as_bytes()).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert_eq!(sizes.recv().await, Some(TerminalSize { width: 80, height: 24 }));
        assert_eq!(sizes.recv().await, Some(TerminalSize { width: 100, height: 40 }));
        assert_eq!(sizes.recv().await, None);
    }
}
