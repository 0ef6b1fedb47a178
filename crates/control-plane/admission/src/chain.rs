//! Runs the plugins in order. Upstream counterpart: k8s.io/apiserver/pkg/admission/chain.go.
//!
//! What stays true: the first plugin that refuses ends it; all mutating comes before all validating.
use async_trait::async_trait;
use sampan_client::Informers;
use serde_json::Value;

use crate::{Operation, Rejection, Request, plugins};

/// One admission plugin.
#[async_trait]
pub trait Plugin: Send + Sync {
    fn name(&self) -> &'static str;

    /// Whether it wants to see such writes at all.
    fn handles(&self, operation: Operation, resource: &str, subresource: &str) -> bool;

    /// May change the object (of a create or update), or refuse it.
    async fn admit(&self, _: &Request<'_>, _: &mut Value, _old: Option<&Value>) -> Result<(), Rejection> {
        Ok(())
    }

    /// May refuse the write. A delete has only the old object.
    async fn validate(
        &self,
        _: &Request<'_>,
        _object: Option<&Value>,
        _old: Option<&Value>,
    ) -> Result<(), Rejection> {
        Ok(())
    }
}

/// What plugins see of the cluster: everything, as the loopback user.
#[derive(Clone)]
pub struct Context {
    pub informers: Informers,
    pub client: kube::Client,
}

impl Context {
    pub fn new(informers: Informers) -> Self {
        let client = informers.client();
        Self { informers, client }
    }

    /// Reads an object past all informers; `None` when there is none.
    pub(crate) async fn get(&self, path: &str) -> Result<Option<Value>, Rejection> {
        let request =
            http::Request::get(path).body(Vec::new()).map_err(|e| Rejection::Internal(e.to_string()))?;
        match self.client.request::<Value>(request).await {
            Ok(object) => Ok(Some(object)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(Rejection::Internal(error.to_string())),
        }
    }
}

/// All plugins, in order.
pub struct Chain(Vec<Box<dyn Plugin>>);

impl Chain {
    pub fn new(context: &Context) -> Self {
        Self(plugins::PLUGINS.iter().map(|make| make(context)).collect())
    }

    /// Those plugins only.
    pub fn of(plugins: Vec<Box<dyn Plugin>>) -> Self {
        Self(plugins)
    }

    /// The plugins' names, in order.
    pub fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|plugin| plugin.name()).collect()
    }

    pub async fn admit(
        &self,
        request: &Request<'_>,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<(), Rejection> {
        for plugin in self.handling(request) {
            plugin.admit(request, object, old).await?;
        }
        Ok(())
    }

    pub async fn validate(
        &self,
        request: &Request<'_>,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<(), Rejection> {
        for plugin in self.handling(request) {
            plugin.validate(request, object, old).await?;
        }
        Ok(())
    }

    fn handling<'a>(&'a self, request: &'a Request<'_>) -> impl Iterator<Item = &'a dyn Plugin> {
        let handles =
            |plugin: &&dyn Plugin| plugin.handles(request.operation, request.resource, request.subresource);
        self.0.iter().map(AsRef::as_ref).filter(handles)
    }
}
