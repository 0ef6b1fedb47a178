//! Nobody grants what they do not have: the checks on writes of roles and bindings.
//!
//! Upstream counterparts: pkg/registry/rbac/{escalation_check.go,validation,*/policybased} and component-helpers
//! auth/rbac/validation. What stays true: a role is written by who holds all its rules or has the verb `escalate`, a
//! binding by who holds the role's rules or has the verb `bind`, and both by superusers.
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, RoleRef};
use sampan_client::Identity;
use serde_json::Value;

use super::{Attributes, Authorizer, rbac};
use crate::status::{GroupResource, Status};

const GROUP: &str = "rbac.authorization.k8s.io";

/// Checks a write of a role or binding: `old` is the stored object when there is one. Other resources pass.
pub fn check_write(
    authorizer: &Authorizer,
    user: &Identity,
    resource: &str,
    namespace: &str,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), Status> {
    if user.is_in(Identity::MASTERS) || old.is_some_and(|old| changes_only_deletion(old, new)) {
        return Ok(());
    }
    let name = new.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let of = GroupResource { group: GROUP, resource };
    let refuse = |why: String| Status::forbidden(of, name, why);
    match resource {
        "roles" | "clusterroles" => {
            if may(authorizer, user, "escalate", resource, namespace, name) {
                return Ok(());
            }
            let rules: Vec<PolicyRule> = read(new.get("rules"))?.unwrap_or_default();
            confirm(&authorizer.rbac, user, namespace, &rules).map_err(refuse)?;
            if resource == "clusterroles" && (is_aggregated(new) || old.is_some_and(is_aggregated)) {
                let words = "must have cluster-admin privileges to use the aggregationRule".to_string();
                confirm(&authorizer.rbac, user, "", &full_authority()).map_err(|_| refuse(words))?;
            }
            Ok(())
        }
        "rolebindings" | "clusterrolebindings" => {
            let role: RoleRef = read(new.get("roleRef"))?.unwrap_or_default();
            let roles = match role.kind.as_str() {
                "Role" => "roles",
                "ClusterRole" => "clusterroles",
                _ => "",
            };
            if !roles.is_empty() && may(authorizer, user, "bind", roles, namespace, &role.name) {
                return Ok(());
            }
            let singular = roles.trim_end_matches('s');
            let rules = authorizer.rbac.rules_of(&role, namespace).map_err(|_| {
                Status::not_found(GroupResource { group: GROUP, resource: singular }, &role.name)
            })?;
            confirm(&authorizer.rbac, user, namespace, &rules).map_err(refuse)
        }
        _ => Ok(()),
    }
}

fn read<T: serde::de::DeserializeOwned>(value: Option<&Value>) -> Result<Option<T>, Status> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => T::deserialize(value).map(Some).map_err(|e| Status::bad_request(e.to_string())),
    }
}

fn may(
    authorizer: &Authorizer,
    user: &Identity,
    verb: &str,
    resource: &str,
    namespace: &str,
    name: &str,
) -> bool {
    let asked = Attributes {
        user: user.clone(),
        verb: verb.to_string(),
        api_group: GROUP.to_string(),
        api_version: "*".to_string(),
        resource: resource.to_string(),
        name: name.to_string(),
        namespace: namespace.to_string(),
        resource_request: true,
        ..Attributes::default()
    };
    authorizer.authorize(&asked).is_allowed()
}

/// Upstream's IsOnlyMutatingGCFields: a garbage collector without the role's rules may still let go of it.
fn changes_only_deletion(old: &Value, new: &Value) -> bool {
    let strip = |object: &Value| {
        let mut object = object.clone();
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            for field in ["ownerReferences", "finalizers", "managedFields"] {
                metadata.remove(field);
            }
        }
        object
    };
    strip(old) == strip(new)
}

fn is_aggregated(role: &Value) -> bool {
    let selectors = role.pointer("/aggregationRule/clusterRoleSelectors").and_then(Value::as_array);
    selectors.is_some_and(|s| !s.is_empty())
}

