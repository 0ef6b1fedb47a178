//! ClusterRoleBinding.
//!
//! Upstream counterpart: pkg/registry/rbac/clusterrolebinding, ValidateClusterRoleBinding in pkg/apis/rbac/validation.
use super::GROUP;
use super::binding::{COLUMNS, defaults, row, validate, validate_same_role};
use crate::kind::{Kind, NameRule, Rest};

const ROLES: &[&str] = &["ClusterRole"];

pub const KIND: Kind = Kind {
    name_rule: NameRule::PathSegment,
    defaults,
    rest: Rest {
        validate: |object| validate(object, ROLES, false),
        validate_update: |new, old| {
            let mut errors = validate(new, ROLES, false);
            validate_same_role(new, old, &mut errors);
            errors
        },
        ..Rest::ANY
    },
    create_on_update: true,
    columns: COLUMNS,
    row,
    ..Kind::plain(GROUP, "v1", "ClusterRoleBinding")
};
