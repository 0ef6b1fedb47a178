//! Resource requests, limits and claims.
//!
//! Upstream counterpart: validateResourceRequirements, validatePodResources and validatePodResourceClaims in
//! validation.go, and the resource name predicates of pkg/apis/core/helper.
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{PodSpec, ResourceClaim, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Scope;
use super::requests::{
    aggregate_container_limits, aggregate_container_requests, is_supported_pod_level_resource,
};
use crate::field::{ErrorList, FieldError, Path};
use crate::meta::IS_NEGATIVE;
use crate::names;
use crate::object::or_empty;
use crate::quantity::{self, Amount, amount, canonical};

type Quantities = BTreeMap<String, Quantity>;

const STANDARD: &[&str] = &[
    "cpu",
    "memory",
    "ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "storage",
    "requests.storage",
    "services.nodeports",
    "services.loadbalancers",
];
const COUNTED: &[&str] = &[
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "services.nodeports",
    "services.loadbalancers",
];

/// A name of Kubernetes' own: no domain, or kubernetes.io's.
pub fn is_native(name: &str) -> bool {
    !name.contains('/') || name.contains("kubernetes.io/")
}

/// A resource of someone else's domain, counted in whole numbers.
pub fn is_extended(name: &str) -> bool {
    !is_native(name)
        && !name.starts_with("requests.")
        && names::qualified_name(&format!("requests.{name}")).is_empty()
}

/// May be promised more often than there is.
pub fn is_overcommit_allowed(name: &str) -> bool {
    is_native(name) && !name.starts_with("hugepages-")
}

/// A resource's name of any use.
pub fn validate_resource_name(name: &str, path: &Path, errors: &mut ErrorList) -> bool {
    let messages = names::qualified_name(name);
    if !messages.is_empty() {
        errors.extend(FieldError::invalid_each(path, name, messages));
        return false;
    }
    let huge = name.starts_with("hugepages-") || name.starts_with("requests.hugepages-");
    if !name.contains('/') && !huge && !STANDARD.contains(&name) {
        let detail = "must be a standard resource type or fully qualified";
        errors.push(FieldError::invalid(path, name, detail));
        return false;
    }
    true
}

/// A resource's name in a container.
pub fn validate_container_resource_name(name: &str, path: &Path, errors: &mut ErrorList) {
    validate_resource_name(name, path, errors);
    if !name.contains('/') {
        if !["cpu", "memory", "ephemeral-storage"].contains(&name) && !name.starts_with("hugepages-") {
            let detail = "must be a standard resource for containers";
            errors.push(FieldError::invalid(path, name, detail));
        }
    } else if !is_native(name) && !is_extended(name) {
        let detail = "doesn't follow extended resource name standard";
        errors.push(FieldError::invalid(path, name, detail));
    }
}

fn validate_pod_resource_name(name: &str, path: &Path, errors: &mut ErrorList) {
    if validate_resource_name(name, path, errors) && !is_supported_pod_level_resource(name) {
        errors.push(FieldError::not_supported(path, name, &["cpu", "hugepages-", "memory"]));
    }
}

/// An amount of a resource: not below zero, whole where the resource is counted.
pub fn validate_quantity(name: &str, value: &Quantity, path: &Path, errors: &mut ErrorList) {
    let text = quantity::text(value);
    if amount(value) < Amount::ZERO {
        errors.push(FieldError::invalid(path, text.as_str(), IS_NEGATIVE));
    }
    if (COUNTED.contains(&name) || is_extended(name)) && !amount(value).is_whole() {
        errors.push(FieldError::invalid(path, text, "must be an integer"));
    }
}

pub fn validate_overhead(overhead: &Quantities, path: &Path, errors: &mut ErrorList) {
    let requirements = ResourceRequirements { limits: Some(overhead.clone()), ..Default::default() };
    validate_container(&requirements, &BTreeSet::new(), path, errors);
}

pub fn validate_container(
    requirements: &ResourceRequirements,
    claims: &BTreeSet<&str>,
    path: &Path,
    errors: &mut ErrorList,
) {
    validate_requirements(requirements, validate_container_resource_name, claims, path, errors);
}

fn validate_requirements(
    requirements: &ResourceRequirements,
    check_name: fn(&str, &Path, &mut ErrorList),
    claims: &BTreeSet<&str>,
    path: &Path,
    errors: &mut ErrorList,
) {
    let none = Quantities::new();
    let limits = requirements.limits.as_ref().unwrap_or(&none);
    let requests = requirements.requests.as_ref().unwrap_or(&none);
    let (limits_path, requests_path) = (path.child("limits"), path.child("requests"));
    let one = |name: &str, value: &Quantity, at: &Path, errors: &mut ErrorList| {
        check_name(name, at, errors);
        validate_quantity(name, value, at, errors);
    };
    for (name, limit) in limits {
        let at = limits_path.key(name);
        one(name, limit, &at, errors);
        validate_huge_page(name, limit, &at, errors);
    }
    for (name, request) in requests {
        let at = requests_path.key(name);
        one(name, request, &at, errors);
        let text = || quantity::text(request);
        match limits.get(name) {
            Some(limit) if amount(request) != amount(limit) && !is_overcommit_allowed(name) => {
                let detail = format!("must be equal to {name} limit of {}", quantity::text(limit));
                errors.push(FieldError::invalid(&requests_path, text(), detail));
            }
            Some(limit) if amount(request) > amount(limit) => {
                let detail =
                    format!("must be less than or equal to {name} limit of {}", quantity::text(limit));
                errors.push(FieldError::invalid(&requests_path, text(), detail));
            }
            None if !is_overcommit_allowed(name) => {
                let detail = "Limit must be set for non overcommitable resources";
                errors.push(FieldError::required(&limits_path, detail));
            }
            _ => {}
        }
        validate_huge_page(name, request, &at, errors);
    }
    let named = |test: fn(&str) -> bool| limits.keys().chain(requests.keys()).any(|name| test(name));
    if named(|n| n.starts_with("hugepages-")) && !named(|n| n == "cpu" || n == "memory") {
        errors.push(FieldError::forbidden(path, "HugePages require cpu or memory"));
    }
    let own = requirements.claims.as_deref().unwrap_or_default();
    validate_claim_names(own, claims, &path.child("claims"), errors);
}

fn validate_huge_page(name: &str, value: &Quantity, path: &Path, errors: &mut ErrorList) {
    let Some(size) = name.strip_prefix("hugepages-") else { return };
    let page = quantity::parse(size).map_or(0, |(size, _)| if size.is_whole() { size.value() } else { 0 });
    if page <= 0 || amount(value).value() % page != 0 {
        let text = quantity::text(value);
        let detail = format!("{text} is not positive integer multiple of {name}");
        errors.push(FieldError::invalid(path, text, detail));
    }
}

fn validate_claim_names(own: &[ResourceClaim], claims: &BTreeSet<&str>, path: &Path, errors: &mut ErrorList) {
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for (i, claim) in own.iter().enumerate() {
        let (name, at) = (claim.name.as_str(), path.index(i));
        if name.is_empty() {
            errors.push(FieldError::required(&at, ""));
            continue;
        }
        if seen.contains(name) {
            errors.push(FieldError::duplicate(&at, name));
        } else {
            let request = or_empty(&claim.request);
            let mut key = name.to_string();
            if !request.is_empty() {
                let messages = names::dns1123_label(request);
                errors.extend(FieldError::invalid_each(&at.child("request"), request, messages));
                key = format!("{name}/{request}");
            }
            let whole = request.is_empty();
            if seen.contains(&key) || (whole && seen.iter().any(|k| k.starts_with(&format!("{name}/")))) {
                errors.push(FieldError::duplicate(&at, key.as_str()));
            }
            seen.insert(key);
        }
        if !claims.contains(name) {
            let known: Vec<&str> = claims.iter().copied().collect();
            let rest = if known.is_empty() {
                " which is empty".to_string()
            } else {
                format!(": {}", known.join(", "))
            };
            let detail = format!("must be one of the names in pod.spec.resourceClaims{rest}");
            errors.push(FieldError::not_found(&at, name).with_detail(detail));
        }
    }
}

/// The names under which a pod's claims are known to its containers.
pub fn claim_names(spec: &PodSpec) -> BTreeSet<&str> {
    spec.resource_claims.iter().flatten().map(|c| c.name.as_str()).filter(|n| !n.is_empty()).collect()
}

pub fn validate_pod_claims(meta: Option<&ObjectMeta>, spec: &PodSpec, path: &Path, errors: &mut ErrorList) {
    let mirror = meta
        .and_then(|m| m.annotations.as_ref())
        .is_some_and(|a| a.contains_key("kubernetes.io/config.mirror"));
    let mut seen = BTreeSet::new();
    for (i, claim) in spec.resource_claims.iter().flatten().enumerate() {
        let at = path.index(i);
        if mirror {
            let detail = "static pods do not support resource claims";
            errors.push(FieldError::forbidden(&Path::new(""), detail));
            continue;
        }
        let name_path = at.child("name");
        if claim.name.is_empty() {
            errors.push(FieldError::required(&name_path, ""));
        } else if !seen.insert(claim.name.as_str()) {
            errors.push(FieldError::duplicate(&name_path, claim.name.as_str()));
        } else {
            let messages = names::dns1123_label(&claim.name);
            errors.extend(FieldError::invalid_each(&name_path, &claim.name, messages));
        }
        let value = || serde_json::to_value(claim).unwrap_or_default();
        match (&claim.resource_claim_name, &claim.resource_claim_template_name) {
            (Some(_), Some(_)) => {
                let detail =
                    "at most one of `resourceClaimName` or `resourceClaimTemplateName` may be specified";
                errors.push(FieldError::invalid(&at, value(), detail));
            }
            (None, None) => {
                let detail = "must specify one of: `resourceClaimName`, `resourceClaimTemplateName`";
                errors.push(FieldError::invalid(&at, value(), detail));
            }
            _ => {}
        }
        for (key, name) in [
            ("resourceClaimName", &claim.resource_claim_name),
            ("resourceClaimTemplateName", &claim.resource_claim_template_name),
        ] {
            if let Some(name) = name {
                errors.extend(FieldError::invalid_each(&at.child(key), name, names::dns1123_subdomain(name)));
            }
        }
    }
}

/// Resources of the pod as a whole.
pub fn validate_pod_resources(scope: &Scope<'_>, path: &Path, errors: &mut ErrorList) {
    let Some(resources) = &scope.spec.resources else { return };
    let at = path.child("resources");
    if scope.os_name() == "windows" {
        errors.push(FieldError::forbidden(&at, "may not be set for a windows pod"));
        return;
    }
    if resources.claims.is_some() {
        let detail = "claims may not be set for Resources at pod-level";
        errors.push(FieldError::forbidden(&at.child("claims"), detail));
    }
    validate_requirements(resources, validate_pod_resource_name, &scope.claims, &at, errors);
    let none = Quantities::new();
    let limits = resources.limits.as_ref().unwrap_or(&none);
    let requests = resources.requests.as_ref().unwrap_or(&none);
    let shown = |value: Amount, like: &Quantity| {
        canonical(value, quantity::parse(&like.0).map_or(quantity::Format::DecimalSi, |(_, format)| format))
    };
    for (name, sum) in aggregate_container_requests(scope.spec) {
        if let Some(request) = requests.get(&name).filter(|r| sum > amount(r)) {
            let detail = format!(
                "must be greater than or equal to aggregate container requests of {}",
                shown(sum, request)
            );
            errors.push(FieldError::invalid(
                &at.child("requests").key(&name),
                quantity::text(request),
                detail,
            ));
        }
    }
    for (name, sum) in aggregate_container_limits(scope.spec) {
        if let Some(limit) = limits.get(&name).filter(|l| name.starts_with("hugepages-") && sum > amount(l)) {
            let detail = format!(
                "must be greater than or equal to aggregate container limits of {}",
                shown(sum, limit)
            );
            errors.push(FieldError::invalid(&at.child("limits").key(&name), quantity::text(limit), detail));
        }
    }
    for (i, container) in scope.spec.containers.iter().enumerate() {
        for (name, own) in container.resources.iter().filter_map(|r| r.limits.as_ref()).flatten() {
            if let Some(limit) = limits.get(name).filter(|l| amount(own) > amount(l)) {
                let detail = format!("must be less than or equal to pod limits of {}", quantity::text(limit));
                let at = at.child("containers").index(i).key(name).child("limits");
                errors.push(FieldError::invalid(&at, quantity::text(own), detail));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::check;

    #[test]
    fn resource_rules() {
        let with =
            |resources: Value| json!({"containers": [{"name": "a", "image": "i", "resources": resources}]});
        let at = "spec.containers[0].resources";
        let cases: Vec<(Value, String)> = vec![
            (with(json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}})), format!("{at}.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1")),
            (with(json!({"requests": {"x.io/gpu": "1"}})), format!("{at}.limits: Required value: Limit must be set for non overcommitable resources")),
            (with(json!({"limits": {"x.io/gpu": "500m"}, "requests": {"x.io/gpu": "500m"}})), format!("{at}.limits[x.io/gpu]: Invalid value: \"500m\": must be an integer")),
            (with(json!({"requests": {"memory": "-1Gi"}})), format!("{at}.requests[memory]: Invalid value: \"-1Gi\": must be greater than or equal to 0")),
            (with(json!({"requests": {"pods": "1"}})), format!("{at}.requests[pods]: Invalid value: \"pods\": must be a standard resource for containers")),
            (with(json!({"claims": [{"name": "c"}]})), format!("{at}.claims[0]: Not found: \"c\": must be one of the names in pod.spec.resourceClaims which is empty")),
            (json!({"resources": {"requests": {"cpu": "1"}}, "containers": [{"name": "a", "image": "i", "resources": {"requests": {"cpu": "2"}}}]}), "spec.resources.requests[cpu]: Invalid value: \"1\": must be greater than or equal to aggregate container requests of 2".to_string()),
        ];
        for (patch, want) in cases {
            let got = check(patch.clone(), true);
            assert!(got.first().is_some_and(|got| got.starts_with(&want)), "{patch}: {got:?}");
        }
        assert!(
            check(with(json!({"limits": {"cpu": "1", "memory": "1Gi", "hugepages-2Mi": "4Mi"}})), true)
                .is_empty()
        );
    }
}
