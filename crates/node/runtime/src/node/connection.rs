//! A connection to a shim: one request, its answers, and descriptors both ways.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use tokio::io::Interest;
use tokio::net::UnixStream;

use super::failed;
use crate::protocol::{self, Receiver};
use crate::spec::{Reply, Request};
use sampan_drivers::runtime::RuntimeError;

pub(super) struct Connection {
    stream: UnixStream,
    receiver: Receiver,
}

impl Connection {
    /// Connects and asks. The request goes out at once: sockets hold more than any request but the largest exec.
    pub(super) async fn open(
        sandbox: &Path,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Connection, RuntimeError> {
        let gone = |e: io::Error| failed(format!("the pod's shim doesn't answer: {e}"));
        let folder: OwnedFd = std::fs::File::open(sandbox).map_err(gone)?.into();
        let stream = UnixStream::connect(protocol::socket_path(&folder)).await.map_err(gone)?;
        let frame = protocol::encode(request).map_err(gone)?;
        let mut sent = 0;
        while sent < frame.len() {
            stream.writable().await.map_err(gone)?;
            let fds = if sent == 0 { fds } else { &[] };
            let write = || protocol::send(stream.as_fd(), &frame[sent..], fds);
            match stream.try_io(Interest::WRITABLE, write) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(gone(e)),
            }
        }
        Ok(Connection { stream, receiver: Receiver::default() })
    }

    /// The next answer; an `Error` answer is an error.
    pub(super) async fn next(&mut self) -> Result<(Reply, Vec<OwnedFd>), RuntimeError> {
        let gone = |e: io::Error| failed(format!("the pod's shim is gone: {e}"));
        loop {
            match self.receiver.take::<Reply>().map_err(gone)? {
                Some((Reply::Error { message }, _)) => return Err(failed(message)),
                Some(answer) => return Ok(answer),
                None => {}
            }
            self.stream.readable().await.map_err(gone)?;
            let receiver = &mut self.receiver;
            let socket = self.stream.as_fd();
            match self.stream.try_io(Interest::READABLE, || receiver.fill(socket)) {
                Ok(true) => {}
                Ok(false) => return Err(failed("the pod's shim is gone")),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(gone(e)),
            }
        }
    }
}

/// Asks and waits for the one answer.
pub(super) async fn ask(sandbox: &Path, request: &Request) -> Result<(Reply, Vec<OwnedFd>), RuntimeError> {
    Connection::open(sandbox, request, &[]).await?.next().await
}
