//! A stream whose other end may read to the end in peace.
//!
//! Who has said everything and drops a stream that the other end still has open resets it (NO_ERROR, RFC 9113 section
//! 8.1). What was said before arrives, but a stream that can't be written to any more counts as broken: hyper's HTTP/1
//! client flushes while it reads, fails at that, and gives up the rest of the body, megabytes when it reads slowly; a
//! copy in both directions ends in the same way. So a stream that its owner is done with stays half open until the other
//! end is done, too, as TCP's do.
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::runtime::Handle;

/// The longest that the other end may take to read what is left.
const LIMIT: Duration = Duration::from_secs(600);

pub(crate) struct Lingering<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> {
    /// Taken when it is dropped.
    stream: Option<S>,
    /// The other end has said everything: nothing to wait for.
    ended: bool,
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Lingering<S> {
    pub fn new(stream: S) -> Self {
        Self { stream: Some(stream), ended: false }
    }

    fn stream(&mut self) -> std::io::Result<Pin<&mut S>> {
        let stream = self.stream.as_mut().ok_or(std::io::ErrorKind::NotConnected)?;
        Ok(Pin::new(stream))
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Drop for Lingering<S> {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take().filter(|_| !self.ended) else { return };
        // where the runtime ends, all streams do
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(tokio::time::timeout(LIMIT, until_the_other_ends(stream)));
        }
    }
}

async fn until_the_other_ends<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    if stream.shutdown().await.is_ok() {
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> AsyncRead for Lingering<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let (before, room) = (into.filled().len(), into.remaining());
        let read = self.stream()?.poll_read(cx, into);
        self.ended |= match &read {
            Poll::Ready(Ok(())) => room > 0 && into.filled().len() == before,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> AsyncWrite for Lingering<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.stream()?.poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }
}
