//! Compaction of etcd's history, by one server at a time.
//!
//! Upstream counterpart: k8s.io/apiserver/pkg/storage/etcd3/compact.go, with the same key, so that its servers and
//! ours agree on one etcd. Every interval each server tries to be the one that moves [`KEY`] on from the version it
//! last saw; who succeeds compacts to the revision that was the latest an interval before, the others learn the
//! version. What stays true: history of one interval at least is kept. Where nothing has happened nothing is
//! written.
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;

use super::grpc::CallError;
use super::messages::{
    CompactionRequest, CompactionResponse, Compare, Compared, Operation, PutRequest, RangeRequest, RequestOp,
    Target, TxnRequest, TxnResponse,
};
use super::transaction::{signed, unsigned};
use super::{Core, TXN};

/// Upstream's `compactRevKey`.
pub(super) const KEY: &str = "compact_rev_key";
pub(super) const COMPACT: &str = "/etcdserverpb.KV/Compact";

pub(super) struct Compactor {
    core: Arc<Core>,
    /// The version of [`KEY`] as last seen.
    version: i64,
    /// The latest revision when it was last looked.
    mark: u64,
}

impl Compactor {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { core, version: 0, mark: 0 }
    }

    /// Runs until it is aborted.
    pub(super) async fn run(mut self, interval: Duration) {
        loop {
            sleep(interval).await;
            // the last round's own write is the last thing that happened
            if *self.core.published.borrow() == self.mark {
                continue;
            }
            if let Err(error) = self.round().await {
                tracing::warn!(%error, "etcd's history cannot be compacted");
            }
        }
    }

    async fn round(&mut self) -> Result<(), CallError> {
        let target = self.mark;
        let answer: TxnResponse = self.core.endpoints.write(TXN, &request(self.version, target)).await?;
        self.mark = unsigned(answer.header.unwrap_or_default().revision);
        if !answer.succeeded {
            let there = answer.responses.into_iter().next().and_then(|r| r.range);
            self.version = there.and_then(|r| r.kvs.first().map(|kv| kv.version)).unwrap_or(0);
            return Ok(());
        }
        self.version += 1;
        // a server that has just begun does not know what was the latest an interval ago
        if target > 0 {
            compact(&self.core, target).await?;
            tracing::debug!(revision = target, "compacted etcd's history");
        }
        Ok(())
    }
}

fn request(version: i64, target: u64) -> TxnRequest {
    let key = || Bytes::from_static(KEY.as_bytes());
    let put = Operation::Put(PutRequest { key: key(), value: target.to_string().into() });
    let read = Operation::Range(RangeRequest { key: key(), ..RangeRequest::default() });
    let compared = Some(Compared::Version(version));
    TxnRequest {
        compare: vec![Compare { target: Target::Version as i32, key: key(), compared }],
        success: vec![RequestOp { operation: Some(put) }],
        failure: vec![RequestOp { operation: Some(read) }],
    }
}

/// Forgets what was before `revision`; it may have been forgotten already.
pub(super) async fn compact(core: &Core, revision: u64) -> Result<(), CallError> {
    let request = CompactionRequest { revision: signed(revision) };
    let answer: Result<CompactionResponse, _> = core.endpoints.read(COMPACT, &request).await;
    match answer {
        Ok(_) => {}
        Err(CallError::Status { message, .. }) if message == super::COMPACTED => {}
        Err(e) => return Err(e),
    }
    let mut memory = core.memory.lock();
    memory.compacted = memory.compacted.max(revision);
    Ok(())
}
