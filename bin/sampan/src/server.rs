//! `sampan server`: the control plane, and (unless told not to) a node on the same machine, in one process. Any number of
//! servers share an etcd ([`crate::datastore`]), or run one together ([`crate::members`]); what one of them alone may do, who leads does ([`crate::leader`]).
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use sampan_admission::Chain;
use sampan_apiserver::authn::{self, ClientLookup, ServiceAccountTokens, VirtualResources};
use sampan_apiserver::authz::{Authorizer, bootstrap_policy};
use sampan_apiserver::config::{Cidr, OpenId};
use sampan_apiserver::{ApiServer, Config};
use sampan_client::{Identity, Informers};
use sampan_store::Store;
use sampan_tunnel::Nodes;

use crate::agent::tunnels;
use crate::bootstrap_data::{BootstrapData, EtcdAuthority, Settings};
use crate::certificate::node_events::NodeEvents;
use crate::certificate::server::{self as certificates, ServerCertificates};
use crate::control_plane::ControlPlane;
use crate::datastore::{self, Datastore, DatastoreArgs};
use crate::join::Cluster;
use crate::leader::{self, Election};
use crate::members::join::Offers;
use crate::members::removal::Removals;
use crate::members::{self, Member, MemberArgs, Own};
use crate::mirror::{self, Directory};
use crate::node::{self, NodeArgs};
use crate::tunnel_endpoint::{self, Access, Endpoint};

#[derive(clap::Args)]
pub struct Args {
    /// Secret that nodes join with; made up and kept in <data-dir>/server/token when not given. With a datastore of
    /// several servers it is needed, the same for all
    #[arg(short, long, env = "SAMPAN_TOKEN", help_heading = "Cluster")]
    token: Option<String>,
    /// Port of the API
    #[arg(long, default_value_t = 6443, help_heading = "Cluster")]
    https_listen_port: u16,
    /// Address that the API listens on
    #[arg(long, default_value = "0.0.0.0", help_heading = "Cluster")]
    bind_address: IpAddr,
    /// Address that nodes and pods reach the API at (default: the node's)
    #[arg(long, help_heading = "Cluster")]
    advertise_address: Option<IpAddr>,
    /// More names or addresses for the API's certificate, may be repeated
    #[arg(long, help_heading = "Cluster")]
    tls_san: Vec<String>,
    /// Addresses of pods
    #[arg(long, default_value = "10.42.0.0/16", help_heading = "Cluster")]
    cluster_cidr: String,
    /// Addresses of services
    #[arg(long, default_value = "10.43.0.0/16", help_heading = "Cluster")]
    service_cidr: String,
    /// Ports for services of type NodePort
    #[arg(long, default_value = "30000-32767", help_heading = "Cluster")]
    service_node_port_range: String,
    /// Address of the cluster's DNS (default: the tenth service address)
    #[arg(long, help_heading = "Cluster")]
    cluster_dns: Option<IpAddr>,
    #[arg(long, default_value = "cluster.local", help_heading = "Cluster")]
    cluster_domain: String,
    /// Where the administrator's kubeconfig is written
    #[arg(short = 'o', long, default_value = "/etc/sampan/sampan.yaml", help_heading = "Cluster")]
    write_kubeconfig: PathBuf,
    /// Mode of that file, octal
    #[arg(long, default_value = "600", help_heading = "Cluster")]
    write_kubeconfig_mode: String,
    /// Let all nodes hand each other the images that they have, of the registries below `mirrors` in each node's
    /// registries.yaml (an empty entry will do, "*" is all). Nodes keep layers as they came for this, besides unpacked
    #[arg(long, help_heading = "Cluster")]
    embedded_registry: bool,
    /// Run no node on this machine
    #[arg(long, help_heading = "Cluster")]
    disable_agent: bool,
    /// How long certificates are good that this server signs (90s, 8760h); for tests
    #[arg(long, hide = true, default_value = "8760h")]
    certificate_lifetime: String,
    #[command(flatten)]
    datastore: DatastoreArgs,
    #[command(flatten)]
    members: MemberArgs,
    #[command(flatten)]
    node: NodeArgs,
}

