//! `sampan agent`: a node that joins a server. It needs outbound TCP to the server's port and nothing else.
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http::{Request, StatusCode, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use sampan_pki::{LiveCertificate, Pair};

use crate::agent_client::Transport;
use crate::certificate::agent::AgentCertificate;
use crate::join::{self, Membership};
use crate::mirror;
use crate::node::{self, KubeletApi, NodeArgs};

#[derive(clap::Args)]
pub struct Args {
    /// Server to join, https://HOST:6443
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
    let (membership, pair) = join_patiently(&args, &folder, &name).await?;
    let membership = Arc::new(membership);
    let certificate = AgentCertificate::new(folder.clone(), args.token.clone(), membership.clone(), &pair)?;
    let live = certificate.live.clone();
    let transport = Transport::new(membership.clone(), live.clone(), certificate.on_refused());
    let client = transport.client()?;
    certificate.keep(transport)?;
    let (setting, mirror) = mirror::part(&membership, &live, &folder)?;
    let kubelet = node::start(&args.node, &membership.cluster, client, Some(mirror)).await?;
    sampan_telemetry::supervise("tunnel", {
        move || keep_connected(membership.clone(), live.clone(), kubelet.clone(), setting.clone())
    });
    node::wait_for_end().await;
    tracing::info!("ending: pods run on");
    Ok(())
}

/// A server that is not there yet, or not any more, is waited for; one that refuses is not.
async fn join_patiently(args: &Args, folder: &std::path::Path, name: &str) -> Result<(Membership, Pair)> {
    let mut delay = FIRST_DELAY;
    loop {
        let error = match join::join(folder, &args.server, args.token.as_deref(), name).await {
            Ok(membership) => return Ok(membership),
            Err(error) => error,
        };
        let unreachable = error.chain().any(|e| e.is::<std::io::Error>() || e.is::<hyper::Error>());
        if !unreachable {
            return Err(error);
        }
        tracing::warn!("{error:#}; trying again in {} ms", delay.as_millis());
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(MAX_DELAY);
    }
}

/// Holds the connection that the server reaches this node through; when it ends, another is made.
async fn keep_connected(
    membership: Arc<Membership>,
    live: Arc<LiveCertificate>,
    kubelet: KubeletApi,
    setting: Arc<mirror::Setting>,
) {
    let mut delay = FIRST_DELAY;
    loop {
        match connect(&membership, live.clone(), &kubelet, &setting).await {
            Ok(()) => delay = FIRST_DELAY,
            Err(error) => {
                tracing::warn!(
                    "the server cannot reach this node: {error:#}; trying again in {} ms",
                    delay.as_millis()
                );
            }
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(MAX_DELAY);
    }
}

async fn connect(
    membership: &Membership,
    live: Arc<LiveCertificate>,
    kubelet: &KubeletApi,
    setting: &mirror::Setting,
) -> Result<()> {
    let server = &membership.server;
    let stream = join::connect(server, Some(&membership.trusted()), Some(live), Some(b"http/1.1")).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    let (host, port) = join::address_of(server)?;
    let request = Request::get(sampan_tunnel::PATH)
        .header(header::HOST, format!("{host}:{port}"))
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, sampan_tunnel::PROTOCOL)
        .body(Empty::<bytes::Bytes>::new())?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        bail!("{server} answered {} to the tunnel", response.status());
    }
    setting.hear(response.headers())?;
    let upgraded = hyper::upgrade::on(response).await?;
    let kubelet = kubelet.clone();
    sampan_tunnel::serve(TokioIo::new(upgraded), move |stream| kubelet.clone().serve(stream)).await?;
    Ok(())
}
