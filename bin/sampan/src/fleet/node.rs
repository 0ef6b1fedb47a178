//! One machine made a node: looked at, judged, given program, configuration and service, waited for.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use sampan_fleet::binary::{self, Binary};
use sampan_fleet::machine::Root;
use sampan_fleet::preflight::{self, Purpose, Severity};
use sampan_fleet::ready::{self, Wait};
use sampan_fleet::service::{CONFIG, Role, Service, Written};
use sampan_fleet::{Ask, Host, Installation, install, words};
use serde_yaml_ng::{Mapping, Value};

use super::access::Way;
use super::effective::{self, Effective};
use super::{Unfit, tell};

/// How nodes are set up, whichever.
#[derive(Clone, clap::Args)]
#[command(next_help_heading = "Installation")]
pub struct Setup {
    /// Folder that the program is put into
    #[arg(long, default_value = "/usr/local/bin")]
    pub bin_dir: String,
    /// A release's bundle (sampan-bundle.tar), or a folder with it or with sampan-amd64, sampan-arm64 and sampan-arm
    /// (default: beside this program)
    #[arg(long)]
    pub binary_dir: Option<PathBuf>,
    /// Answer yes: enable cgroups on a Raspberry Pi and reboot it
    #[arg(short, long)]
    pub yes: bool,
    /// Checks whose failure is only told: architecture, clock, memory, disk, cgroups, kernel, ports, role, skew, all
    #[arg(long, value_delimiter = ',')]
    pub ignore_preflight: Vec<String>,
    /// Seconds to wait until the node is Ready; 0 does not wait
    #[arg(long, default_value_t = 180)]
    pub wait: u64,
    /// Print the commands that are run, for repairing by hand
    #[arg(long)]
    pub print_command: bool,
    /// Taken from k3sup's scripts, without effect: the program that is sent has one version, its own
    #[arg(long, hide = true)]
    k3s_version: Option<String>,
    #[arg(long, hide = true)]
    k3s_channel: Option<String>,
}

impl Setup {
    pub fn note_k3s_flags(&self) {
        if self.k3s_version.is_some() || self.k3s_channel.is_some() {
            eprintln!(
                "--k3s-version and --k3s-channel have no effect: what is sent is sampan {}",
                crate::VERSION
            );
        }
    }
}

/// What a machine is to become.
#[derive(Clone)]
pub struct Wanted {
    pub role: Role,
    pub config: Vec<(String, Value)>,
    pub extra_args: Vec<String>,
    /// Files that the configuration names.
    pub files: Vec<Written>,
}

impl Wanted {
    /// What is there already.
    pub fn nothing_new(role: Role) -> Self {
        Self { role, config: Vec::new(), extra_args: Vec::new(), files: Vec::new() }
    }

    /// Refuses flags that the program would refuse, before any machine is touched.
    pub fn check(&self) -> Result<()> {
        effective::of(
            self.role,
            &self.config.iter().map(|(k, v)| (k.as_str().into(), v.clone())).collect(),
            &self.extra_args,
        )
        .map(drop)
    }
}

impl Wanted {
    /// Whether the server is to run a member of its cluster's etcd.
    pub fn runs_etcd(&self) -> bool {
        let is_on = |(key, value): &(String, Value)| match key.as_str() {
            "cluster-init" => value.as_bool() == Some(true),
            "server" => true,
            _ => false,
        };
        self.role == Role::Server && self.given().iter().any(is_on)
    }

    /// Flags of configuration and arguments.
    fn given(&self) -> Vec<(String, Value)> {
        let config = self.config.iter().map(|(k, v)| (k.as_str().into(), v.clone())).collect();
        effective::of(self.role, &config, &self.extra_args)
            .map(|effective| effective.given)
            .unwrap_or_default()
    }
}

/// A machine that can become a node.
pub struct Prepared {
    pub host: Host,
    pub binary: Binary,
    /// The program there is the one to be sent.
    has_binary: bool,
    /// The etcd to be sent, where the machine needs one and has none of its own.
    etcd: Option<Binary>,
}

