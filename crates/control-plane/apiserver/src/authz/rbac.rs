//! RBAC. Upstream counterparts: plugin/pkg/auth/authorizer/rbac, pkg/registry/rbac/validation/rule.go and
//! pkg/apis/rbac/v1/evaluation_helpers.go.
//!
//! What stays true: rules only ever allow, so what cannot be resolved (a binding to a role that is gone) is named in
//! the reason and otherwise passed over.
use std::sync::Arc;

use k8s_openapi::api::rbac::v1::{
    ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject,
};
use sampan_client::{Identity, Informer, Informers};

use super::{Attributes, Verdict};

/// Decides from roles and bindings.
#[derive(Clone)]
pub struct Rbac {
    pub roles: Informer<Role>,
    pub role_bindings: Informer<RoleBinding>,
    pub cluster_roles: Informer<ClusterRole>,
    pub cluster_role_bindings: Informer<ClusterRoleBinding>,
}

/// What a binding brings: where it comes from, and the rules or why there are none.
enum Granted<'a> {
    ByCluster(&'a ClusterRoleBinding, &'a Subject),
    ByNamespace(&'a RoleBinding, &'a Subject),
}

/// The rules of one role, without copying them.
enum Rules {
    Namespaced(Arc<Role>),
    Cluster(Arc<ClusterRole>),
}

impl Rules {
    fn as_slice(&self) -> &[PolicyRule] {
        match self {
            Self::Namespaced(role) => role.rules.as_deref().unwrap_or_default(),
            Self::Cluster(role) => role.rules.as_deref().unwrap_or_default(),
        }
    }
}

/// Sees a binding with its rules, or why there are none; answers whether to go on.
type Visitor<'a> = dyn FnMut(&Granted<'_>, Result<&[PolicyRule], String>) -> bool + 'a;

impl Rbac {
    pub fn new(informers: &Informers) -> Self {
        Self {
            roles: informers.of(),
            role_bindings: informers.of(),
            cluster_roles: informers.of(),
            cluster_role_bindings: informers.of(),
        }
    }

    /// Without a cluster: tests fill the informers.
    pub fn detached() -> Self {
        Self {
            roles: Informer::detached(),
            role_bindings: Informer::detached(),
            cluster_roles: Informer::detached(),
            cluster_role_bindings: Informer::detached(),
        }
    }

    pub async fn ready(&self) {
        self.roles.synced().await;
        self.role_bindings.synced().await;
        self.cluster_roles.synced().await;
        self.cluster_role_bindings.synced().await;
    }

    pub fn authorize(&self, attributes: &Attributes) -> Verdict {
        let (mut allowed, mut errors) = (None, Vec::new());
        self.visit(&attributes.user, &attributes.namespace, &mut |granted, rules| {
            match rules {
                Ok(rules) if rules.iter().any(|rule| rule_allows(rule, attributes)) => {
                    allowed = Some(format!("RBAC: allowed by {}", describe(granted)));
                }
                Ok(_) => {}
                Err(error) => errors.push(error),
            }
            allowed.is_none()
        });
        match allowed {
            Some(reason) => Verdict::allow(reason),
            None if errors.is_empty() => Verdict::no_opinion(""),
            None => Verdict::no_opinion(format!("RBAC: {}", aggregate(errors))),
        }
    }

    /// All rules that hold for a user in a namespace ("" for the cluster), and what could not be resolved.
    pub fn rules_for(&self, user: &Identity, namespace: &str) -> (Vec<PolicyRule>, Option<String>) {
        let (mut found, mut errors) = (Vec::new(), Vec::new());
        self.visit(user, namespace, &mut |_, rules| {
            match rules {
                Ok(rules) => found.extend_from_slice(rules),
                Err(error) => errors.push(error),
            }
            true
        });
        (found, (!errors.is_empty()).then(|| aggregate(errors)))
    }

    /// The rules that a binding in `namespace` refers to.
    pub fn rules_of(&self, role: &RoleRef, namespace: &str) -> Result<Vec<PolicyRule>, String> {
        self.resolve(role, namespace).map(|rules| rules.as_slice().to_vec())
    }

    fn resolve(&self, role: &RoleRef, namespace: &str) -> Result<Rules, String> {
        let missing = |kind: &str| format!("{kind}.rbac.authorization.k8s.io {:?} not found", role.name);
        match role.kind.as_str() {
            "Role" => {
                self.roles.get(namespace, &role.name).map(Rules::Namespaced).ok_or_else(|| missing("role"))
            }
            "ClusterRole" => self
                .cluster_roles
                .get("", &role.name)
                .map(Rules::Cluster)
                .ok_or_else(|| missing("clusterrole")),
            kind => Err(format!("unsupported role reference kind: {kind:?}")),
        }
    }

