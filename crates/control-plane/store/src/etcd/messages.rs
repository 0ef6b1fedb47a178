//! The messages of etcd's API that are used here, with the fields that are used.
//!
//! Upstream counterpart: etcd's `api/etcdserverpb/rpc.proto` and `api/mvccpb/kv.proto` (v3.4 and later). Written by
//! hand, because making them from the `.proto` files takes `protoc` on every machine that builds. Fields that are
//! left out are skipped when read and have their default when sent.
use bytes::Bytes;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ResponseHeader {
    #[prost(uint64, tag = "1")]
    pub(super) cluster_id: u64,
    #[prost(int64, tag = "3")]
    pub(super) revision: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct KeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    #[prost(int64, tag = "2")]
    pub(super) create_revision: i64,
    #[prost(int64, tag = "3")]
    pub(super) mod_revision: i64,
    #[prost(int64, tag = "4")]
    pub(super) version: i64,
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) value: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) range_end: Bytes,
    #[prost(int64, tag = "3")]
    pub(super) limit: i64,
    #[prost(int64, tag = "4")]
    pub(super) revision: i64,
    #[prost(bool, tag = "8")]
    pub(super) keys_only: bool,
    #[prost(bool, tag = "9")]
    pub(super) count_only: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<ResponseHeader>,
    #[prost(message, repeated, tag = "2")]
    pub(super) kvs: Vec<KeyValue>,
    #[prost(bool, tag = "3")]
    pub(super) more: bool,
    #[prost(int64, tag = "4")]
    pub(super) count: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) value: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DeleteRangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RequestOp {
    #[prost(oneof = "Operation", tags = "1, 2, 3")]
    pub(super) operation: Option<Operation>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Operation {
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    #[prost(message, tag = "2")]
    Put(PutRequest),
    #[prost(message, tag = "3")]
    DeleteRange(DeleteRangeRequest),
}

/// The answer to one operation; of puts and deletions nothing is read.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ResponseOp {
    #[prost(message, optional, tag = "1")]
    pub(super) range: Option<RangeResponse>,
}

/// What a comparison looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Target {
    Version = 0,
    ModRevision = 2,
}

/// `EQUAL`, always: the result's default.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Compare {
    #[prost(enumeration = "Target", tag = "2")]
    pub(super) target: i32,
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) key: Bytes,
    #[prost(oneof = "Compared", tags = "4, 6")]
    pub(super) compared: Option<Compared>,
}

#[derive(Clone, Copy, PartialEq, Eq, prost::Oneof)]
pub(super) enum Compared {
    #[prost(int64, tag = "4")]
    Version(i64),
    #[prost(int64, tag = "6")]
    ModRevision(i64),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    pub(super) success: Vec<RequestOp>,
    #[prost(message, repeated, tag = "3")]
    pub(super) failure: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TxnResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<ResponseHeader>,
    #[prost(bool, tag = "2")]
    pub(super) succeeded: bool,
    #[prost(message, repeated, tag = "3")]
    pub(super) responses: Vec<ResponseOp>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CompactionRequest {
    #[prost(int64, tag = "1")]
    pub(super) revision: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CompactionResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<ResponseHeader>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WatchRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) create: Option<WatchCreateRequest>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WatchCreateRequest {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) range_end: Bytes,
    #[prost(int64, tag = "3")]
    pub(super) start_revision: i64,
    #[prost(bool, tag = "6")]
    pub(super) prev_kv: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WatchResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<ResponseHeader>,
    #[prost(bool, tag = "4")]
    pub(super) canceled: bool,
    #[prost(int64, tag = "5")]
    pub(super) compact_revision: i64,
    #[prost(string, tag = "6")]
    pub(super) cancel_reason: String,
    #[prost(message, repeated, tag = "11")]
    pub(super) events: Vec<WatchEvent>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WatchEvent {
    /// 0 put, 1 deletion.
    #[prost(int32, tag = "1")]
    pub(super) kind: i32,
    #[prost(message, optional, tag = "2")]
    pub(super) kv: Option<KeyValue>,
    #[prost(message, optional, tag = "3")]
    pub(super) prev_kv: Option<KeyValue>,
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// The bytes that etcd's own client sends for these (`protoc --encode` over rpc.proto).
    #[test]
    fn the_wire_is_etcds() {
        let put = PutRequest { key: "k".into(), value: "v".into() };
        let absent = Compare {
            target: Target::ModRevision as i32,
            key: "k".into(),
            compared: Some(Compared::ModRevision(0)),
        };
        let read = RangeRequest { key: "k".into(), ..RangeRequest::default() };
        let txn = TxnRequest {
            compare: vec![absent],
            success: vec![RequestOp { operation: Some(Operation::Put(put)) }],
            failure: vec![RequestOp { operation: Some(Operation::Range(read)) }],
        };
        let want: &[u8] = &[
            0x0a, 7, 0x10, 2, 0x1a, 1, b'k', 0x30, 0, // compare: target MOD, key, mod_revision 0
            0x12, 8, 0x12, 6, 0x0a, 1, b'k', 0x12, 1, b'v', // success: request_put
            0x1a, 5, 0x0a, 3, 0x0a, 1, b'k', // failure: request_range
        ];
        assert_eq!(txn.encode_to_vec(), want);
        let create = WatchCreateRequest {
            key: Bytes::from_static(&[0]),
            range_end: Bytes::from_static(&[0]),
            start_revision: 300,
            prev_kv: true,
        };
        let want: &[u8] = &[0x0a, 11, 0x0a, 1, 0, 0x12, 1, 0, 0x18, 0xac, 2, 0x30, 1];
        assert_eq!(WatchRequest { create: Some(create) }.encode_to_vec(), want);
        // what is not known is skipped: member_id, raft_term, watch_id, created, lease
        let answer: &[u8] = &[
            0x0a, 8, 0x08, 5, 0x10, 6, 0x18, 7, 0x20, 8, 0x10, 1, 0x18, 1, 0x5a, 16, 0x08, 1, 0x12, 7, 0x0a,
            1, b'k', 0x18, 7, 0x30, 9, 0x1a, 3, 0x0a, 1, b'k',
        ];
        let answer = WatchResponse::decode(answer).unwrap();
        assert_eq!(answer.header, Some(ResponseHeader { cluster_id: 5, revision: 7 }));
        let event = &answer.events[0];
        let kv = event.kv.as_ref().unwrap();
        assert_eq!((event.kind, &kv.key[..], kv.mod_revision), (1, &b"k"[..], 7));
        assert_eq!(event.prev_kv.as_ref().unwrap().key, "k");
    }
}
