//! What a server or agent will make of a configuration and arguments, found with the program's own flags.
//!
//! So a misspelt argument is told before anything is sent, and flags that this version lacks are known to be lacking.
use anyhow::Result;
use clap::{Args as _, Command};
use sampan_fleet::service::Role;
use serde_yaml_ng::{Mapping, Value};

use super::Usage;

#[derive(Debug, PartialEq, Eq)]
pub struct Effective {
    pub data_dir: String,
    pub port: u16,
    pub node_name: Option<String>,
    /// The server's own kubeconfig.
    pub kubeconfig: String,
    pub runs_node: bool,
    /// Flags that were given, by their names.
    pub given: Vec<(String, Value)>,
}

fn command(role: Role) -> Command {
    let command = Command::new(role.verb()).no_binary_name(true).args_override_self(true);
    match role {
        Role::Server => crate::server::Args::augment_args(command),
        Role::Agent => crate::agent::Args::augment_args(command),
    }
}

/// Whether this version's server or agent has the flag.
pub fn has_flag(role: Role, long: &str) -> bool {
    command(role).get_arguments().any(|a| a.get_long() == Some(long))
}

/// Flags as `config_file` makes them of a configuration.
fn flags(config: &Mapping) -> Vec<String> {
    let mut flags = Vec::new();
    for (key, value) in config {
        let Some(key) = key.as_str() else { continue };
        let values = match value {
            Value::Sequence(values) => values.as_slice(),
            single => std::slice::from_ref(single),
        };
        for value in values {
            match value {
                Value::Bool(true) => flags.push(format!("--{key}")),
                Value::String(text) => flags.push(format!("--{key}={text}")),
                Value::Number(number) => flags.push(format!("--{key}={number}")),
                _ => {}
            }
        }
    }
    flags
}

pub fn of(role: Role, config: &Mapping, args: &[String]) -> Result<Effective> {
    let words = flags(config).into_iter().chain(args.iter().cloned());
    let mut command = command(role);
    let matches = command.try_get_matches_from_mut(words).map_err(|error| {
        let text = error.to_string();
        let told = text.trim_start_matches("error: ").lines().next().unwrap_or_default().to_string();
        Usage(format!("sampan {} would not take these flags: {told}", role.verb()))
    })?;
    let raw = |id: &str| {
        let values = matches.try_get_raw(id).ok().flatten();
        values.and_then(|mut v| v.next_back()).map(|v| v.to_string_lossy().into_owned())
    };
    Ok(Effective {
        data_dir: raw("data_dir").unwrap_or_else(|| "/var/lib/sampan".to_string()),
        port: raw("https_listen_port").and_then(|p| p.parse().ok()).unwrap_or(6443),
        node_name: raw("node_name"),
        kubeconfig: raw("write_kubeconfig").unwrap_or_else(|| "/etc/sampan/sampan.yaml".to_string()),
        runs_node: !matches.try_get_one::<bool>("disable_agent").ok().flatten().copied().unwrap_or(false),
        given: super::datastore::given(&command, &matches),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Mapping {
        match serde_yaml_ng::from_str(text).unwrap() {
            Value::Mapping(map) => map,
            _ => Mapping::new(),
        }
    }

    #[test]
    fn flags_and_configuration() {
        let args = ["--data-dir", "/mnt/ssd", "--disable-agent"].map(String::from);
        let got = of(Role::Server, &config("https-listen-port: 7443\ndata-dir: /old\nnode-name: n"), &args)
            .unwrap();
        assert_eq!((got.data_dir.as_str(), got.port, got.runs_node), ("/mnt/ssd", 7443, false));
        assert_eq!(got.node_name.as_deref(), Some("n"));
        let plain = of(Role::Agent, &config("server: https://a:6443\ntoken: t"), &[]).unwrap();
        assert_eq!((plain.data_dir.as_str(), plain.runs_node), ("/var/lib/sampan", true));
        let text = "tls-san: [a, b]\nembedded-registry: true\ndatastore-endpoint: http://e:2379\ntoken: t";
        let shared = of(Role::Server, &config(text), &["--cluster-cidr=10.9.0.0/16".to_string()]).unwrap();
        let given =
            serde_yaml_ng::to_value(shared.given.into_iter().collect::<std::collections::BTreeMap<_, _>>());
        let want = "{cluster-cidr: 10.9.0.0/16, datastore-endpoint: 'http://e:2379', embedded-registry: true, tls-san: [a, b], token: t}";
        assert_eq!(given.unwrap(), serde_yaml_ng::from_str::<Value>(want).unwrap());
        let wrong = of(Role::Server, &Mapping::new(), &["--no-such".to_string()]).unwrap_err();
        assert!(wrong.to_string().contains("--no-such") && wrong.is::<Usage>(), "{wrong}");
        assert!(has_flag(Role::Server, "tls-san") && !has_flag(Role::Agent, "tls-san"));
    }
}
