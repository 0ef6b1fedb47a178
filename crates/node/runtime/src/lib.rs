//! The node's container runtime: images on disk, sandboxes, containers, and the shim that holds them.
//!
//! Upstream counterparts: containerd with its CRI plugin, containerd-shim and runc. `Node` (the agent's side) keeps no
//! state that matters in memory: everything is read back from `<data>/runtime` and from the shims. [`shim_main`] is
//! the other program in this crate; the binary calls it before it starts any thread.
mod capabilities;
mod cgroups;
mod content;
mod images;
mod node;
mod protocol;
mod seccomp;
mod shim;
mod spec;
mod sys;

pub use images::{ImageFiles, ImageRecord};
pub use node::{Node, RuntimeOptions};
pub use shim::shim_main;
