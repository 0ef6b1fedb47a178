//! Which Kubernetes this is, for everyone who says so: `/version`, nodes' `kubeletVersion`.
//!
//! Upstream counterpart: staging/src/k8s.io/component-base/version.

/// `git describe` of the Kubernetes whose behaviour this has, and of this program.
pub const GIT_VERSION: &str = concat!("v1.36.2+sampan", env!("CARGO_PKG_VERSION"));
