//! Which Kubernetes this is, for everyone who says so: `/version`, nodes' `kubeletVersion`.
//!
//! Upstream counterpart: staging/src/k8s.io/component-base/version.

/// Stands in the program in one piece, so that the release of a program for another machine can be read from its bytes:
/// see [`crate::upgrade::release::Release::in_program`].
pub const MARK: &str = concat!("sampan-release:v1.36.2+sampan", env!("CARGO_PKG_VERSION"), "\n");

/// What [`MARK`] starts with.
pub const MARK_START: &str = MARK.split_at("sampan-release:".len()).0;

/// `git describe` of the Kubernetes whose behaviour this has, and of this program.
pub const GIT_VERSION: &str = MARK.split_at(MARK.len() - 1).0.split_at("sampan-release:".len()).1;
