//! MutatingAdmissionPolicyBinding.
//!
//! Upstream counterpart: pkg/registry/admissionregistration/mutatingadmissionpolicybinding.
use super::{GROUP, policy_binding};
use crate::kind::{Kind, Rest};
use crate::object::{bump_generation, same_in, set_generation};

pub const KIND: Kind = Kind {
    defaults: policy_binding::defaults,
    rest: Rest {
        prepare_create: |object| set_generation(object, 1),
        prepare_update: |new, old| bump_generation(new, old, !same_in(new, old, "/spec")),
        validate: |object| policy_binding::validate(object, true),
        validate_update: |new, _| policy_binding::validate(new, true),
        ..Rest::ANY
    },
    unconditional_update: false,
    columns: policy_binding::COLUMNS,
    row: policy_binding::row,
    ..Kind::plain(GROUP, "v1", "MutatingAdmissionPolicyBinding")
};
