//! `sampan plan`: a list of hosts turned into the commands that make a cluster of them, as a script to read and to keep.
//! Upstream counterpart: k3sup's cmd/plan.go. Deliberate differences: one server unless --servers says otherwise; several
//! share the etcd that --datastore names, or run one with --cluster.
use std::path::PathBuf;

use anyhow::Result;
use sampan_fleet::{HostEntry, Plan, words};

use super::Usage;
use super::access::{Access, read_plan};
use super::datastore::{DatastoreFlags, SEVERAL};
use super::install::{KubeconfigOut, ServerFlags};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    list: ListedCluster,
    /// Secret that nodes join with (default: the server makes one up); several servers need one
    #[arg(long)]
    token: Option<String>,
    /// Join agents at the same time, in the background
    #[arg(long)]
    background: bool,
}

/// A list of hosts, and the cluster that it is to be.
#[derive(clap::Args)]
pub struct ListedCluster {
    /// JSON or YAML list of hosts; - is standard input
    hosts: PathBuf,
    #[command(flatten)]
    pub layout: Layout,
    #[command(flatten)]
    pub access: Access,
    #[command(flatten)]
    pub out: KubeconfigOut,
}

impl ListedCluster {
    pub fn read(&self) -> Result<Plan> {
        Ok(self.layout.hosts(read_plan(&self.hosts)?))
    }
}

/// What the hosts are to be.
#[derive(Clone, clap::Args)]
#[command(next_help_heading = "Cluster")]
pub struct Layout {
    /// How many hosts without a role of their own are servers; several need --cluster or --datastore
    #[arg(long, default_value_t = 1)]
    pub servers: usize,
    /// The servers run an etcd together, a member each; an odd number of them bears the loss of any less than half
    #[arg(long)]
    pub cluster: bool,
    /// Take so many hosts of the list; 0 takes all
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    #[command(flatten)]
    pub datastore: DatastoreFlags,
    /// More names or addresses for the API's certificate, separated by commas
    #[arg(long, value_delimiter = ',')]
    pub tls_san: Vec<String>,
    /// Arguments for servers, in quotes
    #[arg(long, alias = "server-k3s-extra-args", allow_hyphen_values = true, default_value = "")]
    pub server_extra_args: String,
    /// Arguments for agents, in quotes
    #[arg(long, alias = "agent-k3s-extra-args", allow_hyphen_values = true, default_value = "")]
    pub agent_extra_args: String,
}

impl Layout {
    /// Refuses what cannot be, before any machine is touched.
    pub fn check(&self, servers: usize) -> Result<()> {
        match servers > 1 && !self.datastore.is_given() && !self.cluster {
            true => Err(Usage(format!("{servers} servers: {SEVERAL} (or take --servers 1)")).into()),
            false => Ok(()),
        }
    }

    pub fn hosts(&self, mut plan: Plan) -> Plan {
        if self.limit > 0 {
            plan.hosts.truncate(self.limit);
        }
        plan
    }

    /// A host's arguments: everybody's, then its own name, labels, taints and arguments.
    pub fn extra_args(&self, host: &HostEntry, all: &str) -> String {
        let mut args = vec![all.to_string()];
        args.extend(host.node_name.iter().map(|n| words::quote(&format!("--node-name={n}"))));
        args.extend(host.node_label.iter().map(|l| words::quote(&format!("--node-label={l}"))));
        args.extend(host.node_taint.iter().map(|t| words::quote(&format!("--node-taint={t}"))));
        args.extend(host.extra_args.clone());
        args.retain(|a| !a.trim().is_empty());
        args.join(" ")
    }

    /// Whether the servers run etcd members.
    pub fn has_members(&self) -> bool {
        self.cluster && !self.datastore.is_given()
    }

    /// The flags of the first server; of others, where those do not join it by its URL.
    pub fn server_flags(&self, host: &HostEntry, token: Option<String>) -> ServerFlags {
        ServerFlags {
            tls_san: self.tls_san.clone(),
            cluster: self.cluster,
            token,
            datastore: self.datastore.clone(),
            extra_args: self.extra_args(host, &self.server_extra_args),
            ..ServerFlags::default()
        }
    }
}

