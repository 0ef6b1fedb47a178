//! What a kubelet is told at its start. Upstream counterpart: pkg/kubelet/apis/config (KubeletConfiguration).
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;

#[derive(Clone, Debug)]
pub struct KubeletConfig {
    pub node_name: String,
    /// The node's addresses, the first of each family counts.
    pub node_ips: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    /// Given to the node when it registers, not afterwards.
    pub taints: Vec<Taint>,
    /// Holds `pods`, `seccomp` and the last known pods.
    pub root_dir: PathBuf,
    pub log_dir: PathBuf,
    /// Files of static pods; made where it is missing.
    pub manifests_dir: Option<PathBuf>,
    /// Where `kubepods` lies in the cgroup tree; the runtime makes the groups.
    pub cgroup_root: PathBuf,
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// What pods' resolv.conf starts from with dnsPolicy Default.
    pub resolv_conf: PathBuf,
    pub max_pods: i64,
    /// `pids.max` of each pod; 0: no limit.
    pub pod_pids_limit: i64,
    /// Kept from the node's capacity.
    pub reserved: BTreeMap<String, String>,
    /// Unsafe sysctls that pods may set, by name or `prefix*`.
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Where the kubelet's HTTP API is reached.
    pub api_port: i32,
    pub register: bool,
    /// Secrets in memory file systems (needs the privilege to mount).
    pub memory_backed_secrets: bool,
    pub parallel_pulls: usize,
    pub lease_duration: Duration,
    pub status_report_period: Duration,
    /// For tests: how CrashLoopBackOff and image back-off start.
    pub back_off_initial: Duration,
    pub back_off_max: Duration,
    /// Collect unused images when the file system is fuller than this, down to the second.
    pub image_gc_high_percent: u64,
    pub image_gc_low_percent: u64,
    /// Evict when less memory than this is available.
    pub eviction_memory_bytes: u64,
    /// Evict when less of the file system than this is free.
    pub eviction_disk_percent: u64,
}

impl KubeletConfig {
    pub fn new(node_name: &str, root_dir: PathBuf) -> Self {
        Self {
            node_name: node_name.to_string(),
            node_ips: Vec::new(),
            labels: BTreeMap::new(),
            taints: Vec::new(),
            log_dir: root_dir.join("logs"),
            root_dir,
            manifests_dir: None,
            cgroup_root: PathBuf::from("/sys/fs/cgroup"),
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_string(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            max_pods: 110,
            pod_pids_limit: 0,
            reserved: BTreeMap::new(),
            allowed_unsafe_sysctls: Vec::new(),
            api_port: 10250,
            register: true,
            memory_backed_secrets: true,
            parallel_pulls: 3,
            lease_duration: Duration::from_secs(40),
            status_report_period: Duration::from_secs(300),
            back_off_initial: Duration::from_secs(10),
            back_off_max: Duration::from_secs(300),
            image_gc_high_percent: 85,
            image_gc_low_percent: 80,
            eviction_memory_bytes: 100 * 1024 * 1024,
            eviction_disk_percent: 10,
        }
    }

    pub fn host_ip(&self) -> Option<IpAddr> {
        self.node_ips.first().copied()
    }

    /// One address of each family, at most two.
    pub fn host_ips(&self) -> Vec<IpAddr> {
        let Some(first) = self.host_ip() else { return Vec::new() };
        let second = self.node_ips.iter().find(|ip| ip.is_ipv4() != first.is_ipv4());
        [Some(first), second.copied()].into_iter().flatten().collect()
    }

    pub fn pod_log_dir(&self, namespace: &str, name: &str, uid: &str) -> PathBuf {
        self.log_dir.join("pods").join(format!("{namespace}_{name}_{uid}"))
    }
}
