//! The operating system a pod names, and what Windows pods may and may not set.
//!
//! Upstream counterpart: validateOS, validateLinux, validateWindows, validateWindowsSecurityContextOptions and
//! validateWindowsHostProcessPod in validation.go.
use k8s_openapi::api::core::v1::{PodSpec, WindowsSecurityContextOptions};

use super::visit_containers;
use crate::field::{ErrorList, FieldError, Path};
use crate::names;

pub fn validate_os(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    match spec.os.as_ref().map(|os| os.name.as_str()) {
        None => {}
        Some("") => errors.push(FieldError::required(&path.child("os").child("name"), "")),
        Some("linux") => validate_linux(spec, path, errors),
        Some("windows") => validate_windows(spec, path, errors),
        Some(other) => {
            errors.push(FieldError::not_supported(&path.child("os"), other, &["linux", "windows"]));
        }
    }
}

fn validate_linux(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let detail = "windows options cannot be set for a linux pod";
    let mut check = |set: bool, path: &Path| {
        if set {
            let at = path.child("securityContext").child("windowsOptions");
            errors.push(FieldError::forbidden(&at, detail));
        }
    };
    check(spec.security_context.as_ref().is_some_and(|c| c.windows_options.is_some()), path);
    visit_containers(spec, path, |container, at| {
        check(container.security_context.as_ref().is_some_and(|c| c.windows_options.is_some()), at);
    });
}

fn validate_windows(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let mut forbid = |set: bool, path: Path| {
        if set {
            errors.push(FieldError::forbidden(&path, "cannot be set for a windows pod"));
        }
    };
    let none = Default::default();
    let c = spec.security_context.as_ref().unwrap_or(&none);
    let context = path.child("securityContext");
    forbid(c.app_armor_profile.is_some(), context.child("appArmorProfile"));
    forbid(c.se_linux_options.is_some(), context.child("seLinuxOptions"));
    forbid(spec.host_users.is_some(), path.child("hostUsers"));
    forbid(spec.host_pid == Some(true), path.child("hostPID"));
    forbid(spec.host_ipc == Some(true), path.child("hostIPC"));
    forbid(c.seccomp_profile.is_some(), context.child("seccompProfile"));
    forbid(c.fs_group.is_some(), context.child("fsGroup"));
    forbid(c.fs_group_change_policy.is_some(), context.child("fsGroupChangePolicy"));
    forbid(c.sysctls.as_ref().is_some_and(|s| !s.is_empty()), context.child("sysctls"));
    forbid(spec.share_process_namespace.is_some(), path.child("shareProcessNamespace"));
    forbid(c.run_as_user.is_some(), context.child("runAsUser"));
    forbid(c.run_as_group.is_some(), context.child("runAsGroup"));
    forbid(c.supplemental_groups.is_some(), context.child("supplementalGroups"));
    forbid(c.supplemental_groups_policy.is_some(), context.child("supplementalGroupsPolicy"));
    forbid(c.se_linux_change_policy.is_some(), context.child("seLinuxChangePolicy"));
    visit_containers(spec, path, |container, at| {
        let Some(c) = &container.security_context else { return };
        let context = at.child("securityContext");
        forbid(c.app_armor_profile.is_some(), context.child("appArmorProfile"));
        forbid(c.se_linux_options.is_some(), context.child("seLinuxOptions"));
        forbid(c.seccomp_profile.is_some(), context.child("seccompProfile"));
        forbid(c.capabilities.is_some(), context.child("capabilities"));
        forbid(c.read_only_root_filesystem.is_some(), context.child("readOnlyRootFilesystem"));
        forbid(c.privileged.is_some(), context.child("privileged"));
        forbid(c.allow_privilege_escalation.is_some(), context.child("allowPrivilegeEscalation"));
        forbid(c.proc_mount.is_some(), context.child("procMount"));
        forbid(c.run_as_user.is_some(), context.child("runAsUser"));
        forbid(c.run_as_group.is_some(), context.child("runAsGroup"));
    });
}

