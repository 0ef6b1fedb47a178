//! Quotas: how many bytes the registry, and each repository, may take.
//!
//! A repository is charged for every blob and manifest it links, shared or not; the registry for what lies on disk. Sums
//! are kept in memory only, and added up at the start.
use std::collections::HashMap;

use parking_lot::Mutex;

use crate::error::RegistryError;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    pub total_bytes: Option<u64>,
    pub repository_bytes: Option<u64>,
}

#[derive(Default)]
pub(super) struct Sums {
    pub total: u64,
    pub repositories: HashMap<String, u64>,
}

pub(super) struct Usage {
    quota: Quota,
    sums: Mutex<Sums>,
}

impl Usage {
    pub(super) fn new(quota: Quota) -> Usage {
        Usage { quota, sums: Mutex::default() }
    }

    pub(super) fn is_counted(&self) -> bool {
        self.quota != Quota::default()
    }

    pub(super) fn set(&self, sums: Sums) {
        *self.sums.lock() = sums;
    }

    /// Charges both for bytes that arrive, before they are written.
    pub(super) fn add(&self, repository: &str, size_bytes: u64) -> Result<(), RegistryError> {
        if !self.is_counted() {
            return Ok(());
        }
        let mut sums = self.sums.lock();
        if let Some(quota) = self.quota.total_bytes
            && sums.total.saturating_add(size_bytes) > quota
        {
            return Err(over("the registry", sums.total, size_bytes, quota));
        }
        self.check_repository(&sums, repository, size_bytes)?;
        sums.total += size_bytes;
        *sums.repositories.entry(repository.to_string()).or_default() += size_bytes;
        Ok(())
    }

    pub(super) fn add_to_repository(&self, repository: &str, size_bytes: u64) -> Result<(), RegistryError> {
        if !self.is_counted() {
            return Ok(());
        }
        let mut sums = self.sums.lock();
        self.check_repository(&sums, repository, size_bytes)?;
        *sums.repositories.entry(repository.to_string()).or_default() += size_bytes;
        Ok(())
    }

    fn check_repository(&self, sums: &Sums, repository: &str, size_bytes: u64) -> Result<(), RegistryError> {
        let used = sums.repositories.get(repository).copied().unwrap_or_default();
        match self.quota.repository_bytes {
            Some(quota) if used.saturating_add(size_bytes) > quota => {
                Err(over(&format!("repository {repository}"), used, size_bytes, quota))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn take(&self, repository: &str, size_bytes: u64) {
        self.take_from_total(size_bytes);
        self.take_from_repository(repository, size_bytes);
    }

    pub(super) fn take_from_total(&self, size_bytes: u64) {
        if self.is_counted() {
            let mut sums = self.sums.lock();
            sums.total = sums.total.saturating_sub(size_bytes);
        }
    }

    pub(super) fn take_from_repository(&self, repository: &str, size_bytes: u64) {
        if self.is_counted()
            && let Some(used) = self.sums.lock().repositories.get_mut(repository)
        {
            *used = used.saturating_sub(size_bytes);
        }
    }
}

fn over(whose: &str, used: u64, size_bytes: u64, quota: u64) -> RegistryError {
    RegistryError::Denied(format!(
        "quota exceeded: {whose} uses {used} of {quota} bytes, and {size_bytes} more were to come"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_hold_for_both() {
        let usage = Usage::new(Quota { total_bytes: Some(100), repository_bytes: Some(60) });
        usage.add("a", 60).unwrap();
        let error = usage.add("a", 1).unwrap_err();
        assert!(error.to_string().contains("repository a uses 60 of 60 bytes"), "{error}");
        usage.add("b", 40).unwrap();
        assert!(usage.add("b", 1).unwrap_err().to_string().contains("the registry uses 100"));
        usage.take("a", 10);
        usage.add("b", 10).unwrap();
        usage.add_to_repository("b", 10).unwrap();
        assert!(usage.add_to_repository("b", 1).is_err());
    }
}
