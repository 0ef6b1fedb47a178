//! ValidatingWebhookConfiguration.
//!
//! Upstream counterpart: pkg/registry/admissionregistration/validatingwebhookconfiguration.
use super::{GROUP, webhook};
use crate::kind::{Kind, Rest};
use crate::object::set_generation;

pub const KIND: Kind = Kind {
    defaults: |object| webhook::defaults(object, false),
    rest: Rest {
        prepare_create: |object| set_generation(object, 1),
        prepare_update: webhook::prepare_update,
        validate: |object| webhook::validate(object, false),
        validate_update: |new, _| webhook::validate(new, false),
        ..Rest::ANY
    },
    unconditional_update: false,
    columns: webhook::COLUMNS,
    row: webhook::row,
    ..Kind::plain(GROUP, "v1", "ValidatingWebhookConfiguration")
};
