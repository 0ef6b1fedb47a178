//! MutatingWebhookConfiguration.
//!
//! Upstream counterpart: pkg/registry/admissionregistration/mutatingwebhookconfiguration.
use super::{GROUP, webhook};
use crate::kind::{Kind, Rest};
use crate::object::set_generation;

pub const KIND: Kind = Kind {
    defaults: |object| webhook::defaults(object, true),
    rest: Rest {
        prepare_create: |object| set_generation(object, 1),
        prepare_update: webhook::prepare_update,
        validate: |object| webhook::validate(object, true),
        validate_update: |new, _| webhook::validate(new, true),
        ..Rest::ANY
    },
    unconditional_update: false,
    columns: webhook::COLUMNS,
    row: webhook::row,
    ..Kind::plain(GROUP, "v1", "MutatingWebhookConfiguration")
};
