//! The node in this process: runtime, pod network, services, DNS and kubelet put together.
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Taint;
use sampan_client::Informers;
use sampan_dns::{Dns, DnsConfig};
use sampan_drivers::runtime::Platform;
use sampan_drivers::{PodNetwork, Runtime};
use sampan_image::{Mirror, Registries};
use sampan_kubelet::{Kubelet, KubeletConfig};
use sampan_pods::{PodNet, PodNetConfig};
use sampan_runtime::RuntimeOptions;
use sampan_services::{Services, ServicesConfig};
use sampan_telemetry::supervise;

use crate::agent::tunnels;
use crate::join::Cluster;
use crate::mirror;

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
    /// Setting of the kubelet, KEY=VALUE with upstream's names (max-pods, eviction-hard, ...), may be repeated
    #[arg(long)]
    kubelet_arg: Vec<String>,
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

    pub fn is_debugged(&self) -> bool {
        self.debug
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

impl NodeArgs {
    fn platform(&self) -> Result<Platform> {
        let text = self.platform.as_deref().unwrap_or(machine_platform());
        parse_platform(text)
            .with_context(|| format!("--platform {text}: expected OS/ARCH or OS/ARCH/VARIANT"))
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

/// Waits for SIGTERM or SIGINT, or for a program that is to take this one's place.
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
        () = crate::node_upgrade::requested() => {}
    }
}

/// A node that runs: what the server reaches of it.
pub type KubeletApi = sampan_kubelet::api::Api;

/// A node that was started.
pub struct Started {
    pub api: KubeletApi,
    /// What it knows of the cluster, for whoever wants to know the same.
    pub informers: Informers,
}

/// Puts the node together and starts it.
pub async fn start(
    args: &NodeArgs,
    cluster: &Cluster,
    client: kube::Client,
    mirror: Option<mirror::Membership>,
) -> Result<Started> {
    let (name, ip) = (args.name()?, args.ip()?);
    let data = args.data_dir.join("agent");
    std::fs::create_dir_all(&data).with_context(|| format!("making {}", data.display()))?;
    let dns_ip: IpAddr = cluster.cluster_dns.parse().context("the cluster's DNS address")?;
    let registries = registries(&args.private_registry)?;
    let peers =
        mirror.as_ref().map(|m| Arc::new(mirror::Peers::new(registries.clone(), m)) as Arc<dyn Mirror>);
    let options = RuntimeOptions {
        data_dir: data.clone(),
        run_dir: PathBuf::from("/run/sampan"),
        cgroup_root: args.cgroup_root.clone(),
        platform: args.platform()?,
        registries: registries.clone(),
        shim_exe: crate::node_upgrade::program()?,
    };
    let images = sampan_runtime::Node::open_mirrored(options, peers)
        .await
        .context("starting the container runtime")?;
    let lender = mirror.map(|mirror| mirror::start(images.clone(), registries, ip, &mirror));
    crate::image::service::start(images.clone(), &data);
    let runtime: Arc<dyn Runtime> = Arc::new(images);
    let informers = Informers::new(client.clone());
    crate::node_upgrade::follow(&name, &client, &informers);
    let pods = PodNet::new(
        PodNetConfig {
            node_name: name.clone(),
            node_ip: ip,
            state_dir: data.join("network"),
            cluster_cidr: cluster.cluster_cidr.clone(),
        },
        &informers,
    );
    let services = Services::new(
        ServicesConfig {
            node_name: name.clone(),
            node_ip: ip,
            cluster_cidr: cluster.cluster_cidr.clone(),
            cluster_dns: dns_ip,
        },
        &informers,
    );
    let dns = Dns::new(
        DnsConfig {
            cluster_dns: dns_ip,
            listen: Vec::new(),
            domain: cluster.cluster_domain.clone(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
        },
        &informers,
    );
    let network: Arc<dyn PodNetwork> = pods.clone();
    supervise("pod network", forever(pods, |p| async move { p.run().await }));
    supervise("services", forever(services, |s| async move { s.run().await }));
    supervise("dns", forever(dns, |d| async move { d.run().await }));
    let mut config = KubeletConfig::new(&name, data.clone());
    config.node_ips = vec![ip];
    config.labels = labels(&args.node_label)?;
    config.taints = taints(&args.node_taint)?;
    config.cluster_dns = vec![dns_ip];
    config.cluster_domain = cluster.cluster_domain.clone();
    config.manifests_dir = Some(data.join("pod-manifests"));
    config.log_dir = PathBuf::from("/var/log");
    config.cgroup_root = PathBuf::from("/sys/fs/cgroup").join(&args.cgroup_root);
    crate::kubelet_args::apply(&mut config, &args.kubelet_arg)?;
    let kubelet = Kubelet::new(config, client, informers.clone(), runtime.clone(), network);
    supervise("kubelet", {
        let kubelet = kubelet.clone();
        move || {
            let kubelet = kubelet.clone();
            async move { kubelet.run().await }
        }
    });
    supervise("idle memory", unmap_idle_code);
    let api = KubeletApi::new(Arc::new(kubelet), runtime);
    if let Some(lender) = lender {
        api.lend_images(lender);
    }
    let builds = crate::image::build::served::on_node(args.data_dir.clone(), args.private_registry.clone());
    api.build_images(Arc::new(builds));
    Ok(Started { api, informers })
}

/// What only the start needed is soon given up, what a busy time needed some minutes later.
pub async fn unmap_idle_code() {
    let mut wait = Duration::from_secs(30);
    loop {
        tokio::time::sleep(wait).await;
        let _ = tokio::task::spawn_blocking(sampan_world::memory::unmap_idle_code).await;
        wait = Duration::from_secs(600);
    }
}

/// A task over a shared value that can be started again.
fn forever<T, F, Fut>(value: Arc<T>, task: F) -> impl Fn() -> Fut + Send + 'static
where
    T: Send + Sync + 'static,
    F: Fn(Arc<T>) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    move || task(value.clone())
}

/// The server's own node: reached in memory, through the same protocol as all others; and by other servers as nodes are.
pub async fn start_local(
    args: &NodeArgs,
    cluster: &Cluster,
    client: kube::Client,
    nodes: &Arc<sampan_tunnel::Nodes>,
    mirror: Option<mirror::Membership>,
    others: Option<tunnels::Others>,
) -> Result<()> {
    let Started { api, informers } = start(args, cluster, client, mirror).await?;
    if let Some(others) = others {
        tunnels::of_server(others, &api, &informers);
    }
    let (nodes, name) = (nodes.clone(), args.name()?);
    supervise("local tunnel", move || {
        let (nodes, name, api) = (nodes.clone(), name.clone(), api.clone());
        async move {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let served = sampan_tunnel::serve(far, move |stream| api.clone().serve(stream));
            let ((), served) = tokio::join!(nodes.hold(&name, near), served);
            if let Err(error) = served {
                tracing::debug!(%error, "the local tunnel ended");
            }
        }
    });
    Ok(())
}

/// The machine's platform, as images name it.
fn machine_platform() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "linux/arm64",
        "arm" => "linux/arm/v7",
        "x86" => "linux/386",
        _ => "linux/amd64",
    }
}

