//! Admission: what may change a write, or refuse it, after it was authorized and before it is stored.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/admission and plugin/pkg/admission. One file a plugin in `plugins/`, one
//! line in its `registry!` list; the order of the list is the order at run time.
pub mod chain;
pub mod plugins;
pub mod pod;
pub mod rejection;
pub mod request;

pub use chain::{Chain, Context, Plugin};
pub use rejection::{Cause, Rejection};
pub use request::{Operation, Request};