impl Args {
    fn certificate_lifetime_seconds(&self) -> Result<i64> {
        crate::token::seconds(&self.certificate_lifetime).context("--certificate-lifetime")
    }

    /// Who this server is among etcd's members.
    fn own<'a>(&'a self, folder: &'a Path, same: &'a Settings) -> Result<Own<'a>> {
        Ok(Own {
            folder,
            name: self.node.name()?,
            address: self.node.ip()?,
            token: self.token.as_deref(),
            settings: same,
            certificate_lifetime_seconds: self.certificate_lifetime_seconds()?,
            is_debugged: self.node.is_debugged(),
        })
    }
}

pub fn run(args: Args) -> Result<()> {
    sampan_telemetry::init(&args.node.log_filter());
    let data_dir = args.node.data_dir.clone();
    match crate::node_upgrade::run(&data_dir, serve(args)) {
        Err(error) if error.is::<leader::Lost>() => {
            tracing::error!("{error:#}: starting again");
            let exe = std::env::current_exe().context("finding this program")?;
            Err(crate::node_upgrade::replace(&exe).context(error))
        }
        done => done,
    }
}

async fn serve(args: Args) -> Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = args.node.data_dir.join("server");
    let addresses = Addresses::of(&args)?;
    let same = addresses.same();
    if args.members.cluster_reset {
        return members::reset(&args.members, &args.own(&folder, &same)?).await;
    }
    let datastore = args.datastore.parse()?;
    let way = members::way(&folder, &args.members, datastore.as_ref())?;
    let Some(way) = way else {
        datastore::check_folder(&folder, datastore.as_ref())?;
        return serve_with(&args, &addresses, datastore, None, &AtomicBool::new(false)).await;
    };
    let own = args.own(&folder, &same)?;
    let is_up = AtomicBool::new(false);
    // until it is up nobody else heeds a signal, and etcd would be left behind
    let ended_early = async {
        node::wait_for_end().await;
        if is_up.load(Ordering::Acquire) {
            std::future::pending::<()>().await;
        }
    };
    tokio::pin!(ended_early);
    let member = tokio::select! {
        member = Member::start(&args.members, &way, &own) => member?,
        () = &mut ended_early => return Ok(()),
    };
    let done = tokio::select! {
        done = serve_with(&args, &addresses, Some(member.datastore()), Some(&member), &is_up) => done,
        () = &mut ended_early => Ok(()),
    };
    member.end().await;
    done
}

