//! Security contexts of pods and containers.
//!
//! Upstream counterpart: validatePodSpecSecurityContext and ValidateSecurityContext in validation.go. Privileged
//! containers are allowed, as `--allow-privileged` usually says.
use k8s_openapi::api::core::v1::{AppArmorProfile, PodSpec, SeccompProfile, SecurityContext};

use super::volumes::local_descending_path;
use super::windows;
use crate::field::{ErrorList, FieldError, Path};
use crate::names;

const SECCOMP_TYPES: &[&str] = &["Localhost", "RuntimeDefault", "Unconfined"];
const SYSCTL_REGEX: &str = r"^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";

pub fn validate_pod(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let Some(context) = &spec.security_context else { return };
    for (key, id) in [
        ("fsGroup", context.fs_group),
        ("runAsUser", context.run_as_user),
        ("runAsGroup", context.run_as_group),
    ] {
        validate_id(id, &path.child(key), errors);
    }
    for (i, id) in context.supplemental_groups.iter().flatten().enumerate() {
        validate_id(Some(*id), &path.child("supplementalGroups").index(i), errors);
    }
    if spec.share_process_namespace == Some(true) && spec.host_pid == Some(true) {
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        errors.push(FieldError::invalid(&path.child("shareProcessNamespace"), true, detail));
    }
    validate_sysctls(spec, &path.child("sysctls"), errors);
    optional_of(
        &context.fs_group_change_policy,
        &["Always", "OnRootMismatch"],
        "fsGroupChangePolicy",
        path,
        errors,
    );
    validate_seccomp(context.seccomp_profile.as_ref(), &path.child("seccompProfile"), errors);
    windows::validate_options(context.windows_options.as_ref(), &path.child("windowsOptions"), errors);
    validate_app_armor(context.app_armor_profile.as_ref(), &path.child("appArmorProfile"), errors);
    let merge = &["Merge", "Strict"];
    optional_of(&context.supplemental_groups_policy, merge, "supplementalGroupsPolicy", path, errors);
    optional_of(&context.se_linux_change_policy, &["Recursive"], "seLinuxChangePolicy", path, errors);
}

fn optional_of(value: &Option<String>, supported: &[&str], key: &str, path: &Path, errors: &mut ErrorList) {
    if let Some(value) = value.as_deref().filter(|v| !supported.contains(v)) {
        errors.push(FieldError::not_supported(&path.child(key), value, supported));
    }
}

fn validate_id(id: Option<i64>, path: &Path, errors: &mut ErrorList) {
    if let Some(id) = id {
        errors.extend(names::user_or_group_id(id).into_iter().map(|m| FieldError::invalid(path, id, m)));
    }
}

fn validate_sysctls(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let sysctls = spec.security_context.as_ref().and_then(|c| c.sysctls.as_deref()).unwrap_or_default();
    for (i, sysctl) in sysctls.iter().enumerate() {
        let (name, at) = (sysctl.name.as_str(), path.index(i).child("name"));
        if name.is_empty() {
            errors.push(FieldError::required(&at, ""));
        } else if !is_sysctl_name(name) {
            let detail = format!("must have at most 253 characters and match regex {SYSCTL_REGEX}");
            errors.push(FieldError::invalid(&at, name, detail));
        } else if sysctls[..i].iter().any(|s| s.name == name) {
            errors.push(FieldError::duplicate(&at, name));
        }
        match sysctl_namespace(&normalize_sysctl(name)) {
            Some("net") if spec.host_network == Some(true) => {
                let detail = "may not be specified when 'hostNetwork' is true";
                errors.push(FieldError::invalid(&at, name, detail));
            }
            Some("ipc") if spec.host_ipc == Some(true) => {
                errors.push(FieldError::invalid(&at, name, "may not be specified when 'hostIPC' is true"));
            }
            _ => {}
        }
    }
}

fn is_sysctl_name(name: &str) -> bool {
    let end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    name.len() <= 253
        && name.split(['.', '/']).all(|segment| {
            end(segment.chars().next())
                && end(segment.chars().next_back())
                && segment.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b))
        })
}

/// A name whose first separator is a slash has dots and slashes exchanged.
fn normalize_sysctl(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(first) if name.as_bytes()[first] == b'/' => name
            .chars()
            .map(|c| match c {
                '/' => '.',
                '.' => '/',
                c => c,
            })
            .collect(),
        _ => name.to_string(),
    }
}

/// Which kernel namespace holds a sysctl.
pub fn sysctl_namespace(name: &str) -> Option<&'static str> {
    if name == "kernel.sem"
        || name.starts_with("kernel.shm")
        || name.starts_with("kernel.msg")
        || name.starts_with("fs.mqueue.")
    {
        Some("ipc")
    } else if name.starts_with("net.") {
        Some("net")
    } else {
        None
    }
}

fn validate_seccomp(profile: Option<&SeccompProfile>, path: &Path, errors: &mut ErrorList) {
    let Some(profile) = profile else { return };
    let at = path.child("type");
    match profile.type_.as_str() {
        "" => errors.push(FieldError::required(&at, "type is required when seccompProfile is set")),
        kind if !SECCOMP_TYPES.contains(&kind) => {
            errors.push(FieldError::not_supported(&at, kind, SECCOMP_TYPES));
        }
        _ => {}
    }
    let at = path.child("localhostProfile");
    match (profile.type_ == "Localhost", &profile.localhost_profile) {
        (true, None) => {
            errors.push(FieldError::required(&at, "must be set when seccomp type is Localhost"));
        }
        (true, Some(file)) => local_descending_path(file, &at, errors),
        (false, Some(_)) => {
            let value = serde_json::to_value(profile).unwrap_or_default();
            errors.push(FieldError::invalid(&at, value, "can only be set when seccomp type is Localhost"));
        }
        (false, None) => {}
    }
}

