//! Keeps the service account `default` in every active namespace. Upstream counterpart:
//! pkg/controller/serviceaccount/serviceaccounts_controller.go.
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client};
use sampan_client::{Event, Informer, WorkQueue};

use crate::controller::{Controller, Descriptor, SyncResult, run};
use crate::controller_ref::{name, namespace};
use crate::{Scope, api_error};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "serviceaccount-controller",
    service_account: "service-account-controller",
    component: "service-account-controller",
    build: |scope| run(ServiceAccountController::new(&scope)),
};

const DEFAULT: &str = "default";

struct ServiceAccountController {
    client: Client,
    namespaces: Informer<Namespace>,
    accounts: Informer<ServiceAccount>,
    queue: WorkQueue<String>,
}

impl ServiceAccountController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            namespaces: scope.informers.of(),
            accounts: scope.informers.selected("metadata.name=default"),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.namespaces.on_event(move |event| me.queue.add(name(&**event.object()).to_string()));
        let me = this.clone();
        this.accounts.on_event(move |event| {
            if let Event::Deleted(account) = event {
                me.queue.add(namespace(&***account).to_string());
            }
        });
        this
    }
}

/// Whether a namespace is in use and not going away.
pub(crate) fn is_active(namespace: &Namespace) -> bool {
    let phase = namespace.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("Active");
    phase == "Active" && namespace.metadata.deletion_timestamp.is_none()
}

impl Controller for ServiceAccountController {
    type Key = String;

    fn queue(&self) -> &WorkQueue<String> {
        &self.queue
    }

    async fn synced(&self) {
        self.namespaces.synced().await;
        self.accounts.synced().await;
    }

    fn all(&self) -> Vec<String> {
        self.namespaces.list().iter().map(|n| name(&**n).to_string()).collect()
    }

    async fn sync(&self, key: String) -> SyncResult {
        let active = self.namespaces.get("", &key).is_some_and(|n| is_active(&n));
        if !active || self.accounts.get(&key, DEFAULT).is_some() {
            return Ok(());
        }
        let metadata =
            ObjectMeta { name: Some(DEFAULT.into()), namespace: Some(key.clone()), ..ObjectMeta::default() };
        let account = ServiceAccount { metadata, ..ServiceAccount::default() };
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &key);
        match api.create(&PostParams::default(), &account).await {
            Err(e) if api_error::is_already_exists(&e) || api_error::is_namespace_terminating(&e) => Ok(()),
            Err(e) => Err(e.into()),
            Ok(_) => Ok(()),
        }
    }
}