/// Serves until it is to end; `is_up` says from when on that is heeded here.
async fn serve_with(
    args: &Args,
    addresses: &Addresses,
    datastore: Option<Datastore>,
    member: Option<&Member>,
    is_up: &AtomicBool,
) -> Result<()> {
    let started = sampan_world::clock::monotonic();
    let folder = args.node.data_dir.join("server");
    make_private(&folder.join("tls"))?;
    let etcd = member.map(|member| member.certificate.files().shared()).transpose()?;
    let (store, shared) = open_store(args, &folder, addresses, datastore.as_ref(), etcd.as_ref()).await?;
    let mut settings = settings(args, &folder, addresses, shared.clone())?;
    settings.member = member.map(|member| member.certificate.clone());
    let certificates = ServerCertificates::open(settings)?;

    let nodes = Arc::new(Nodes::default());
    let endpoint = Arc::new(Endpoint {
        certificates: certificates.clone(),
        nodes: nodes.clone(),
        cluster: addresses.cluster.clone(),
        access: std::sync::OnceLock::new(),
        programs: crate::programs::Programs::new(folder.join("binaries"))?,
        advertise: addresses.advertise,
        offers: Offers { shared, members: member.map(Member::local).transpose()? },
    });
    let mut config = Config::new(store.clone());
    config.dialer = Some(nodes.clone());
    config.service_cidrs = vec![addresses.service_cidr];
    config.node_ports = addresses.node_ports.clone();
    config.advertise = Some(addresses.advertise);
    config.extra = Some(endpoint.router());
    config.extra_prefixes = tunnel_endpoint::PREFIXES.iter().map(|p| (*p).to_string()).collect();
    let (configuration, keys) =
        (authn::service_account::openid_configuration(), certificates.account_key.clone());
    config.openid = Some(OpenId { configuration, keys: keys.clone() });
    let api = ApiServer::new(config).await.context("starting the API server")?;

    let client = api.client(Identity::loopback(), "sampan-apiserver");
    let informers = Informers::new(client.clone());
    let lookup: Arc<ClientLookup> = Arc::new(ClientLookup(client.clone()));
    let service_accounts = Arc::new(ServiceAccountTokens::new(keys, lookup.clone()));
    let authenticator = Arc::new(authn::Authenticator::new(authn::Options {
        service_accounts: service_accounts.clone(),
        client_verifier: certificates.verifier.clone(),
        lookup,
        static_tokens: certificates.static_tokens(),
        anonymous: true,
    }));
    api.bootstrap().await.map_err(|status| anyhow::anyhow!("preparing the cluster: {}", status.0.message))?;
    bootstrap_policy::ensure(&client).await.context("writing the default roles")?;
    let_nodes_see_services(&client).await.context("letting nodes see services")?;
    let authorizer = Authorizer::new(&informers);
    authorizer.ready().await;
    api.install_admission(Arc::new(Chain::new(&sampan_admission::Context::new(informers.clone()))));
    api.install_reviews(Arc::new(VirtualResources {
        authenticator: authenticator.clone(),
        authorizer: authorizer.clone(),
        service_accounts,
    }));
    api.install_authorization(Arc::new(authorizer));
    api.install_authentication(authenticator.clone());
    let images = args.embedded_registry.then(|| Directory::new(nodes.clone(), client.clone()));
    let _ = endpoint.access.set(Access {
        authenticator: authenticator.clone(),
        client: client.clone(),
        images: images.clone(),
    });

    let config = Arc::new(sampan_pki::tls::server_config(certificates.serving.clone())?);
    let listen = SocketAddr::new(args.bind_address, args.https_listen_port);
    let listener =
        tokio::net::TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    let serving = api.clone();
    let server = tokio::spawn(async move { serving.serve(listener, config).await });
    certificates.write_kubeconfig()?;
    tracing::info!(address = %listen, ms = started.elapsed().as_millis() as u64, "the API is served");

    let options = sampan_controllers::Options {
        cluster_cidr: Some(args.cluster_cidr.clone()),
        service_cidr: Some(args.service_cidr.clone()),
        root_ca_pem: certificates.bundle(),
        ..sampan_controllers::Options::default()
    };
    let (name, registries) = (args.node.name()?, &args.node.private_registry);
    let removals = member.map(|_| Removals::new(&store, &folder));
    let plane = ControlPlane::new(&api, options, &endpoint.programs, registries, images.as_ref(), removals)?;
    let mut election = Election::new(&name);
    let announced = match store.is_shared() {
        true => {
            plane.campaign(&mut election);
            Some(api.announce(&name))
        }
        false => {
            plane.start();
            None
        }
    };
    let of_server = store.is_shared().then_some(name.as_str());
    crate::manifests::start(client.clone(), folder.join("manifests"), of_server)?;
    let mut events = None;
    if !args.disable_agent {
        let etcd = match member {
            Some(member) => Some((store.clone(), member.id().await?)),
            None => None,
        };
        tokio::spawn(show_role(client, args.node.name()?, etcd));
        let identity = Identity::new(&format!("system:node:{}", args.node.name()?), &["system:nodes"]);
        let client = api.client(identity, "kubelet");
        events = Some(NodeEvents::new(client.clone(), &args.node.name()?));
        let mirror = match images {
            Some(images) => Some(mirror::of_server(images, args.node.name()?, &certificates)?),
            None => None,
        };
        let others = store.is_shared().then(|| others(&certificates, addresses.advertise)).flatten();
        node::start_local(&args.node, &addresses.cluster, client, &nodes, mirror, others).await?;
    }
    certificates.keep(authenticator, events)?;
    is_up.store(true, Ordering::Release);
    let fault: Option<anyhow::Error> = tokio::select! {
        () = node::wait_for_end() => None,
        lost = election.lost() => Some(lost.into()),
        gone = gone(member) => Some(gone.into()),
    };
    tracing::info!("ending: pods run on");
    tokio::join!(election.end(), async {
        if let Some(announced) = announced {
            announced.withdraw().await;
        }
    });
    certificates.end();
    api.shut_down();
    let _ = server.await;
    store.close().await.context("closing the store")?;
    fault.map_or(Ok(()), Err)
}

