//! batch/v1, one file a kind.
pub mod cron_job;
pub mod cron_schedule;
pub mod job;