/// Looks at the machine and judges it; nothing is changed but, when that is agreed to, a Pi's kernel command line.
pub async fn prepare(way: &Way, wanted: &Wanted, setup: &Setup, ask: &Arc<dyn Ask>) -> Result<Prepared> {
    let asked = sampan_world::clock::monotonic();
    let mut host = way.reach(ask).await?;
    let mut rebooted = false;
    loop {
        let binary = binary_for(&host, setup).await?;
        let there = install::installed_digest(&host, &setup.bin_dir).await?;
        let has_binary = there.as_deref() == Some(binary.digest.as_str());
        let etcd = etcd_for(&host, wanted, setup).await?;
        let mut purpose =
            purpose(wanted, setup, if has_binary { 0 } else { binary.size_bytes }, asked.elapsed());
        purpose.needs_etcd &= etcd.is_none();
        purpose.binary_bytes += etcd.as_ref().map_or(0, |etcd| etcd.size_bytes);
        let found = preflight::check(&host.facts, &purpose);
        let curable = found.has("cgroups") && host.facts.cmdline_path.is_some() && !rebooted;
        if curable && cure(way, &host, setup, ask).await? {
            rebooted = true;
            host = come_back(way, ask).await?;
            continue;
        }
        for finding in &found.0 {
            let word = if finding.severity == Severity::Error { "error" } else { "warning" };
            tell(&host.name, &format!("{word}: {} [{}]", finding.message, finding.check));
        }
        if let Some(first) = found.errors().next() {
            return Err(Unfit(format!("{}: {}", host.name, first.message)).into());
        }
        if let Root::Missing(why) = &host.root {
            let (host, what, why) = (host.name.clone(), "installing".to_string(), why.clone());
            return Err(sampan_fleet::MachineError::NoRoot { host, what, why }.into());
        }
        // flags of a configuration that an owner left there may not fit
        look(&host, wanted).await?;
        return Ok(Prepared { host, binary, has_binary, etcd });
    }
}

/// What is sent to that machine.
pub async fn binary_for(host: &Host, setup: &Setup) -> Result<Binary> {
    let arch = host.facts.architecture().map_err(|why| Unfit(format!("{}: {why}", host.name)))?;
    let own = std::env::current_exe().context("finding this program")?;
    let from = setup.binary_dir.clone();
    let found = tokio::task::spawn_blocking(move || binary::find(arch, from.as_deref(), &own)).await;
    Ok(found.context("reading the program")??)
}

/// The etcd that is sent to that machine, as `etcd-ARCH` in the folder of binaries.
async fn etcd_for(host: &Host, wanted: &Wanted, setup: &Setup) -> Result<Option<Binary>> {
    let has_own = host.facts.etcd.as_ref().is_some_and(|path| !path.ends_with(install::ETCD));
    let is_named = wanted.given().iter().any(|(flag, _)| flag == "etcd");
    let Some(folder) = setup.binary_dir.clone().filter(|_| wanted.runs_etcd() && !has_own && !is_named)
    else {
        return Ok(None);
    };
    let arch = host.facts.architecture().map_err(|why| Unfit(format!("{}: {why}", host.name)))?;
    let found = tokio::task::spawn_blocking(move || binary::beside(&folder, "etcd", arch)).await;
    Ok(found.context("reading etcd")?.transpose()?)
}

fn purpose(wanted: &Wanted, setup: &Setup, binary_bytes: u64, asked_for: Duration) -> Purpose {
    let config: Mapping = wanted.config.iter().map(|(k, v)| (k.as_str().into(), v.clone())).collect();
    let port = effective::of(wanted.role, &config, &wanted.extra_args).map_or(6443, |e| e.port);
    let runs_etcd = wanted.runs_etcd();
    let mut ports = if wanted.role == Role::Server { vec![port] } else { Vec::new() };
    ports.extend(runs_etcd.then_some([2379, 2380]).into_iter().flatten());
    Purpose {
        ports,
        needs_etcd: runs_etcd && !wanted.given().iter().any(|(flag, _)| flag == "etcd"),
        binary_bytes,
        service: wanted.role.service().to_string(),
        now_s: sampan_world::clock::now().as_second(),
        asked_for_s: i64::try_from(asked_for.as_secs()).unwrap_or(i64::MAX),
        ignored: setup.ignore_preflight.clone(),
    }
}

/// Enables cgroups and reboots, when that is agreed to.
async fn cure(way: &Way, host: &Host, setup: &Setup, ask: &Arc<dyn Ask>) -> Result<bool> {
    if way.address.is_none() {
        return Ok(false);
    }
    let agreed = setup.yes || {
        let (ask, path) = (ask.clone(), host.facts.cmdline_path.clone().unwrap_or_default());
        let question =
            format!("The memory control group of {} is off. Enable it in {path} and reboot now?", host.name);
        tokio::task::spawn_blocking(move || ask.confirm(&question)).await.ok().flatten().unwrap_or(false)
    };
    if !agreed || !install::enable_cgroups(host).await? {
        return Ok(false);
    }
    tell(&host.name, "the memory control group is enabled; rebooting");
    install::reboot(host).await;
    Ok(true)
}

