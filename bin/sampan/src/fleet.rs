//! `sampan install`, `join`, `apply` and their like: clusters on machines that are reached over SSH.
//!
//! Upstream counterpart: k3sup's cmd/. What is told of the progress goes to standard error, answers to standard output.
//! Exit codes say what went wrong, see [`EXIT_CODES`].
mod access;
mod apply;
mod datastore;
mod effective;
mod exec;
mod get_config;
mod install;
mod join;
mod killall;
mod node;
mod plan;
mod ready;
mod uninstall;
mod upgrade;

use std::process::ExitCode;

use clap::Subcommand;
use sampan_fleet::ready::ReadyError;
use sampan_fleet::{ConnectError, InstallError, MachineError};

pub const EXIT_CODES: &str = "Exit codes: 0 done, 1 something else, 2 wrong usage, 3 the machine cannot be reached, \
4 it lets nobody in (wrong password, refused key), 5 its host key is not right, 6 preflight: the machine cannot be a node \
(architecture, disk, memory, clock, cgroups, ports), 7 root cannot be become, 8 the node does not become Ready, \
9 the program did not arrive (disk full, digest)";

#[derive(Subcommand)]
pub enum Command {
    /// Install a server on a machine over SSH, and fetch its kubeconfig
    #[command(after_help = EXIT_CODES)]
    Install(Box<install::Args>),
    /// Install an agent, or another server, on a machine over SSH, and join it to a server
    #[command(after_help = EXIT_CODES)]
    Join(Box<join::Args>),
    /// Print the commands that make a cluster of a list of hosts
    Plan(Box<plan::Args>),
    /// Make a cluster of a list of hosts, several at a time
    #[command(after_help = EXIT_CODES)]
    Apply(Box<apply::Args>),
    /// Wait until all nodes of a cluster are Ready
    Ready(ready::Args),
    /// Fetch the kubeconfig of a server
    #[command(after_help = EXIT_CODES)]
    GetConfig(get_config::Args),
    /// Print the token that nodes join a server with
    #[command(after_help = EXIT_CODES)]
    NodeToken(get_config::TokenArgs),
    /// Run a command on machines over SSH
    Exec(exec::Args),
    /// Bring machines to this version, one by one, and back when a node does not become Ready
    #[command(after_help = EXIT_CODES)]
    Upgrade(Box<upgrade::Args>),
    /// Remove sampan from machines, with all that it kept there
    #[command(after_help = EXIT_CODES)]
    Uninstall(uninstall::Args),
    /// End all pods of this machine, and remove interfaces, tables and groups
    #[command(hide = true)]
    Killall(killall::Args),
}

pub fn run(command: Command) -> ExitCode {
    let runtime = match crate::runtime() {
        Ok(runtime) => runtime,
        Err(error) => return crate::fail(&error),
    };
    let done = runtime.block_on(async {
        match command {
            Command::Install(args) => install::run(&args).await,
            Command::Join(args) => join::run(&args).await,
            Command::Plan(args) => plan::run(&args),
            Command::Apply(args) => apply::run(&args).await,
            Command::Ready(args) => ready::run(&args).await,
            Command::GetConfig(args) => get_config::run(&args).await,
            Command::NodeToken(args) => get_config::run_token(&args).await,
            Command::Exec(args) => return Ok(exec::run(&args).await),
            Command::Upgrade(args) => upgrade::run(&args).await,
            Command::Uninstall(args) => uninstall::run(&args).await,
            Command::Killall(args) => killall::run(&args),
        }
        .map(|()| 0_u8)
    });
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("sampan: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// A machine that cannot be a node; the findings were told.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unfit(pub String);

/// Flags that do not fit together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

fn exit_code(error: &anyhow::Error) -> u8 {
    let connect = |e: &ConnectError| match e {
        e if e.is_host_key() => 5,
        e if e.is_refusal() => 4,
        ConnectError::KnownHosts { .. } => 5,
        _ => 3,
    };
    let machine = |e: &MachineError| match e {
        MachineError::Connect(e) => connect(e),
        MachineError::NoRoot { .. } => 7,
        MachineError::NoSpace { .. } => 9,
        _ => 1,
    };
    if let Some(e) = error.downcast_ref::<ConnectError>() {
        return connect(e);
    }
    if let Some(e) = error.downcast_ref::<MachineError>() {
        return machine(e);
    }
    match error.downcast_ref::<InstallError>() {
        Some(InstallError::Machine(e)) => return machine(e),
        Some(InstallError::Digest { .. } | InstallError::DoesNotStart { .. }) => return 9,
        _ => {}
    }
    match () {
        () if error.is::<Usage>() || error.is::<clap::Error>() => 2,
        () if error.is::<Unfit>() || error.is::<sampan_fleet::binary::BinaryError>() => 6,
        () if error.is::<ReadyError>() => 8,
        () => 1,
    }
}

/// A line about a machine.
pub fn tell(host: &str, text: &str) {
    eprintln!("{host}: {text}");
}

#[cfg(test)]
mod tests {
    use clap::{ArgMatches, Args};

    use super::*;

    /// The flags of one subcommand, from a line as a shell would split it.
    pub fn try_parse<A: Args>(line: &str) -> Result<A, clap::Error> {
        let command = A::augment_args(clap::Command::new("x").no_binary_name(true));
        let matches: ArgMatches = command.try_get_matches_from(sampan_fleet::words::split(line).unwrap())?;
        A::from_arg_matches(&matches)
    }

    pub fn parse<A: Args>(line: &str) -> A {
        try_parse(line).unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    #[test]
    fn exit_codes() {
        let address = "pi@h".to_string();
        let refused = || ConnectError::Refused {
            address: address.clone(),
            tried: "the password".into(),
            takes: "password".into(),
        };
        let unknown = ConnectError::HostKeyUnknown {
            address: address.clone(),
            kind: "ed25519".into(),
            fingerprint: "SHA256:x".into(),
        };
        let no_root = MachineError::NoRoot { host: "h".into(), what: "x".into(), why: "y".into() };
        let full = MachineError::NoSpace { host: "h".into(), said: "No space left on device".into() };
        let gone = ConnectError::NoAnswer { address: address.clone(), seconds: 1 };
        for (error, want) in [
            (anyhow::Error::new(refused()).context("more"), 4),
            (MachineError::from(refused()).into(), 4),
            (InstallError::from(MachineError::from(unknown)).into(), 5),
            (no_root.into(), 7),
            (InstallError::from(full).into(), 9),
            (gone.into(), 3),
            (Unfit("x".into()).into(), 6),
            (Usage("x".into()).into(), 2),
            (anyhow::anyhow!("other"), 1),
        ] {
            assert_eq!(exit_code(&error), want, "{error:#}");
        }
    }
}
