//! Secret.
//!
//! Upstream counterpart: pkg/registry/core/secret, ValidateSecret in validation.go; stringData is merged into data as
//! upstream's conversion does. Left out: the warning about TLS pairs that don't fit.
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::config_map::{MAX_SIZE_BYTES, decoded_len, validate_immutable};
use crate::field::{ErrorList, FieldError, Path};
use crate::kind::{Column, Kind, Rest};
use crate::meta::immutable_key;
use crate::names;
use crate::object::{child, count, default_zero, entries, remove, text};
use crate::table;

fn defaults(object: &mut Value) {
    default_zero(object, "type", "Opaque");
    if let Some(Value::Object(strings)) = remove(object, "stringData") {
        let data = child(object, "data");
        for (key, value) in strings {
            data[key] = STANDARD.encode(value.as_str().unwrap_or_default()).into();
        }
    }
}

fn validate(object: &Value) -> ErrorList {
    let (mut errors, mut size_bytes) = (ErrorList::new(), 0);
    let path = Path::new("data");
    for (key, value) in entries(object, "/data") {
        errors.extend(FieldError::invalid_each(&path.key(key), key, names::config_map_key(key)));
        size_bytes += decoded_len(value.as_str().unwrap_or_default());
    }
    if size_bytes > MAX_SIZE_BYTES {
        errors.push(FieldError::too_long(&path, MAX_SIZE_BYTES));
    }
    let value =
        |key: &str| object.get("data").and_then(|d| d.get(key)).map(|v| v.as_str().unwrap_or_default());
    let mut required = |key: &str| errors.push(FieldError::required(&path.key(key), ""));
    let json_map = |key: &str, errors: &mut ErrorList| {
        let Some(encoded) = value(key) else {
            errors.push(FieldError::required(&path.key(key), ""));
            return;
        };
        let decoded = STANDARD.decode(encoded).unwrap_or_default();
        if let Err(error) = serde_json::from_slice::<serde_json::Map<String, Value>>(&decoded) {
            let at = path.key(key);
            errors.push(FieldError::invalid(&at, "<secret contents redacted>", error.to_string()));
        }
    };
    match text(object, "/type") {
        "kubernetes.io/service-account-token" => {
            let key = "kubernetes.io/service-account.name";
            let annotation = object.pointer("/metadata/annotations").and_then(|a| a.get(key));
            if annotation.and_then(Value::as_str).unwrap_or_default().is_empty() {
                let at = Path::new("metadata").child("annotations").key(key);
                errors.push(FieldError::required(&at, ""));
            }
        }
        "kubernetes.io/dockercfg" => json_map(".dockercfg", &mut errors),
        "kubernetes.io/dockerconfigjson" => json_map(".dockerconfigjson", &mut errors),
        "kubernetes.io/basic-auth" if value("username").is_none() && value("password").is_none() => {
            required("username");
            required("password");
        }
        "kubernetes.io/ssh-auth" if value("ssh-privatekey").unwrap_or_default().is_empty() => {
            required("ssh-privatekey");
        }
        "kubernetes.io/tls" => {
            ["tls.crt", "tls.key"].iter().filter(|key| value(key).is_none()).for_each(|key| required(key));
        }
        _ => {}
    }
    errors
}

pub const KIND: Kind = Kind {
    defaults,
    rest: Rest {
        prepare_update: |new, old| {
            let kind = text(old, "/type").to_string();
            default_zero(new, "type", kind);
        },
        validate,
        validate_update: |new, old| {
            let mut errors = ErrorList::new();
            immutable_key(Some(new), Some(old), "type", &Path::new(""), &mut errors);
            validate_immutable(new, old, &["data"], &mut errors);
            errors.extend(validate(new));
            errors
        },
        ..Rest::ANY
    },
    columns: &[
        Column::NAME,
        Column::string("Type", "What the secret is for."),
        Column::string("Data", "How many keys there are."),
        Column::AGE,
    ],
    row: |object, now| {
        let (kind, keys) = (text(object, "/type"), count(object, "/data"));
        vec![table::name(object), kind.into(), keys.into(), table::age(object, now)]
    },
    selectable: |object| vec![("type", text(object, "/type").to_string())],
    ..Kind::plain("", "v1", "Secret")
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules() {
        let mut secret = json!({"stringData": {"a": "x"}, "data": {"a": "MQ==", "b": "Mg=="}});
        defaults(&mut secret);
        assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "eA==", "b": "Mg=="}}));
        for (kind, data, want) in [
            ("kubernetes.io/tls", json!({"tls.crt": ""}), vec!["data[tls.key]: Required value"]),
            (
                "kubernetes.io/basic-auth",
                json!({}),
                vec!["data[username]: Required value", "data[password]: Required value"],
            ),
            ("kubernetes.io/dockerconfigjson", json!({}), vec!["data[.dockerconfigjson]: Required value"]),
            ("x/y", json!({}), vec![]),
        ] {
            let got: Vec<String> =
                validate(&json!({"type": kind, "data": data})).iter().map(ToString::to_string).collect();
            assert_eq!(got, want, "{kind}");
        }
        let got = (KIND.rest.validate_update)(&json!({"type": "a"}), &json!({"type": "b"}));
        assert_eq!(got[0].to_string(), "type: Invalid value: \"a\": field is immutable");
    }
}
