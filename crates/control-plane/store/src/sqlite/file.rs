//! The SQLite file: opening and checking it, its tables, and the statements over them.
//!
//! Upstream counterpart: etcd's `mvcc/backend` and `mvcc/kvstore`.
//!
//! Two tables hold the keys. `log` has one row a write, deletions included, so every revision after the last
//! compaction can be read. `deferred` has one row a key, changed in place: a node that renews its lease all day
//! costs a page each two minutes and leaves no history to compact. `meta` is one row. What stays true: `meta.reserved`
//! is on disk before a revision up to it is seen by anyone, so none is given twice, whatever a crash loses.
//! Each commit is synced (`synchronous=FULL`); opening an intact file writes nothing, so a full disk can be read.
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};

use crate::entry::{Entry, Event, EventKind, Span};
use crate::error::{StoreError, sqlite};
use crate::options::Options;

/// "SMPN", in the header of the file.
const APPLICATION_ID: i64 = 0x534d_504e;
const FORMAT: i64 = 1;
/// After a crash a file up to this size is checked as a whole; a bigger one would hold up the start too long.
const CHECKED_AFTER_CRASH_BYTES: u64 = 64 << 20;
/// Keeps the WAL's index in memory: as a file it was mapped, and of the disk's idle writes more than half.
const VFS: &str = "unix-excl";
const LOCK_STEP: Duration = Duration::from_millis(20);
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Pages of WAL before they go to their places: 2 MiB.
const WAL_PAGES: u32 = 512;
const WRITER_CACHE_KIB: u32 = 768;
const READER_CACHE_KIB: u32 = 256;

const SCHEMA: &str = "
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    reserved INTEGER NOT NULL,
    compacted INTEGER NOT NULL,
    clean INTEGER NOT NULL,
    deferred_prefixes TEXT NOT NULL
);
CREATE TABLE log (
    rev INTEGER PRIMARY KEY,
    key BLOB NOT NULL,
    create_rev INTEGER NOT NULL,
    prev_rev INTEGER NOT NULL,
    deleted INTEGER NOT NULL,
    value BLOB NOT NULL
);
CREATE INDEX log_key ON log (key, rev, deleted);
CREATE TABLE deferred (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,
    rev INTEGER NOT NULL,
    create_rev INTEGER NOT NULL,
    value BLOB NOT NULL
);";

/// What the file says of itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Meta {
    pub(crate) reserved: u64,
    pub(crate) compacted: u64,
    /// The newest row of the log.
    pub(crate) last_row: u64,
}

/// The file, opened for writing. One process has it at a time.
pub(crate) struct Opened {
    pub(crate) connection: Connection,
    pub(crate) meta: Meta,
    pub(crate) lock: File,
}

fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(crate) fn open(options: &Options) -> Result<Opened, StoreError> {
    let path = options.path.as_path();
    let lock = lock(path, options.lock_wait)?;
    let opened = (|| {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags_and_vfs(path, flags, VFS)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.set_prepared_statement_cache_capacity(32);
        let pages: i64 = connection.pragma_query_value(None, "page_count", |r| r.get(0))?;
        if pages == 0 {
            connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        }
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "cache_size", -i64::from(WRITER_CACHE_KIB))?;
        connection.pragma_update(None, "mmap_size", 0)?;
        connection.pragma_update(None, "secure_delete", "OFF")?;
        connection.pragma_update(None, "wal_autocheckpoint", WAL_PAGES)?;
        connection.pragma_update(None, "journal_size_limit", i64::from(WAL_PAGES) * 4096)?;
        Ok(connection)
    })();
    let mut connection = opened.map_err(|e| sqlite(path, e))?;
    let corrupt = |detail: String| StoreError::Corrupt { path: path.display().to_string(), detail };
    let (application, format, tables) = identity(&connection).map_err(|e| sqlite(path, e))?;
    match (application, format, tables) {
        (0, 0, 0) => {
            create(&mut connection, options).map_err(|e| sqlite(path, e))?;
            sync_folder(path)?;
        }
        (APPLICATION_ID, FORMAT, _) => {}
        (APPLICATION_ID, newer, _) => {
            return Err(corrupt(format!(
                "it has format {newer}, made by another version; this one reads {FORMAT}"
            )));
        }
        _ => return Err(corrupt("it is an SQLite file but not a store".to_owned())),
    }
    let (meta, clean, prefixes) = read_meta(&connection).map_err(|e| damaged(path, e))?;
    let size_bytes = std::fs::metadata(path).map_or(0, |m| m.len());
    if !clean && size_bytes <= CHECKED_AFTER_CRASH_BYTES {
        let verdict: String =
            connection.query_row("PRAGMA quick_check(1)", [], |r| r.get(0)).map_err(|e| damaged(path, e))?;
        if verdict != "ok" {
            return Err(corrupt(verdict));
        }
    }
    if prefixes != options.deferred_prefixes.join("\n") {
        move_keys(&mut connection, options).map_err(|e| sqlite(path, e))?;
    }
    Ok(Opened { connection, meta, lock })
}

