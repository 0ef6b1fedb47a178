//! Commands over a connection, and ports of the machine reached through it.
use russh::ChannelMsg;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{ConnectError, Connection};
use crate::machine::{Output, OutputSink};

/// What a command reads, and who is told how far it got.
pub struct Feed<'a> {
    pub from: Box<dyn AsyncRead + Send + Unpin + 'a>,
    pub sent: &'a (dyn Fn(u64) + Send + Sync),
}

const CHUNK_BYTES: usize = 128 * 1024;
/// Connections at a time through one forwarded port.
const MAX_FORWARDED: usize = 64;

impl Connection {
    fn lost(&self, error: impl std::fmt::Display) -> ConnectError {
        ConnectError::Lost { address: self.address.to_string(), message: error.to_string() }
    }

    /// Runs a command line in the user's shell there.
    pub async fn run(
        &self,
        command: &str,
        feed: Feed<'_>,
        sink: &mut OutputSink<'_>,
    ) -> Result<Output, ConnectError> {
        let channel = self.handle.channel_open_session().await.map_err(|e| self.lost(e))?;
        channel.exec(true, command).await.map_err(|e| self.lost(e))?;
        let (mut read, write) = channel.split();
        let Feed { mut from, sent } = feed;
        let feeding = async move {
            let mut writer = write.make_writer();
            let mut buffer = vec![0; CHUNK_BYTES];
            let mut total = 0;
            while let Ok(count @ 1..) = from.read(&mut buffer).await {
                if writer.write_all(&buffer[..count]).await.is_err() {
                    break;
                }
                total += count as u64;
                sent(total);
            }
            let _ = writer.flush().await;
            let _ = write.eof().await;
            // the command says when it is over, not its input
            std::future::pending::<()>().await;
        };
        let collecting = async {
            let mut code = None;
            while let Some(message) = read.wait().await {
                match message {
                    ChannelMsg::Data { data } => sink.stdout(&data),
                    ChannelMsg::ExtendedData { data, .. } => sink.stderr(&data),
                    ChannelMsg::ExitStatus { exit_status } => {
                        code = Some(i32::try_from(exit_status).unwrap_or(255))
                    }
                    ChannelMsg::ExitSignal { .. } => code = Some(128 + 9),
                    ChannelMsg::Failure => return Err(self.lost("it runs no commands for this user")),
                    _ => {}
                }
            }
            code.ok_or_else(|| self.lost("it ended in the middle of a command"))
        };
        let code = tokio::select! {
            code = collecting => code?,
            () = feeding => 0,
        };
        Ok(sink.output(code))
    }

    /// Leads a port of this machine's own loopback to `host:port` as seen from there. It ends when the connection does,
    /// or with the guard.
    pub async fn forward(self: &std::sync::Arc<Self>, host: &str, port: u16) -> std::io::Result<Forwarded> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let local = listener.local_addr()?.port();
        let (connection, host) = (self.clone(), host.to_string());
        let task = tokio::spawn(async move {
            let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_FORWARDED));
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(slot) = slots.clone().acquire_owned().await else { return };
                let (connection, host) = (connection.clone(), host.clone());
                tokio::spawn(async move {
                    let _slot = slot;
                    connection.lead(stream, &host, port).await;
                });
            }
        });
        Ok(Forwarded { port: local, task })
    }

    async fn lead(&self, mut near: TcpStream, host: &str, port: u16) {
        let _ = near.set_nodelay(true);
        let opened = self.handle.channel_open_direct_tcpip(host, u32::from(port), "127.0.0.1", 0).await;
        match opened {
            Ok(channel) => {
                let _ = tokio::io::copy_bidirectional(&mut near, &mut channel.into_stream()).await;
            }
            Err(error) => tracing::debug!("{}: no way to {host}:{port}: {error}", self.address),
        }
    }
}

/// A port that leads to a machine.
pub struct Forwarded {
    pub port: u16,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        self.task.abort();
    }
}