/// Waits for a machine that reboots.
async fn come_back(way: &Way, ask: &Arc<dyn Ask>) -> Result<Host> {
    const LIMIT: Duration = Duration::from_secs(300);
    let start = sampan_world::clock::monotonic();
    loop {
        tokio::time::sleep(Duration::from_secs(8)).await;
        match way.reach(ask).await {
            Ok(host) => return Ok(host),
            Err(error) if start.elapsed() > LIMIT => {
                return Err(error).context("after its reboot, which was 5 minutes ago");
            }
            Err(_) => {}
        }
    }
}

/// Sends the program, unless it is there.
pub async fn send(prepared: &Prepared, setup: &Setup, alone: bool) -> Result<bool> {
    let (host, binary) = (&prepared.host, &prepared.binary);
    let mut new_etcd = false;
    if let Some(etcd) = &prepared.etcd {
        new_etcd = install::send_etcd(host, etcd, &setup.bin_dir).await?;
        let told = if new_etcd { "sent and verified" } else { "there already" };
        tell(&host.name, &format!("etcd is {told}"));
    }
    if prepared.has_binary {
        tell(&host.name, "the program is there already");
        return Ok(new_etcd);
    }
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let live = alone && rustix::termios::isatty(rustix::stdio::stderr());
    let told = std::sync::atomic::AtomicU64::new(0);
    let progress = |sent: u64, of: u64| {
        let percent = sent * 100 / of.max(1);
        let before = told.load(std::sync::atomic::Ordering::Relaxed);
        let step = if live { 1 } else { 50 };
        if percent >= before + step {
            told.store(percent, std::sync::atomic::Ordering::Relaxed);
            let line = format!("sending the program, {:.1} of {:.1} MB", megabytes(sent), megabytes(of));
            match live {
                true => eprint!("\r{}: {line}", host.name),
                false => tell(&host.name, &line),
            }
        }
    };
    let start = sampan_world::clock::monotonic();
    let sent = install::send_binary(host, binary, &setup.bin_dir, &progress).await;
    if live {
        eprintln!();
    }
    let changed = sent?;
    let seconds = start.elapsed().as_secs_f64();
    tell(&host.name, &format!("{:.1} MB sent and verified in {seconds:.1} s", megabytes(binary.size_bytes)));
    Ok(changed || new_etcd)
}

/// A node that runs.
pub struct Settled {
    pub effective: Effective,
}

/// Configuration and service; then waits until the node is Ready.
pub async fn settle(
    prepared: &Prepared,
    wanted: &Wanted,
    setup: &Setup,
    new_binary: bool,
) -> Result<Settled> {
    let host = &prepared.host;
    let wanted = &with_etcd(prepared, wanted, setup);
    let effective = look(host, wanted).await?;
    let service = Service {
        role: wanted.role,
        bin_dir: setup.bin_dir.clone(),
        data_dir: effective.data_dir.clone(),
        args: wanted.extra_args.clone(),
    };
    if setup.print_command {
        let words = words::quote_all(&wanted.extra_args);
        eprintln!(
            "{}: {} {} {words} # flags besides: {CONFIG}",
            host.name,
            service.program(),
            wanted.role.verb()
        );
    }
    let installation =
        Installation { service: service.clone(), config: wanted.config.clone(), files: wanted.files.clone() };
    let changed = install::configure(host, &installation).await?;
    let node = name_of(host, &effective);
    let heard = ready::last_heard(host, &kubeconfig_path(wanted.role, &effective), &node).await;
    let anew = changed || new_binary;
    install::start(host, &service, anew).await?;
    tell(
        &host.name,
        &format!("{} {}", service.role.service(), if anew { "started" } else { "runs already" }),
    );
    if setup.wait > 0 && effective.runs_node {
        wait(host, &service, &effective, setup.wait, heard.filter(|_| anew)).await?;
    }
    Ok(Settled { effective })
}

/// Names the etcd that we sent, now or before.
fn with_etcd(prepared: &Prepared, wanted: &Wanted, setup: &Setup) -> Wanted {
    let mut wanted = wanted.clone();
    let is_sent = prepared.host.facts.etcd.as_ref().is_some_and(|path| path.ends_with(install::ETCD));
    if wanted.runs_etcd() && (prepared.etcd.is_some() || is_sent) {
        let path = format!("{}/{}", setup.bin_dir, install::ETCD);
        wanted.config.push(("etcd".to_string(), path.into()));
    }
    wanted
}