fn lock(path: &Path, patience: Duration) -> Result<File, StoreError> {
    let io = |e: std::io::Error| StoreError::Io { path: path.display().to_string(), detail: e.to_string() };
    let mut name = path.as_os_str().to_owned();
    name.push("-lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(PathBuf::from(name))
        .map_err(io)?;
    let mut waited = Duration::ZERO;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            // a process that was just killed holds its locks until its last thread has ended
            Err(TryLockError::WouldBlock) if waited < patience => {
                std::thread::sleep(LOCK_STEP);
                waited += LOCK_STEP;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::Locked { path: path.display().to_string() });
            }
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
    }
    // SQLite gives its WAL the mode of the file: secrets lie in both.
    OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).map_err(io)?;
    Ok(file)
}

fn sync_folder(path: &Path) -> Result<(), StoreError> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|f| f.sync_all());
    synced.map_err(|e| StoreError::Io { path: path.display().to_string(), detail: e.to_string() })
}

/// A missing table or column is damage too, not an I/O error.
fn damaged(path: &Path, error: rusqlite::Error) -> StoreError {
    match sqlite(path, error) {
        StoreError::Io { path, detail } => StoreError::Corrupt { path, detail },
        other => other,
    }
}

fn identity(connection: &Connection) -> rusqlite::Result<(i64, i64, i64)> {
    let application = connection.pragma_query_value(None, "application_id", |r| r.get(0))?;
    let format = connection.pragma_query_value(None, "user_version", |r| r.get(0))?;
    let tables = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0))?;
    Ok((application, format, tables))
}

fn create(connection: &mut Connection, options: &Options) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(SCHEMA)?;
    // The first revision an empty store answers with is 1: Kubernetes has a meaning of its own for 0.
    transaction.execute(
        "INSERT INTO meta (id, reserved, compacted, clean, deferred_prefixes) VALUES (1, 1, 0, 1, ?1)",
        [options.deferred_prefixes.join("\n")],
    )?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", FORMAT)?;
    transaction.commit()
}

fn read_meta(connection: &Connection) -> rusqlite::Result<(Meta, bool, String)> {
    let last_row: Option<i64> = connection.query_row("SELECT max(rev) FROM log", [], |r| r.get(0))?;
    let last_row = unsigned(last_row.unwrap_or(0));
    connection.query_row("SELECT reserved, compacted, clean, deferred_prefixes FROM meta", [], |r| {
        let meta =
            Meta { reserved: unsigned(r.get(0)?).max(last_row), compacted: unsigned(r.get(1)?), last_row };
        Ok((meta, r.get(2)?, r.get(3)?))
    })
}