fn full_authority() -> Vec<PolicyRule> {
    let any = || vec!["*".to_string()];
    vec![
        PolicyRule { verbs: any(), api_groups: Some(any()), resources: Some(any()), ..PolicyRule::default() },
        PolicyRule { verbs: any(), non_resource_urls: Some(any()), ..PolicyRule::default() },
    ]
}

/// Whether `user` holds all of `rules` in `namespace`; else what is missing, in upstream's words.
pub fn confirm(
    rbac: &rbac::Rbac,
    user: &Identity,
    namespace: &str,
    rules: &[PolicyRule],
) -> Result<(), String> {
    let (owned, errors) = rbac.rules_for(user, namespace);
    let missing = uncovered(&owned, rules);
    if missing.is_empty() {
        return Ok(());
    }
    let mut lines: Vec<String> = compact(missing).iter().map(describe).collect();
    lines.sort_unstable();
    lines.dedup();
    let mut message = format!(
        "user {:?} (groups={}) is attempting to grant RBAC permissions not currently held:\n{}",
        user.username,
        quoted(&user.groups),
        lines.join("\n")
    );
    if let Some(errors) = errors {
        message.push_str(&format!("; resolution errors: [{errors}]"));
    }
    Err(message)
}

/// The single-verb, single-resource parts of `wanted` that no rule of `owned` covers.
pub fn uncovered(owned: &[PolicyRule], wanted: &[PolicyRule]) -> Vec<PolicyRule> {
    wanted.iter().flat_map(parts).filter(|part| !owned.iter().any(|rule| covers(rule, part))).collect()
}

fn parts(rule: &PolicyRule) -> Vec<PolicyRule> {
    let mut parts = Vec::new();
    let names: Vec<Option<&String>> = match list(rule.resource_names.as_ref()) {
        [] => vec![None],
        names => names.iter().map(Some).collect(),
    };
    for group in list(rule.api_groups.as_ref()) {
        for resource in list(rule.resources.as_ref()) {
            for verb in &rule.verbs {
                parts.extend(names.iter().map(|name| PolicyRule {
                    verbs: vec![verb.clone()],
                    api_groups: Some(vec![group.clone()]),
                    resources: Some(vec![resource.clone()]),
                    resource_names: name.map(|n| vec![n.clone()]),
                    non_resource_urls: None,
                }));
            }
        }
    }
    for path in list(rule.non_resource_urls.as_ref()) {
        parts.extend(rule.verbs.iter().map(|verb| PolicyRule {
            verbs: vec![verb.clone()],
            non_resource_urls: Some(vec![path.clone()]),
            ..PolicyRule::default()
        }));
    }
    parts
}

fn list(list: Option<&Vec<String>>) -> &[String] {
    list.map(Vec::as_slice).unwrap_or_default()
}

/// `part` has at most one of everything.
fn covers(rule: &PolicyRule, part: &PolicyRule) -> bool {
    let all = |set: &[String], wanted: &[String]| {
        set.iter().any(|one| one == "*") || wanted.iter().all(|one| set.contains(one))
    };
    let resources = list(rule.resources.as_ref());
    let covers_resource = |wanted: &String| {
        resources.iter().any(|one| one == "*" || one == wanted)
            || wanted.split_once('/').is_some_and(|(_, sub)| resources.contains(&format!("*/{sub}")))
    };
    let paths = list(rule.non_resource_urls.as_ref());
    let covers_path = |wanted: &String| paths.iter().any(|path| rbac::path_matches(path, wanted));
    let (names, wanted_names) = (list(rule.resource_names.as_ref()), list(part.resource_names.as_ref()));
    all(&rule.verbs, &part.verbs)
        && all(list(rule.api_groups.as_ref()), list(part.api_groups.as_ref()))
        && list(part.resources.as_ref()).iter().all(covers_resource)
        && list(part.non_resource_urls.as_ref()).iter().all(covers_path)
        && (names.is_empty() || (!wanted_names.is_empty() && wanted_names.iter().all(|n| names.contains(n))))
}

