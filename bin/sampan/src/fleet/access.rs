//! How machines are reached: the flags, and what they come to for one machine.
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use sampan_fleet::connection::HostKeys;
use sampan_fleet::machine::Sudo;
use sampan_fleet::{Address, Ask, Host, HostEntry, Login, Nobody, Plan, Secret, Terminal};

use super::{Usage, tell};

/// Which machine.
#[derive(Clone, clap::Args)]
pub struct Target {
    /// IP address of the machine
    #[arg(long, default_value = "127.0.0.1")]
    ip: IpAddr,
    /// Host name of the machine, instead of --ip
    #[arg(long)]
    host: Option<String>,
}

impl Target {
    pub fn host(&self) -> String {
        self.host.clone().unwrap_or_else(|| self.ip.to_string())
    }
}

/// One machine, or all of a list.
#[derive(Clone, clap::Args)]
pub struct Machines {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    access: Access,
    /// List of hosts (JSON or YAML), instead of --ip
    #[arg(long)]
    hosts: Option<PathBuf>,
}

impl Machines {
    pub fn ways(&self) -> Result<Vec<Way>> {
        match &self.hosts {
            Some(path) => read_plan(path)?.hosts.iter().map(|h| self.access.way_of(h)).collect(),
            None => Ok(vec![self.access.way(&self.target.host())?]),
        }
    }
}

/// How to log in.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "SSH")]
pub struct Access {
    /// User to log in as
    #[arg(long, default_value = "root")]
    pub user: String,
    /// Private key to log in with (default: the agent's keys, then ~/.ssh/id_ed25519, id_ecdsa and id_rsa)
    #[arg(long)]
    pub ssh_key: Option<PathBuf>,
    /// Port of the SSH server
    #[arg(long, default_value_t = 22)]
    pub ssh_port: u16,
    /// Machine to go by way of, [USER@]HOST[:PORT]; several, nearest first, separated by commas
    #[arg(long, value_delimiter = ',')]
    pub ssh_jump: Vec<Address>,
    /// File with the password to log in with; SAMPAN_SSH_PASSWORD gives it directly
    #[arg(long)]
    pub ssh_password_file: Option<PathBuf>,
    /// Become root by sudo when the user is not root
    #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set)]
    pub sudo: bool,
    /// File with sudo's password (default: the one of the login); SAMPAN_SUDO_PASSWORD gives it directly
    #[arg(long)]
    pub sudo_password_file: Option<PathBuf>,
    /// The file of known host keys (default: those of OpenSSH)
    #[arg(long)]
    pub known_hosts: Option<PathBuf>,
    /// Trust and remember the keys of hosts that are met for the first time
    #[arg(long)]
    pub accept_new_host_keys: bool,
    /// The only right fingerprint of the host's key, SHA256:…
    #[arg(long)]
    pub host_key: Option<String>,
}

/// The way to one machine.
#[derive(Clone, Debug)]
pub struct Way {
    pub name: String,
    /// `None` is this machine.
    pub address: Option<Address>,
    pub login: Login,
    pub sudo: Sudo,
}

fn secret(file: Option<&Path>, variable: &str) -> Result<Option<Secret>> {
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        return Ok(Some(Secret::new(text.trim_end_matches(['\r', '\n']))));
    }
    Ok(std::env::var(variable).ok().filter(|v| !v.is_empty()).map(Secret::new))
}

/// `~/x` as the shell would have it, where the shell did not see it.
pub fn expand(path: &Path) -> PathBuf {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_path_buf(),
    }
}

impl Access {
    pub fn way(&self, host: &str) -> Result<Way> {
        Ok(Way {
            name: host.to_string(),
            address: Some(Address { user: self.user.clone(), host: host.to_string(), port: self.ssh_port }),
            login: Login {
                key: self.ssh_key.as_deref().map(expand),
                passphrase: secret(None, "SAMPAN_SSH_KEY_PASSPHRASE")?,
                password: secret(self.ssh_password_file.as_deref(), "SAMPAN_SSH_PASSWORD")?,
                host_keys: HostKeys {
                    file: self.known_hosts.as_deref().map(expand),
                    accept_new: self.accept_new_host_keys,
                    fingerprint: self.host_key.clone(),
                },
                jumps: self.ssh_jump.clone(),
            },
            sudo: Sudo {
                never: !self.sudo,
                password: secret(self.sudo_password_file.as_deref(), "SAMPAN_SUDO_PASSWORD")?,
            },
        })
    }