/// Waits until the cluster has removed this server's etcd member, where it has one.
async fn gone(member: Option<&Member>) -> members::Removed {
    match member {
        Some(member) => member.gone().await,
        None => std::future::pending().await,
    }
}

/// How the server's own node lets other servers reach it.
fn others(certificates: &Arc<ServerCertificates>, myself: SocketAddr) -> Option<tunnels::Others> {
    let shared = certificates.clone();
    let trusted = Box::new(move || shared.authority().certificate_pem().to_string());
    Some(tunnels::Others { myself, own: certificates.node()?, trusted })
}

/// The cluster's store: in the data folder, or an etcd, with what its servers have in common.
async fn open_store(
    args: &Args,
    folder: &Path,
    addresses: &Addresses,
    datastore: Option<&Datastore>,
    etcd: Option<&EtcdAuthority>,
) -> Result<(Store, Option<Arc<BootstrapData>>)> {
    let Some(datastore) = datastore else {
        make_private(&folder.join("db"))?;
        let options = sampan_store::Options::new(folder.join("db/state.db"))
            .deferred(sampan_apiserver::storage::DEFERRED_PREFIXES);
        return Ok((Store::open(options).context("opening the store")?, None));
    };
    crate::bootstrap_data::candidates(folder, args.token.as_deref())?;
    let store = datastore.connect().await?;
    let (token, endpoints) = (args.token.as_deref(), &datastore.endpoints);
    let shared = BootstrapData::join(&store, folder, endpoints, token, &addresses.same(), etcd).await?;
    Ok((store, Some(shared)))
}

/// Shows this server's node with the role `control-plane`, and `etcd` where it has a member, as K3s does. No kubelet may
/// give itself a role. Which member stands for the node is written down.
async fn show_role(client: kube::Client, node: String, etcd: Option<(Store, u64)>) {
    use kube::api::{Patch, PatchParams};
    let nodes = kube::Api::<k8s_openapi::api::core::v1::Node>::all(client);
    let mut labels = serde_json::json!({"node-role.kubernetes.io/control-plane": "true"});
    if etcd.is_some() {
        labels["node-role.kubernetes.io/etcd"] = "true".into();
    }
    let patch = serde_json::json!({"metadata": {"labels": labels}});
    let mut delay = std::time::Duration::from_millis(100);
    loop {
        let shown = async {
            let node = nodes.patch(&node, &PatchParams::default(), &Patch::Merge(&patch)).await?;
            match &etcd {
                Some((store, id)) => members::removal::register(store, &node, *id).await,
                None => Ok(()),
            }
        };
        // it registers in a moment
        let Err(error) = shown.await else { return };
        tracing::debug!("labelling node {node}: {error:#}");
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(std::time::Duration::from_secs(10));
    }
}

