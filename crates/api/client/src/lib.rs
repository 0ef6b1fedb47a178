//! How every part of Sampan but the API server itself sees the cluster: a `kube::Client`, shared informers and
//! work queues.
//!
//! Upstream counterparts: client-go's rest, tools/cache and util/workqueue.
pub mod identity;
pub mod in_process;
pub mod informer;
pub mod reflector;
pub mod work_queue;

pub use identity::Identity;
pub use informer::{Event, Informer, Informers};
pub use work_queue::WorkQueue;
