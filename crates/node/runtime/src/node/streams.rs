//! Exec, attach and port forwarding: bytes between the kubelet's streams and pipes or terminals.
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use sampan_drivers::runtime::{ExecResult, RuntimeError, Streams, TerminalSize};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::connection::Connection;
use super::{Node, failed, io_failed};
use crate::spec::{Reply, Request};

const CHUNK: usize = 16 * 1024;
/// How long output is still taken after the end of a process whose children hold its pipes open.
const DRAIN: Duration = Duration::from_secs(2);

/// Our end of a pipe or terminal, without blocking.
struct End(AsyncFd<OwnedFd>);

impl End {
    fn new(fd: OwnedFd) -> Result<End, RuntimeError> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| failed(e.to_string()))?;
        Ok(End(crate::sys::watch_descriptor(fd).map_err(io_failed("watching a stream"))?))
    }

    /// 0 at the end (a terminal says EIO).
    async fn read(&self, buffer: &mut [u8]) -> usize {
        loop {
            let Ok(mut guard) = self.0.readable().await else { return 0 };
            let read =
                |fd: &AsyncFd<OwnedFd>| rustix::io::read(fd.get_ref(), &mut *buffer).map_err(Into::into);
            match guard.try_io(read) {
                Ok(Ok(n)) => return n,
                Ok(Err(e)) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(Err(_)) => return 0,
                Err(_) => {}
            }
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let Ok(mut guard) = self.0.writable().await else { return false };
            match guard.try_io(|fd| rustix::io::write(fd.get_ref(), bytes).map_err(Into::into)) {
                Ok(Ok(n)) => bytes = &bytes[n..],
                Ok(Err(e)) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(Err(_)) => return false,
                Err(_) => {}
            }
        }
        true
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), RuntimeError> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(format!("pipe: {e}")))
}

/// From a container to a client; a client that is gone is no reason to stop reading.
async fn pump_out(end: End, mut client: Option<Box<dyn AsyncWrite + Send + Unpin>>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = end.read(&mut buffer).await;
        if n == 0 {
            break;
        }
        if let Some(writer) = &mut client
            && (writer.write_all(&buffer[..n]).await.is_err() || writer.flush().await.is_err())
        {
            client = None;
        }
    }
    if let Some(mut writer) = client {
        let _ = writer.shutdown().await;
    }
}

/// From a client to a container; `true` when the client ended its stream.
async fn pump_in(mut client: Box<dyn AsyncRead + Send + Unpin>, end: &End) -> bool {
    let mut buffer = vec![0; CHUNK];
    loop {
        match client.read(&mut buffer).await {
            Ok(0) | Err(_) => return true,
            Ok(n) => {
                if !end.write_all(&buffer[..n]).await {
                    return false;
                }
            }
        }
    }
}

async fn follow_size(mut sizes: mpsc::Receiver<TerminalSize>, terminal: OwnedFd) {
    while let Some(size) = sizes.recv().await {
        let winsize =
            rustix::termios::Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        let _ = rustix::termios::tcsetwinsize(&terminal, winsize);
    }
}

/// Aborts its task when dropped: no pump outlives its exec.
struct Task(tokio::task::JoinHandle<()>);
impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Task {
    Task(tokio::spawn(future))
}

async fn exit_code(connection: &mut Connection) -> Result<i32, RuntimeError> {
    loop {
        if let (Reply::Exited { code }, _) = connection.next().await? {
            return Ok(code);
        }
    }
}

impl Node {
    pub(super) async fn run_exec_sync(
        &self,
        id: &str,
        command: &[String],
        timeout: Duration,
        limit_bytes: usize,
    ) -> Result<(Vec<u8>, Vec<u8>, i32), RuntimeError> {
        let null = std::fs::File::open("/dev/null").map_err(io_failed("/dev/null"))?;
        let ((out, stdout), (err, stderr)) = (pipe()?, pipe()?);
        let run = async {
            let fds = [null.as_fd(), stdout.as_fd(), stderr.as_fd()];
            let (mut connection, _) = self.open_exec(id, command, false, true, &fds).await?;
            drop((stdout, stderr));
            let (out, err) = (End::new(out)?, End::new(err)?);
            let (mut seen_out, mut seen_err) = (Vec::new(), Vec::new());
            let code = {
                let both = async {
                    tokio::join!(
                        collect(&out, &mut seen_out, limit_bytes),
                        collect(&err, &mut seen_err, limit_bytes)
                    )
                };
                tokio::pin!(both);
                tokio::select! {
                    _ = &mut both => exit_code(&mut connection).await?,
                    code = exit_code(&mut connection) => {
                        let code = code?;
                        let _ = tokio::time::timeout(DRAIN, &mut both).await;
                        code
                    }
                }
            };
            Ok((code, seen_out, seen_err))
        };
        let limit = if timeout.is_zero() { Duration::from_secs(u64::from(u32::MAX)) } else { timeout };
        match tokio::time::timeout(limit, run).await {
            Ok(done) => done.map(|(code, out, err)| (out, err, code)),
            // The connection closed with the future: the shim kills the process.
            Err(_) => Err(failed(format!("command {command:?} timed out"))),
        }
    }

