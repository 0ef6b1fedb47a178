//! Netlink: messages and sockets for routes and links, nftables and connection tracking.
//!
//! Upstream counterparts: vishvananda/netlink and sigs.k8s.io/knftables (which runs the `nft` program; nothing is run
//! here). Everything is synchronous and short; callers on an async runtime use `spawn_blocking`. A socket belongs to the
//! network namespace of the thread that opened it, so each operation opens its own; [`inside`] does that in another one.
pub mod cidr;
pub mod conntrack;
pub mod message;
pub mod nft;
pub mod route;
pub mod socket;

pub use cidr::Cidr;
pub use socket::{Error, Socket, inside, link_events};
