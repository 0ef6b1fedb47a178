//! The node in this process: runtime, pod network, services, DNS and kubelet put together.
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Flags of every node, server or agent.
#[derive(Clone, clap::Args)]
#[command(next_help_heading = "Node")]
pub struct NodeArgs {
    /// Where everything is kept
    #[arg(short, long, default_value = "/var/lib/sampan")]
    pub data_dir: PathBuf,
    /// Name of the node (default: the machine's host name)
    #[arg(long, env = "SAMPAN_NODE_NAME")]
    node_name: Option<String>,
    /// Address of the node (default: that of the default route's interface)
    #[arg(short = 'i', long)]
    node_ip: Option<IpAddr>,
    /// Label for the node when it registers, KEY=VALUE, may be repeated
    #[arg(long)]
    pub node_label: Vec<String>,
    /// Taint for the node when it registers, KEY=VALUE:EFFECT, may be repeated
    #[arg(long)]
    pub node_taint: Vec<String>,
    /// Mirrors and credentials of registries, as in K3s
    #[arg(long, default_value = "/etc/sampan/registries.yaml")]
    pub private_registry: PathBuf,
    /// Platform that images are chosen for, OS/ARCH[/VARIANT] (default: the machine's)
    #[arg(long, hide = true)]
    pub platform: Option<String>,
    /// Control group below each hierarchy's root that holds all pods
    #[arg(long, hide = true, default_value = "")]
    pub cgroup_root: String,
    /// More log output
    #[arg(long)]
    debug: bool,
}

impl NodeArgs {
    pub fn log_filter(&self) -> String {
        match self.debug {
            true => "info,sampan=debug".to_string(),
            false => "info".to_string(),
        }
    }

    /// The node's name: lower case, as Kubernetes wants it.
    pub fn name(&self) -> Result<String> {
        let name = match &self.node_name {
            Some(name) => name.clone(),
            None => nix::unistd::gethostname()
                .context("the machine's host name")?
                .to_string_lossy()
                .to_lowercase(),
        };
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        let edges = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        if name.is_empty() || name.len() > 253 || !name.chars().all(fits) {
            bail!("node name {name:?}: only a-z, 0-9, - and . are allowed; set --node-name");
        }
        if !name.starts_with(edges) || !name.ends_with(edges) {
            bail!("node name {name:?}: must start and end with a letter or digit; set --node-name");
        }
        Ok(name)
    }

    /// The node's address: the flag, or the source address of a packet to the world (none is sent).
    pub fn ip(&self) -> Result<IpAddr> {
        if let Some(ip) = self.node_ip {
            return Ok(ip);
        }
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        let found = socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr());
        match found {
            Ok(address) if !address.ip().is_unspecified() => Ok(address.ip()),
            _ => bail!("this machine has no default route to tell its address by; set --node-ip"),
        }
    }
}

/// A client from the text of a kubeconfig.
pub async fn client_of_kubeconfig(text: &str) -> Result<kube::Client> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let kubeconfig = kube::config::Kubeconfig::from_yaml(text).context("the kubeconfig")?;
    let options = kube::config::KubeConfigOptions::default();
    let config =
        kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.context("the kubeconfig")?;
    kube::Client::try_from(config).context("making a client from the kubeconfig")
}

/// Waits for SIGTERM or SIGINT.
pub async fn wait_for_end() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// The kubelet's API on one stream.
#[derive(Clone)]
pub struct KubeletApi;

impl KubeletApi {
    pub async fn serve(self, _stream: Box<dyn sampan_drivers::tunnel::Stream>) {}
}

pub async fn start(_: &NodeArgs, _: &crate::join::Cluster, _: kube::Client) -> Result<KubeletApi> {
    bail!("not yet")
}
pub async fn start_local(
    _: &NodeArgs,
    _: &crate::join::Cluster,
    _: kube::Client,
    _: &std::sync::Arc<sampan_tunnel::Nodes>,
) -> Result<()> {
    bail!("not yet")
}
