//! Reads the built-in table: text made by build.rs, a record a type, parsed when the type is first used.
//!
//! What stays true: nothing here fails at run time; a record that can't be read would be a bug of build.rs,
//! which the tests below would find, since they read every one.

use std::sync::OnceLock;

use crate::types::{
    Element, Field, GroupVersionKind, ListKind, MapKind, Omit, PatchStrategy, ResourceFact, Shape, Text,
    Type, TypeRef, Union, Wire,
};

mod index {
    include!(concat!(env!("OUT_DIR"), "/index.rs"));

    /// Offset of each record in `TEXT`, and its end.
    pub fn types() -> &'static [u32] {
        &TYPES
    }
    pub fn kinds() -> &'static [u32] {
        &KINDS
    }
    pub const TYPE_COUNT: usize = TYPES.len() - 1;
}

static TEXT: &str = include_str!(concat!(env!("OUT_DIR"), "/types.txt"));
static KIND_TEXT: &str = include_str!(concat!(env!("OUT_DIR"), "/kinds.txt"));
static RESOURCE_TEXT: &str = include_str!(concat!(env!("OUT_DIR"), "/resources.txt"));

static MADE: [OnceLock<Box<Type>>; index::TYPE_COUNT] = [const { OnceLock::new() }; index::TYPE_COUNT];
static RESOURCES: OnceLock<Vec<ResourceFact>> = OnceLock::new();
/// What a number that no record has would give; never seen, but indexing must not panic.
static NONE: Type = Type::nothing();

fn record(text: &'static str, offsets: &[u32], at: usize) -> &'static str {
    match (offsets.get(at), offsets.get(at + 1)) {
        (Some(&from), Some(&to)) => text.get(from as usize..to as usize).unwrap_or(""),
        _ => "",
    }
}

fn find(text: &'static str, offsets: &[u32], name: &str) -> Result<usize, usize> {
    let numbers = &offsets[..offsets.len() - 1];
    let key = |offset: u32| {
        let rest = &text[offset as usize..];
        rest.split('\t').next().unwrap_or(rest)
    };
    numbers.binary_search_by(|&offset| key(offset).cmp(name))
}

pub fn type_count() -> u16 {
    index::TYPE_COUNT as u16
}

pub fn type_at(at: u16) -> &'static Type {
    match MADE.get(usize::from(at)) {
        Some(cell) => {
            cell.get_or_init(|| Box::new(parse_type(record(TEXT, index::types(), usize::from(at)))))
        }
        None => &NONE,
    }
}

pub fn by_name(name: &str) -> Option<&'static Type> {
    find(TEXT, index::types(), name).ok().map(|at| type_at(at as u16))
}

pub fn by_gvk(group: &str, version: &str, kind: &str) -> Option<&'static Type> {
    // These two are registered in every group version, so that no list of them need be kept.
    match kind {
        "DeleteOptions" => return by_name("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions"),
        "WatchEvent" => return by_name("io.k8s.apimachinery.pkg.apis.meta.v1.WatchEvent"),
        _ => {}
    }
    let full =
        if group.is_empty() { format!("{version}/{kind}") } else { format!("{group}/{version}/{kind}") };
    let at = find(KIND_TEXT, index::kinds(), &full).ok()?;
    let number = record(KIND_TEXT, index::kinds(), at).trim_end().rsplit('\t').next()?;
    number.parse().ok().map(type_at)
}

pub fn resources() -> &'static [ResourceFact] {
    RESOURCES.get_or_init(|| RESOURCE_TEXT.lines().filter_map(parse_resource).collect())
}