    /// Calls `see` with each binding that applies, until it answers false.
    fn visit(&self, user: &Identity, namespace: &str, see: &mut Visitor<'_>) {
        let mut seen = |granted: &Granted<'_>, rules: Result<Rules, String>| match rules {
            Ok(rules) => see(granted, Ok(rules.as_slice())),
            Err(error) => see(granted, Err(error)),
        };
        for binding in self.cluster_role_bindings.list() {
            let subjects = binding.subjects.as_deref().unwrap_or_default();
            if let Some(subject) = subjects.iter().find(|s| applies(s, user, ""))
                && !seen(&Granted::ByCluster(&binding, subject), self.resolve(&binding.role_ref, ""))
            {
                return;
            }
        }
        if namespace.is_empty() {
            return;
        }
        for binding in self.role_bindings.list_in(namespace) {
            let subjects = binding.subjects.as_deref().unwrap_or_default();
            if let Some(subject) = subjects.iter().find(|s| applies(s, user, namespace))
                && !seen(&Granted::ByNamespace(&binding, subject), self.resolve(&binding.role_ref, namespace))
            {
                return;
            }
        }
    }
}

fn describe(granted: &Granted<'_>) -> String {
    let subject = |s: &Subject, namespace: &str| match s.kind.as_str() {
        "ServiceAccount" => {
            let own = s.namespace.as_deref().filter(|n| !n.is_empty());
            format!("{} {:?}", s.kind, format!("{}/{}", s.name, own.unwrap_or(namespace)))
        }
        _ => format!("{} {:?}", s.kind, s.name),
    };
    let (kind, name, role, subject) = match granted {
        Granted::ByCluster(b, s) => {
            ("ClusterRoleBinding", b.metadata.name.clone().unwrap_or_default(), &b.role_ref, subject(s, ""))
        }
        Granted::ByNamespace(b, s) => {
            let namespace = b.metadata.namespace.as_deref().unwrap_or_default();
            let name = format!("{}/{namespace}", b.metadata.name.as_deref().unwrap_or_default());
            ("RoleBinding", name, &b.role_ref, subject(s, namespace))
        }
    };
    format!("{kind} {name:?} of {} {:?} to {subject}", role.kind, role.name)
}

fn applies(subject: &Subject, user: &Identity, namespace: &str) -> bool {
    match subject.kind.as_str() {
        "User" => user.username == subject.name,
        "Group" => user.is_in(&subject.name),
        "ServiceAccount" => {
            let namespace = subject.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or(namespace);
            let rest = user.username.strip_prefix("system:serviceaccount:");
            let rest =
                rest.and_then(|rest| rest.strip_prefix(namespace)).and_then(|rest| rest.strip_prefix(':'));
            !namespace.is_empty() && rest == Some(subject.name.as_str())
        }
        _ => false,
    }
}

/// Several errors as upstream's utilerrors.Aggregate prints them.
fn aggregate(errors: Vec<String>) -> String {
    let mut distinct: Vec<String> = Vec::new();
    for error in errors {
        if !distinct.contains(&error) {
            distinct.push(error);
        }
    }
    match distinct.as_slice() {
        [one] => one.clone(),
        _ => format!("[{}]", distinct.join(", ")),
    }
}

pub fn rule_allows(rule: &PolicyRule, attributes: &Attributes) -> bool {
    if !has(Some(&rule.verbs), &attributes.verb) {
        return false;
    }
    if !attributes.resource_request {
        let paths = rule.non_resource_urls.as_deref().unwrap_or_default();
        return paths.iter().any(|path| path_matches(path, &attributes.path));
    }
    let names = rule.resource_names.as_deref().unwrap_or_default();
    has(rule.api_groups.as_ref(), &attributes.api_group)
        && resource_matches(rule.resources.as_deref().unwrap_or_default(), attributes)
        && (names.is_empty() || names.contains(&attributes.name))
}

fn has(set: Option<&Vec<String>>, wanted: &str) -> bool {
    set.is_some_and(|set| set.iter().any(|one| one == "*" || one == wanted))
}

pub(super) fn path_matches(pattern: &str, path: &str) -> bool {
    pattern == "*"
        || pattern == path
        || (pattern.ends_with('*') && path.starts_with(pattern.trim_end_matches('*')))
}

