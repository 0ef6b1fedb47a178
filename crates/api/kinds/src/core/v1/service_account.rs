//! ServiceAccount.
//!
//! Upstream counterpart: pkg/registry/core/serviceaccount.
use serde_json::{Value, json};

use crate::kind::{Kind, Rest};
use crate::object::items_mut;

const MOUNTABLE: &str = "kubernetes.io/enforce-mountable-secrets";

/// Of a reference to a secret only its name is kept.
fn clean_references(object: &mut Value) {
    for secret in items_mut(object, "/secrets") {
        let name = secret.get("name").cloned();
        *secret = name.map_or_else(|| json!({}), |name| json!({"name": name}));
    }
}

pub const KIND: Kind = Kind {
    rest: Rest {
        prepare_create: clean_references,
        prepare_update: |new, _| clean_references(new),
        warnings: |new, old| {
            let has =
                |o: &Value| o.pointer("/metadata/annotations").is_some_and(|a| a.get(MOUNTABLE).is_some());
            if !has(new) || old.is_some_and(has) {
                return Vec::new();
            }
            vec![format!(
                "metadata.annotations[{MOUNTABLE}]: deprecated in v1.32+; prefer separate namespaces to isolate access to \
                 mounted secrets"
            )]
        },
        ..Rest::ANY
    },
    ..Kind::plain("", "v1", "ServiceAccount")
};