fn parse_type(text: &'static str) -> Type {
    let mut lines = text.lines();
    let mut words = lines.next().unwrap_or("").split('\t');
    let mut word = || words.next().unwrap_or("");
    let name = word();
    let map = match word() {
        "a" => Some(MapKind::Atomic),
        "g" => Some(MapKind::Granular),
        _ => None,
    };
    let gvks = word();
    let unions = parse_unions(word());
    let hidden = word() == "h";
    let kinds = gvks.split(',').filter_map(parse_gvk).collect();
    let fields: Vec<Field> = lines.map(parse_field).collect();
    let mut ty = Type::new(name, fields);
    ty.kinds = kinds;
    ty.map = map;
    ty.unions = unions;
    ty.has_wire = !name.ends_with(".version.Info");
    ty.in_any_group = gvks == "*";
    ty.hidden = hidden;
    ty
}

fn parse_gvk(text: &'static str) -> Option<GroupVersionKind> {
    let (rest, kind) = text.rsplit_once('/')?;
    let (group, version) = rest.rsplit_once('/').unwrap_or(("", rest));
    Some(GroupVersionKind {
        group: Text::Borrowed(group),
        version: Text::Borrowed(version),
        kind: Text::Borrowed(kind),
    })
}

fn parse_unions(text: &'static str) -> Vec<Union> {
    let parsed: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    let mut unions = Vec::new();
    for union in parsed.as_array().into_iter().flatten() {
        let fields = union["fields-to-discriminateBy"].as_object().into_iter().flatten();
        unions.push(Union {
            discriminator: union["discriminator"].as_str().map(|name| Text::Owned(name.to_owned())),
            fields: fields
                .map(|(field, value)| {
                    (Text::Owned(field.clone()), Text::Owned(value.as_str().unwrap_or("").to_owned()))
                })
                .collect(),
        });
    }
    unions
}

fn parse_field(line: &'static str) -> Field {
    let mut words = line.split('\t');
    let mut word = || words.next().unwrap_or("");
    let (name, tag, within, shape, flags, list, merge_key, default, go_type) =
        (word(), word(), word(), word(), word(), word(), word(), word(), word());
    let has = |flag: char| flags.contains(flag);
    let tag = tag.parse().unwrap_or(0);
    let mut path = [0; 2];
    for (slot, number) in path.iter_mut().zip(within.split(',')) {
        *slot = number.parse().unwrap_or(0);
    }
    let element = Element {
        shape: parse_shape(shape),
        list: match list {
            "" | "=atomic" => ListKind::Atomic,
            "=set" => ListKind::Set,
            keys => ListKind::Map(keys.split(',').map(Text::Borrowed).collect()),
        },
        list_stated: !list.is_empty(),
        map: if has('a') { MapKind::Atomic } else { MapKind::Granular },
        map_stated: has('S'),
        schema_default: (!default.is_empty())
            .then(|| serde_json::from_str(default).ok())
            .flatten()
            .map(Box::new),
        ..Element::default()
    };
    Field {
        name: Text::Borrowed(name),
        tag,
        within: path,
        wire: match (tag, has('w')) {
            (0, _) => Wire::Absent,
            (_, true) => Wire::Items,
            _ => Wire::Plain,
        },
        required: has('r'),
        patch: PatchStrategy { merge: has('m'), replace: has('p'), retain_keys: has('k') },
        merge_key: (!merge_key.is_empty()).then_some(Text::Borrowed(merge_key)),
        pointer: has('*'),
        omit: if has('!') {
            Omit::Never
        } else if has('0') {
            Omit::Zero
        } else {
            Omit::Empty
        },
        go_type: Text::Borrowed(go_type),
        element,
    }
}

fn parse_shape(code: &'static str) -> Shape {
    let (first, rest) = code.split_at(code.len().min(1));
    let inner = |rest| {
        let map =
            if first != "#" && str::starts_with(rest, '@') { MapKind::Atomic } else { MapKind::Granular };
        Box::new(Element { shape: parse_shape(rest), map, ..Element::default() })
    };
    match first {
        "b" => Shape::Boolean,
        "i" => Shape::Int32,
        "l" => Shape::Int64,
        "d" => Shape::Double,
        "s" => Shape::String,
        "B" => Shape::Bytes,
        "T" => Shape::Time,
        "M" => Shape::MicroTime,
        "Q" => Shape::Quantity,
        "I" => Shape::IntOrString,
        "R" => Shape::RawExtension,
        "F" => Shape::FieldsV1,
        "A" => Shape::SchemaOrArray,
        "O" => Shape::SchemaOrBool,
        "S" => Shape::SchemaOrStrings,
        "[" => Shape::Array(inner(rest)),
        "{" => Shape::Map(inner(rest)),
        "#" | "@" => Shape::Object(TypeRef::BuiltIn(rest.parse().unwrap_or(u16::MAX))),
        _ => Shape::Any,
    }
}