fn validate_app_armor(profile: Option<&AppArmorProfile>, path: &Path, errors: &mut ErrorList) {
    let Some(profile) = profile else { return };
    let at = path.child("localhostProfile");
    let required = "must be set when AppArmor type is Localhost";
    match (profile.type_.as_str(), &profile.localhost_profile) {
        ("Localhost", None) => errors.push(FieldError::required(&at, required)),
        ("Localhost", Some(name)) => {
            if name.trim() != name {
                let detail = "must not be padded with whitespace";
                errors.push(FieldError::invalid(&at, name.as_str(), detail));
            } else if name.is_empty() {
                errors.push(FieldError::required(&at, required));
            }
            if name.len() > 4095 {
                errors.push(FieldError::too_long(&at, 4095));
            }
        }
        ("RuntimeDefault" | "Unconfined", Some(name)) => {
            let detail = "can only be set when AppArmor type is Localhost";
            errors.push(FieldError::invalid(&at, name.as_str(), detail));
        }
        ("RuntimeDefault" | "Unconfined", None) => {}
        ("", _) => {
            let detail = "type is required when appArmorProfile is set";
            errors.push(FieldError::required(&path.child("type"), detail));
        }
        (other, _) => errors.push(FieldError::not_supported(&path.child("type"), other, SECCOMP_TYPES)),
    }
}

pub fn validate_container(context: &SecurityContext, host_users: bool, path: &Path, errors: &mut ErrorList) {
    validate_id(context.run_as_user, &path.child("runAsUser"), errors);
    validate_id(context.run_as_group, &path.child("runAsGroup"), errors);
    if let Some(mount) = context.proc_mount.as_deref() {
        let at = path.child("procMount");
        if !["Default", "Unmasked"].contains(&mount) {
            errors.push(FieldError::not_supported(&at, mount, &["Default", "Unmasked"]));
        }
        if host_users && mount == "Unmasked" {
            errors.push(FieldError::invalid(&at, mount, "`hostUsers` must be false to use `Unmasked`"));
        }
    }
    validate_seccomp(context.seccomp_profile.as_ref(), &path.child("seccompProfile"), errors);
    if context.allow_privilege_escalation == Some(false) {
        let value = || serde_json::to_value(context).unwrap_or_default();
        if context.privileged == Some(true) {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
            errors.push(FieldError::invalid(path, value(), detail));
        }
        let added = context.capabilities.as_ref().and_then(|c| c.add.as_deref()).unwrap_or_default();
        for _ in added.iter().filter(|c| *c == "CAP_SYS_ADMIN") {
            let detail =
                "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            errors.push(FieldError::invalid(path, value(), detail));
        }
    }
    windows::validate_options(context.windows_options.as_ref(), &path.child("windowsOptions"), errors);
    validate_app_armor(context.app_armor_profile.as_ref(), &path.child("appArmorProfile"), errors);
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::check;

    #[test]
    fn security_rules() {
        let container =
            |context: Value| json!({"containers": [{"name": "a", "image": "i", "securityContext": context}]});
        let pod = |context: Value| json!({"securityContext": context});
        let cases: Vec<(Value, &str)> = vec![
            (
                pod(json!({"runAsUser": -1})),
                "spec.securityContext.runAsUser: Invalid value: -1: must be between 0 and 2147483647, inclusive",
            ),
            (
                pod(json!({"sysctls": [{"name": "A", "value": "1"}]})),
                "spec.securityContext.sysctls[0].name: Invalid value: \"A\": must have at most 253 characters and match regex ^([a-z0-9]",
            ),
            (
                pod(json!({"seccompProfile": {"type": "Localhost"}})),
                "spec.securityContext.seccompProfile.localhostProfile: Required value: must be set when seccomp type is Localhost",
            ),
            (
                pod(json!({"fsGroupChangePolicy": "x"})),
                "spec.securityContext.fsGroupChangePolicy: Unsupported value: \"x\": supported values: \"Always\", \"OnRootMismatch\"",
            ),
            (
                container(json!({"privileged": true, "allowPrivilegeEscalation": false})),
                "spec.containers[0].securityContext: Invalid value: {\"allowPrivilegeEscalation\":false,\"privileged\":true}: cannot set",
            ),
            (
                container(json!({"procMount": "Unmasked"})),
                "spec.containers[0].securityContext.procMount: Invalid value: \"Unmasked\": `hostUsers` must be false",
            ),
            (
                json!({"hostNetwork": true, "securityContext": {"sysctls": [{"name": "net.core.x", "value": "1"}]}}),
                "spec.securityContext.sysctls[0].name: Invalid value: \"net.core.x\": may not be specified when 'hostNetwork' is true",
            ),
        ];
        for (patch, want) in cases {
            let got = check(patch.clone(), true);
            assert!(got.len() == 1 && got[0].starts_with(want), "{patch}: {got:?}");
        }
    }
}
