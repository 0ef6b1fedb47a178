//! What goes through an upload: counted, and hashed once however often it is sent.
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::transport::Body;

/// The bytes that were sent, hashed in order, however often parts of them were sent again.
#[derive(Default)]
pub(super) struct Hashed {
    pub hash: Sha256,
    pub bytes: u64,
}

/// A body of so many bytes that counts and hashes what goes through.
pub(super) struct Watched {
    pub inner: Body,
    pub left: u64,
    pub at: u64,
    pub sent: Arc<AtomicU64>,
    pub hashed: Arc<Mutex<Hashed>>,
    pub failed: Arc<Mutex<Option<String>>>,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = &mut *self;
        loop {
            if this.left == 0 {
                return Poll::Ready(None);
            }
            let failure = match http_body::Body::poll_frame(Pin::new(&mut this.inner), context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => io::Error::other(format!("ended {} bytes early", this.left)),
                Poll::Ready(Some(Err(e))) => e,
                Poll::Ready(Some(Ok(frame))) => {
                    let Ok(mut data) = frame.into_data() else { continue };
                    if data.len() as u64 > this.left {
                        data.truncate(this.left as usize);
                    }
                    let mut hashed = this.hashed.lock();
                    let end = this.at + data.len() as u64;
                    // What was hashed when it was first sent is not hashed again.
                    if this.at <= hashed.bytes && end > hashed.bytes {
                        let known = (hashed.bytes - this.at) as usize;
                        hashed.hash.update(&data[known..]);
                        hashed.bytes = end;
                    }
                    this.at = end;
                    this.left -= data.len() as u64;
                    this.sent.store(end, Ordering::Relaxed);
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
            };
            *this.failed.lock() = Some(failure.to_string());
            return Poll::Ready(Some(Err(failure)));
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