fn parse_resource(line: &'static str) -> Option<ResourceFact> {
    let mut words = line.split('\t');
    let mut word = || words.next();
    let list = |text: &'static str| text.split(',').filter(|word| !word.is_empty()).collect();
    Some(ResourceFact {
        group: word()?,
        version: word()?,
        kind: word()?,
        kind_group: word()?,
        kind_version: word()?,
        name: word()?,
        singular: word()?,
        namespaced: word()? == "y",
        short_names: list(word()?),
        categories: list(word()?),
        verbs: list(word()?),
        served_by_default: word()? == "y",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_reads() {
        for at in 0..type_count() {
            let ty = type_at(at);
            assert!(by_name(&ty.name).is_some_and(|found| std::ptr::eq(found, ty)), "{}", ty.name);
            for kind in &ty.kinds {
                let found = by_gvk(&kind.group, &kind.version, &kind.kind);
                assert!(found.is_some_and(|found| std::ptr::eq(found, ty)), "{kind:?}");
            }
            for field in ty.fields() {
                assert!(ty.field(&field.name).is_some(), "{} {}", ty.name, field.name);
                let meta = matches!(&*field.name, "apiVersion" | "kind") || !ty.has_wire;
                assert!(field.tag != 0 || meta, "{} {} has no tag", ty.name, field.name);
                let mut element: &Element = &field.element;
                while let Some(items) = element.items() {
                    element = items;
                }
                if let Shape::Object(TypeRef::BuiltIn(number)) = &element.shape {
                    assert!(*number < type_count(), "{} {}", ty.name, field.name);
                }
            }
        }
    }

    #[test]
    fn facts_read_back() {
        let spec = by_name("io.k8s.api.core.v1.PodSpec").unwrap();
        let containers = spec.field("containers").unwrap();
        assert_eq!(containers.list, ListKind::Map(vec!["name".into()]));
        assert!(containers.patch.merge && containers.required);
        assert_eq!(containers.merge_key.as_deref(), Some("name"));
        assert_eq!(containers.items().unwrap().object().unwrap().short_name(), "Container");
        assert_eq!(spec.field("nodeSelector").unwrap().map, MapKind::Atomic);
        assert!(spec.field("Containers").is_none());
        let volume = by_name("io.k8s.api.core.v1.PersistentVolumeSpec").unwrap();
        assert_eq!(volume.field("claimRef").unwrap().map, MapKind::Granular);
        let probe = by_name("io.k8s.api.core.v1.Probe").unwrap();
        assert_eq!(
            (probe.field("httpGet").unwrap().within, probe.field("httpGet").unwrap().tag),
            ([1, 0], 2)
        );
        let named = by_name("io.k8s.api.admissionregistration.v1.NamedRuleWithOperations").unwrap();
        assert_eq!(named.field("apiGroups").unwrap().within, [2, 2]);
        let env = by_name("io.k8s.api.core.v1.ConfigMapKeySelector").unwrap();
        assert_eq!((env.field("name").unwrap().within, env.field("name").unwrap().tag), ([1, 0], 1));
        let pods = resources().iter().find(|fact| fact.name == "pods").unwrap();
        assert_eq!((pods.singular, &pods.short_names[..]), ("pod", &["po"][..]));
        for fact in resources().iter().filter(|fact| !fact.kind.ends_with("Options")) {
            assert!(fact.kind_type().is_some(), "{fact:?}");
        }
    }
}
