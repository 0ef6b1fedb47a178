//! The program: parses the command line and hands over to one file a subcommand.
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod agent;
mod agent_client;
mod bootstrap_data;
mod certificate;
mod config_file;
mod control_plane;
mod datastore;
mod fleet;
mod folder_changes;
mod image;
mod join;
mod kubelet_args;
mod lab;
mod leader;
mod manifest;
mod manifests;
mod members;
mod mirror;
mod node;
mod node_upgrade;
mod platforms;
mod programs;
mod registry;
mod server;
mod token;
mod tunnel_endpoint;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Kubernetes for small, cheap, mixed machines.
#[derive(Parser)]
#[command(name = "sampan", version = VERSION, args_override_self = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What `--version` prints: ours, and the Kubernetes release it speaks.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (Kubernetes v1.36)");

#[derive(Subcommand)]
enum Command {
    /// Run the control plane, and a node on the same machine
    Server(Box<server::Args>),
    /// Run a node that joins a server
    Agent(Box<agent::Args>),
    /// Manage the tokens that nodes join with
    #[command(subcommand)]
    Token(token::Command),
    /// Check, renew and replace certificates
    #[command(subcommand)]
    Certificate(certificate::Command),
    /// Serve images as an OCI registry
    #[command(subcommand)]
    Registry(registry::Command),
    #[command(flatten)]
    Fleet(fleet::Command),
    /// Run whole clusters on this one machine, for trying and testing
    #[command(subcommand)]
    Lab(lab::Command),
    /// Make and push manifest lists: one image name for several architectures
    #[command(subcommand)]
    Manifest(manifest::Command),
    /// Images of this node, of registries and of archives
    #[command(subcommand)]
    Image(image::Command),
    /// Have this machine's etcd member leave its cluster
    #[command(hide = true)]
    Leave(members::removal::Args),
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    // the allocator asks for huge pages: two of them would be most of what a shim uses. Containers get them back.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    // these change namespaces or must stay tiny: before any thread exists
    if let Some(code) = sampan_lab::hidden(&args[1..]) {
        return ExitCode::from(u8::try_from(code).unwrap_or(1));
    }
    if args.get(1).map(String::as_str) == Some("shim") {
        return sampan_runtime::shim_main(&args[2..]);
    }
    if args.get(1).map(String::as_str) == Some("step") {
        return sampan_runtime::step_main(&args[2..]);
    }
    let args = match config_file::merge(args) {
        Ok(args) => args,
        Err(error) => return fail(&error),
    };
    let result = match Cli::parse_from(args).command {
        Command::Server(args) => server::run(*args),
        Command::Agent(args) => agent::run(*args),
        Command::Token(command) => token::run(command),
        Command::Certificate(command) => certificate::run(command),
        Command::Manifest(command) => manifest::run(command),
        Command::Image(command) => image::run(command),
        Command::Leave(args) => members::removal::run(&args),
        Command::Registry(command) => registry::run(command),
        Command::Fleet(command) => return fleet::run(command),
        Command::Lab(command) => return lab::run(command).unwrap_or_else(|e| fail(&e)),
    };
    result.map_or_else(|e| fail(&e), |()| ExitCode::SUCCESS)
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("sampan: {error:#}");
    ExitCode::FAILURE
}

/// The runtime of the long-running subcommands: two workers serve small machines better than one a core.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(2);
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(16)
        .thread_keep_alive(std::time::Duration::from_secs(5))
        .enable_all()
        .build()?)
}
