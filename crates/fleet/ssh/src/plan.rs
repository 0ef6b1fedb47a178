//! A list of machines, as JSON or YAML: k3sup's `plan` file with more that can be said of each.
//!
//! Upstream counterpart: k3sup's cmd/plan.go (`[{"hostname": …, "ip": …}]`). Deliberate differences: YAML too, defaults
//! for all hosts, a role a host. Unknown keys are errors, as a misspelt one would otherwise be silently without effect.
use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Deserialize;
use serde_yaml_ng::Value;

#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("{file} is no list of hosts: {message}")]
    Format { file: String, message: String },
    #[error("{file}: host {number}: {message}")]
    Host { file: String, number: usize, message: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlanRole {
    Server,
    Agent,
}

/// A machine, or what is true of all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct HostEntry {
    pub hostname: Option<String>,
    pub ip: Option<String>,
    pub role: Option<PlanRole>,
    pub user: Option<String>,
    pub ssh_key: Option<PathBuf>,
    pub ssh_port: Option<u16>,
    /// `user@host:port`, nearest first.
    #[serde(deserialize_with = "one_or_many")]
    pub ssh_jump: Vec<String>,
    pub ssh_password_file: Option<PathBuf>,
    pub sudo_password_file: Option<PathBuf>,
    pub sudo: Option<bool>,
    /// The fingerprint of the host's key.
    pub host_key: Option<String>,
    pub node_name: Option<String>,
    #[serde(deserialize_with = "one_or_many")]
    pub node_label: Vec<String>,
    #[serde(deserialize_with = "one_or_many")]
    pub node_taint: Vec<String>,
    /// Arguments for the server or agent, as on a command line.
    pub extra_args: Option<String>,
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Option::<Either>::deserialize(from)? {
        None => Vec::new(),
        Some(Either::One(one)) => {
            one.split(',').map(|s| s.trim().to_string()).filter(|s| !s.is_empty()).collect()
        }
        Some(Either::Many(many)) => many,
    })
}

impl HostEntry {
    /// Where it is reached: its address, else its name.
    pub fn target(&self) -> &str {
        self.ip.as_deref().or(self.hostname.as_deref()).unwrap_or_default()
    }

    /// What the owner calls it.
    pub fn shown(&self) -> &str {
        self.hostname.as_deref().or(self.ip.as_deref()).unwrap_or_default()
    }

