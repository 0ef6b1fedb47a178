//! Golden bytes, a generated sample of every type, and damaged input.

use serde_json::json;

use super::*;
use crate::types::{Element, Shape, TypeRef};

#[test]
fn golden_config_map() {
    let object =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v"}});
    let bytes = encode(crate::by_gvk("", "v1", "ConfigMap").unwrap(), &object).unwrap();
    // ObjectMeta: name "a", then the empty strings, the generation and the zero time that Go never leaves out.
    let meta = b"\x0a\x01a\x12\x00\x1a\x00\x22\x00\x2a\x00\x32\x00\x38\x00\x42\x00";
    let mut raw = vec![0x0a, meta.len() as u8];
    raw.extend_from_slice(meta);
    raw.extend_from_slice(b"\x12\x06\x0a\x01k\x12\x01v");
    let mut want = b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12".to_vec();
    want.push(raw.len() as u8);
    want.extend_from_slice(&raw);
    want.extend_from_slice(b"\x1a\x00\x22\x00");
    assert_eq!(bytes, want);
    assert_eq!(decode(&bytes, None).unwrap(), object);
}

#[test]
fn embedded_messages() {
    let ty = crate::by_name("io.k8s.api.core.v1.Volume").unwrap();
    let volume = json!({"name": "v", "emptyDir": {"medium": "Memory"}});
    let mut bytes = Vec::new();
    encode_message(ty, &volume, &mut bytes).unwrap();
    assert_eq!(bytes, b"\x0a\x01v\x12\x0a\x12\x08\x0a\x06Memory");
    assert_eq!(decode_message(ty, &bytes).unwrap(), volume);
}

#[test]
fn watch_events_hold_an_envelope() {
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}});
    let inner = encode(crate::by_gvk("", "v1", "ConfigMap").unwrap(), &object).unwrap();
    let event = decode_message(crate::by_gvk("", "v1", "WatchEvent").unwrap(), &watch_event("ADDED", &inner));
    assert_eq!(event.unwrap(), json!({"type": "ADDED", "object": object}));
}

/// A value with every field set, references followed `depth` levels down.
fn sample(element: &Element, depth: u32) -> Value {
    match &element.shape {
        Shape::Boolean => json!(true),
        Shape::Int32 => json!(-7),
        Shape::Int64 => json!(5_000_000_000_i64),
        Shape::Double => json!(1.5),
        Shape::String => json!("text"),
        Shape::Bytes => json!("AAEC"),
        Shape::Time => json!("2024-02-29T12:00:00Z"),
        Shape::MicroTime => json!("2024-02-29T12:00:00.000001Z"),
        Shape::Quantity => json!("1500m"),
        Shape::IntOrString => json!(if depth.is_multiple_of(2) { json!("50%") } else { json!(8080) }),
        Shape::RawExtension | Shape::FieldsV1 | Shape::AnyObject => json!({"f:x": {}}),
        Shape::Any => json!([1, {"a": "b"}]),
        Shape::SchemaOrArray => json!({"type": "string"}),
        Shape::SchemaOrBool => json!(true),
        Shape::SchemaOrStrings => json!(["a"]),
        Shape::Array(items) => json!([sample(items, depth)]),
        Shape::Map(items) => json!({"key": sample(items, depth)}),
        Shape::Object(TypeRef::BuiltIn(_)) if depth == 0 => json!({}),
        Shape::Object(ty) => sample_of(ty, depth - 1),
    }
}

fn sample_of(ty: &Type, depth: u32) -> Value {
    let fields = ty.fields().iter().filter(|field| field.tag != 0);
    Value::Object(fields.map(|field| (field.name.to_string(), sample(&field.element, depth))).collect())
}

#[test]
fn every_type_round_trips() {
    let mut fields = 0;
    for ty in crate::all().filter(|ty| ty.has_wire) {
        for depth in [0, 1, 2] {
            let mut value = sample_of(ty, depth);
            let conformed = conform(ty, &mut value).unwrap();
            assert!(conformed.unknown.is_empty(), "{}", ty.name);
            let mut bytes = Vec::new();
            encode_message(ty, &value, &mut bytes).unwrap_or_else(|error| panic!("{}: {error}", ty.name));
            let back = decode_message(ty, &bytes).unwrap_or_else(|error| panic!("{}: {error}", ty.name));
            assert_eq!(back, value, "{}", ty.name);
        }
        fields += ty.fields().len();
    }
    assert!(fields > 2500, "{fields}");
}

#[test]
fn damaged_input_is_refused() {
    let ty = crate::by_gvk("", "v1", "Pod").unwrap();
    let mut object = sample_of(ty, 3);
    conform(ty, &mut object).unwrap();
    object["apiVersion"] = json!("v1");
    object["kind"] = json!("Pod");
    let bytes = encode(ty, &object).unwrap();
    assert_eq!(decode(&bytes, None).unwrap(), object);
    for cut in (0..bytes.len()).step_by(7) {
        let _ = decode(&bytes[..cut], None);
        let mut flipped = bytes.clone();
        flipped[cut] ^= 0x55;
        let _ = decode(&flipped, None);
    }
    assert!(matches!(decode(b"{}", None), Err(ProtoError::NoMagic)));
    assert!(matches!(decode(b"k8s\0\x0a\xff", None), Err(ProtoError::Truncated)));
    // Schemas within schemas, deeper than anybody needs.
    let schema = json_schema().unwrap();
    let tag = schema.field("not").unwrap().tag;
    let mut deep = Vec::new();
    for _ in 0..500 {
        let mut outer = Vec::new();
        put_bytes(&mut outer, tag, &deep);
        deep = outer;
    }
    assert!(matches!(decode_message(schema, &deep), Err(ProtoError::Depth)));
}

/// Every object of upstream's own testdata (staging/src/k8s.io/api/testdata/HEAD): its protobuf reads as what
/// its JSON conforms to, and that writes the same bytes again.
#[test]
#[ignore = "needs upstream's testdata folder in KUBERNETES_TESTDATA"]
fn upstream_testdata() {
    let folder = std::env::var("KUBERNETES_TESTDATA").unwrap();
    let mut failures = Vec::new();
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ext| ext != "pb") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let body = std::fs::read(path.with_extension("json")).unwrap();
        let mut object: Value = serde_json::from_slice(&body).unwrap();
        let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
        let (api_version, kind) = (text("apiVersion"), text("kind"));
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", &api_version));
        let Some(ty) = crate::by_gvk(group, version, &kind) else { continue };
        count += 1;
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let original = object.clone();
        match conform(ty, &mut object) {
            Ok(conformed) if !conformed.unknown.is_empty() => {
                failures.push(format!("{name}: {:?}", conformed.unknown))
            }
            Ok(_) if object != original => {
                failures.push(format!("{name}: JSON changed\n{object}\n{original}"))
            }
            Ok(_) => {}
            Err(error) => failures.push(format!("{name}: {error}")),
        }
        match decode(&bytes, None) {
            Ok(decoded) if decoded != object => {
                failures.push(format!("{name}: differs\n{decoded}\n{object}"))
            }
            Ok(_) => {}
            Err(error) => failures.push(format!("{name}: {error}")),
        }
        if encode(ty, &object).ok().as_deref() != Some(&bytes[..]) {
            failures.push(format!("{name}: other bytes"));
        }
    }
    assert!(count >= 100 && failures.is_empty(), "{count}\n{}", failures.join("\n"));
}