pub fn validate_options(
    options: Option<&WindowsSecurityContextOptions>,
    path: &Path,
    errors: &mut ErrorList,
) {
    let Some(options) = options else { return };
    if let Some(name) = &options.gmsa_credential_spec_name {
        let at = path.child("gmsaCredentialSpecName");
        errors.extend(FieldError::invalid_each(&at, name, names::dns1123_subdomain(name)));
    }
    if let Some(spec) = options.gmsa_credential_spec.as_deref() {
        let at = path.child("gmsaCredentialSpec");
        match spec.len() {
            0 => errors.push(FieldError::invalid(&at, spec, "gmsaCredentialSpec cannot be an empty string")),
            1..=65536 => {}
            _ => errors.push(FieldError::invalid(&at, spec, "gmsaCredentialSpec size must be under 64 KiB")),
        }
    }
    if let Some(name) = options.run_as_user_name.as_deref() {
        validate_user_name(name, &path.child("runAsUserName"), errors);
    }
}

fn validate_user_name(name: &str, path: &Path, errors: &mut ErrorList) {
    let mut refuse = |detail: &str| errors.push(FieldError::invalid(path, name, detail));
    if name.is_empty() {
        return refuse("runAsUserName cannot be an empty string");
    }
    if name.chars().any(|c| c.is_ascii_control()) {
        return refuse("runAsUserName cannot contain control characters");
    }
    if name.matches('\\').count() > 1 {
        return refuse("runAsUserName cannot contain more than one backslash");
    }
    let (domain, user) = name.split_once('\\').map_or((None, name), |(domain, user)| (Some(domain), user));
    if domain.is_some_and(|d| d.len() >= 256) {
        refuse("runAsUserName's Domain length must be under 256 characters");
    }
    if domain.is_some_and(|d| !is_net_bios(d) && !is_domain(d)) {
        refuse("runAsUserName's Domain doesn't match the NetBios nor the DNS format");
    }
    match user.len() {
        0 => refuse("runAsUserName's User cannot be empty"),
        1..=104 => {}
        _ => refuse("runAsUserName's User length must not be longer than 104 characters"),
    }
    if !user.is_empty() && user.chars().all(|c| c == '.' || c == ' ') {
        refuse("runAsUserName's User cannot contain only periods or spaces");
    }
    if user.contains(['"', '/', '\\', ':', ';', '|', '=', ',', '+', '*', '?', '<', '>', '@', '[', ']']) {
        refuse("runAsUserName's User cannot contain the following characters: \"/\\:;|=,+*?<>@[]");
    }
}

fn is_net_bios(domain: &str) -> bool {
    (1..=15).contains(&domain.chars().count())
        && !domain.starts_with('.')
        && !domain.contains(['\\', '/', ':', '*', '?', '"', '<', '>', '|'])
}

fn is_domain(domain: &str) -> bool {
    domain.split('.').all(|label| names::dns1123_label(&label.to_ascii_lowercase()).is_empty())
}

pub fn validate_host_process(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let pod = spec.security_context.as_ref().and_then(|c| c.windows_options.as_ref()?.host_process);
    let (mut all, mut host_process) = (0, 0);
    visit_containers(spec, path, |container, at| {
        all += 1;
        let own = container.security_context.as_ref().and_then(|c| c.windows_options.as_ref()?.host_process);
        if let (Some(pod), Some(own)) = (pod, own)
            && pod != own
        {
            let detail = format!("pod hostProcess value must be identical if both are specified, was {pod}");
            let at = at.child("securityContext").child("windowsOptions").child("hostProcess");
            errors.push(FieldError::invalid(&at, own, detail));
        }
        host_process += i32::from(own.or(pod) == Some(true));
    });
    if host_process == 0 {
        return;
    }
    if host_process != all {
        let detail =
            "If pod contains any hostProcess containers then all containers must be HostProcess containers";
        errors.push(FieldError::invalid(path, "", detail));
    }
    if spec.host_network != Some(true) {
        let detail = "hostNetwork must be true if pod contains any hostProcess containers";
        errors.push(FieldError::invalid(&path.child("hostNetwork"), false, detail));
    }
}