/// Joins parts that differ in their verb only.
fn compact(parts: Vec<PolicyRule>) -> Vec<PolicyRule> {
    let mut joined: Vec<PolicyRule> = Vec::new();
    for part in parts {
        let same = joined.iter_mut().find(|rule| {
            part.non_resource_urls.is_none()
                && rule.non_resource_urls.is_none()
                && rule.api_groups == part.api_groups
                && rule.resources == part.resources
                && rule.resource_names == part.resource_names
        });
        match same {
            Some(rule) => rule.verbs.extend(part.verbs),
            None => joined.push(part),
        }
    }
    joined
}

fn describe(rule: &PolicyRule) -> String {
    let fields = [
        ("APIGroups", list(rule.api_groups.as_ref())),
        ("Resources", list(rule.resources.as_ref())),
        ("NonResourceURLs", list(rule.non_resource_urls.as_ref())),
        ("ResourceNames", list(rule.resource_names.as_ref())),
        ("Verbs", &rule.verbs),
    ];
    let fields: Vec<String> = fields
        .iter()
        .filter(|(_, l)| !l.is_empty())
        .map(|(name, l)| format!("{name}:{}", quoted(l)))
        .collect();
    format!("{{{}}}", fields.join(", "))
}

fn quoted(list: &[String]) -> String {
    let quoted: Vec<String> = list.iter().map(|s| format!("{s:?}")).collect();
    format!("[{}]", quoted.join(" "))
}

/// Whether a cluster role takes its rules from others.
pub fn takes_from_others(role: &ClusterRole) -> bool {
    role.aggregation_rule
        .as_ref()
        .and_then(|r| r.cluster_role_selectors.as_ref())
        .is_some_and(|s| !s.is_empty())
}

#[cfg(test)]
mod tests {
    use super::super::rbac::tests::{bind, cluster_role, rule};
    use super::*;

    #[test]
    fn covers_what_upstream_covers() {
        let cases = [
            (
                rule(&["*"], &["*"], &["*"], &[]),
                rule(&["get"], &["apps"], &["deployments/scale"], &["x"]),
                true,
            ),
            (rule(&["get"], &[""], &["pods"], &[]), rule(&["get", "list"], &[""], &["pods"], &[]), false),
            (rule(&["get"], &[""], &["*/log"], &[]), rule(&["get"], &[""], &["pods/log"], &[]), true),
            (rule(&["get"], &[""], &["pods"], &["a"]), rule(&["get"], &[""], &["pods"], &[]), false),
            (rule(&["get"], &[""], &["pods"], &["a", "b"]), rule(&["get"], &[""], &["pods"], &["b"]), true),
        ];
        for (owned, wanted, want) in cases {
            assert_eq!(uncovered(&[owned], &[wanted]).is_empty(), want);
        }
    }

    #[test]
    fn says_what_is_missing() {
        let rbac = rbac::Rbac::detached();
        rbac.cluster_roles.put(cluster_role("r", vec![rule(&["get"], &[""], &["pods"], &[])]));
        rbac.role_bindings.put(bind("ns", "b", "ClusterRole", "r", ("User", "jane")));
        let jane =
            Identity { username: "jane".into(), groups: vec!["a".into(), "b".into()], ..Identity::default() };
        let wanted = [rule(&["get", "list", "watch"], &[""], &["pods"], &[])];
        assert_eq!(
            confirm(&rbac, &jane, "ns", &wanted).unwrap_err(),
            "user \"jane\" (groups=[\"a\" \"b\"]) is attempting to grant RBAC permissions not currently held:\n\
             {APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"list\" \"watch\"]}"
        );
        assert_eq!(confirm(&rbac, &jane, "ns", &[rule(&["get"], &[""], &["pods"], &["x"])]), Ok(()));
    }
}
