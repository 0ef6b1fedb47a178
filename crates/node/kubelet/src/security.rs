//! What a pod's and a container's security contexts mean together.
//!
//! Upstream counterparts: pkg/securitycontext, pkg/kubelet/kuberuntime/security_context{,_others}.go, pkg/kubelet/sysctl.
use std::path::Path;

use k8s_openapi::api::core::v1::{Container, Pod, SeccompProfile};
use kube::ResourceExt;
use sampan_drivers::runtime::{Image, Seccomp, SecurityContext};

/// Upstream's list of sysctls that are namespaced and isolated, so that any pod may set them.
const SAFE_SYSCTLS: &[&str] = &[
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// Dots, however the pod writes them.
pub fn sysctl_name(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'/' => name
            .chars()
            .map(|c| {
                if c == '/' {
                    '.'
                } else if c == '.' {
                    '/'
                } else {
                    c
                }
            })
            .collect(),
        _ => name.to_string(),
    }
}

/// Why a pod's sysctls are refused, where they are.
pub fn check_sysctls(pod: &Pod, allowed: &[String]) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let sysctls = spec.security_context.as_ref()?.sysctls.as_ref()?;
    for sysctl in sysctls {
        let name = sysctl_name(&sysctl.name);
        let listed = allowed.iter().any(|a| match a.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => *a == name,
        });
        if !listed && !SAFE_SYSCTLS.contains(&name.as_str()) {
            return Some(format!("forbidden sysctl: {:?} not allowlisted", sysctl.name));
        }
        if spec.host_network == Some(true) && name.starts_with("net.") {
            return Some(format!("forbidden sysctl: {:?} not allowed with host net enabled", sysctl.name));
        }
        let ipc = name.starts_with("kernel.shm")
            || name.starts_with("kernel.msg")
            || name.starts_with("fs.mqueue.");
        if spec.host_ipc == Some(true) && ipc {
            return Some(format!("forbidden sysctl: {:?} not allowed with host ipc enabled", sysctl.name));
        }
    }
    None
}

fn shown(pod: &Pod) -> String {
    format!("{}_{}({})", pod.name_any(), pod.namespace().unwrap_or_default(), pod.uid().unwrap_or_default())
}

/// Checks `runAsNonRoot` against the image, with upstream's words.
fn check_non_root(pod: &Pod, container: &Container, image: &Image) -> Result<(), String> {
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let own = container.security_context.as_ref();
    let wanted = own.and_then(|s| s.run_as_non_root).or(of_pod.and_then(|s| s.run_as_non_root));
    if wanted != Some(true) {
        return Ok(());
    }
    let (pod_name, name) = (shown(pod), &container.name);
    match own.and_then(|s| s.run_as_user).or(of_pod.and_then(|s| s.run_as_user)) {
        Some(0) => {
            return Err(format!(
                "container's runAsUser breaks non-root policy (pod: {pod_name:?}, container: {name})"
            ));
        }
        Some(_) => return Ok(()),
        None => {}
    }
    let user = image.user.split(':').next().unwrap_or_default();
    match user.parse::<i64>() {
        Ok(uid) if uid != 0 => Ok(()),
        Ok(_) => Err(format!(
            "container has runAsNonRoot and image will run as root (pod: {pod_name:?}, container: {name})"
        )),
        Err(_) if user.is_empty() => Err(format!(
            "container has runAsNonRoot and image will run as root (pod: {pod_name:?}, container: {name})"
        )),
        Err(_) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root (pod: {pod_name:?}, container: {name})"
        )),
    }
}

/// The profile that a seccompProfile names; without one a container is unconfined, as upstream without SeccompDefault.
pub fn seccomp(profile: Option<&SeccompProfile>, root: &Path) -> Result<Seccomp, String> {
    let Some(profile) = profile else { return Ok(Seccomp::Unconfined) };
    match profile.type_.as_str() {
        "RuntimeDefault" => Ok(Seccomp::RuntimeDefault),
        "Unconfined" => Ok(Seccomp::Unconfined),
        "Localhost" => match profile.localhost_profile.as_deref().unwrap_or_default() {
            "" => Err("localhostProfile must be set if seccompProfile type is Localhost.".to_string()),
            name => Ok(Seccomp::Localhost(root.join("seccomp").join(name))),
        },
        other => Err(format!("unknown seccomp profile type: {other}")),
    }
}

