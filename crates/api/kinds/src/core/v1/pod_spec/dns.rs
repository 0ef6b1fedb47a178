//! DNS settings, host aliases and host names.
//!
//! Upstream counterpart: validatePodDNSConfig, ValidateHostAliases and validatePodHostName in validation.go.
use k8s_openapi::api::core::v1::PodSpec;

use crate::field::{ErrorList, FieldError, Path};
use crate::ip::validate_ip;
use crate::names;
use crate::object::or_empty;

const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCH_PATHS: usize = 32;
const MAX_SEARCH_LIST_CHARS: usize = 2048;

pub fn validate(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let none = or_empty(&spec.dns_policy) == "None";
    let Some(config) = &spec.dns_config else {
        if none {
            errors.push(FieldError::required(path, "must provide `dnsConfig` when `dnsPolicy` is None"));
        }
        return;
    };
    let nameservers = config.nameservers.as_deref().unwrap_or_default();
    let at = path.child("nameservers");
    if none && nameservers.is_empty() {
        let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
        errors.push(FieldError::required(&at, detail));
        return;
    }
    if nameservers.len() > MAX_NAMESERVERS {
        let detail = format!("must not have more than {MAX_NAMESERVERS} nameservers");
        errors.push(FieldError::invalid(&at, nameservers.to_vec(), detail));
    }
    for (i, nameserver) in nameservers.iter().enumerate() {
        errors.extend(validate_ip(&at.index(i), nameserver, &[]));
    }
    let searches = config.searches.as_deref().unwrap_or_default();
    let at = path.child("searches");
    if searches.len() > MAX_SEARCH_PATHS {
        let detail = format!("must not have more than {MAX_SEARCH_PATHS} search paths");
        errors.push(FieldError::invalid(&at, searches.to_vec(), detail));
    }
    if searches.join(" ").len() > MAX_SEARCH_LIST_CHARS {
        let detail = format!(
            "must not have more than {MAX_SEARCH_LIST_CHARS} characters (including spaces) in the search list"
        );
        errors.push(FieldError::invalid(&at, searches.to_vec(), detail));
    }
    for (i, search) in searches.iter().enumerate().filter(|(_, search)| *search != ".") {
        let search = search.strip_suffix('.').unwrap_or(search);
        let messages = names::dns1123_subdomain_with_underscore(search);
        errors.extend(FieldError::invalid_each(&at.index(i), search, messages));
    }
    for (i, option) in config.options.iter().flatten().enumerate() {
        if or_empty(&option.name).is_empty() {
            errors.push(FieldError::required(&path.child("options").index(i), "must not be empty"));
        }
    }
}

pub fn validate_host_aliases(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    for (i, alias) in spec.host_aliases.iter().flatten().enumerate() {
        let at = path.index(i);
        errors.extend(validate_ip(&at.child("ip"), &alias.ip, &[]));
        for (j, name) in alias.hostnames.iter().flatten().enumerate() {
            let at = at.child("hostnames").index(j);
            errors.extend(FieldError::invalid_each(&at, name, names::dns1123_subdomain(name)));
        }
    }
}

pub fn validate_hostname_override(spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let Some(name) = &spec.hostname_override else { return };
    let at = path.child("hostnameOverride");
    if spec.set_hostname_as_fqdn == Some(true) {
        errors.push(FieldError::forbidden(&at, "may not be specified when setHostnameAsFQDN is true"));
    }
    if spec.host_network == Some(true) {
        errors.push(FieldError::forbidden(&at, "may not be specified when hostNetwork is true"));
    }
    if name.len() > 64 {
        errors.push(FieldError::too_long(&at, 64));
    }
    errors.extend(FieldError::invalid_each(&at, name, names::dns1123_subdomain(name)));
}