    /// What a list says of a host wins over the flags.
    pub fn way_of(&self, entry: &HostEntry) -> Result<Way> {
        let mut own = self.clone();
        let set = |own: &mut Option<PathBuf>, given: &Option<PathBuf>| {
            if given.is_some() {
                own.clone_from(given);
            }
        };
        set(&mut own.ssh_key, &entry.ssh_key);
        set(&mut own.ssh_password_file, &entry.ssh_password_file);
        set(&mut own.sudo_password_file, &entry.sudo_password_file);
        if let Some(user) = &entry.user {
            own.user.clone_from(user);
        }
        own.ssh_port = entry.ssh_port.unwrap_or(own.ssh_port);
        own.sudo = entry.sudo.unwrap_or(own.sudo);
        // one fingerprint cannot be right for several
        own.host_key.clone_from(&entry.host_key);
        if !entry.ssh_jump.is_empty() {
            let parsed: Result<Vec<Address>, String> = entry.ssh_jump.iter().map(|j| j.parse()).collect();
            own.ssh_jump = parsed.map_err(|e| Usage(format!("{}: ssh-jump {e}", entry.shown())))?;
        }
        let mut way = own.way(entry.target())?;
        way.name = entry.shown().to_string();
        Ok(way)
    }
}

impl Way {
    /// This machine itself.
    pub fn local() -> Self {
        Self { name: "localhost".to_string(), address: None, login: Login::default(), sudo: Sudo::default() }
    }

    pub async fn reach(&self, ask: &Arc<dyn Ask>) -> Result<Host> {
        let reached = Host::reach(&self.name, self.address.as_ref(), &self.login, &self.sudo, ask.clone());
        let host = reached.await?;
        tell(&host.name, &host.facts.summary());
        Ok(host)
    }
}

/// Whoever sits at the terminal, or nobody.
pub fn ask() -> Arc<dyn Ask> {
    match Terminal::open() {
        Some(terminal) => Arc::new(terminal),
        None => Arc::new(Nobody),
    }
}

pub fn read_plan(path: &Path) -> Result<Plan> {
    let text = match path.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()).context("reading the list of hosts")?,
        false => std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?,
    };
    Plan::parse(&path.display().to_string(), &text).map_err(|e| Usage(e.to_string()).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::{parse, try_parse};

    #[test]
    fn a_list_wins_over_flags() {
        let access: Access =
            parse("--user pi --ssh-key /k --sudo=false --host-key SHA256:a --ssh-jump a@g:2,h");
        let plan = Plan::parse(
            "f",
            "[{ip: 10.0.0.1}, {ip: 10.0.0.2, hostname: two, user: me, ssh-port: 2222, ssh-key: /o, sudo: true, ssh-jump: z}]",
        );
        let plan = plan.unwrap();
        let one = access.way_of(&plan.hosts[0]).unwrap();
        assert_eq!(one.address.unwrap().to_string(), "pi@10.0.0.1");
        assert_eq!((one.login.key, one.sudo.never), (Some("/k".into()), true));
        assert_eq!(one.login.jumps.iter().map(ToString::to_string).collect::<Vec<_>>(), ["a@g:2", "root@h"]);
        assert_eq!(one.login.host_keys.fingerprint, None);
        let two = access.way_of(&plan.hosts[1]).unwrap();
        assert_eq!(
            (two.name.as_str(), two.address.unwrap().to_string().as_str()),
            ("two", "me@10.0.0.2:2222")
        );
        assert_eq!((two.login.key, two.sudo.never, two.login.jumps.len()), (Some("/o".into()), false, 1));
        assert!(try_parse::<Access>("--ssh-jump h:x").is_err());
        assert!(parse::<Access>("--sudo").sudo);
    }
}