/// The prefixes have changed: keys go to the table that is now theirs. Their history does not come along.
fn move_keys(connection: &mut Connection, options: &Options) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let keys: Vec<Vec<u8>> = {
        let mut statement = transaction.prepare("SELECT key FROM deferred")?;
        let keys = statement.query_map([], |r| r.get(0))?;
        keys.collect::<rusqlite::Result<_>>()?
    };
    for key in keys.iter().filter(|k| !options.is_deferred(&String::from_utf8_lossy(k))) {
        transaction.execute(
            "INSERT INTO log (rev, key, create_rev, prev_rev, deleted, value)
             SELECT rev, key, create_rev, 0, 0, value FROM deferred WHERE key = ?1",
            [key],
        )?;
        transaction.execute("DELETE FROM deferred WHERE key = ?1", [key])?;
    }
    for prefix in &options.deferred_prefixes {
        let span = Span::of(prefix, None);
        transaction.execute(
            "INSERT OR REPLACE INTO deferred (key, rev, create_rev, value)
             SELECT key, rev, create_rev, value FROM log l WHERE key >= ?1 AND key < ?2 AND deleted = 0
             AND rev = (SELECT max(rev) FROM log WHERE key = l.key)",
            params![span.start, span.end],
        )?;
        transaction.execute("DELETE FROM log WHERE key >= ?1 AND key < ?2", params![span.start, span.end])?;
    }
    transaction.execute("UPDATE meta SET deferred_prefixes = ?1", [options.deferred_prefixes.join("\n")])?;
    transaction.commit()
}

pub(crate) fn open_reader(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags_and_vfs(path, flags, VFS)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "cache_size", -i64::from(READER_CACHE_KIB))?;
    connection.pragma_update(None, "mmap_size", 0)?;
    Ok(connection)
}

/// The revisions up to `revision` may now be given out. Takes the mark of a clean end away.
pub(crate) fn reserve(t: &Transaction<'_>, revision: u64) -> rusqlite::Result<()> {
    t.prepare_cached("UPDATE meta SET reserved = ?1, clean = 0")?.execute([signed(revision)])?;
    Ok(())
}

/// Nothing is lost and nothing given out beyond `revision`: the next start goes on right after it.
pub(crate) fn mark_clean(connection: &Connection, revision: u64) -> rusqlite::Result<()> {
    connection.execute("UPDATE meta SET reserved = ?1, clean = 1", [signed(revision)])?;
    Ok(())
}

pub(crate) fn append(t: &Transaction<'_>, event: &Event) -> rusqlite::Result<()> {
    let mut insert = t.prepare_cached(
        "INSERT INTO log (rev, key, create_rev, prev_rev, deleted, value) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    insert.execute(params![
        signed(event.revision),
        event.key.as_bytes(),
        signed(event.create_revision),
        signed(event.prev.as_ref().map_or(0, |p| p.mod_revision)),
        event.kind == EventKind::Delete,
        &event.value[..],
    ])?;
    Ok(())
}

/// Gives `key` its state in the table of deferred keys.
pub(crate) fn set_deferred(t: &Transaction<'_>, key: &str, after: Option<&Entry>) -> rusqlite::Result<()> {
    let Some(entry) = after else {
        t.prepare_cached("DELETE FROM deferred WHERE key = ?1")?.execute([key.as_bytes()])?;
        return Ok(());
    };
    let mut upsert = t.prepare_cached(
        "INSERT INTO deferred (key, rev, create_rev, value) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (key) DO UPDATE SET rev = ?2, create_rev = ?3, value = ?4",
    )?;
    upsert.execute(params![
        key.as_bytes(),
        signed(entry.mod_revision),
        signed(entry.create_revision),
        &entry.value[..],
    ])?;
    Ok(())
}

fn entry(key: &Arc<str>, r: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry {
        key: key.clone(),
        mod_revision: unsigned(r.get(0)?),
        create_revision: unsigned(r.get(1)?),
        value: Bytes::from(r.get::<_, Vec<u8>>(2)?),
    })
}