pub fn run(args: &Args) -> Result<()> {
    print!("{}", script(args, args.list.read()?)?);
    Ok(())
}

fn script(args: &Args, plan: Plan) -> Result<String> {
    let ListedCluster { layout, out, .. } = &args.list;
    let (servers, agents) = plan.roles(layout.servers);
    let mut text = "#!/bin/sh\nset -e\n".to_string();
    let Some((first, others)) = servers.split_first() else { return Ok(text) };
    layout.check(servers.len())?;
    // the first one's flags fit, or no machine is touched
    layout.server_flags(first, args.token.clone()).wanted(first.target())?;
    let san = layout.tls_san.join(",");
    let mut install = line("sampan install", args, first);
    install.extend(args.token.as_ref().map(|token| format!("--token {}", words::quote(token))));
    let datastore = layout.datastore.given();
    let datastore = || datastore.iter().map(|(flag, value)| format!("--{flag} {}", words::quote(value)));
    install.extend(datastore());
    install.extend(layout.cluster.then(|| "--cluster".to_string()));
    install.push(format!("--local-path {}", words::quote(&out.local_path.display().to_string())));
    install.push(format!("--context {}", words::quote(&out.context)));
    install.extend((!san.is_empty()).then(|| format!("--tls-san {}", words::quote(&san))));
    install.extend(out.merge.then(|| "--merge".to_string()));
    install.extend(extra(&layout.extra_args(first, &layout.server_extra_args)));
    text.push_str(&format!("\necho \"Setting up server {}\"\n{}\n", first.shown(), install.join(" \\\n  ")));
    let token = line("sampan node-token", args, first).join(" ");
    text.push_str(&format!("\necho \"Fetching the server's node token\"\nNODE_TOKEN=$({token})\n"));
    let joins = others.iter().map(|h| (*h, true)).chain(agents.iter().map(|h| (*h, false)));
    for (host, server) in joins {
        let mut join = line("sampan join", args, host);
        join.push(format!("--server-host {}", first.target()));
        join.push("--node-token \"$NODE_TOKEN\"".to_string());
        let all = if server { &layout.server_extra_args } else { &layout.agent_extra_args };
        if server {
            join.push("--server".to_string());
            join.extend(datastore());
            join.extend(layout.cluster.then(|| "--cluster".to_string()));
            join.extend((!san.is_empty()).then(|| format!("--tls-san {}", words::quote(&san))));
        }
        join.extend(extra(&layout.extra_args(host, all)));
        let kind = if server { "server" } else { "agent" };
        let end = if args.background && !server { " &" } else { "" };
        text.push_str(&format!(
            "\necho \"Setting up {kind} {}\"\n{}{end}\n",
            host.shown(),
            join.join(" \\\n  ")
        ));
    }
    if args.background {
        text.push_str("\nwait\n");
    }
    Ok(text)
}

fn extra(args: &str) -> Option<String> {
    (!args.is_empty()).then(|| format!("--extra-args {}", words::quote(args)))
}