    pub(super) async fn run_exec(
        &self,
        id: &str,
        command: &[String],
        streams: Streams,
    ) -> Result<ExecResult, RuntimeError> {
        if streams.tty {
            return self.exec_terminal(id, command, streams).await;
        }
        let ((stdin, input), (out, stdout), (err, stderr)) = (pipe()?, pipe()?, pipe()?);
        let fds = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
        let mut connection = match self.open_exec(id, command, false, false, &fds).await {
            Ok((connection, _)) => connection,
            Err(RuntimeError::Failed { message }) => return Ok(ExecResult::Failed(message)),
            Err(e) => return Err(e),
        };
        drop((stdin, stdout, stderr));
        let outputs = {
            let (out, err) = (End::new(out)?, End::new(err)?);
            async move { tokio::join!(pump_out(out, streams.stdout), pump_out(err, streams.stderr)) }
        };
        let mut outputs = tokio::spawn(outputs);
        let input = End::new(input)?;
        let _stdin = spawn(async move {
            if let Some(client) = streams.stdin {
                pump_in(client, &input).await;
            }
        });
        let code = exit_code(&mut connection).await;
        if tokio::time::timeout(DRAIN, &mut outputs).await.is_err() {
            outputs.abort();
        }
        Ok(ExecResult::Exited(code?))
    }

    async fn exec_terminal(
        &self,
        id: &str,
        command: &[String],
        streams: Streams,
    ) -> Result<ExecResult, RuntimeError> {
        let (mut connection, fds) = match self.open_exec(id, command, true, false, &[]).await {
            Ok(opened) => opened,
            Err(RuntimeError::Failed { message }) => return Ok(ExecResult::Failed(message)),
            Err(e) => return Err(e),
        };
        let master = fds.into_iter().next().ok_or_else(|| failed("the shim sent no terminal"))?;
        let copy = || master.try_clone().map_err(io_failed("terminal"));
        let _sizes = streams.resize.map(|r| Ok(spawn(follow_size(r, copy()?)))).transpose()?;
        let input = End::new(copy()?)?;
        let _stdin = streams.stdin.map(|client| {
            spawn(async move {
                pump_in(client, &input).await;
            })
        });
        let mut output = tokio::spawn(pump_out(End::new(copy()?)?, streams.stdout));
        let code = exit_code(&mut connection).await;
        if tokio::time::timeout(DRAIN, &mut output).await.is_err() {
            output.abort();
        }
        Ok(ExecResult::Exited(code?))
    }

    pub(super) async fn run_attach(&self, id: &str, streams: Streams) -> Result<(), RuntimeError> {
        let record = self.container(id)?;
        let ((out, stdout), (err, stderr)) = (pipe()?, pipe()?);
        let sandbox = self.sandbox_folder(&record.sandbox_id);
        let request = Request::Attach { id: id.to_string() };
        let mut connection = Connection::open(&sandbox, &request, &[stdout.as_fd(), stderr.as_fd()]).await?;
        let (_, fds) = connection.next().await?;
        drop((stdout, stderr, connection));
        let input = fds.into_iter().next();
        let _sizes = match (streams.resize, &input) {
            (Some(sizes), Some(terminal)) if record.config.tty => {
                Some(spawn(follow_size(sizes, terminal.try_clone().map_err(io_failed("terminal"))?)))
            }
            _ => None,
        };
        let (closes, container) = (record.config.stdin_once && !record.config.tty, id.to_string());
        let _stdin = match (streams.stdin, input) {
            (Some(client), Some(fd)) => {
                let end = End::new(fd)?;
                Some(spawn(async move {
                    let ended = pump_in(client, &end).await;
                    drop(end);
                    if ended && closes {
                        let _ =
                            super::connection::ask(&sandbox, &Request::CloseStdin { id: container }).await;
                    }
                }))
            }
            _ => None,
        };
        // Until the container ends, when the shim closes its ends.
        tokio::join!(pump_out(End::new(out)?, streams.stdout), pump_out(End::new(err)?, streams.stderr));
        Ok(())
    }

    /// Connects from within the pod's network namespace: a thread enters it, connects, and ends.
    pub(super) async fn connect_in(
        &self,
        sandbox_id: &str,
        port: u16,
    ) -> Result<tokio::net::TcpStream, RuntimeError> {
        let sandbox = self.sandbox(sandbox_id)?;
        let pid = sandbox.shim_pid.ok_or_else(|| failed(format!("sandbox {sandbox_id} is not ready")))?;
        let host = sandbox.config.host_network;
        let (send, receive) = tokio::sync::oneshot::channel();
        let connect = move || -> std::io::Result<std::net::TcpStream> {
            if !host {
                let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
                nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            }
            let limit = Duration::from_secs(10);
            let v4 = std::net::TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), limit);
            v4.or_else(|e| {
                let v6 = std::net::SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port));
                std::net::TcpStream::connect_timeout(&v6, limit).map_err(|_| e)
            })
        };
        let thread = std::thread::Builder::new().name("port-forward".into()).stack_size(128 * 1024);
        thread.spawn(move || send.send(connect())).map_err(io_failed("port forwarding"))?;
        let stream = receive.await.map_err(|e| failed(e.to_string()))?;
        let stream = stream
            .map_err(|e| failed(format!("failed to connect to localhost:{port} inside the pod: {e}")))?;
        stream.set_nonblocking(true).map_err(io_failed("port forwarding"))?;
        debug_assert!(stream.as_raw_fd() >= 0);
        tokio::net::TcpStream::from_std(stream).map_err(io_failed("port forwarding"))
    }
}

/// Reads to the end, keeping `limit_bytes`.
async fn collect(end: &End, into: &mut Vec<u8>, limit_bytes: usize) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = end.read(&mut buffer).await;
        if n == 0 {
            return;
        }
        let room = limit_bytes.saturating_sub(into.len()).min(n);
        into.extend_from_slice(&buffer[..room]);
    }
}
