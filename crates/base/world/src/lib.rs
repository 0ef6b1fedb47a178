//! The outside world: the clock, randomness and files, behind functions that a test can take over.
//!
//! Nothing else in the workspace may call the ambient ones (clippy.toml bans them), so that a seeded
//! simulation can run the control plane and a test can make the clock jump.
pub mod clock;
pub mod files;
pub mod memory;
pub mod random;
