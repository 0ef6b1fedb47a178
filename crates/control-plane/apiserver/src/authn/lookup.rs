//! How authentication looks objects up: tokens are only as good as the objects they are bound to.
use async_trait::async_trait;
use serde_json::Value;

/// Reads one object of the core group.
#[async_trait]
pub trait Lookup: Send + Sync {
    /// The object, `None` when there is none, or why nobody can tell.
    async fn get(&self, resource: &str, namespace: &str, name: &str) -> Result<Option<Value>, String>;
}

/// Asks the API server itself, in memory.
pub struct ClientLookup(pub kube::Client);

#[async_trait]
impl Lookup for ClientLookup {
    async fn get(&self, resource: &str, namespace: &str, name: &str) -> Result<Option<Value>, String> {
        // names come from tokens and bodies: one that could change the path names nothing
        let plain = |s: &str| s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b));
        if name.is_empty() || !plain(name) || !plain(namespace) || name.starts_with("..") || name == "." {
            return Ok(None);
        }
        let within = if namespace.is_empty() { String::new() } else { format!("namespaces/{namespace}/") };
        let request = http::Request::get(format!("/api/v1/{within}{resource}/{name}"))
            .body(Vec::new())
            .map_err(|e| e.to_string())?;
        match self.0.request::<Value>(request).await {
            Ok(object) => Ok(Some(object)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::collections::HashMap;

    /// Objects in memory.
    #[derive(Default)]
    pub struct Objects(Mutex<HashMap<String, Value>>);

    impl Objects {
        pub fn put(&self, resource: &str, namespace: &str, name: &str, object: Value) {
            self.0.lock().insert(format!("{resource}/{namespace}/{name}"), object);
        }

        pub fn remove(&self, resource: &str, namespace: &str, name: &str) {
            self.0.lock().remove(&format!("{resource}/{namespace}/{name}"));
        }
    }

    #[async_trait]
    impl Lookup for Objects {
        async fn get(&self, resource: &str, namespace: &str, name: &str) -> Result<Option<Value>, String> {
            Ok(self.0.lock().get(&format!("{resource}/{namespace}/{name}")).cloned())
        }
    }
}
