//! LIST: whole, in pages, at a revision.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/endpoints/handlers/get.go, …/storage/cacher/delegator.go. Pages after
//! the first come from the cache while nothing of the resource has changed since, else from the store's history.
use std::sync::Arc;

use http::Response;
use sampan_store::{Range, StoreError};

use crate::body::Body;
use crate::cache::{Cache, Object, Predicate, store_failed};
use crate::call::Call;
use crate::reply::{self, ListMeta};
use crate::resource_version::{self, CONTINUE_EXPIRED, INCONSISTENT_CONTINUE, Read, encode_continue};
use crate::status::{Result, Status};

/// So many entries are read from the store at once.
const STORE_PAGE: usize = 500;

/// A page of a list.
pub struct Listed {
    pub objects: Vec<Arc<Object>>,
    pub meta: ListMeta,
}

pub async fn serve(call: &Call) -> Result<Response<Body>> {
    let listed = list(call).await?;
    reply::list(call, listed.objects, &listed.meta)
}

/// What the request's options ask for.
pub async fn list(call: &Call) -> Result<Listed> {
    let predicate = call.predicate()?;
    let limit = usize::try_from(call.query.integer("limit")?.unwrap_or(0)).unwrap_or(0);
    let read = resource_version::for_list(&call.query)?;
    let cache = call.cache().await?;
    let prefix = call.resource.storage.namespace_prefix(&call.info.namespace);
    let caches = &call.server.caches;
    let (from, at) = match read {
        Read::Latest => (None, None),
        Read::Any => return Ok(from_cache(call, &cache, &prefix, None, &predicate, limit)),
        Read::NotOlderThan(revision) => {
            caches.reach(revision).await?;
            return Ok(from_cache(call, &cache, &prefix, None, &predicate, limit));
        }
        Read::Exact(revision) => {
            caches.reach(revision).await?;
            (None, Some(revision))
        }
        Read::Continue { from, at } => (Some(format!("{}{from}", call.resource.storage.prefix)), at),
    };
    match at {
        Some(revision) if revision < cache.revision() => {
            let source = History { call, prefix: &prefix, from: from.as_deref(), revision };
            source.list(&predicate, limit).await
        }
        Some(revision) => {
            caches.reach(revision).await?;
            let mut listed = from_cache(call, &cache, &prefix, from.as_deref(), &predicate, limit);
            // A change may have come in between.
            if cache.revision() > revision {
                let source = History { call, prefix: &prefix, from: from.as_deref(), revision };
                return source.list(&predicate, limit).await;
            }
            listed.meta.revision = revision;
            if !listed.meta.continue_token.is_empty() {
                listed.meta.continue_token = token(call, &listed.objects, revision);
            }
            Ok(listed)
        }
        None => {
            caches.catch_up().await?;
            Ok(from_cache(call, &cache, &prefix, from.as_deref(), &predicate, limit))
        }
    }
}

fn from_cache(
    call: &Call,
    cache: &Cache,
    prefix: &str,
    from: Option<&str>,
    predicate: &Predicate,
    limit: usize,
) -> Listed {
    let snapshot = call.server.caches.snapshot(cache, prefix, from);
    let mut objects = snapshot.objects;
    if !predicate.is_empty() {
        objects.retain(|object| predicate.matches(object));
    }
    let mut meta = ListMeta { revision: snapshot.revision, ..ListMeta::default() };
    if limit > 0 && objects.len() > limit {
        meta.remaining = predicate.is_empty().then_some((objects.len() - limit) as u64);
        objects.truncate(limit);
        meta.continue_token = token(call, &objects, meta.revision);
    }
    Listed { objects, meta }
}

/// The token of the page after these objects.
fn token(_: &Call, objects: &[Arc<Object>], revision: u64) -> String {
    objects
        .last()
        .map_or_else(String::new, |last| encode_continue(&format!("{}\0", last.short_key()), Some(revision)))
}

/// A list as of a revision that the cache has moved past.
struct History<'a> {
    call: &'a Call,
    prefix: &'a str,
    from: Option<&'a str>,
    revision: u64,
}

impl History<'_> {
    async fn list(&self, predicate: &Predicate, limit: usize) -> Result<Listed> {
        let storage = &self.call.resource.storage;
        let mut objects: Vec<Arc<Object>> = Vec::new();
        let mut range = Range::prefix(self.prefix).at(self.revision);
        range.from = self.from.map(str::to_string);
        range.limit = if limit > 0 { (limit + 1).min(STORE_PAGE) } else { STORE_PAGE };
        let mut meta = ListMeta { revision: self.revision, ..ListMeta::default() };
        loop {
            let page =
                self.call.server.caches.store().range(range.clone()).await.map_err(|e| self.failed(e))?;
            let last = page.entries.last().map(|entry| entry.key.clone());
            let (mut left, more) = (page.entries.len() as u64, page.remaining.unwrap_or(0));
            for entry in page.entries {
                let object = Object::new(storage, entry.key, entry.value, entry.mod_revision);
                if predicate.matches(&object) {
                    if limit > 0 && objects.len() == limit {
                        meta.remaining = predicate.is_empty().then_some(left + more);
                        meta.continue_token = token(self.call, &objects, self.revision);
                        return Ok(Listed { objects, meta });
                    }
                    objects.push(Arc::new(object));
                }
                left -= 1;
            }
            match last {
                Some(last) if page.more => range = range.start_after(&last),
                _ => return Ok(Listed { objects, meta }),
            }
        }
    }

    fn failed(&self, error: StoreError) -> Status {
        match (&error, self.from) {
            (StoreError::Compacted { .. }, Some(from)) => {
                let short = from.strip_prefix(self.call.resource.storage.prefix.as_str());
                match short {
                    Some(short) => {
                        Status::expired(INCONSISTENT_CONTINUE).with_continue(encode_continue(short, None))
                    }
                    None => Status::expired(CONTINUE_EXPIRED),
                }
            }
            _ => store_failed(error),
        }
    }
}