/// Agents do kube-proxy's work themselves, so nodes get its role.
async fn let_nodes_see_services(client: &kube::Client) -> Result<(), kube::Error> {
    use k8s_openapi::api::rbac::v1::{ClusterRoleBinding, RoleRef, Subject};
    let mut binding = ClusterRoleBinding {
        role_ref: RoleRef {
            api_group: Some("rbac.authorization.k8s.io".to_string()),
            kind: "ClusterRole".to_string(),
            name: "system:node-proxier".to_string(),
        },
        subjects: Some(vec![Subject {
            api_group: Some("rbac.authorization.k8s.io".to_string()),
            kind: "Group".to_string(),
            name: "system:nodes".to_string(),
            ..Subject::default()
        }]),
        ..ClusterRoleBinding::default()
    };
    binding.metadata.name = Some("sampan:node-proxier".to_string());
    let bindings = kube::Api::<ClusterRoleBinding>::all(client.clone());
    match bindings.create(&kube::api::PostParams::default(), &binding).await {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

/// The addresses that follow from the flags.
struct Addresses {
    advertise: SocketAddr,
    service_cidr: Cidr,
    node_ports: std::ops::RangeInclusive<u16>,
    cluster: Cluster,
}

impl Addresses {
    /// What must be equal on all servers of a cluster.
    fn same(&self) -> Settings {
        let cluster = &self.cluster;
        let same = [
            ("--cluster-cidr", &cluster.cluster_cidr),
            ("--service-cidr", &cluster.service_cidr),
            ("--cluster-dns", &cluster.cluster_dns),
            ("--cluster-domain", &cluster.cluster_domain),
        ];
        same.map(|(flag, value)| (flag.to_string(), value.clone())).into()
    }

    fn of(args: &Args) -> Result<Self> {
        let Some(service_cidr) = Cidr::parse(&args.service_cidr) else {
            bail!("--service-cidr {}: expected an address range such as 10.43.0.0/16", args.service_cidr)
        };
        if Cidr::parse(&args.cluster_cidr).is_none() {
            bail!("--cluster-cidr {}: expected an address range such as 10.42.0.0/16", args.cluster_cidr);
        }
        let ip = match args.advertise_address {
            Some(ip) => ip,
            None => args.node.ip()?,
        };
        let node_ports = parse_ports(&args.service_node_port_range).with_context(|| {
            format!("--service-node-port-range {}: expected FIRST-LAST", args.service_node_port_range)
        })?;
        let cluster_dns = args.cluster_dns.unwrap_or_else(|| service_cidr.nth(10));
        let cluster = Cluster {
            cluster_cidr: args.cluster_cidr.clone(),
            service_cidr: args.service_cidr.clone(),
            cluster_dns: cluster_dns.to_string(),
            cluster_domain: args.cluster_domain.clone(),
            embedded_registry: args.embedded_registry,
        };
        Ok(Self { advertise: SocketAddr::new(ip, args.https_listen_port), service_cidr, node_ports, cluster })
    }
}

fn parse_ports(text: &str) -> Option<std::ops::RangeInclusive<u16>> {
    let (first, last) = text.split_once('-')?;
    let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
    (first > 0 && first <= last).then_some(first..=last)
}

pub fn make_private(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("making {} (--data-dir names another place)", path.display()))
}

/// What the flags say of certificates.
fn settings(
    args: &Args,
    folder: &Path,
    addresses: &Addresses,
    shared: Option<Arc<BootstrapData>>,
) -> Result<certificates::Settings> {
    let own = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", "127.0.0.1"];
    let mut names: Vec<String> = own.map(String::from).to_vec();
    names.push(format!("kubernetes.default.svc.{}", args.cluster_domain));
    names.push(addresses.service_cidr.nth(1).to_string());
    names.push(addresses.advertise.ip().to_string());
    names.push(args.node.name()?);
    names.extend(args.node.ip().ok().map(|ip| ip.to_string()));
    names.extend(args.tls_san.iter().cloned());
    let mode = &args.write_kubeconfig_mode;
    Ok(certificates::Settings {
        folder: folder.to_path_buf(),
        token: args.token.clone(),
        names: certificates::names(names),
        node: (!args.disable_agent).then(|| args.node.name()).transpose()?,
        kubeconfig: args.write_kubeconfig.clone(),
        kubeconfig_mode: u32::from_str_radix(mode, 8)
            .with_context(|| format!("--write-kubeconfig-mode {mode}: expected octal, as in 644"))?,
        server: format!("https://127.0.0.1:{}", args.https_listen_port),
        lifetime_seconds: args.certificate_lifetime_seconds()?,
        shared,
        member: None,
    })
}

#[cfg(test)]
mod tests {
    use super::parse_ports;

    #[test]
    fn node_port_ranges() {
        assert_eq!(parse_ports("30000-32767"), Some(30000..=32767));
        for bad in ["", "1", "5-4", "0-9", "a-b", "1-70000"] {
            assert_eq!(parse_ports(bad), None, "{bad}");
        }
    }
}
