//! `sampan certificate`: how a data folder's certificates stand, and having them renewed. Names, flags and output are
//! K3s'.
//!
//! Upstream counterparts: K3s' pkg/cli/cert, kubeadm's `certs`. What stays true: everything goes through the data
//! folder, so that it works with the server or agent running or not; what runs sees what changed there and takes it up at
//! once. Deliberately different from K3s: nothing needs a restart, `rotate` throws nothing away before there is something
//! new, and `rotate-ca` makes the new authority itself when no folder is given.
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use sampan_pki::Authority;
use sampan_pki::rotation::{self, Replacement};
use sampan_world::clock;

pub mod agent;
mod check;
pub mod files;
pub mod node_events;
pub mod server;

use files::Kept;

/// How long a running server or agent is waited for. It acts within a second; an agent has to ask its server.
const TAKEN_UP: Duration = Duration::from_secs(20);

#[derive(Subcommand)]
pub enum Command {
    /// Tell how the certificates stand; fails when one has expired
    Check {
        #[command(flatten)]
        of: Of,
        /// How to tell it
        #[arg(short, long, value_enum, default_value = "text")]
        output: Output,
    },
    /// Renew certificates now, without a restart; of a stopped server or agent, when it starts
    Rotate {
        #[command(flatten)]
        of: Of,
    },
    /// Replace the certificate authority and the service account key, without a restart
    ///
    /// Without --path a new authority is made that the present one signs. What the present one signed stays good until
    /// it ends, and who trusts the present one trusts the new one, so nodes and kubeconfigs go on and follow by
    /// themselves. Take a backup of the data folder first; the files replaced are kept in server/tls-TIME.
    RotateCa {
        /// Where everything is kept
        #[arg(short, long, default_value = files::DATA_DIR)]
        data_dir: PathBuf,
        /// Folder with the new server-ca.crt (with what chains it to the present one) and server-ca.key, or service.key
        #[arg(long)]
        path: Option<PathBuf>,
        /// Replace it though nobody would trust the new one, and trust the present one no more: all nodes have to join
        /// anew, and all kubeconfigs have to be fetched anew
        #[arg(long)]
        force: bool,
    },
}

#[derive(clap::Args)]
pub struct Of {
    /// Where everything is kept
    #[arg(short, long, default_value = files::DATA_DIR)]
    data_dir: PathBuf,
    /// Only these: admin, api-server, kubelet, etcd, certificate-authority; may be repeated
    #[arg(short, long, value_delimiter = ',')]
    service: Vec<String>,
}

impl Of {
    fn kept(&self) -> Result<Vec<Kept>> {
        files::chosen(&self.data_dir, &self.service)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Text,
    Table,
    Json,
}

pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Check { of, output } => check::run(&of.kept()?, output),
        Command::Rotate { of } => rotate(&of),
        Command::RotateCa { data_dir, path, force } => rotate_authority(&data_dir, path.as_deref(), force),
    }
}

fn rotate(of: &Of) -> Result<()> {
    let named = of.service.iter().any(|s| s == files::AUTHORITY);
    if named {
        bail!("{} is not renewed but replaced: use `sampan certificate rotate-ca`", files::AUTHORITY);
    }
    let kept: Vec<Kept> = of.kept()?.into_iter().filter(|k| k.service != files::AUTHORITY).collect();
    for one in &kept {
        one.ask_for_renewal().with_context(|| format!("asking for a new {}", one.path.display()))?;
    }
    let mut late = Vec::new();
    for one in &kept {
        match files::is_free(one.folder())? {
            Some(_) => println!("{}: will be renewed when sampan starts", one.service),
            None if wait_until(|| !one.is_asked_for()) => {
                println!("{}: renewed, {}", one.service, one.validity());
            }
            None => late.push(one.service),
        }
    }
    match late.is_empty() {
        true => Ok(()),
        false => bail!("{}: not renewed yet; sampan goes on trying, its log says why", late.join(", ")),
    }
}

fn rotate_authority(data_dir: &Path, path: Option<&Path>, force: bool) -> Result<()> {
    let tls = data_dir.join("server/tls");
    if !tls.join("server-ca.crt").exists() {
        bail!(
            "{} holds no certificate authority: run this on a server (--data-dir names its data)",
            tls.display()
        );
    }
    let now = clock::now();
    let free = files::is_free(&tls)?;
    if free.is_some() {
        rotation::install(&tls, now).context("ending an earlier replacement")?;
    }
    let (new, source) = match path {
        Some(path) => (Replacement::read(path)?, path.display().to_string()),
        None => {
            let present = Authority::load_or_create(&tls)?;
            (Replacement::generate(&present, force)?, "the new authority".to_string())
        }
    };
    let new = new.checked(&tls, &source, force, now)?;
    new.stage(&tls)?;
    let is_running = free.is_none();
    match is_running {
        true if !wait_until(|| !rotation::staged(&tls).exists()) => {
            let _ = std::fs::remove_dir_all(rotation::staged(&tls));
            bail!("the running server did not take up the new authority: its log says why");
        }
        true => {}
        false => drop(rotation::install(&tls, now)?),
    }
    if new.authority.is_some() {
        let authority = Authority::load_or_create(&tls)?;
        println!(
            "the certificate authority is replaced; joining takes a token with the hash {}",
            authority.hash()
        );
    }
    if new.account_keys.is_some() {
        println!("service accounts' tokens are signed with a new key");
    }
    match (force, is_running) {
        (true, _) => println!("all nodes have to join anew, and kubeconfigs have to be fetched anew"),
        (false, true) => println!("nodes that are connected follow by themselves"),
        (false, false) => println!("the server's certificates are renewed when it starts, nodes then follow"),
    }
    Ok(())
}

/// Polls: only this command waits like this, for some seconds at most.
fn wait_until(done: impl Fn() -> bool) -> bool {
    let step = Duration::from_millis(20);
    for _ in 0..TAKEN_UP.as_millis() / step.as_millis() {
        if done() {
            return true;
        }
        std::thread::sleep(step);
    }
    done()
}