fn key_text(r: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Arc<str>> {
    let bytes = r.get_ref(column)?.as_blob()?;
    std::str::from_utf8(bytes).map(Arc::from).map_err(|e| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Blob, Box::new(e))
    })
}

/// `key` in the log as it was at `at`.
pub(crate) fn log_get(c: &Connection, key: &str, at: u64) -> rusqlite::Result<Option<Entry>> {
    let mut find = c.prepare_cached(
        "SELECT rev, create_rev, value, deleted FROM log INDEXED BY log_key
         WHERE key = ?1 AND rev <= ?2 ORDER BY rev DESC LIMIT 1",
    )?;
    let key: Arc<str> = key.into();
    let found = find.query_row(params![key.as_bytes(), signed(at)], |r| {
        if r.get(3)? { Ok(None) } else { entry(&key, r).map(Some) }
    });
    Ok(found.optional()?.flatten())
}

pub(crate) fn deferred_get(c: &Connection, key: &str) -> rusqlite::Result<Option<Entry>> {
    let mut find = c.prepare_cached("SELECT rev, create_rev, value FROM deferred WHERE key = ?1")?;
    let key: Arc<str> = key.into();
    find.query_row([key.as_bytes()], |r| entry(&key, r)).optional()
}

/// The live keys of `span` in the log at `at` with their revisions, at most `limit` (0: all).
pub(crate) fn log_keys(
    c: &Connection,
    span: &Span,
    at: u64,
    limit: usize,
) -> rusqlite::Result<Vec<(Arc<str>, u64)>> {
    // The index alone answers: a key's versions lie next to each other, the one that counts last.
    let mut scan = c.prepare_cached(
        "SELECT key, rev, deleted FROM log INDEXED BY log_key
         WHERE key >= ?1 AND key < ?2 AND rev <= ?3 ORDER BY key, rev",
    )?;
    let mut rows = scan.query(params![span.start, span.end, signed(at)])?;
    let mut keys: Vec<(Arc<str>, u64)> = Vec::new();
    let mut last: Option<(Arc<str>, u64, bool)> = None;
    while let Some(r) = rows.next()? {
        let (revision, deleted) = (unsigned(r.get(1)?), r.get(2)?);
        let key = r.get_ref(0)?.as_blob()?;
        if let Some(l) = last.as_mut().filter(|l| l.0.as_bytes() == key) {
            (l.1, l.2) = (revision, deleted);
            continue;
        }
        if let Some((key, revision, false)) = last.take() {
            keys.push((key, revision));
            if keys.len() == limit {
                return Ok(keys);
            }
        }
        last = Some((key_text(r, 0)?, revision, deleted));
    }
    if let Some((key, revision, false)) = last {
        keys.push((key, revision));
    }
    Ok(keys)
}

pub(crate) fn log_count(c: &Connection, span: &Span, at: u64) -> rusqlite::Result<u64> {
    // Beside max(), SQLite takes the other columns from the row that has the maximum.
    let mut count = c.prepare_cached(
        "SELECT count(*) FROM (SELECT deleted, max(rev) FROM log INDEXED BY log_key
         WHERE key >= ?1 AND key < ?2 AND rev <= ?3 GROUP BY key) WHERE deleted = 0",
    )?;
    count.query_row(params![span.start, span.end, signed(at)], |r| r.get(0)).map(unsigned)
}

pub(crate) fn log_entry(c: &Connection, key: &Arc<str>, revision: u64) -> rusqlite::Result<Option<Entry>> {
    let mut find = c.prepare_cached("SELECT rev, create_rev, value FROM log WHERE rev = ?1")?;
    find.query_row([signed(revision)], |r| entry(key, r)).optional()
}

