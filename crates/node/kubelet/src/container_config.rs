//! From a container of a pod to what the runtime makes: environment, mounts, labels, limits.
//!
//! Upstream counterparts: kuberuntime_container.go (generateContainerConfig), kubelet_pods.go (makeMounts), labels.go.
//! The keys of labels and annotations are upstream's; they are also how a restarted agent knows what runs.
use std::collections::BTreeMap;
use std::fs;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, VolumeMount};
use kube::ResourceExt;
use sampan_drivers::runtime::{ContainerConfig, Image, Mount, NamespaceMode, Propagation, SandboxConfig};
use sampan_volumes::{PodVolumes, subpath};

use crate::node_services::NodeServices;
use crate::{dns, env, expansion, resources, security};

pub const POD_NAME: &str = "io.kubernetes.pod.name";
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const POD_UID: &str = "io.kubernetes.pod.uid";
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
pub const HASH: &str = "io.kubernetes.container.hash";
pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
pub const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
pub const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
pub const GRACE_PERIOD: &str = "io.kubernetes.pod.terminationGracePeriod";

pub fn pod_labels(pod: &Pod) -> BTreeMap<String, String> {
    [
        (POD_NAME.to_string(), pod.name_any()),
        (POD_NAMESPACE.to_string(), pod.namespace().unwrap_or_default()),
        (POD_UID.to_string(), pod.uid().unwrap_or_default()),
    ]
    .into()
}

/// Changes when a container must be replaced: upstream hashes name and image only.
pub fn hash(container: &Container) -> String {
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    (container.name.as_str(), container.image.as_deref().unwrap_or_default()).hash(&mut hasher);
    format!("{:x}", hasher.finish())
}

/// FNV-1a: the same on every machine and in every build, unlike the standard library's.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// An ephemeral container as a container: the same fields but for its target.
pub fn from_ephemeral(container: &EphemeralContainer) -> Container {
    let value = serde_json::to_value(container).unwrap_or_default();
    serde_json::from_value(value).unwrap_or_default()
}

/// What the pod's sandbox is made from.
pub fn sandbox(pod: &Pod, node: &NodeServices, attempt: u32) -> Result<SandboxConfig, String> {
    let spec = pod.spec.clone().unwrap_or_default();
    let (namespace, name, uid) =
        (pod.namespace().unwrap_or_default(), pod.name_any(), pod.uid().unwrap_or_default());
    let resolver = dns::resolver(pod, &node.config);
    let security = spec.security_context.clone().unwrap_or_default();
    let host_network = spec.host_network == Some(true);
    let hostname = match host_network {
        true => node.hostname.clone(),
        false => dns::node_name_in_pod(pod, &node.config)?,
    };
    let mut annotations = pod.metadata.annotations.clone().unwrap_or_default();
    annotations.insert(GRACE_PERIOD.into(), spec.termination_grace_period_seconds.unwrap_or(30).to_string());
    Ok(SandboxConfig {
        hostname,
        labels: pod
            .metadata
            .labels
            .iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.clone()))
            .chain(pod_labels(pod))
            .collect(),
        annotations,
        log_directory: node.config.pod_log_dir(&namespace, &name, &uid),
        namespace,
        name,
        uid,
        attempt,
        dns_servers: resolver.servers,
        dns_searches: resolver.searches,
        dns_options: resolver.options,
        host_network,
        pid: match (spec.host_pid, spec.share_process_namespace) {
            (Some(true), _) => NamespaceMode::Node,
            (_, Some(true)) => NamespaceMode::Pod,
            _ => NamespaceMode::Container,
        },
        ipc: if spec.host_ipc == Some(true) { NamespaceMode::Node } else { NamespaceMode::Pod },
        sysctls: security
            .sysctls
            .iter()
            .flatten()
            .map(|s| (security::sysctl_name(&s.name), s.value.clone()))
            .collect(),
        cgroup_parent: resources::cgroup_parent(pod),
        resources: resources::of_pod(pod, node.config.pod_pids_limit),
        seccomp: security::seccomp(security.seccomp_profile.as_ref(), &node.config.root_dir)?,
    })
}

