//! The traits between planes: what the kubelet asks of a container runtime and of the pod network.
//!
//! A plane never imports another; `bin/sampan` hands the implementations over.
pub mod network;
pub mod platform;
pub mod runtime;
pub mod tunnel;

pub use network::PodNetwork;
pub use runtime::Runtime;
pub use tunnel::{DialError, Dialer, Target};