/// What the configuration there and ours come to together.
pub async fn look(host: &Host, wanted: &Wanted) -> Result<Effective> {
    let text = host.root("reading the configuration", "[ ! -e \"$1\" ] || cat \"$1\"", &[CONFIG]).await?;
    let merged = install::merge_config(&text, &wanted.config)
        .map_err(|message| install::InstallError::Config { host: host.name.clone(), message })?;
    let merged: Mapping = serde_yaml_ng::from_str(&merged).unwrap_or_default();
    effective::of(wanted.role, &merged, &wanted.extra_args)
        .with_context(|| format!("{} ({CONFIG} there counts too)", host.name))
}

/// The node's name: as configured, else the machine's.
pub fn name_of(host: &Host, effective: &Effective) -> String {
    let own = || host.facts.name.clone().unwrap_or_default().to_lowercase();
    effective.node_name.clone().unwrap_or_else(own)
}

/// The kubeconfig there that may read the node.
pub fn kubeconfig_path(role: Role, effective: &Effective) -> String {
    match role {
        Role::Server => effective.kubeconfig.clone(),
        Role::Agent => format!("{}/agent/kubelet.kubeconfig", effective.data_dir),
    }
}

/// Waits until the node is Ready, and was heard of later than `after`.
pub async fn wait(
    host: &Host,
    service: &Service,
    effective: &Effective,
    seconds: u64,
    after: Option<jiff::Timestamp>,
) -> Result<()> {
    let (path, node) = (kubeconfig_path(service.role, effective), name_of(host, effective));
    let start = sampan_world::clock::monotonic();
    let waited = Wait {
        host,
        kubeconfig_path: &path,
        node: &node,
        limit: Duration::from_secs(seconds),
        after,
        service,
        tell: &|text| tell(&host.name, &format!("node {node}: {text}")),
    };
    ready::wait(&waited).await?;
    tell(&host.name, &format!("node {node} is Ready ({:.1} s)", start.elapsed().as_secs_f64()));
    Ok(())
}

/// A file there that only root reads.
pub async fn read_root(host: &Host, path: &str) -> Result<String> {
    let what = format!("reading {path}");
    Ok(host.root(&what, "cat \"$1\"", &[path]).await?)
}

/// The arguments of the service as it is.
pub async fn running_args(host: &Host, role: Role) -> Result<Vec<String>> {
    let service = Service { role, bin_dir: String::new(), data_dir: String::new(), args: Vec::new() };
    let text = read_root(host, &service.path(host.facts.init)).await?;
    Ok(args_of(&text, role))
}

/// What stands behind the subcommand in a service's file, whichever init it is for.
fn args_of(text: &str, role: Role) -> Vec<String> {
    let of_line = |line: &str| {
        if let Some(line) = line.strip_prefix("ExecStart=") {
            let words = words::split(line).ok()?;
            return Some(words.iter().map(|w| w.replace("%%", "%").replace("$$", "$")).collect::<Vec<_>>());
        }
        if let Some(line) = line.strip_prefix("command_args=") {
            // one word that is evaluated once more
            return words::split(words::split(line).ok()?.first()?).ok();
        }
        words::split(line.strip_prefix("\"$PROGRAM\"")?.strip_suffix('&')?).ok()
    };
    let all = text.lines().map(str::trim).filter_map(of_line).next_back().unwrap_or_default();
    all.into_iter().skip_while(|w| w != role.verb()).skip(1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampan_fleet::facts::Init;

    #[test]
    fn a_services_arguments_are_found_again() {
        let args = ["--node-label=a=it's 5 % $x", "--data-dir", "/mnt/a b"].map(String::from).to_vec();
        for (init, args) in [Init::Systemd, Init::OpenRc, Init::Sysv]
            .into_iter()
            .flat_map(|i| [(i, args.clone()), (i, Vec::new())])
        {
            let service = Service {
                role: Role::Agent,
                bin_dir: "/usr/local/bin".to_string(),
                data_dir: "/mnt/a b".to_string(),
                args: args.clone(),
            };
            let file = service.files(init).pop().unwrap();
            assert_eq!(args_of(&file.text, Role::Agent), args, "{}", file.text);
        }
    }
}
