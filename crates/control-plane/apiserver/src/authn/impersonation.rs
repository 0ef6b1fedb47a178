//! Acting as somebody else. Upstream counterpart: k8s.io/apiserver/pkg/endpoints/filters/impersonation.
//!
//! What stays true: each thing impersonated (user, group, extra, uid) is authorized by itself, as the real user.
use std::collections::BTreeMap;

use http::HeaderMap;
use sampan_client::Identity;

use super::{ANONYMOUS, UNAUTHENTICATED};
use crate::authz::Attributes;
use crate::query::percent_decode;
use crate::status::Status;

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";
const AUTHENTICATION: &str = "authentication.k8s.io";

/// One thing that the caller wants to be.
struct Wish {
    kind: &'static str,
    namespace: String,
    name: String,
    /// The key of an extra.
    key: String,
}

/// Whom the caller wants to act as, and all that it must be allowed for that.
#[derive(Clone, Debug)]
pub struct Impersonation {
    pub identity: Identity,
    pub checks: Vec<Attributes>,
}

/// What the headers ask for, not yet allowed.
pub fn requested(headers: &HeaderMap, user: &Identity) -> Result<Option<Impersonation>, Status> {
    let wishes = wishes(headers)?;
    if wishes.is_empty() {
        return Ok(None);
    }
    let groups_given = headers.contains_key(GROUP);
    let (mut acting, mut checks) = (Identity::default(), Vec::new());
    for wish in &wishes {
        let mut asked = Attributes {
            user: user.clone(),
            verb: "impersonate".to_string(),
            namespace: wish.namespace.clone(),
            name: wish.name.clone(),
            resource_request: true,
            ..Attributes::default()
        };
        match wish.kind {
            "ServiceAccount" => {
                asked.resource = "serviceaccounts".to_string();
                asked.api_version = "v1".to_string();
                acting.username = format!("system:serviceaccount:{}:{}", wish.namespace, wish.name);
                if !groups_given {
                    let of_namespace = format!("system:serviceaccounts:{}", wish.namespace);
                    acting.groups = vec!["system:serviceaccounts".to_string(), of_namespace];
                }
            }
            "User" => {
                asked.resource = "users".to_string();
                acting.username = wish.name.clone();
            }
            "Group" => {
                asked.resource = "groups".to_string();
                acting.groups.push(wish.name.clone());
            }
            kind => {
                asked.api_group = AUTHENTICATION.to_string();
                asked.api_version = "v1".to_string();
                if kind == "UserExtra" {
                    asked.resource = "userextras".to_string();
                    asked.subresource = wish.key.clone();
                    acting.extra.entry(wish.key.clone()).or_default().push(wish.name.clone());
                } else {
                    asked.resource = "uids".to_string();
                    acting.uid = wish.name.clone();
                }
            }
        }
        checks.push(asked);
    }
    let (add, unless) = match acting.username == ANONYMOUS {
        true => (UNAUTHENTICATED, [UNAUTHENTICATED, UNAUTHENTICATED]),
        false => (Identity::AUTHENTICATED, [Identity::AUTHENTICATED, UNAUTHENTICATED]),
    };
    if !unless.iter().any(|group| acting.is_in(group)) {
        acting.groups.push(add.to_string());
    }
    Ok(Some(Impersonation { identity: acting, checks }))
}