fn parse_platform(text: &str) -> Option<Platform> {
    let mut parts = text.split('/').map(str::to_string).filter(|p| !p.is_empty());
    let platform = Platform { os: parts.next()?, architecture: parts.next()?, variant: parts.next() };
    parts.next().is_none().then_some(platform)
}

/// Mirrors and credentials; none where there is no file.
pub fn registries(path: &std::path::Path) -> Result<Registries> {
    match std::fs::read_to_string(path) {
        Ok(text) => Registries::parse(&text).with_context(|| path.display().to_string()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Registries::default()),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

/// `KEY=VALUE` each.
fn labels(given: &[String]) -> Result<std::collections::BTreeMap<String, String>> {
    given
        .iter()
        .map(|label| {
            let (key, value) =
                label.split_once('=').with_context(|| format!("--node-label {label}: expected KEY=VALUE"))?;
            Ok((key.to_string(), value.to_string()))
        })
        .collect()
}

/// `KEY[=VALUE]:EFFECT` each.
fn taints(given: &[String]) -> Result<Vec<Taint>> {
    given
        .iter()
        .map(|taint| {
            let wrong = || {
                format!(
                    "--node-taint {taint}: expected KEY=VALUE:NoSchedule, :PreferNoSchedule or :NoExecute"
                )
            };
            let (rest, effect) = taint.rsplit_once(':').with_context(wrong)?;
            if !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
                bail!(wrong());
            }
            let (key, value) = match rest.split_once('=') {
                Some((key, value)) => (key, Some(value.to_string())),
                None => (rest, None),
            };
            Ok(Taint { key: key.to_string(), value, effect: effect.to_string(), time_added: None })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_the_node() {
        assert_eq!(parse_platform("linux/arm/v7").unwrap().variant.as_deref(), Some("v7"));
        assert!(parse_platform("linux").is_none() && parse_platform("a/b/c/d").is_none());
        assert_eq!(labels(&["a=b".into()]).unwrap()["a"], "b");
        assert!(labels(&["a".into()]).is_err());
        let taints_of = |text: &str| taints(&[text.to_string()]);
        assert_eq!(taints_of("k=v:NoSchedule").unwrap()[0].value.as_deref(), Some("v"));
        assert_eq!(taints_of("k:NoExecute").unwrap()[0].value, None);
        assert!(taints_of("k=v:Never").unwrap_err().to_string().contains("expected KEY=VALUE"));
    }
}
