//! The node's container runtime: images on disk, sandboxes, containers, and the shim that holds them.
//!
//! Upstream counterparts: containerd with its CRI plugin, containerd-shim and runc. `Node` (the agent's side) keeps no
//! state that matters in memory: everything is read back from `<data>/runtime` and from the shims. [`shim_main`] and
//! [`step_main`] are the other programs in this crate; the binary calls them before it starts any thread.
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

pub use content::{Limits, UnpackError, Unpacked, unpack};
pub use images::{ImageFiles, ImageRecord};
pub use node::{Node, RuntimeOptions};
pub use shim::{Ended, Step, StepMount, plain_overlay_options, remove_step_groups, shim_main, step_main};
