//! The group upgrade.sampan.io: which release nodes are to have.
//!
//! The plan controller and a node speak through annotations of the Node; the names stand here for both.
use serde::{Deserialize, Serialize};

pub mod release;
pub mod v1;

/// The plan that is upgrading the node.
pub const PLAN: &str = "upgrade.sampan.io/plan";
/// What the plan wants; another value is another attempt.
pub const REQUEST: &str = "upgrade.sampan.io/request";
/// When the plan began with the node, RFC 3339.
pub const SINCE: &str = "upgrade.sampan.io/since";
/// The node was made unschedulable by its plan.
pub const CORDONED: &str = "upgrade.sampan.io/cordoned";
/// The release that the node is to bring itself to, now.
pub const VERSION: &str = "upgrade.sampan.io/version";
/// The only right SHA-256 of the program.
pub const SHA256: &str = "upgrade.sampan.io/sha256";
/// The request that did not succeed, and why.
pub const FAILED: &str = "upgrade.sampan.io/failed";
pub const MESSAGE: &str = "upgrade.sampan.io/message";
/// When the node's last upgrade by a plan was done, RFC 3339.
pub const COMPLETED: &str = "upgrade.sampan.io/completed";

/// Of servers' nodes.
pub const SERVER_LABEL: &str = "node-role.kubernetes.io/control-plane";

/// A program that a server has for its nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Program {
    pub arch: String,
    /// The release, as nodes show it.
    pub version: String,
    /// Hexadecimal.
    pub sha256: String,
    pub size_bytes: u64,
}
