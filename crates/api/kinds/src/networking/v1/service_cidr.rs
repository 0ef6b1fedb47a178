//! ServiceCIDR.
//!
//! Upstream counterpart: pkg/registry/networking/servicecidr, ValidateServiceCIDR in pkg/apis/networking/validation.
use serde_json::{Value, json};

use crate::field::{ErrorList, FieldError, Path};
use crate::ip::{parse_cidr, validate_cidr};
use crate::kind::{Column, Kind, Rest};
use crate::meta::FIELD_IMMUTABLE;
use crate::object::{items, keep};
use crate::table;

fn cidrs(object: &Value) -> Vec<&str> {
    items(object, "/spec/cidrs").iter().filter_map(Value::as_str).collect()
}

fn validate(object: &Value) -> ErrorList {
    let (path, cidrs) = (Path::new("spec").child("cidrs"), cidrs(object));
    match cidrs.len() {
        0 => return vec![FieldError::required(&path, "at least one CIDR required")],
        1 | 2 => {}
        _ => {
            let spec = object["spec"].clone();
            return vec![FieldError::invalid(&path, spec, "may only hold up to 2 values")];
        }
    }
    let mut errors = ErrorList::new();
    for (i, cidr) in cidrs.iter().enumerate() {
        let wrong = validate_cidr(&path.index(i), cidr, &[]);
        if let Some((address, bits)) = parse_cidr(cidr).filter(|_| wrong.is_empty()) {
            let canonical = format!("{address}/{bits}");
            if canonical != *cidr {
                let detail = format!("must be in canonical form (\"{canonical}\")");
                errors.push(FieldError::invalid(&path.index(i), *cidr, detail));
            }
        }
        errors.extend(wrong);
    }
    let families: Vec<bool> =
        cidrs.iter().filter_map(|c| parse_cidr(c)).map(|(ip, _)| ip.is_ipv4()).collect();
    if let [first, second] = families[..]
        && first == second
    {
        let detail =
            "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64";
        errors.push(FieldError::invalid(&path, json!(cidrs), detail));
    }
    errors
}

/// A second family may be added; all else stays.
fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let path = Path::new("spec").child("cidrs");
    let (new_cidrs, old_cidrs) = (cidrs(new), cidrs(old));
    if new_cidrs.len() != old_cidrs.len() && (old_cidrs.len(), new_cidrs.len()) != (1, 2) {
        return vec![FieldError::invalid(&path, json!(new_cidrs), FIELD_IMMUTABLE)];
    }
    let changed = old_cidrs.iter().zip(&new_cidrs).enumerate().filter(|(_, (old, new))| old != new);
    let mut errors: ErrorList =
        changed.map(|(i, (_, new))| FieldError::invalid(&path.index(i), *new, FIELD_IMMUTABLE)).collect();
    if new_cidrs.len() > old_cidrs.len() {
        errors.extend(validate(new));
    }
    errors
}

pub const KIND: Kind = Kind {
    rest: Rest {
        prepare_create: |object| object["status"] = json!({}),
        prepare_update: |new, old| keep(new, old, "status"),
        validate,
        validate_update,
        ..Rest::ANY
    },
    status: Some(Rest { prepare_update: |new, old| keep(new, old, "spec"), ..Rest::ANY }),
    columns: &[Column::NAME, Column::string("CIDRs", "The ranges of services' addresses."), Column::AGE],
    row: |object, now| vec![table::name(object), cidrs(object).join(",").into(), table::age(object, now)],
    ..Kind::plain("networking.k8s.io", "v1", "ServiceCIDR")
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_second_family_is_added() {
        let of = |cidrs: &[&str]| json!({"spec": {"cidrs": cidrs}});
        let one = of(&["10.0.0.0/16"]);
        assert_eq!(validate(&one), Vec::new());
        assert_eq!(validate_update(&of(&["10.0.0.0/16", "fd00::/64"]), &one), Vec::new());
        assert_eq!(validate_update(&of(&["10.0.0.0/16", "10.1.0.0/16"]), &one).len(), 1);
        assert_eq!(validate_update(&of(&["10.1.0.0/16"]), &one).len(), 1);
        assert_eq!(validate(&of(&["10.0.0.1/16"])).len(), 1);
    }
}
