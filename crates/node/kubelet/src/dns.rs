//! A pod's hostname, hosts file and resolv.conf.
//!
//! Upstream counterparts: pkg/kubelet/network/dns/dns.go, kubelet_pods.go (GeneratePodHostNameAndDomain,
//! managedHostsFileContent), whose texts containers see.
use std::net::IpAddr;
use std::path::Path;

use k8s_openapi::api::core::v1::{Pod, PodDNSConfig};
use kube::ResourceExt;

use crate::config::KubeletConfig;

const MAX_HOSTNAME: usize = 63;

/// What resolv.conf says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolver {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

impl Resolver {
    pub fn parse(text: &str) -> Self {
        let mut resolver = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => resolver.servers.extend(words.next().map(str::to_string)),
                Some("search") => {
                    resolver.searches = words.filter(|w| *w != ".").map(str::to_string).collect()
                }
                Some("options") => resolver.options = words.map(str::to_string).collect(),
                _ => {}
            }
        }
        resolver
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        if !self.searches.is_empty() {
            out.push_str(&format!("search {}\n", self.searches.join(" ")));
        }
        for server in &self.servers {
            out.push_str(&format!("nameserver {server}\n"));
        }
        if !self.options.is_empty() {
            out.push_str(&format!("options {}\n", self.options.join(" ")));
        }
        out
    }

    fn add(&mut self, config: &PodDNSConfig) {
        let add = |list: &mut Vec<String>, more: &Option<Vec<String>>| {
            for item in more.iter().flatten() {
                if !list.contains(item) {
                    list.push(item.clone());
                }
            }
        };
        add(&mut self.servers, &config.nameservers);
        add(&mut self.searches, &config.searches);
        for option in config.options.iter().flatten() {
            let name = option.name.clone().unwrap_or_default();
            self.options.retain(|o| o.split(':').next() != Some(name.as_str()));
            self.options.push(match option.value.as_deref() {
                Some(value) if !value.is_empty() => format!("{name}:{value}"),
                _ => name,
            });
        }
    }
}

/// What the pod's dnsPolicy and dnsConfig make.
pub fn resolver(pod: &Pod, config: &KubeletConfig) -> Resolver {
    let spec = pod.spec.clone().unwrap_or_default();
    let host = || Resolver::parse(&std::fs::read_to_string(&config.resolv_conf).unwrap_or_default());
    let is_cluster = match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "ClusterFirst" => spec.host_network != Some(true),
        "ClusterFirstWithHostNet" => true,
        _ => false,
    };
    let mut resolver = if spec.dns_policy.as_deref() == Some("None") {
        Resolver::default()
    } else if is_cluster && !config.cluster_dns.is_empty() {
        let domain = &config.cluster_domain;
        let namespace = pod.namespace().unwrap_or_default();
        let mut searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
        searches.extend(host().searches.into_iter().filter(|s| s != domain));
        Resolver {
            servers: config.cluster_dns.iter().map(ToString::to_string).collect(),
            searches,
            options: vec!["ndots:5".to_string()],
        }
    } else {
        host()
    };
    if let Some(own) = &spec.dns_config {
        resolver.add(own);
    }
    resolver
}

/// The pod's hostname and, with a subdomain, its domain.
pub fn hostname(pod: &Pod, config: &KubeletConfig) -> Result<(String, String), String> {
    let spec = pod.spec.clone().unwrap_or_default();
    if let Some(name) = spec.hostname_override.filter(|h| !h.is_empty()) {
        return Ok((name, String::new()));
    }
    let name = spec.hostname.filter(|h| !h.is_empty()).unwrap_or_else(|| pod.name_any());
    let end = name.len().min(MAX_HOSTNAME);
    let hostname = name.get(..end).unwrap_or(&name).trim_end_matches(['-', '.']).to_string();
    let domain = match spec.subdomain.filter(|s| !s.is_empty()) {
        Some(subdomain) => {
            format!("{subdomain}.{}.svc.{}", pod.namespace().unwrap_or_default(), config.cluster_domain)
        }
        None => String::new(),
    };
    Ok((hostname, domain))
}