/// What the runtime is told for one container.
pub fn effective(
    pod: &Pod,
    container: &Container,
    image: &Image,
    root: &Path,
) -> Result<SecurityContext, String> {
    check_non_root(pod, container, image)?;
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let own = container.security_context.as_ref();
    let privileged = own.and_then(|s| s.privileged).unwrap_or(false);
    let profile =
        own.and_then(|s| s.seccomp_profile.as_ref()).or(of_pod.and_then(|s| s.seccomp_profile.as_ref()));
    let capabilities = own.and_then(|s| s.capabilities.as_ref());
    let groups = of_pod.and_then(|s| s.fs_group).into_iter();
    let groups = groups.chain(of_pod.iter().flat_map(|s| s.supplemental_groups.iter().flatten().copied()));
    Ok(SecurityContext {
        privileged,
        add_capabilities: capabilities.and_then(|c| c.add.clone()).unwrap_or_default(),
        drop_capabilities: capabilities.and_then(|c| c.drop.clone()).unwrap_or_default(),
        run_as_user: own.and_then(|s| s.run_as_user).or(of_pod.and_then(|s| s.run_as_user)),
        run_as_group: own.and_then(|s| s.run_as_group).or(of_pod.and_then(|s| s.run_as_group)),
        supplemental_groups: groups.collect(),
        supplemental_groups_strict: of_pod.and_then(|s| s.supplemental_groups_policy.as_deref())
            == Some("Strict"),
        readonly_rootfs: own.and_then(|s| s.read_only_root_filesystem).unwrap_or(false),
        no_new_privileges: own.and_then(|s| s.allow_privilege_escalation) == Some(false),
        seccomp: if privileged && profile.is_none() { Seccomp::Unconfined } else { seccomp(profile, root)? },
        masked_paths: !privileged && own.and_then(|s| s.proc_mount.as_deref()) != Some("Unmasked"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampan_drivers::runtime::Platform;
    use serde_json::json;

    #[test]
    fn run_as_non_root() {
        let cases = [
            (json!({}), json!({"runAsNonRoot": true}), "1000", None),
            (json!({}), json!({"runAsNonRoot": true}), "", Some("image will run as root")),
            (json!({}), json!({"runAsNonRoot": true}), "0:0", Some("image will run as root")),
            (json!({}), json!({"runAsNonRoot": true}), "nobody", Some("non-numeric user (nobody)")),
            (
                json!({"runAsUser": 0}),
                json!({"runAsNonRoot": true}),
                "",
                Some("runAsUser breaks non-root policy"),
            ),
            (json!({"runAsNonRoot": true}), json!({"runAsUser": 7}), "", None),
            (json!({"runAsNonRoot": true}), json!({"runAsNonRoot": false}), "", None),
        ];
        for (of_pod, own, user, want) in cases {
            let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {
                "containers": [{"name": "c", "securityContext": own}], "securityContext": of_pod}}))
            .unwrap();
            let platform = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
            let image = Image {
                id: "i".into(),
                repo_tags: vec![],
                repo_digests: vec![],
                size_bytes: 1,
                user: user.into(),
                platform,
                pinned: false,
            };
            let got = effective(&pod, &pod.spec.as_ref().unwrap().containers[0], &image, Path::new("/r"));
            match want {
                None => assert!(got.is_ok(), "{user}"),
                Some(text) => assert!(got.unwrap_err().contains(text), "{user}"),
            }
        }
    }

    #[test]
    fn sysctls() {
        for (name, host_network, allowed, refused) in [
            ("kernel.shm_rmid_forced", false, vec![], false),
            ("kernel/shm_rmid_forced", false, vec![], false),
            ("kernel.msgmax", false, vec![], true),
            ("kernel.msgmax", false, vec!["kernel.msg*".to_string()], false),
            ("net.ipv4.tcp_syncookies", true, vec![], true),
        ] {
            let pod: Pod =
                serde_json::from_value(json!({"spec": {"containers": [], "hostNetwork": host_network,
                "securityContext": {"sysctls": [{"name": name, "value": "1"}]}}}))
                .unwrap();
            assert_eq!(check_sysctls(&pod, &allowed).is_some(), refused, "{name}");
        }
    }
}
