//! DeviceClass.
//!
//! Upstream counterpart: pkg/registry/resource/deviceclass. Left out: what is inside the spec.
use super::GROUP;
use crate::kind::{Kind, Rest};
use crate::object::{bump_generation, same_in, set_generation};

pub const KIND: Kind = Kind {
    rest: Rest {
        prepare_create: |object| set_generation(object, 1),
        prepare_update: |new, old| bump_generation(new, old, !same_in(new, old, "/spec")),
        ..Rest::ANY
    },
    ..Kind::plain(GROUP, "v1", "DeviceClass")
};