/// What `uname -n` says in the pod.
pub fn node_name_in_pod(pod: &Pod, config: &KubeletConfig) -> Result<String, String> {
    let (hostname, domain) = hostname(pod, config)?;
    if pod.spec.as_ref().and_then(|s| s.set_hostname_as_fqdn) != Some(true) || domain.is_empty() {
        return Ok(hostname);
    }
    let full = format!("{hostname}.{domain}");
    if full.len() > 64 {
        return Err(format!(
            "failed to construct FQDN from pod hostname and cluster domain, FQDN {full} is too long (64 characters is the max, {} characters requested)",
            full.len()
        ));
    }
    Ok(full)
}

/// The managed /etc/hosts.
pub fn hosts(pod: &Pod, config: &KubeletConfig, ips: &[IpAddr], node_hosts: &Path) -> String {
    let spec = pod.spec.clone().unwrap_or_default();
    let mut out = String::new();
    if spec.host_network == Some(true) {
        out.push_str("# Kubernetes-managed hosts file (host network).\n");
        out.push_str(&std::fs::read_to_string(node_hosts).unwrap_or_default());
    } else {
        out.push_str("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n");
        out.push_str(
            "::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\n",
        );
        out.push_str("fe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n");
        let (hostname, domain) = hostname(pod, config).unwrap_or_default();
        for ip in ips {
            match domain.as_str() {
                "" => out.push_str(&format!("{ip}\t{hostname}\n")),
                domain => out.push_str(&format!("{ip}\t{hostname}.{domain}\t{hostname}\n")),
            }
        }
    }
    let aliases = spec.host_aliases.unwrap_or_default();
    if !aliases.is_empty() {
        out.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            out.push_str(&format!("{}\t{}\n", alias.ip, alias.hostnames.unwrap_or_default().join("\t")));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        let mut spec = spec;
        spec["containers"] = json!([]);
        serde_json::from_value(json!({"metadata": {"name": "web-0", "namespace": "ns"}, "spec": spec}))
            .unwrap()
    }

    #[test]
    fn resolv_conf_by_policy() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = KubeletConfig::new("n", dir.path().into());
        config.cluster_dns = vec!["10.43.0.10".parse().unwrap()];
        config.resolv_conf = dir.path().join("resolv.conf");
        std::fs::write(&config.resolv_conf, "nameserver 9.9.9.9\nsearch lan\noptions edns0\n").unwrap();
        let cluster = "search ns.svc.cluster.local svc.cluster.local cluster.local lan\nnameserver 10.43.0.10\noptions ndots:5\n";
        let host = "search lan\nnameserver 9.9.9.9\noptions edns0\n";
        let own = json!({"nameservers": ["1.1.1.1"], "searches": ["x"], "options": [{"name": "ndots", "value": "2"}]});
        let cases = [
            (json!({}), cluster),
            (json!({"hostNetwork": true}), host),
            (json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}), cluster),
            (json!({"dnsPolicy": "Default"}), host),
            (
                json!({"dnsPolicy": "None", "dnsConfig": own}),
                "search x\nnameserver 1.1.1.1\noptions ndots:2\n",
            ),
            (
                json!({"dnsPolicy": "ClusterFirst", "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]}}),
                &cluster.replace(":5", ":2"),
            ),
        ];
        for (spec, want) in cases {
            assert_eq!(resolver(&pod(spec.clone()), &config).text(), want, "{spec}");
        }
    }

    #[test]
    fn hostnames_and_hosts() {
        let config = KubeletConfig::new("n", "/r".into());
        let with = pod(json!({"hostname": "h", "subdomain": "s", "setHostnameAsFQDN": true}));
        assert_eq!(node_name_in_pod(&with, &config).unwrap(), "h.s.ns.svc.cluster.local");
        assert_eq!(node_name_in_pod(&pod(json!({})), &config).unwrap(), "web-0");
        let text = hosts(&with, &config, &["10.0.0.1".parse().unwrap()], Path::new("/nothing"));
        assert!(text.contains("10.0.0.1\th.s.ns.svc.cluster.local\th\n"), "{text}");
        let alias = json!({"hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]});
        assert!(hosts(&pod(alias), &config, &[], Path::new("/nothing")).ends_with("1.2.3.4\ta\tb\n"));
    }
}
