//! Who calls: the user that authentication found, or that a caller in memory carries.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A user as `UserInfo` has it. Travels in a request's extensions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub username: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl Identity {
    pub const MASTERS: &str = "system:masters";
    pub const AUTHENTICATED: &str = "system:authenticated";

    /// A user of those groups, and of `system:authenticated`.
    pub fn new(username: &str, groups: &[&str]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|g| (*g).to_string()).collect();
        groups.push(Self::AUTHENTICATED.to_string());
        Self { username: username.to_string(), groups, ..Self::default() }
    }

    /// The API server calling itself (upstream's loopback user).
    pub fn loopback() -> Self {
        Self::new("system:apiserver", &[Self::MASTERS])
    }

    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}
