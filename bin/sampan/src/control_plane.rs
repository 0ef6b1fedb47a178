//! The parts of the control plane that work on the cluster rather than answer for it: controllers and scheduler.
//!
//! Upstream counterparts: cmd/kube-controller-manager and cmd/kube-scheduler. What stays true: they see the cluster only
//! through the router that they are started with, so who shuts that has stopped them. With a datastore of their own they
//! run at once, on a shared one each on the server that leads ([`crate::leader`]).
use std::sync::Arc;

use anyhow::Result;
use sampan_apiserver::ApiServer;
use sampan_client::in_process::{self, Router};
use sampan_client::{Identity, Informers};
use sampan_scheduler::{PlatformCache, Scheduler};
use sampan_telemetry::supervise;

use crate::leader::{self, Election};
use crate::members::removal::Removals;
use crate::mirror::{self, Directory};
use crate::node;
use crate::platforms::RegistryPlatforms;
use crate::programs::Programs;

pub struct ControlPlane {
    pub api: ApiServer,
    pub options: sampan_controllers::Options,
    pub programs: Arc<Programs>,
    platforms: PlatformCache,
    /// Where servers run etcd themselves.
    removals: Option<Arc<Removals>>,
}

impl ControlPlane {
    pub fn new(
        api: &ApiServer,
        options: sampan_controllers::Options,
        programs: &Arc<Programs>,
        private_registry: &std::path::Path,
        images: Option<&Arc<Directory>>,
        removals: Option<Arc<Removals>>,
    ) -> Result<Arc<Self>> {
        let registries = node::registries(private_registry)?;
        let peers = images.map(|directory| mirror::through_tunnels(directory, &registries));
        let client = api.client(Identity::loopback(), "sampan-platforms");
        let platforms = RegistryPlatforms::new(registries, client).with_mirror(peers);
        Ok(Arc::new(Self {
            api: api.clone(),
            options,
            programs: programs.clone(),
            platforms: PlatformCache::new(Arc::new(platforms)),
            removals,
        }))
    }

    /// Starts both, for as long as the process lives.
    pub fn start(&self) {
        self.start_controllers(self.api.router());
        self.start_scheduler(self.api.router());
    }

    /// Starts each when this server leads.
    pub fn campaign(self: &Arc<Self>, election: &mut Election) {
        let candidate = |user: &str, agent: &'static str| self.api.client(Identity::new(user, &[]), agent);
        let this = self.clone();
        let client = candidate("system:kube-controller-manager", leader::CONTROLLERS);
        election.enter(leader::CONTROLLERS, client, move |gate| {
            this.start_controllers(gate.guard(this.api.router()));
        });
        let this = self.clone();
        let client = candidate("system:kube-scheduler", leader::SCHEDULER);
        election.enter(leader::SCHEDULER, client, move |gate| {
            this.start_scheduler(gate.guard(this.api.router()));
        });
    }

    fn start_controllers(&self, router: Router) {
        let identity = Identity::new("system:kube-controller-manager", &[Identity::MASTERS]);
        let client = in_process::client(router.clone(), identity, "kube-controller-manager");
        let informers = Informers::new(client.clone());
        if let Some(removals) = &self.removals {
            removals.follow(client, &informers);
        }
        sampan_controllers::start(sampan_controllers::Context {
            clients: Arc::new(move |name: &'static str| {
                let user = format!("system:serviceaccount:kube-system:{name}");
                let groups = ["system:serviceaccounts", "system:serviceaccounts:kube-system"];
                in_process::client(router.clone(), Identity::new(&user, &groups), "kube-controller-manager")
            }),
            informers,
            options: self.options.clone(),
            image_platforms: Some(Arc::new(self.platforms.clone())),
            programs: Some(Arc::new({
                let programs = self.programs.clone();
                move || programs.watch()
            })),
        });
    }

    fn start_scheduler(&self, router: Router) {
        let identity = Identity::new("system:kube-scheduler", &[]);
        let client = in_process::client(router, identity, "kube-scheduler");
        let platforms = self.platforms.clone();
        supervise("scheduler", move || {
            let (client, platforms) = (client.clone(), platforms.clone());
            async move {
                Scheduler::new(client.clone(), Informers::new(client), Some(platforms)).run().await;
            }
        });
    }
}