pub(crate) fn deferred_keys(c: &Connection, span: &Span) -> rusqlite::Result<Vec<Arc<str>>> {
    let mut scan = c.prepare_cached("SELECT key FROM deferred WHERE key >= ?1 AND key < ?2 ORDER BY key")?;
    let keys = scan.query_map(params![span.start, span.end], |r| key_text(r, 0))?;
    keys.collect()
}

/// The changes of `span` in the log from `start` to `end`, oldest first: at most `limit` or about `limit_bytes`.
/// The flag says that there may be more.
pub(crate) fn log_events(
    c: &Connection,
    span: &Span,
    (start, end): (u64, u64),
    limit: usize,
    limit_bytes: usize,
) -> rusqlite::Result<(Vec<Event>, bool)> {
    // The plus keeps SQLite from sorting what the index on keys finds.
    let mut scan = c.prepare_cached(
        "SELECT rev, create_rev, value, key, prev_rev, deleted FROM log
         WHERE rev >= ?1 AND rev <= ?2 AND +key >= ?3 AND +key < ?4 ORDER BY rev",
    )?;
    let mut rows = scan.query(params![signed(start), signed(end), span.start, span.end])?;
    let (mut events, mut bytes) = (Vec::new(), 0);
    while let Some(r) = rows.next()? {
        if events.len() == limit || bytes >= limit_bytes {
            return Ok((events, true));
        }
        let now = entry(&key_text(r, 3)?, r)?;
        let prev = match unsigned(r.get(4)?) {
            0 => None,
            revision => log_entry(c, &now.key, revision)?,
        };
        bytes += now.value.len();
        events.push(Event {
            kind: if r.get(5)? { EventKind::Delete } else { EventKind::Put },
            key: now.key,
            value: now.value,
            prev,
            revision: now.mod_revision,
            create_revision: now.create_revision,
        });
    }
    Ok((events, false))
}

/// Removes what the writes after `done` up to `target` superseded, looking at `limit` of them at most. Returns
/// how far it came.
pub(crate) fn compact(c: &mut Connection, done: u64, target: u64, limit: u64) -> rusqlite::Result<u64> {
    let t = c.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let last: Option<i64> = t
        .prepare_cached("SELECT rev FROM log WHERE rev > ?1 AND rev <= ?2 ORDER BY rev LIMIT 1 OFFSET ?3")?
        .query_row(params![signed(done), signed(target), signed(limit)], |r| r.get(0))
        .optional()?;
    let last = last.map_or(target, unsigned);
    let bounds = params![signed(done), signed(last)];
    t.prepare_cached(
        "DELETE FROM log WHERE rev IN (SELECT prev_rev FROM log WHERE rev > ?1 AND rev <= ?2 AND prev_rev > 0)",
    )?
    .execute(bounds)?;
    t.prepare_cached("DELETE FROM log WHERE rev > ?1 AND rev <= ?2 AND deleted = 1")?.execute(bounds)?;
    t.prepare_cached("UPDATE meta SET compacted = ?1")?.execute([signed(last)])?;
    t.commit()?;
    Ok(last)
}

/// Gives unused pages back to the filesystem when they are a good part of the file; at most `limit`.
/// Says whether it did.
pub(crate) fn vacuum(c: &Connection, limit: u32) -> rusqlite::Result<bool> {
    let pages: i64 = c.pragma_query_value(None, "page_count", |r| r.get(0))?;
    let free: i64 = c.pragma_query_value(None, "freelist_count", |r| r.get(0))?;
    if free < 64 || free < pages / 4 {
        return Ok(false);
    }
    let mut statement = c.prepare(&format!("PRAGMA incremental_vacuum({limit})"))?;
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(true)
}

/// Moves the WAL into the file, and with `truncate` empties it.
pub(crate) fn checkpoint(c: &Connection, truncate: bool) -> rusqlite::Result<()> {
    let mode = if truncate { "PRAGMA wal_checkpoint(TRUNCATE)" } else { "PRAGMA wal_checkpoint(PASSIVE)" };
    c.query_row(mode, [], |_| Ok(()))
}
