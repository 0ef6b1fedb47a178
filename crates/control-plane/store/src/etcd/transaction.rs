//! Guarded writes as etcd's transactions.
//!
//! Upstream counterpart: `storage/etcd3/store.go`'s transactions over `kubernetes.Interface`.
//!
//! Each expectation is a comparison with the key's modification revision. When one fails, the same transaction reads
//! all the keys that were compared, so the answer names what was in the way as of that very moment.
use std::sync::Arc;

use bytes::Bytes;

use super::messages::{
    Compare, Compared, DeleteRangeRequest, KeyValue, Operation, PutRequest, RangeRequest, RequestOp,
    ResponseOp, Target, TxnRequest,
};
use crate::entry::{Entry, Expect, Guard, Write};
use crate::error::{StoreError, WriteError};
use crate::memory::PLAIN_PREFIX;

pub(super) const OBJECT_PREFIX: &str = "/registry/";
/// etcd's default limit of comparisons, and of operations.
const LIMIT: usize = 128;

/// What all of etcd's numbers are in the store.
pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(super) fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

/// A key that is UTF-8, as all of ours are. The value is copied: it would keep the whole answer in memory.
pub(super) fn entry(kv: &KeyValue) -> Option<Entry> {
    Some(Entry {
        key: Arc::from(std::str::from_utf8(&kv.key).ok()?),
        value: Bytes::copy_from_slice(&kv.value),
        mod_revision: unsigned(kv.mod_revision),
        create_revision: unsigned(kv.create_revision),
    })
}

/// The keys with expectations, in the order they are checked.
fn expected<'a>(guards: &'a [Guard], writes: &'a [Write]) -> impl Iterator<Item = (&'a str, Expect)> {
    let guards = guards.iter().map(|g| (g.key.as_str(), g.expect));
    let all = guards.chain(writes.iter().map(|w| (w.key.as_str(), w.expect)));
    all.filter(|(_, expect)| *expect != Expect::Any)
}

/// Refuses what etcd could not do as the store promises.
pub(super) fn check(guards: &[Guard], writes: &[Write]) -> Result<(), StoreError> {
    let invalid = |key: &str, detail| Err(StoreError::Invalid { key: key.to_owned(), detail });
    let mut objects = 0;
    for write in writes {
        if write.key.starts_with(OBJECT_PREFIX) {
            objects += 1;
        } else if !write.key.starts_with(PLAIN_PREFIX) {
            return invalid(&write.key, "etcd holds keys under /registry/ and /sampan/ only");
        }
        if objects > 1 {
            return invalid(&write.key, "a transaction on etcd writes at most one key under /registry/");
        }
    }
    match expected(guards, writes).nth(LIMIT) {
        Some((key, _)) => invalid(key, "a transaction on etcd has at most 128 guards and guarded writes"),
        None => Ok(()),
    }
}

pub(super) fn request(guards: &[Guard], writes: &[Write]) -> TxnRequest {
    let bytes = |key: &str| Bytes::copy_from_slice(key.as_bytes());
    let compare = expected(guards, writes).map(|(key, expect)| {
        let revision = match expect {
            // nothing has revision 0; to etcd it would mean that there is no key
            Expect::Revision(0) => -1,
            Expect::Revision(revision) => signed(revision),
            Expect::Absent | Expect::Any => 0,
        };
        let compared = Some(Compared::ModRevision(revision));
        Compare { target: Target::ModRevision as i32, key: bytes(key), compared }
    });
    let success = writes.iter().map(|write| match &write.value {
        Some(value) => Operation::Put(PutRequest { key: bytes(&write.key), value: value.clone() }),
        None => Operation::DeleteRange(DeleteRangeRequest { key: bytes(&write.key) }),
    });
    let failure = expected(guards, writes)
        .map(|(key, _)| Operation::Range(RangeRequest { key: bytes(key), ..RangeRequest::default() }));
    let operations = |o: Operation| RequestOp { operation: Some(o) };
    TxnRequest {
        compare: compare.collect(),
        success: success.map(operations).collect(),
        failure: failure.map(operations).collect(),
    }
}

/// The expectation that did not hold.
pub(super) fn conflict(guards: &[Guard], writes: &[Write], found: Vec<ResponseOp>) -> WriteError {
    let mut first = None;
    for ((key, expect), found) in expected(guards, writes).zip(found) {
        let current = found.range.and_then(|r| r.kvs.first().and_then(entry));
        let conflict = WriteError::Conflict { key: key.to_owned(), current: current.clone() };
        if !expect.holds(current.as_ref()) {
            return conflict;
        }
        first.get_or_insert(conflict);
    }
    let none = || WriteError::Conflict { key: String::new(), current: None };
    first.unwrap_or_else(none)
}

#[cfg(test)]
mod tests {
    use super::super::messages::RangeResponse;
    use super::*;

    #[test]
    fn what_etcd_cannot_do_is_refused() {
        let guards = |n: usize| vec![Guard { key: "/registry/g".into(), expect: Expect::Absent }; n];
        for (guards, keys, want) in [
            (vec![], vec!["/registry/a"], None),
            (vec![], vec!["/registry/a", "/sampan/b", "/sampan/c"], None),
            (
                vec![],
                vec!["/registry/a", "/sampan/b", "/registry/c"],
                Some("/registry/c: a transaction on etcd writes"),
            ),
            (vec![], vec!["/other"], Some("/other: etcd holds keys")),
            (guards(128), vec!["/registry/a"], None),
            (guards(129), vec!["/registry/a"], Some("/registry/g: a transaction on etcd has at most 128")),
        ] {
            let writes: Vec<Write> = keys.iter().map(|k| Write::put(*k, "1")).collect();
            let said = check(&guards, &writes).err().map(|e| e.to_string());
            assert!(said.as_deref().unwrap_or_default().starts_with(want.unwrap_or_default()), "{said:?}");
            assert_eq!(said.is_some(), want.is_some());
        }
    }

    #[test]
    fn expectations_become_comparisons() {
        let guards = [
            Guard { key: "/g".into(), expect: Expect::Revision(7) },
            Guard { key: "/any".into(), expect: Expect::Any },
        ];
        let writes =
            [Write::create("/a", "1"), Write::put("/b", "2"), Write::delete("/c", Expect::Revision(0))];
        let txn = request(&guards, &writes);
        let compared: Vec<_> = txn.compare.iter().map(|c| (&c.key[..], c.compared)).collect();
        let want =
            [(&b"/g"[..], 7), (b"/a", 0), (b"/c", -1)].map(|(k, r)| (k, Some(Compared::ModRevision(r))));
        assert_eq!(compared, want);
        assert_eq!((txn.success.len(), txn.failure.len()), (3, 3));
        // the first that does not hold is named, with what is there
        let is = |revision: i64| ResponseOp {
            range: Some(RangeResponse {
                kvs: vec![KeyValue { key: "/x".into(), mod_revision: revision, ..KeyValue::default() }],
                ..RangeResponse::default()
            }),
        };
        let absent = || ResponseOp { range: Some(RangeResponse::default()) };
        for (found, want) in [
            (vec![is(8), absent(), absent()], ("/g", Some(8))),
            (vec![is(7), is(5), absent()], ("/a", Some(5))),
            (vec![is(7), absent(), absent()], ("/c", None)),
        ] {
            let WriteError::Conflict { key, current } = conflict(&guards, &writes, found) else { panic!() };
            assert_eq!((key.as_str(), current.map(|e| e.mod_revision)), want);
        }
    }
}