fn resource_matches(resources: &[String], attributes: &Attributes) -> bool {
    let (resource, subresource) = (attributes.resource.as_str(), attributes.subresource.as_str());
    resources.iter().any(|one| match one.split_once('/') {
        _ if one == "*" => true,
        None => subresource.is_empty() && one == resource,
        Some((main, sub)) => {
            !subresource.is_empty() && sub == subresource && (main == "*" || main == resource)
        }
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn rule(verbs: &[&str], groups: &[&str], resources: &[&str], names: &[&str]) -> PolicyRule {
        let list = |of: &[&str]| of.iter().map(|s| (*s).to_string()).collect::<Vec<_>>();
        PolicyRule {
            verbs: list(verbs),
            api_groups: Some(list(groups)),
            resources: Some(list(resources)),
            resource_names: (!names.is_empty()).then(|| list(names)),
            non_resource_urls: None,
        }
    }

    pub fn cluster_role(name: &str, rules: Vec<PolicyRule>) -> ClusterRole {
        let mut role = ClusterRole { rules: Some(rules), ..ClusterRole::default() };
        role.metadata.name = Some(name.into());
        role
    }

    pub fn bind(namespace: &str, name: &str, kind: &str, role: &str, subject: (&str, &str)) -> RoleBinding {
        let mut binding = RoleBinding {
            role_ref: RoleRef { kind: kind.into(), name: role.into(), ..RoleRef::default() },
            subjects: Some(vec![Subject {
                kind: subject.0.into(),
                name: subject.1.into(),
                ..Subject::default()
            }]),
            ..RoleBinding::default()
        };
        binding.metadata.name = Some(name.into());
        binding.metadata.namespace = Some(namespace.into());
        binding
    }

    fn ask(user: &str, verb: &str, namespace: &str, resource: &str, name: &str) -> Attributes {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Attributes {
            user: Identity::new(user, &[]),
            verb: verb.into(),
            namespace: namespace.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            name: name.into(),
            resource_request: true,
            ..Attributes::default()
        }
    }

    #[test]
    fn rules_match_as_upstream() {
        let any = rule(&["*"], &["*"], &["*"], &[]);
        let named = rule(&["get"], &[""], &["pods"], &["a"]);
        let log = rule(&["get"], &[""], &["pods/log"], &[]);
        let scale = rule(&["get"], &[""], &["*/scale"], &[]);
        let cases = [
            (&any, "get", "pods/log", "", true),
            (&named, "get", "pods", "a", true),
            (&named, "get", "pods", "b", false),
            (&named, "list", "pods", "a", false),
            (&named, "get", "pods/log", "a", false),
            (&log, "get", "pods/log", "a", true),
            (&log, "get", "pods", "a", false),
            (&scale, "get", "deployments/scale", "", true),
            (&scale, "get", "deployments", "", false),
        ];
        for (rule, verb, resource, name, want) in cases {
            assert_eq!(
                rule_allows(rule, &ask("u", verb, "ns", resource, name)),
                want,
                "{verb} {resource} {name}"
            );
        }
        let paths = PolicyRule {
            verbs: vec!["get".into()],
            non_resource_urls: Some(vec!["/healthz".into(), "/api/*".into()]),
            ..PolicyRule::default()
        };
        for (path, want) in [("/healthz", true), ("/healthz/x", false), ("/api/v1", true), ("/apis", false)] {
            let attributes = Attributes { verb: "get".into(), path: path.into(), ..Attributes::default() };
            assert_eq!(rule_allows(&paths, &attributes), want, "{path}");
        }
    }

    #[test]
    fn bindings_reach_their_namespace_and_missing_roles_are_named() {
        let rbac = Rbac::detached();
        rbac.cluster_roles.put(cluster_role("view", vec![rule(&["get"], &[""], &["pods"], &[])]));
        rbac.role_bindings.put(bind("ns", "b", "ClusterRole", "view", ("User", "jane")));
        rbac.role_bindings.put(bind("ns", "c", "ClusterRole", "view", ("ServiceAccount", "default")));
        rbac.role_bindings.put(bind("ns", "d", "ClusterRole", "gone", ("User", "joe")));
        let jane = rbac.authorize(&ask("jane", "get", "ns", "pods", "x"));
        assert!(jane.is_allowed());
        assert_eq!(
            jane.reason,
            r#"RBAC: allowed by RoleBinding "b/ns" of ClusterRole "view" to User "jane""#
        );
        assert!(!rbac.authorize(&ask("jane", "get", "other", "pods", "x")).is_allowed());
        assert!(!rbac.authorize(&ask("jane", "get", "", "pods", "x")).is_allowed());
        let account = "system:serviceaccount:ns:default";
        assert!(rbac.authorize(&ask(account, "get", "ns", "pods", "x")).is_allowed());
        assert!(
            !rbac
                .authorize(&ask("system:serviceaccount:ns:default:x", "get", "ns", "pods", "x"))
                .is_allowed()
        );
        let joe = rbac.authorize(&ask("joe", "get", "ns", "pods", "x"));
        assert_eq!(joe.reason, r#"RBAC: clusterrole.rbac.authorization.k8s.io "gone" not found"#);
    }
}
