//! `sampan lab`: clusters on this machine.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Subcommand;
use sampan_lab::{Lab, LabState, Up};

#[derive(Subcommand)]
pub enum Command {
    /// Make a cluster; the first node is the server
    Up {
        #[command(flatten)]
        lab: Name,
        /// The nodes' architectures, in order
        #[arg(long, value_delimiter = ',', default_value = "amd64,arm64,arm")]
        nodes: Vec<String>,
        /// Port of the API on 127.0.0.1; 0 takes a free one
        #[arg(long, default_value_t = 0)]
        api_port: u16,
        /// Folder of OCI archives that every node imports
        #[arg(long)]
        images: Option<PathBuf>,
        /// Run Debian's docker-registry in the lab, as registry.lab:5000
        #[arg(long)]
        registry: bool,
        /// Make machines without an agent, for trying `sampan install` and `sampan join` on
        #[arg(long)]
        bare: bool,
        /// Seconds to wait until all nodes are Ready; 0 does not wait
        #[arg(long, default_value_t = 120)]
        wait: u64,
        /// Argument for the server, may be repeated
        #[arg(long, allow_hyphen_values = true)]
        server_arg: Vec<String>,
        /// Argument for the agents, may be repeated
        #[arg(long, allow_hyphen_values = true)]
        agent_arg: Vec<String>,
    },
    /// End a cluster and remove all of it
    Down(Name),
    /// List clusters and their nodes
    Ls,
    /// Run a command in a node
    Exec {
        #[command(flatten)]
        lab: Name,
        /// A node's name, or `hub`
        node: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Print the kubeconfig
    Kubeconfig(Name),
    /// Print a node's log
    Logs {
        #[command(flatten)]
        lab: Name,
        node: String,
    },
    /// Start a node's agent (the server, on the first node)
    Start(Node),
    /// End a node's agent; its containers run on
    Stop {
        #[command(flatten)]
        node: Node,
        /// With SIGKILL
        #[arg(long)]
        kill: bool,
    },
    /// Take a node off the network
    Cut(Node),
    /// Put a node back on the network
    Heal(Node),
    /// Set a node's clock off by some seconds
    Clock {
        #[command(flatten)]
        node: Node,
        #[arg(allow_hyphen_values = true)]
        seconds: i64,
    },
}

#[derive(clap::Args)]
pub struct Name {
    /// The lab's name
    #[arg(long, default_value = "lab", env = "SAMPAN_LAB")]
    name: String,
}

#[derive(clap::Args)]
pub struct Node {
    #[command(flatten)]
    lab: Name,
    node: String,
}

pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Up { lab, nodes, api_port, images, registry, bare, wait, server_arg, agent_arg } => {
            let up = Up {
                name: lab.name,
                nodes,
                api_port,
                images,
                registry,
                bare,
                server_args: server_arg,
                agent_args: agent_arg,
            };
            up_and_wait(&up, if bare { 0 } else { wait })?;
        }
        Command::Down(lab) => {
            Lab::open(&lab.name)?.down()?;
            println!("lab {} is gone", lab.name);
        }
        Command::Ls => list(),
        Command::Exec { lab, node, command } => {
            let code = Lab::open(&lab.name)?.exec(&node, &command)?;
            return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
        }
        Command::Kubeconfig(lab) => {
            let kubeconfig = Lab::open(&lab.name)?.kubeconfig();
            print!(
                "{}",
                kubeconfig.context("the server has not written its kubeconfig yet; see `sampan lab logs`")?
            );
        }
        Command::Logs { lab, node } => {
            let path = Lab::open(&lab.name)?.log_path(&node)?;
            let mut file =
                std::fs::File::open(&path).with_context(|| format!("reading {}", path.display()))?;
            std::io::copy(&mut file, &mut std::io::stdout().lock())?;
        }
        Command::Start(node) => Lab::open(&node.lab.name)?.start(&node.node)?,
        Command::Stop { node, kill } => Lab::open(&node.lab.name)?.stop(&node.node, kill)?,
        Command::Cut(node) => Lab::open(&node.lab.name)?.set_wire(&node.node, false)?,
        Command::Heal(node) => Lab::open(&node.lab.name)?.set_wire(&node.node, true)?,
        Command::Clock { node, seconds } => Lab::open(&node.lab.name)?.set_clock(&node.node, seconds)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up_and_wait(up: &Up, wait_seconds: u64) -> Result<()> {
    let lab = Lab::up(up)?;
    let count = lab.state.nodes.len();
    eprintln!("lab {}: {count} nodes started, API at https://127.0.0.1:{}", up.name, lab.state.api_port);
    if wait_seconds == 0 {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let limit = std::time::Duration::from_secs(wait_seconds);
    let ready = runtime.block_on(async { tokio::time::timeout(limit, wait_ready(&lab)).await });
    match ready {
        Ok(result) => result?,
        Err(_) => {
            anyhow::bail!(
                "not all nodes are Ready after {wait_seconds} s; see `sampan lab logs --name {} NODE`",
                up.name
            )
        }
    }
    eprintln!("use it:  export KUBECONFIG=$(mktemp); sampan lab kubeconfig --name {} > $KUBECONFIG", up.name);
    Ok(())
}

/// Waits until every node says Ready, telling each once.
async fn wait_ready(lab: &Lab) -> Result<()> {
    use k8s_openapi::api::core::v1::Node;
    let pause = std::time::Duration::from_millis(200);
    let kubeconfig = loop {
        match lab.kubeconfig() {
            Some(text) => break text,
            None => {
                check_alive(lab)?;
                tokio::time::sleep(pause).await;
            }
        }
    };
    let client = crate::node::client_of_kubeconfig(&kubeconfig).await?;
    let nodes = kube::Api::<Node>::all(client);
    let mut told: Vec<String> = Vec::new();
    while told.len() < lab.state.nodes.len() {
        for node in nodes.list(&kube::api::ListParams::default()).await.map(|l| l.items).unwrap_or_default() {
            let name = node.metadata.name.clone().unwrap_or_default();
            let conditions = node.status.and_then(|s| s.conditions).unwrap_or_default();
            let ready = conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True");
            if ready && !told.contains(&name) {
                eprintln!("node {name} is Ready");
                told.push(name);
            }
        }
        check_alive(lab)?;
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// Waiting for a node whose process has ended would be in vain.
fn check_alive(lab: &Lab) -> Result<()> {
    for node in &lab.state.nodes {
        if !node.agent.as_ref().is_some_and(|agent| agent.is_alive()) {
            let log = std::fs::read_to_string(lab.log_path(&node.name)?).unwrap_or_default();
            anyhow::bail!(
                "the agent of node {} has ended: {}",
                node.name,
                log.lines().last().unwrap_or_default()
            );
        }
    }
    Ok(())
}

fn list() {
    println!("{:<12} {:<12} {:<8} {:<14} {:<8} API", "LAB", "NODE", "ARCH", "IP", "AGENT");
    for name in LabState::all() {
        let Ok(lab) = LabState::load(&name) else { continue };
        for node in &lab.nodes {
            let agent = match &node.agent {
                Some(agent) if agent.is_alive() => "runs",
                _ => "stopped",
            };
            let api = format!("https://127.0.0.1:{}", lab.api_port);
            println!("{name:<12} {:<12} {:<8} {:<14} {agent:<8} {api}", node.name, node.arch, node.ip);
        }
    }
}
