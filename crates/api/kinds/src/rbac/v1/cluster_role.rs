//! ClusterRole.
//!
//! Upstream counterpart: pkg/registry/rbac/clusterrole, ValidateClusterRole in pkg/apis/rbac/validation.
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;

use super::GROUP;
use super::policy_rule::validate_rules;
use crate::default_table;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Kind, NameRule, Rest};
use crate::meta::validate_label_selector;
use crate::object::{items, read};

fn validate(object: &Value) -> ErrorList {
    let mut errors = validate_rules(object, false);
    if object.get("aggregationRule").is_none_or(Value::is_null) {
        return errors;
    }
    let at = Path::new("aggregationRule").child("clusterRoleSelectors");
    let selectors = items(object, "/aggregationRule/clusterRoleSelectors");
    if selectors.is_empty() {
        let detail = "at least one clusterRoleSelector required if aggregationRule is non-nil";
        errors.push(FieldError::required(&at, detail));
    }
    for (i, selector) in selectors.iter().enumerate() {
        match read::<LabelSelector>(Some(selector), &at.index(i)) {
            Ok(selector) => errors.extend(validate_label_selector(Some(&selector), &at.index(i))),
            Err(error) => errors.push(error),
        }
    }
    errors
}

pub const KIND: Kind = Kind {
    name_rule: NameRule::PathSegment,
    rest: Rest { validate, validate_update: |new, _| validate(new), ..Rest::ANY },
    create_on_update: true,
    columns: default_table::COLUMNS,
    row: default_table::row,
    ..Kind::plain(GROUP, "v1", "ClusterRole")
};