    fn or(self, all: &Self) -> Self {
        let list = |own: Vec<String>, all: &[String]| if own.is_empty() { all.to_vec() } else { own };
        Self {
            hostname: self.hostname,
            ip: self.ip,
            role: self.role.or(all.role),
            user: self.user.or_else(|| all.user.clone()),
            ssh_key: self.ssh_key.or_else(|| all.ssh_key.clone()),
            ssh_port: self.ssh_port.or(all.ssh_port),
            ssh_jump: list(self.ssh_jump, &all.ssh_jump),
            ssh_password_file: self.ssh_password_file.or_else(|| all.ssh_password_file.clone()),
            sudo_password_file: self.sudo_password_file.or_else(|| all.sudo_password_file.clone()),
            sudo: self.sudo.or(all.sudo),
            host_key: self.host_key,
            node_name: self.node_name,
            node_label: list(self.node_label, &all.node_label),
            node_taint: list(self.node_taint, &all.node_taint),
            extra_args: self.extra_args.or_else(|| all.extra_args.clone()),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub hosts: Vec<HostEntry>,
}

impl Plan {
    /// A list of hosts, or `hosts:` beside `defaults:`. JSON is YAML.
    pub fn parse(file: &str, text: &str) -> Result<Self, PlanError> {
        let bad = |message: String| PlanError::Format { file: file.to_string(), message };
        let value: Value = serde_yaml_ng::from_str(text).map_err(|e| bad(e.to_string()))?;
        let (hosts, defaults) = match value {
            Value::Sequence(hosts) => (hosts, Value::Null),
            Value::Mapping(mut map) => {
                let hosts = map.remove("hosts");
                let defaults = map.remove("defaults").unwrap_or_default();
                if let Some(key) = map.keys().next() {
                    let key = serde_yaml_ng::to_string(key).unwrap_or_default();
                    return Err(bad(format!("`{}` is unknown; it has `hosts` and `defaults`", key.trim())));
                }
                match hosts {
                    Some(Value::Sequence(hosts)) => (hosts, defaults),
                    _ => return Err(bad("`hosts` is no list".to_string())),
                }
            }
            _ => return Err(bad("expected a list".to_string())),
        };
        let defaults: HostEntry = match defaults {
            Value::Null => HostEntry::default(),
            given => serde_yaml_ng::from_value(given).map_err(|e| bad(format!("defaults: {e}")))?,
        };
        let (mut found, mut targets): (Vec<HostEntry>, BTreeSet<String>) = (Vec::new(), BTreeSet::new());
        for (index, value) in hosts.into_iter().enumerate() {
            let wrong =
                |message: String| PlanError::Host { file: file.to_string(), number: index + 1, message };
            let entry: HostEntry = serde_yaml_ng::from_value(value).map_err(|e| wrong(e.to_string()))?;
            let entry = entry.or(&defaults);
            let target = entry.target();
            if target.is_empty() {
                return Err(wrong("it has neither `ip` nor `hostname`".to_string()));
            }
            if target.contains(|c: char| c.is_whitespace() || "'\"$`;&|<>\\/".contains(c)) {
                return Err(wrong(format!("{target:?} is no address")));
            }
            if !targets.insert(format!("{target}:{}", entry.ssh_port.unwrap_or(22))) {
                return Err(wrong(format!("{target} is there twice")));
            }
            found.push(entry);
        }
        if found.is_empty() {
            return Err(bad("it is empty".to_string()));
        }
        Ok(Self { hosts: found })
    }

    /// Servers and agents. Hosts that say nothing are servers until there are `servers`, in their order.
    pub fn roles(&self, servers: usize) -> (Vec<&HostEntry>, Vec<&HostEntry>) {
        let mut missing =
            servers.saturating_sub(self.hosts.iter().filter(|h| h.role == Some(PlanRole::Server)).count());
        self.hosts.iter().partition(|host| match host.role {
            Some(role) => role == PlanRole::Server,
            None if missing > 0 => {
                missing -= 1;
                true
            }
            None => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn k3sups_own_file() {
        let text = r#"[{"hostname": "node-1", "ip": "192.168.128.102"},
            {"hostname": "node-2", "ip": "192.168.128.103"}, {"hostname": "node-3", "ip": "192.168.128.104"}]"#;
        let plan = Plan::parse("hosts.json", text).unwrap();
        let (servers, agents) = plan.roles(1);
        assert_eq!((servers[0].shown(), servers[0].target()), ("node-1", "192.168.128.102"));
        assert_eq!(agents.len(), 2);
        assert_eq!(plan.roles(3).1.len(), 0);
    }

    #[test]
    fn defaults_and_roles() {
        let text = "defaults: {user: pi, ssh-key: /k, node-label: [zone=home], ssh-jump: 'a@gate, b@inner'}\n\
            hosts:\n- {ip: 10.0.0.1, role: agent}\n- {hostname: two.lan, user: root, ssh-port: 2222, node-label: disk=ssd}\n\
            - {ip: 10.0.0.3, ssh-jump: []}\n";
        let plan = Plan::parse("hosts.yaml", text).unwrap();
        let [one, two, _] = &plan.hosts[..] else { panic!() };
        assert_eq!(
            (one.user.as_deref(), one.node_label.as_slice()),
            (Some("pi"), &["zone=home".to_string()][..])
        );
        assert_eq!((two.user.as_deref(), two.ssh_port), (Some("root"), Some(2222)));
        assert_eq!(two.node_label, ["disk=ssd"]);
        assert_eq!(two.ssh_jump, ["a@gate", "b@inner"]);
        let (servers, agents) = plan.roles(1);
        assert_eq!((servers[0].target(), agents.len()), ("two.lan", 2));
    }

    #[test]
    fn faults_are_named() {
        for (text, want) in [
            ("", "expected a list"),
            ("[]", "it is empty"),
            ("a: [", "no list of hosts"),
            ("{hosts: x}", "`hosts` is no list"),
            ("{host: []}", "`host` is unknown"),
            ("[{hostname: a}, {ip: ''}]", "host 2: it has neither"),
            ("[{ip: a, sshkey: x}]", "host 1: unknown field `sshkey`"),
            ("[{ip: a, role: worker}]", "unknown variant `worker`"),
            ("[{ip: a}, {ip: a}]", "host 2: a is there twice"),
            ("[{ip: 'a; rm -rf /'}]", "is no address"),
            ("[{ip: a, ssh-port: 70000}]", "host 1"),
        ] {
            let error = Plan::parse("f", text).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}
