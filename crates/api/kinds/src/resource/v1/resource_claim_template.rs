//! ResourceClaimTemplate.
//!
//! Upstream counterpart: pkg/registry/resource/resourceclaimtemplate. Left out: what ResourceClaim leaves out.
use super::{GROUP, resource_claim};
use crate::apps::v1::workload::immutable;
use crate::field::{ErrorList, Path};
use crate::kind::{Kind, Rest};

pub const KIND: Kind = Kind {
    defaults: |object| resource_claim::defaults(object, "/spec/spec"),
    rest: Rest {
        validate: |object| resource_claim::validate(object, "/spec/spec", &Path::new("spec").child("spec")),
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            immutable(new, old, "/spec", &Path::new("spec"), &mut errors);
            errors
        },
        ..Rest::ANY
    },
    ..Kind::plain(GROUP, "v1", "ResourceClaimTemplate")
};
