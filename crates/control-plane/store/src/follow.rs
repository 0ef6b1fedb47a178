//! Following one key.
//!
//! Upstream counterpart: none; what others do with a watch over a single key and a read before it.
//!
//! What stays true: the last answer is what the key was at some moment after it was asked for, and a change after
//! that moment gives another answer. States in between may be left out, and one may be told twice: act on what is,
//! not on how often it is told.
use crate::entry::Entry;
use crate::error::{StoreError, WatchError};
use crate::{Store, Watch};

/// A key, followed: from [`Store::follow`].
pub struct Follow {
    store: Store,
    key: String,
    watch: Option<Watch>,
}

impl Follow {
    pub(crate) fn new(store: Store, key: &str) -> Self {
        Self { store, key: key.to_owned(), watch: None }
    }

    /// First what the key is now (`None`: absent), then each time what it has become. After an error it can be
    /// called again, except after [`StoreError::Closed`]; wait a little in between. Dropping the future loses
    /// nothing.
    pub async fn next(&mut self) -> Result<Option<Entry>, StoreError> {
        loop {
            let Some(watch) = &mut self.watch else {
                let (entry, revision) = self.store.get(&self.key, None).await?;
                match self.store.watch(&self.key, revision) {
                    Ok(watch) => self.watch = Some(watch),
                    // what was read is older by now than what can be followed
                    Err(StoreError::Compacted { .. }) => continue,
                    Err(e) => return Err(e),
                }
                return Ok(entry);
            };
            match watch.next().await {
                Ok(events) => {
                    if let Some(last) = events.iter().rev().find(|e| *e.key == *self.key) {
                        return Ok(last.after());
                    }
                }
                Err(WatchError::Closed) => return Err(StoreError::Closed),
                Err(_) => self.watch = None,
            }
        }
    }
}
