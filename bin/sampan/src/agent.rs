//! `sampan agent`: a node that joins a cluster. It needs outbound TCP to its servers' port and nothing else.
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use sampan_pki::Pair;

use crate::agent_client::Transport;
use crate::certificate::agent::AgentCertificate;
use crate::join::{self, Membership};
use crate::mirror;
use crate::node::{self, NodeArgs};

pub mod servers;
pub mod tunnels;

use servers::Servers;
use tunnels::Tunnels;

#[derive(clap::Args)]
pub struct Args {
    /// Server to join, https://HOST:6443; where a cluster has several, one of them, or what balances between them
    #[arg(short, long, env = "SAMPAN_URL", help_heading = "Cluster")]
    server: String,
    /// Token to join with: <data-dir>/server/node-token of the server, or one of `sampan token create`
    #[arg(short, long, env = "SAMPAN_TOKEN", help_heading = "Cluster")]
    token: Option<String>,
    #[command(flatten)]
    node: NodeArgs,
}

const FIRST_DELAY: Duration = Duration::from_millis(500);
const MAX_DELAY: Duration = Duration::from_secs(15);

pub fn run(args: Args) -> Result<()> {
    sampan_telemetry::init(&args.node.log_filter());
    let data_dir = args.node.data_dir.clone();
    crate::node_upgrade::run(&data_dir, serve(args))
}

async fn serve(args: Args) -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    join::address_of(&args.server)?;
    let folder = args.node.data_dir.join("agent");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("making {} (--data-dir names another place)", folder.display()))?;
    let name = args.node.name()?;
    let servers = Servers::of_agent(&folder, &args.server)?;
    let (membership, pair) = join_patiently(&args, &folder, &servers, &name).await?;
    let membership = Arc::new(membership);
    let certificate = AgentCertificate::new(folder.clone(), args.token.clone(), membership.clone(), &pair)?;
    let live = certificate.live.clone();
    let transport = Transport::new(membership.clone(), live.clone(), certificate.on_refused());
    let client = transport.client()?;
    certificate.keep(transport)?;
    let (setting, mirror) = mirror::part(&membership, &live, &folder)?;
    let node = node::start(&args.node, &membership.cluster, client, Some(mirror)).await?;
    servers::follow(&servers, &node.informers);
    follow_with_kubeconfig(&membership, &folder);
    let tunnels = Arc::new(Tunnels {
        servers,
        trusted: Box::new(move || membership.trusted()),
        own: live,
        kubelet: tunnels::kubelet(&node.api),
        setting: Some(setting),
        myself: None,
    });
    sampan_telemetry::supervise("tunnels", move || tunnels.clone().keep());
    node::wait_for_end().await;
    tracing::info!("ending: pods run on");
    Ok(())
}

/// A server that is not there yet, or not any more, is waited for; one that refuses is not.
async fn join_patiently(
    args: &Args,
    folder: &Path,
    servers: &Arc<Servers>,
    name: &str,
) -> Result<(Membership, Pair)> {
    let mut delay = FIRST_DELAY;
    loop {
        let error = match join::join(folder, servers, args.token.as_deref(), name).await {
            Ok(membership) => return Ok(membership),
            Err(error) => error,
        };
        if !join::may_pass(&error) {
            return Err(error);
        }
        tracing::warn!("{error:#}; trying again in {} ms", delay.as_millis());
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(MAX_DELAY);
    }
}

/// The kubeconfig for commands on this machine names the server that answers.
fn follow_with_kubeconfig(membership: &Arc<Membership>, folder: &Path) {
    let shared = Arc::new((membership.clone(), folder.to_path_buf()));
    sampan_telemetry::supervise("kubelet's kubeconfig", move || {
        let shared = shared.clone();
        async move {
            let (membership, folder) = &*shared;
            let mut current = membership.servers.current();
            loop {
                let server = current.borrow_and_update().clone();
                if let Some(server) = server
                    && let Err(error) = join::name_in_kubeconfig(folder, membership, &server)
                {
                    tracing::warn!("the kubelet's kubeconfig: {error:#}");
                }
                if current.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        }
    });
}