/// Removes the headers, so that nothing behind this sees or forwards them.
pub fn strip(headers: &mut HeaderMap) {
    let ours = |name: &str| matches!(name, USER | GROUP | UID) || name.starts_with(EXTRA);
    let names: Vec<_> = headers.keys().filter(|k| ours(k.as_str())).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

fn wishes(headers: &HeaderMap) -> Result<Vec<Wish>, Status> {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let wish = |kind, name: String| Wish { kind, namespace: String::new(), name, key: String::new() };
    let mut wishes = Vec::new();
    let user = headers.get(USER).map(text).filter(|user| !user.is_empty());
    if let Some(user) = user.clone() {
        let account = user.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
        wishes.push(match account {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains(':') => {
                Wish { namespace: namespace.to_string(), ..wish("ServiceAccount", name.to_string()) }
            }
            _ => wish("User", user),
        });
    }
    wishes.extend(headers.get_all(GROUP).iter().map(|group| wish("Group", text(group))));
    for (name, value) in headers {
        if let Some(key) = name.as_str().strip_prefix(EXTRA) {
            let key = percent_decode(key, false).into_owned();
            wishes.push(Wish { key, ..wish("UserExtra", text(value)) });
        }
    }
    if let Some(uid) = headers.get(UID).map(text).filter(|uid| !uid.is_empty()) {
        wishes.push(wish("UID", uid));
    }
    if user.is_none() && !wishes.is_empty() {
        let named = |kind: &'static str| wishes.iter().filter(move |wish| wish.kind == kind);
        let list = |values: Vec<&str>| match values.is_empty() {
            true => "[]string(nil)".to_string(),
            false => format!(
                "[]string{{{}}}",
                values.iter().map(|v| format!("{v:?}")).collect::<Vec<_>>().join(", ")
            ),
        };
        let mut extra: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        named("UserExtra").for_each(|wish| extra.entry(&wish.key).or_default().push(&wish.name));
        let extra = match extra.is_empty() {
            true => "map[string][]string(nil)".to_string(),
            false => {
                let entries: Vec<String> =
                    extra.into_iter().map(|(key, values)| format!("{key:?}:{}", list(values))).collect();
                format!("map[string][]string{{{}}}", entries.join(", "))
            }
        };
        let uid = named("UID").next().map_or("", |wish| wish.name.as_str());
        let groups = list(named("Group").map(|wish| wish.name.as_str()).collect());
        let message = format!(
            "requested &user.DefaultInfo{{Name:\"\", UID:{uid:?}, Groups:{groups}, Extra:{extra}}} without \
             impersonating a user name"
        );
        return Err(Status::bad_request(message));
    }
    Ok(wishes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authz::{Authorizer, node::NodeAuthorizer, rbac::Rbac};
    use http::{HeaderName, HeaderValue};

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = list.iter().map(|(k, v)| (HeaderName::from_static(k), HeaderValue::from_static(v)));
        let mut headers = HeaderMap::new();
        pairs.for_each(|(k, v)| {
            headers.append(k, v);
        });
        headers
    }

    /// As the handler does it.
    fn impersonated(
        headers: &HeaderMap,
        user: &Identity,
        authorizer: &Authorizer,
    ) -> Result<Option<Identity>, Status> {
        let Some(Impersonation { identity, checks }) = requested(headers, user)? else { return Ok(None) };
        checks.iter().try_for_each(|check| authorizer.check(check))?;
        Ok(Some(identity))
    }

    #[test]
    fn groups_follow_the_user() {
        let authorizer = Authorizer { node: NodeAuthorizer::detached(), rbac: Rbac::detached() };
        let admin = Identity::loopback();
        type Headers = &'static [(&'static str, &'static str)];
        let cases: [(Headers, &str, &str); 4] = [
            (&[(USER, "jane")], "jane", "system:authenticated"),
            (&[(USER, "jane"), (GROUP, "a"), (GROUP, "b")], "jane", "a,b,system:authenticated"),
            (
                &[(USER, "system:serviceaccount:ns:sa")],
                "system:serviceaccount:ns:sa",
                "system:serviceaccounts,system:serviceaccounts:ns,system:authenticated",
            ),
            (&[(USER, ANONYMOUS)], ANONYMOUS, UNAUTHENTICATED),
        ];
        for (list, user, groups) in cases {
            let acting = impersonated(&headers(list), &admin, &authorizer).unwrap().unwrap();
            assert_eq!((acting.username.as_str(), acting.groups.join(",").as_str()), (user, groups));
        }
        let mut extra = headers(&[(USER, "jane"), ("impersonate-extra-acme.com%2fproject", "x"), (UID, "7")]);
        let acting = impersonated(&extra, &admin, &authorizer).unwrap().unwrap();
        assert_eq!((acting.uid.as_str(), &acting.extra["acme.com/project"]), ("7", &vec!["x".to_string()]));
        strip(&mut extra);
        assert!(extra.is_empty());
        assert_eq!(impersonated(&extra, &admin, &authorizer), Ok(None));

        let refused =
            impersonated(&headers(&[(USER, "jane")]), &Identity::new("joe", &[]), &authorizer).unwrap_err();
        assert_eq!(
            refused.0.message,
            r#"users "jane" is forbidden: User "joe" cannot impersonate resource "users" in API group "" at the cluster scope"#
        );
        let alone = impersonated(&headers(&[(GROUP, "a")]), &admin, &authorizer).unwrap_err();
        assert_eq!(
            alone.0.message,
            "requested &user.DefaultInfo{Name:\"\", UID:\"\", Groups:[]string{\"a\"}, Extra:map[string][]string(nil)} \
             without impersonating a user name"
        );
    }
}