/// The command, and how its host is reached.
fn line(command: &str, args: &Args, host: &HostEntry) -> Vec<String> {
    let access = &args.list.access;
    let mut words_of = vec![format!("{command} --host {}", host.target())];
    let mut flag = |name: &str, value: &str| words_of.push(format!("--{name} {}", words::quote(value)));
    let path = |own: &Option<PathBuf>, all: &Option<PathBuf>| {
        own.as_ref().or(all.as_ref()).map(|p| p.display().to_string())
    };
    flag("user", host.user.as_deref().unwrap_or(&access.user));
    if let Some(key) = path(&host.ssh_key, &access.ssh_key) {
        flag("ssh-key", &key);
    }
    let port = host.ssh_port.unwrap_or(access.ssh_port);
    if port != 22 {
        flag("ssh-port", &port.to_string());
    }
    let jumps: Vec<String> = match host.ssh_jump.is_empty() {
        true => access.ssh_jump.iter().map(ToString::to_string).collect(),
        false => host.ssh_jump.clone(),
    };
    if !jumps.is_empty() {
        flag("ssh-jump", &jumps.join(","));
    }
    if let Some(file) = path(&host.ssh_password_file, &access.ssh_password_file) {
        flag("ssh-password-file", &file);
    }
    if let Some(file) = path(&host.sudo_password_file, &access.sudo_password_file) {
        flag("sudo-password-file", &file);
    }
    if let Some(key) = &host.host_key {
        flag("host-key", key);
    }
    if !host.sudo.unwrap_or(access.sudo) {
        words_of.push("--sudo=false".to_string());
    }
    if access.accept_new_host_keys {
        words_of.push("--accept-new-host-keys".to_string());
    }
    words_of
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::parse;

    #[test]
    fn a_script() {
        let line = "hosts.json --user ubuntu --servers 2 --limit 3 --tls-san 10.0.0.100 --merge --background --token 'a b' \
                    --datastore http://10.0.0.9:2379 --server-k3s-extra-args '--node-taint a=b:NoSchedule'";
        let args: Args = parse(line);
        let list = "[{hostname: n1, ip: 10.0.0.1}, {ip: 10.0.0.2, ssh-port: 2222}, {ip: 10.0.0.3, user: pi, node-label: [\"a=b c\"]}, {ip: 10.0.0.4}]";
        let text = script(&args, args.list.layout.hosts(Plan::parse("f", list).unwrap())).unwrap();
        for want in [
            "#!/bin/sh\nset -e\n",
            "echo \"Setting up server n1\"\nsampan install --host 10.0.0.1 \\\n  --user ubuntu \\\n  --token 'a b' \\\n  --datastore http://10.0.0.9:2379 \\\n  --local-path kubeconfig \\\n  --context default \\\n  --tls-san 10.0.0.100 \\\n  --merge \\\n  --extra-args '--node-taint a=b:NoSchedule'\n",
            "NODE_TOKEN=$(sampan node-token --host 10.0.0.1 --user ubuntu)\n",
            "sampan join --host 10.0.0.2 \\\n  --user ubuntu \\\n  --ssh-port 2222 \\\n  --server-host 10.0.0.1 \\\n  --node-token \"$NODE_TOKEN\" \\\n  --server \\\n  --datastore http://10.0.0.9:2379 \\\n  --tls-san 10.0.0.100 \\\n  --extra-args '--node-taint a=b:NoSchedule'\n",
            "sampan join --host 10.0.0.3 \\\n  --user pi \\\n  --server-host 10.0.0.1 \\\n  --node-token \"$NODE_TOKEN\" \\\n  --extra-args ''\\''--node-label=a=b c'\\''' &\n",
            "\nwait\n",
        ] {
            assert!(text.contains(want), "{want}\nin\n{text}");
        }
        assert!(!text.contains("10.0.0.4"));
        let args: Args = parse("hosts.json --servers 2 --cluster");
        let text = script(&args, Plan::parse("f", "[{ip: 10.0.0.1}, {ip: 10.0.0.2}]").unwrap()).unwrap();
        for want in ["--user root \\\n  --cluster \\\n", "\"$NODE_TOKEN\" \\\n  --server \\\n  --cluster\n"] {
            assert!(text.contains(want), "{want}\nin\n{text}");
        }
        let two = || Plan::parse("f", "[{ip: 10.0.0.1}, {ip: 10.0.0.2}]").unwrap();
        for (line, want) in [
            (
                "hosts.json --servers 2",
                "2 servers: servers run an etcd together with --cluster, or share one",
            ),
            ("hosts.json --servers 2 --datastore http://e:2379", "needs --token"),
        ] {
            let refused = script(&parse::<Args>(line), two()).unwrap_err();
            assert!(refused.is::<Usage>() && refused.to_string().contains(want), "{refused}");
        }
    }
}
