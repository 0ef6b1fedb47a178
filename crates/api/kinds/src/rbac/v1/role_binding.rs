//! RoleBinding.
//!
//! Upstream counterpart: pkg/registry/rbac/rolebinding, ValidateRoleBinding in pkg/apis/rbac/validation.
use super::GROUP;
use super::binding::{COLUMNS, defaults, row, validate, validate_same_role};
use crate::kind::{Kind, NameRule, Rest};

const ROLES: &[&str] = &["Role", "ClusterRole"];

pub const KIND: Kind = Kind {
    name_rule: NameRule::PathSegment,
    defaults,
    rest: Rest {
        validate: |object| validate(object, ROLES, true),
        validate_update: |new, old| {
            let mut errors = validate(new, ROLES, true);
            validate_same_role(new, old, &mut errors);
            errors
        },
        ..Rest::ANY
    },
    create_on_update: true,
    columns: COLUMNS,
    row,
    ..Kind::plain(GROUP, "v1", "RoleBinding")
};
