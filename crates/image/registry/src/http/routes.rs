//! Which path names what, and what one must be allowed to do for it.
use http::Method;

use super::query::{Query, decode, encode};
use crate::auth::Access;
use crate::error::RegistryError;
use crate::name;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// `/`: for load balancers that ask whether anything is there
    Root,
    Base,
    Catalog,
    Tags,
    Manifest(String),
    Blob(String),
    Uploads,
    Upload(String),
    Referrers(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub repository: String,
    pub target: Target,
}

impl Route {
    pub(crate) fn parse(path: &str) -> Result<Route, RegistryError> {
        if path == "/" || path.is_empty() {
            return Ok(Route { repository: String::new(), target: Target::Root });
        }
        let path = decode(path, false);
        let rest = match path.as_str() {
            "/v2" => "",
            path => path.strip_prefix("/v2/").ok_or(RegistryError::NoEndpoint)?,
        };
        let base = |target| Ok(Route { repository: String::new(), target });
        if rest.is_empty() {
            return base(Target::Base);
        }
        if rest == "_catalog" {
            return base(Target::Catalog);
        }
        let parts: Vec<&str> = rest.split('/').collect();
        let (repository, target) = match parts.as_slice() {
            [name @ .., "tags", "list"] => (name, Target::Tags),
            [name @ .., "blobs", "uploads"] | [name @ .., "blobs", "uploads", ""] => (name, Target::Uploads),
            [name @ .., "blobs", "uploads", id] => (name, Target::Upload(id.to_string())),
            [name @ .., "blobs", digest] => (name, Target::Blob(digest.to_string())),
            [name @ .., "manifests", reference] => (name, Target::Manifest(reference.to_string())),
            [name @ .., "referrers", digest] => (name, Target::Referrers(digest.to_string())),
            _ => return Err(RegistryError::NoEndpoint),
        };
        let repository = repository.join("/");
        if !name::is_repository(&repository) {
            return Err(RegistryError::NameInvalid(repository.chars().take(300).collect()));
        }
        Ok(Route { repository, target })
    }

    pub(super) fn accesses(&self, method: &Method, query: &Query) -> Vec<Access> {
        if self.target == Target::Catalog {
            return vec![Access::new("registry", "catalog", &["*"])];
        }
        if self.repository.is_empty() {
            return Vec::new();
        }
        let actions: &[&str] = match *method {
            Method::GET | Method::HEAD => &["pull"],
            Method::DELETE if !matches!(self.target, Target::Upload(_)) => &["delete"],
            _ => &["pull", "push"],
        };
        let mut accesses = vec![Access::new("repository", &self.repository, actions)];
        if let (Target::Uploads, Some(from)) = (&self.target, query.get("from")) {
            accesses.push(Access::new("repository", from, &["pull"]));
        }
        accesses
    }
}

pub(crate) fn upload_location(repository: &str, id: &str) -> String {
    format!("/v2/{repository}/blobs/uploads/{id}")
}

pub(super) fn blob_location(repository: &str, digest: &crate::Digest) -> String {
    format!("/v2/{repository}/blobs/{digest}")
}

pub(super) fn next_link(path: &str, query: &str) -> String {
    format!("<{path}?{query}>; rel=\"next\"")
}

/// The next page of referrers.
pub(super) fn referrers_query(artifact_type: Option<&str>, last: &str) -> String {
    let filter = artifact_type.map(|t| format!("artifactType={}&", encode(t))).unwrap_or_default();
    format!("{filter}last={}", encode(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_apart() {
        for (path, repository, target) in [
            ("/v2/", "", Target::Base),
            ("/v2/_catalog", "", Target::Catalog),
            ("/v2/a/b/tags/list", "a/b", Target::Tags),
            ("/v2/a/manifests/latest", "a", Target::Manifest("latest".into())),
            ("/v2/a/blobs/uploads/", "a", Target::Uploads),
            ("/v2/a/blobs/uploads/x-y", "a", Target::Upload("x-y".into())),
            ("/v2/a/blobs/blobs/sha256%3Aab", "a/blobs", Target::Blob("sha256:ab".into())),
            ("/v2/manifests/tags/manifests/list", "manifests/tags", Target::Manifest("list".into())),
            ("/v2/a/referrers/sha256:ab", "a", Target::Referrers("sha256:ab".into())),
        ] {
            assert_eq!(
                Route::parse(path).unwrap(),
                Route { repository: repository.into(), target },
                "{path}"
            );
        }
        for path in [
            "/v1/",
            "/v2/a",
            "/v2/A/tags/list",
            "/v2/../x/tags/list",
            "/v2/a%2F..%2Fb/blobs/x",
            "/v2//tags/list",
        ] {
            assert!(Route::parse(path).is_err(), "{path}");
        }
    }
}
