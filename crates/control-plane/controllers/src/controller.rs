//! The frame of a controller: a [`Descriptor`] names it, a [`Controller`] reconciles keys.
//!
//! Upstream counterpart: cmd/kube-controller-manager/app/controller_descriptor.go. What stays true: informers' handlers
//! are attached once, when the controller is built; when its task panics, it is started again with the same queue and
//! every key is queued anew, so nothing depends on what the panic lost.
use std::fmt::Debug;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;

use futures::future::BoxFuture;
use sampan_client::WorkQueue;

use crate::Scope;

/// (namespace, name)
pub type Key = sampan_client::informer::Key;

/// Starts, and after a panic restarts, a controller's loop.
pub type Run = Box<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// One controller as [`crate::registry`] lists it.
pub struct Descriptor {
    /// Upstream's name of the controller.
    pub name: &'static str,
    /// The service account it acts as (in kube-system); its role is `system:controller:<this>`.
    pub service_account: &'static str,
    /// The source of its events.
    pub component: &'static str,
    pub build: fn(Scope) -> Run,
}

/// Why a key could not be reconciled; it is retried with back-off.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    #[error("{0}")]
    Api(#[from] kube::Error),
    #[error("{0}")]
    Failed(String),
}

impl SyncError {
    pub fn failed(why: impl Into<String>) -> Self {
        Self::Failed(why.into())
    }

    /// The sentence for people: the API's message without the client's wrapping.
    pub fn message(&self) -> String {
        match self {
            Self::Api(e) => crate::api_error::message(e),
            Self::Failed(why) => why.clone(),
        }
    }
}

pub type SyncResult = Result<(), SyncError>;

/// A level-triggered controller over keys.
pub trait Controller: Send + Sync + 'static {
    type Key: Clone + Eq + Hash + Debug + Send + Sync;
    const WORKERS: usize = 2;

    fn queue(&self) -> &WorkQueue<Self::Key>;

    /// Waits until its informers have listed.
    fn synced(&self) -> impl Future<Output = ()> + Send;

    /// All keys there are now.
    fn all(&self) -> Vec<Self::Key>;

    fn sync(&self, key: Self::Key) -> impl Future<Output = SyncResult> + Send;
}

/// The loop of `controller`.
pub fn run<C: Controller>(controller: Arc<C>) -> Run {
    Box::new(move || {
        let controller = controller.clone();
        Box::pin(async move {
            controller.synced().await;
            for key in controller.all() {
                controller.queue().add(key);
            }
            let sync = |key| Box::pin(controller.sync(key)) as BoxFuture<'_, SyncResult>;
            controller.queue().run(C::WORKERS, sync).await;
        })
    })
}