/// What one container is made from, with all that is known when it is about to start.
pub struct Making<'a> {
    pub node: &'a NodeServices,
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub attempt: u32,
    pub image: &'a Image,
    pub ips: &'a [IpAddr],
    pub volumes: &'a PodVolumes,
}

impl Making<'_> {
    fn pod_dir(&self) -> PathBuf {
        self.node.volumes.pod_dir(&self.pod.uid().unwrap_or_default())
    }

    /// The text is shown as the container's `CreateContainerConfigError`.
    pub async fn config(&self) -> Result<ContainerConfig, String> {
        let (pod, container) = (self.pod, self.container);
        let security = security::effective(pod, container, self.image, &self.node.config.root_dir)?;
        let services = self.node.services.list();
        let sources = env::Sources {
            config: &self.node.config,
            volumes: &self.node.volumes,
            pod_ips: self.ips,
            services: &services,
        };
        let environment = env::environment(pod, container, &sources).await?;
        let mut mounts = self.volume_mounts(&environment)?;
        mounts.extend(self.files(&mounts).map_err(|e| format!("writing the pod's files: {e}"))?);
        let expand = |list: &Option<Vec<String>>| -> Vec<String> {
            list.iter().flatten().map(|text| expansion::expand_env(text, &environment)).collect()
        };
        let mut env = environment.clone();
        if !env.iter().any(|(name, _)| name == "HOSTNAME") {
            let hostname = dns::node_name_in_pod(pod, &self.node.config).unwrap_or_default();
            let is_host = pod.spec.as_ref().and_then(|s| s.host_network) == Some(true);
            env.insert(0, ("HOSTNAME".into(), if is_host { self.node.hostname.clone() } else { hostname }));
        }
        let mut labels = pod_labels(pod);
        labels.insert(CONTAINER_NAME.into(), container.name.clone());
        Ok(ContainerConfig {
            name: container.name.clone(),
            attempt: self.attempt,
            image_id: self.image.id.clone(),
            image: container.image.clone().unwrap_or_default(),
            command: expand(&container.command),
            args: expand(&container.args),
            working_dir: container.working_dir.clone().filter(|w| !w.is_empty()),
            env,
            mounts,
            devices: Vec::new(),
            labels,
            annotations: self.annotations(),
            log_path: PathBuf::from(&container.name).join(format!("{}.log", self.attempt)),
            stdin: container.stdin.unwrap_or(false),
            stdin_once: container.stdin_once.unwrap_or(false),
            tty: container.tty.unwrap_or(false),
            resources: resources::of_container(pod, container, self.node.memory_bytes()),
            security,
            stop_signal: container.lifecycle.as_ref().and_then(|l| l.stop_signal.clone()),
        })
    }

    fn annotations(&self) -> BTreeMap<String, String> {
        let container = self.container;
        let grace = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(30);
        [
            (HASH.to_string(), hash(container)),
            (RESTART_COUNT.to_string(), self.attempt.to_string()),
            (MESSAGE_PATH.to_string(), container.termination_message_path.clone().unwrap_or_default()),
            (MESSAGE_POLICY.to_string(), container.termination_message_policy.clone().unwrap_or_default()),
            (GRACE_PERIOD.to_string(), grace.to_string()),
        ]
        .into()
    }

    fn volume_mounts(&self, environment: &[(String, String)]) -> Result<Vec<Mount>, String> {
        let mut mounts = Vec::new();
        for (i, mount) in self.container.volume_mounts.iter().flatten().enumerate() {
            mounts.push(self.volume_mount(i, mount, environment)?);
        }
        Ok(mounts)
    }

    /// Volumes whose content the kubelet keeps up to date are read-only for containers, whatever the mount says.
    fn is_written_by_kubelet(&self, name: &str) -> bool {
        let volumes = self.pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        volumes.filter(|v| v.name == name).any(|v| {
            v.config_map.is_some() || v.secret.is_some() || v.projected.is_some() || v.downward_api.is_some()
        })
    }

    fn volume_mount(
        &self,
        index: usize,
        mount: &VolumeMount,
        env: &[(String, String)],
    ) -> Result<Mount, String> {
        let name = &self.container.name;
        let path = self.volumes.path(&mount.name);
        let volume = path
            .ok_or_else(|| format!("cannot find volume {:?} to mount into container {name:?}", mount.name))?;
        let mut sub = mount.sub_path.clone().unwrap_or_default();
        if let Some(expression) = mount.sub_path_expr.as_deref().filter(|e| !e.is_empty()) {
            let mut missing = Vec::new();
            let lookup = |n: &str| env.iter().rev().find(|(k, _)| k == n).map(|(_, v)| v.clone());
            sub = expansion::expand(expression, lookup, &mut missing);
            if !missing.is_empty() {
                return Err(format!("missing value for {missing:?}"));
            }
        }
        let host_path = if sub.is_empty() {
            volume.to_path_buf()
        } else {
            if sub.starts_with('/') {
                return Err(format!("error SubPath `{sub}` must not be an absolute path"));
            }
            if sub.split('/').any(|part| part == "..") {
                return Err(format!("unable to provision SubPath `{sub}`: must not contain '..'"));
            }
            let target =
                self.pod_dir().join("volume-subpaths").join(&mount.name).join(name).join(index.to_string());
            subpath::prepare(volume, &sub, &target).map_err(|error| {
                format!(
                    "failed to prepare subPath for volumeMount {:?} of container {name:?}: {error}",
                    mount.name
                )
            })?
        };
        let readonly = mount.read_only.unwrap_or(false) || self.is_written_by_kubelet(&mount.name);
        Ok(Mount {
            container_path: if mount.mount_path.starts_with('/') {
                mount.mount_path.clone()
            } else {
                format!("/{}", mount.mount_path)
            },
            host_path,
            readonly,
            recursive_readonly: readonly
                && matches!(mount.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible")),
            propagation: match mount.mount_propagation.as_deref() {
                Some("Bidirectional") => Propagation::Bidirectional,
                Some("HostToContainer") => Propagation::HostToContainer,
                _ => Propagation::Private,
            },
        })
    }

    /// hosts, resolv.conf, hostname and the termination message, as far as the pod does not mount its own.
    fn files(&self, taken: &[Mount]) -> std::io::Result<Vec<Mount>> {
        let dir = self.pod_dir();
        fs::create_dir_all(&dir)?;
        let readonly = self
            .container
            .security_context
            .as_ref()
            .and_then(|s| s.read_only_root_filesystem)
            .unwrap_or(false);
        let mut mounts = Vec::new();
        let mut add = |container_path: &str, host_path: PathBuf, readonly: bool| {
            if !taken.iter().any(|m| m.container_path == container_path) {
                mounts.push(Mount {
                    container_path: container_path.to_string(),
                    host_path,
                    readonly,
                    recursive_readonly: false,
                    propagation: Propagation::Private,
                });
            }
        };
        let config = &self.node.config;
        let hosts = dns::hosts(self.pod, config, self.ips, Path::new("/etc/hosts"));
        let is_host = self.pod.spec.as_ref().and_then(|s| s.host_network) == Some(true);
        let hostname = if is_host {
            self.node.hostname.clone()
        } else {
            dns::node_name_in_pod(self.pod, config).unwrap_or_default()
        };
        let files = [
            ("/etc/hosts", "etc-hosts", hosts),
            ("/etc/resolv.conf", "resolv.conf", dns::resolver(self.pod, config).text()),
            ("/etc/hostname", "hostname", format!("{hostname}\n")),
        ];
        for (container_path, name, text) in files {
            let path = dir.join(name);
            if fs::read_to_string(&path).ok().as_deref() != Some(text.as_str()) {
                // in place: running containers have this very file mounted
                fs::write(&path, text)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
            }
            add(container_path, path, readonly);
        }
        if let Some(path) = self.container.termination_message_path.as_deref().filter(|p| !p.is_empty()) {
            let file = message_file(&dir, &self.container.name, self.attempt);
            if let Some(parent) = file.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&file, "")?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o666))?;
            add(path, file, false);
        }
        Ok(mounts)
    }
}

/// Where on the node a container's termination message lies.
pub fn message_file(pod_dir: &Path, container: &str, attempt: u32) -> PathBuf {
    pod_dir.join("containers").join(container).join(format!("{attempt}.message"))
}
