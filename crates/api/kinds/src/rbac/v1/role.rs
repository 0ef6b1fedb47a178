//! Role.
//!
//! Upstream counterpart: pkg/registry/rbac/role, ValidateRole in pkg/apis/rbac/validation.
use super::GROUP;
use super::policy_rule::validate_rules;
use crate::default_table;
use crate::kind::{Kind, NameRule, Rest};

pub const KIND: Kind = Kind {
    name_rule: NameRule::PathSegment,
    rest: Rest {
        validate: |object| validate_rules(object, true),
        validate_update: |new, _| validate_rules(new, true),
        ..Rest::ANY
    },
    create_on_update: true,
    columns: default_table::COLUMNS,
    row: default_table::row,
    ..Kind::plain(GROUP, "v1", "Role")
};
