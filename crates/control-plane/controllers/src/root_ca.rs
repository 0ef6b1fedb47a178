//! Publishes the cluster's CA as the ConfigMap `kube-root-ca.crt` in every namespace. Upstream counterpart:
//! pkg/controller/certificates/rootcacertpublisher.
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client};
use sampan_client::{Informer, WorkQueue};
use tokio::sync::watch;

use crate::controller::{Controller, Descriptor, SyncResult, run};
use crate::controller_ref::{name, namespace};
use crate::service_account::is_active;
use crate::{Scope, api_error};

pub static DESCRIPTOR: Descriptor = Descriptor {
    name: "root-ca-certificate-publisher-controller",
    service_account: "root-ca-cert-publisher",
    component: "root-ca-cert-publisher",
    build: |scope| run(RootCaController::new(&scope)),
};

const NAME: &str = "kube-root-ca.crt";
const DESCRIPTION_ANNOTATION: &str = "kubernetes.io/description";
const DESCRIPTION: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal \
    endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across \
    distributions of Kubernetes clusters.";

struct RootCaController {
    client: Client,
    root_ca_pem: watch::Receiver<String>,
    namespaces: Informer<Namespace>,
    config_maps: Informer<ConfigMap>,
    queue: WorkQueue<String>,
}

impl RootCaController {
    fn new(scope: &Scope) -> Arc<Self> {
        let this = Arc::new(Self {
            client: scope.client.clone(),
            root_ca_pem: scope.options.root_ca_pem.clone(),
            namespaces: scope.informers.of(),
            config_maps: scope.informers.selected("metadata.name=kube-root-ca.crt"),
            queue: WorkQueue::new(),
        });
        let me = this.clone();
        this.namespaces.on_event(move |event| me.queue.add(name(&**event.object()).to_string()));
        let me = this.clone();
        this.config_maps.on_event(move |event| me.queue.add(namespace(&**event.object()).to_string()));
        let (me, mut changes) = (this.clone(), scope.options.root_ca_pem.clone());
        tokio::spawn(async move {
            while changes.changed().await.is_ok() {
                me.all().into_iter().for_each(|namespace| me.queue.add(namespace));
            }
        });
        this
    }
}

impl Controller for RootCaController {
    type Key = String;

    fn queue(&self) -> &WorkQueue<String> {
        &self.queue
    }

    async fn synced(&self) {
        self.namespaces.synced().await;
        self.config_maps.synced().await;
    }

    fn all(&self) -> Vec<String> {
        self.namespaces.list().iter().map(|n| name(&**n).to_string()).collect()
    }

    async fn sync(&self, key: String) -> SyncResult {
        if !self.namespaces.get("", &key).is_some_and(|n| is_active(&n)) {
            return Ok(());
        }
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &key);
        let data: BTreeMap<String, String> =
            [("ca.crt".to_string(), self.root_ca_pem.borrow().clone())].into();
        let described = |map: &ConfigMap| {
            map.metadata.annotations.as_ref().and_then(|a| a.get(DESCRIPTION_ANNOTATION)).map(String::as_str)
                == Some(DESCRIPTION)
        };
        let annotation = (DESCRIPTION_ANNOTATION.to_string(), DESCRIPTION.to_string());
        let Some(existing) = self.config_maps.get(&key, NAME) else {
            let map = ConfigMap {
                metadata: ObjectMeta {
                    name: Some(NAME.into()),
                    namespace: Some(key.clone()),
                    annotations: Some([annotation].into()),
                    ..ObjectMeta::default()
                },
                data: Some(data),
                ..ConfigMap::default()
            };
            return match api.create(&PostParams::default(), &map).await {
                Err(e) if api_error::is_namespace_terminating(&e) || api_error::is_already_exists(&e) => {
                    Ok(())
                }
                Err(e) => Err(e.into()),
                Ok(_) => Ok(()),
            };
        };
        if existing.data.as_ref() == Some(&data) && described(&existing) {
            return Ok(());
        }
        let mut map = (*existing).clone();
        map.data = Some(data);
        map.metadata.annotations.get_or_insert_with(BTreeMap::new).extend([annotation]);
        api.replace(NAME, &PostParams::default(), &map).await?;
        Ok(())
    }
}
