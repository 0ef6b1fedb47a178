//! MutatingAdmissionPolicy.
//!
//! Upstream counterpart: pkg/registry/admissionregistration/mutatingadmissionpolicy, pkg/apis/admissionregistration.
//! Left out: compiling expressions.
use serde_json::Value;

use super::GROUP;
use super::validating_admission_policy::{defaults, param_kind, validate_shared};
use crate::core::v1::pod_spec::one_of;
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::object::{bump_generation, count, items, same_in, set_generation, text};
use crate::table;

fn validate(object: &Value) -> ErrorList {
    let (mut errors, path) = (ErrorList::new(), Path::new("spec"));
    validate_shared(object, &mut errors);
    let (at, mutations) = (path.child("mutations"), items(object, "/spec/mutations"));
    if mutations.is_empty() {
        errors.push(FieldError::required(&at, "mutations must contain at least one item"));
    }
    for (i, mutation) in mutations.iter().enumerate() {
        let at = at.index(i);
        let key = match text(mutation, "/patchType") {
            "ApplyConfiguration" => "applyConfiguration",
            "JSONPatch" => "jsonPatch",
            "" => {
                errors.push(FieldError::required(&at.child("patchType"), ""));
                continue;
            }
            other => {
                let supported = ["ApplyConfiguration", "JSONPatch"];
                errors.push(FieldError::not_supported(&at.child("patchType"), other, &supported));
                continue;
            }
        };
        if text(mutation, &format!("/{key}/expression")).trim().is_empty() {
            let at = at.child(key).child("expression");
            errors.push(FieldError::required(&at, "expression is not specified"));
        }
    }
    let policy = text(object, "/spec/reinvocationPolicy");
    one_of(policy, &["IfNeeded", "Never"], &path.child("reinvocationPolicy"), &mut errors);
    errors
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_create: |object| set_generation(object, 1),
        prepare_update: |new, old| bump_generation(new, old, !same_in(new, old, "/spec")),
        validate,
        validate_update: |new, _| validate(new),
        ..Rest::ANY
    },
    unconditional_update: false,
    columns: &[
        Column::NAME,
        Column::integer(
            "Mutations",
            "Mutation indicates the number of mutations rules defined in this configuration",
        ),
        Column::string(
            "ParamKind",
            "ParamKind specifies the kind of resources used to parameterize this policy",
        ),
        Column::AGE,
    ],
    row: |object, now| {
        let mutations = count(object, "/spec/mutations");
        vec![table::name(object), mutations.into(), param_kind(object), table::age(object, now)]
    },
    ..Kind::plain(GROUP, "v1", "MutatingAdmissionPolicy")
};
