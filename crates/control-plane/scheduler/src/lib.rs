//! The scheduler: decides which node each pod runs on.
//!
//! Upstream counterpart: pkg/scheduler. The framework's extension points are small traits ([`framework`]), plugins are
//! one file each behind a list ([`plugins`]). The loop takes one pod at a time from the [`queue`], looks at a
//! [`framework::snapshot`] of the [`cache`], and binds beside it. Nothing runs on a timer while no pod waits.
//!
//! Deliberate differences: an own plugin, ImagePlatform, sends pods only where their images run; there is one profile,
//! no extenders, no pod groups, no dynamic resources; volumes are not bound here; filtering is done by one thread.
pub mod cache;
mod event_handlers;
mod event_recorder;
pub mod framework;
pub mod platforms;
pub mod plugins;
mod preemptor;
pub mod queue;
mod schedule_one;
mod scheduler;
mod sources;
mod status_writer;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod writes;

pub use platforms::PlatformCache;
pub use scheduler::Scheduler;

/// The name pods ask for this scheduler by, and what its events come from.
pub const SCHEDULER_NAME: &str = "default-scheduler";
