//! The types of the API: what each kind's fields are called, hold, and how they merge.
//!
//! Upstream spreads this over Go struct tags, generated protobuf descriptors and generated OpenAPI
//! (staging/src/k8s.io/api/*/types.go, generated.proto, pkg/generated/openapi). Here it is one `Type`,
//! whether it comes from the built-in table or from a custom resource's schema; every walk of this crate
//! (pruning, protobuf, patches, apply, OpenAPI) is written against it.
//!
//! What stays true: the built-in table lives in read-only memory without relocations and a type is put
//! together on first use, so a process pays only for the types it touches. Once made, a built-in type lives
//! as long as the process. Custom types hold their own strings and are shared by `Arc`.

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use serde_json::Value;

use crate::table;

pub(crate) const JSON_SCHEMA_PROPS: &str =
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

/// A string of the table, or one that a custom resource brought along.
pub type Text = Cow<'static, str>;

/// One object type: the fields it knows and how it behaves as a whole.
#[derive(Debug, Default)]
pub struct Type {
    /// The OpenAPI definition name, such as `io.k8s.api.core.v1.Pod`; for a custom type the name that its
    /// definition gets in OpenAPI.
    pub name: Text,
    /// Sorted by name. Private so that the order can be relied on: see [`Type::new`].
    fields: Vec<Field>,
    /// Positions in `fields` of those that are on the wire, in the order of their tags; fields of one embedded
    /// message stand together.
    wire_order: Vec<u16>,
    /// The kinds that this type is the root object of.
    pub kinds: Vec<GroupVersionKind>,
    /// What the type itself says about merging; a field can override it, see [`Element::map`].
    pub map: Option<MapKind>,
    pub unions: Vec<Union>,
    /// Values under names that no field has, for custom types with additionalProperties beside properties.
    pub additional: Option<Box<Element>>,
    /// Custom types only: x-kubernetes-preserve-unknown-fields.
    pub preserve_unknown: bool,
    /// Custom types only: x-kubernetes-embedded-resource.
    pub embedded_resource: bool,
    /// Whether the protobuf message exists at all; false for custom types and version.Info.
    pub has_wire: bool,
    /// Registered as a kind in every group version (DeleteOptions, WatchEvent).
    pub in_any_group: bool,
    /// In no OpenAPI document.
    pub hidden: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupVersionKind {
    pub group: Text,
    pub version: Text,
    pub kind: Text,
}

impl GroupVersionKind {
    /// `v1` or `apps/v1`, as objects carry it.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_string()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }
}

/// x-kubernetes-unions of the OpenAPI document.
#[derive(Debug, Clone)]
pub struct Union {
    pub discriminator: Option<Text>,
    /// JSON field name and the discriminator's value that goes with it.
    pub fields: Vec<(Text, Text)>,
}

/// A field of a type. Derefs to its [`Element`], so `field.shape` and `field.list` read naturally.
#[derive(Debug)]
pub struct Field {
    pub name: Text,
    /// The protobuf tag; 0 where the field isn't on the wire (apiVersion and kind, custom types).
    pub tag: u32,
    /// Tags of the embedded messages to go through before `tag`, outermost first, 0 where unused.
    pub within: [u32; 2],
    pub wire: Wire,
    pub required: bool,
    pub patch: PatchStrategy,
    pub merge_key: Option<Text>,
    /// Go holds a pointer here, so an explicit zero is something else than absence and is kept.
    pub pointer: bool,
    pub omit: Omit,
    /// Go's name of the type where it can't be told from the shape, such as `v1.Protocol`; else empty.
    pub go_type: Text,
    pub element: Element,
}

impl Deref for Field {
    type Target = Element;
    fn deref(&self) -> &Element {
        &self.element
    }
}

/// What may stand at one place: as a field's value, a list's item or a map's value.
#[derive(Debug, Default)]
pub struct Element {
    pub shape: Shape,
    /// How apply merges a list here. Atomic where nothing is said, as upstream.
    pub list: ListKind,
    /// The schema states the list kind (OpenAPI shows only what is stated).
    pub list_stated: bool,
    /// How apply merges a map or object here: the field's own word, else the type's, else granular.
    pub map: MapKind,
    /// The field itself states the map kind, rather than its type.
    pub map_stated: bool,
    /// The default that the schema states. For built-in kinds it serves OpenAPI and apply's keys only;
    /// their defaulting is written by hand, kind by kind.
    pub schema_default: Option<Box<Value>>,
    /// Custom types only: null is a value here.
    pub nullable: bool,
    /// Custom types only: what the schema asks of values.
    pub rules: Option<Arc<Rules>>,
}

/// Value validation and CEL of a custom resource's schema, at one place.
#[derive(Debug, Default)]
pub struct Rules {
    /// The schema's value constraints (`minimum`, `pattern`, `enum`, `allOf`, …) as written.
    pub values: serde_json::Map<String, Value>,
    /// x-kubernetes-validations.
    pub cel: Vec<CelRule>,
}

#[derive(Debug, Default, Clone)]
pub struct CelRule {
    pub rule: String,
    pub message: String,
    pub message_expression: String,
    pub reason: String,
    pub field_path: String,
    pub optional_old_self: Option<bool>,
}

/// The form of a value.
#[derive(Debug, Default)]
pub enum Shape {
    Boolean,
    Int32,
    Int64,
    Double,
    String,
    /// base64 text.
    Bytes,
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    /// An object of any kind.
    RawExtension,
    /// An object, kept as written.
    FieldsV1,
    /// Any JSON value.
    #[default]
    Any,
    /// Custom types only: an object whose content isn't known and is kept.
    AnyObject,
    /// apiextensions' JSONSchemaPropsOrArray: a schema or a list of them.
    SchemaOrArray,
    /// apiextensions' JSONSchemaPropsOrBool.
    SchemaOrBool,
    /// apiextensions' JSONSchemaPropsOrStringArray.
    SchemaOrStrings,
    Array(Box<Element>),
    /// Keys are strings.
    Map(Box<Element>),
    Object(TypeRef),
}

/// A type that another one refers to. Built-in types refer to each other in circles, so they go by number.
#[derive(Debug, Clone)]
pub enum TypeRef {
    BuiltIn(u16),
    Custom(Arc<Type>),
}

impl Deref for TypeRef {
    type Target = Type;
    fn deref(&self) -> &Type {
        match self {
            TypeRef::BuiltIn(index) => table::type_at(*index),
            TypeRef::Custom(custom) => custom,
        }
    }
}

/// How a field stands on the wire, where its shape doesn't already say it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// As the shape says.
    #[default]
    Plain,
    /// A list wrapped in a message of its own whose field 1 repeats (Verbs, ExtraValue): the message stands
    /// where the innermost list does.
    Items,
    /// Not on the wire.
    Absent,
}

/// When Go's encoder leaves a field out.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Omit {
    /// Never: a zero is written out.
    Never,
    /// omitempty: false, 0, "", nil and empty lists and maps are left out; structs never are.
    #[default]
    Empty,
    /// omitzero: a struct whose fields are all zero is left out too.
    Zero,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub enum ListKind {
    #[default]
    Atomic,
    Set,
    /// Items are told apart by these fields.
    Map(Vec<Text>),
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    #[default]
    Granular,
    Atomic,
}

/// Strategic merge patch's directives for a field.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PatchStrategy {
    pub merge: bool,
    pub replace: bool,
    pub retain_keys: bool,
}

impl PatchStrategy {
    /// As x-kubernetes-patch-strategy writes it; None where nothing is said.
    pub fn text(self) -> Option<&'static str> {
        match (self.merge, self.replace, self.retain_keys) {
            (true, _, true) => Some("merge,retainKeys"),
            (true, _, false) => Some("merge"),
            (false, _, true) => Some("retainKeys"),
            (false, true, false) => Some("replace"),
            (false, false, false) => None,
        }
    }
}

impl Type {
    /// No fields and no name; a constant, unlike the default.
    pub(crate) const fn nothing() -> Type {
        Type {
            name: Text::Borrowed(""),
            fields: Vec::new(),
            wire_order: Vec::new(),
            kinds: Vec::new(),
            map: None,
            unions: Vec::new(),
            additional: None,
            preserve_unknown: false,
            embedded_resource: false,
            has_wire: false,
            in_any_group: false,
            hidden: false,
        }
    }

    /// A type of these fields; sorts them.
    pub fn new(name: impl Into<Text>, mut fields: Vec<Field>) -> Type {
        fields.sort_by(|a, b| a.name.cmp(&b.name));
        let mut wire_order: Vec<u16> = (0..fields.len() as u16).collect();
        wire_order.retain(|at| fields[usize::from(*at)].tag != 0);
        wire_order.sort_by_key(|at| fields[usize::from(*at)].wire_path());
        Type { name: name.into(), fields, wire_order, ..Type::default() }
    }

    pub(crate) fn wire_order(&self) -> &[u16] {
        &self.wire_order
    }

    /// Sorted by name.
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.binary_search_by(|field| (*field.name).cmp(name)).ok().map(|at| &self.fields[at])
    }

    /// `Pod` of `io.k8s.api.core.v1.Pod`.
    pub fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }

    /// The version segment of the name, which Go uses as package name in its messages: `v1`.
    pub fn package(&self) -> &str {
        self.name.rsplit('.').nth(1).unwrap_or("")
    }
}

impl Field {
    /// A plain optional field, for building custom types: fill in the rest by struct update.
    pub fn new(name: impl Into<Text>, element: Element) -> Field {
        Field {
            name: name.into(),
            tag: 0,
            within: [0; 2],
            wire: Wire::Absent,
            required: false,
            patch: PatchStrategy::default(),
            merge_key: None,
            pointer: true,
            omit: Omit::Empty,
            go_type: Text::Borrowed(""),
            element,
        }
    }

    /// The tags that lead to the field's value: those of embedded messages, its own, then zeros.
    pub(crate) fn wire_path(&self) -> [u32; 4] {
        match self.within {
            [0, _] => [self.tag, 0, 0, 0],
            [outer, 0] => [outer, self.tag, 0, 0],
            [outer, inner] => [outer, inner, self.tag, 0],
        }
    }
}

impl Element {
    pub fn of(shape: Shape) -> Element {
        let map = match &shape {
            Shape::Object(ty) => ty.map.unwrap_or_default(),
            _ => MapKind::Granular,
        };
        Element { shape, map, ..Element::default() }
    }

    /// The type of an object here.
    pub fn object(&self) -> Option<&Type> {
        match &self.shape {
            Shape::Object(ty) => Some(ty),
            _ => None,
        }
    }

    /// What a list's items or a map's values are.
    pub fn items(&self) -> Option<&Element> {
        match &self.shape {
            Shape::Array(items) | Shape::Map(items) => Some(items),
            _ => None,
        }
    }
}

/// A resource that discovery shows: `pods`, or the subresource `pods/status`.
#[derive(Debug, Clone)]
pub struct ResourceFact {
    pub group: &'static str,
    pub version: &'static str,
    /// Kind of the body; for subresources possibly of another group, see `kind_group`.
    pub kind: &'static str,
    /// Group and version that `kind` belongs to.
    pub kind_group: &'static str,
    pub kind_version: &'static str,
    /// `pods`, `pods/status`.
    pub name: &'static str,
    /// Empty for subresources.
    pub singular: &'static str,
    pub namespaced: bool,
    pub short_names: Vec<&'static str>,
    pub categories: Vec<&'static str>,
    pub verbs: Vec<&'static str>,
    /// Upstream serves the version without a feature gate or runtime-config.
    pub served_by_default: bool,
}

impl ResourceFact {
    /// `v1` or `apps/v1`.
    pub fn group_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_string()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `pods` of `pods/status`.
    pub fn resource(&self) -> &'static str {
        self.name.split('/').next().unwrap_or(self.name)
    }

    /// `status` of `pods/status`.
    pub fn subresource(&self) -> Option<&'static str> {
        self.name.split_once('/').map(|(_, sub)| sub)
    }

    /// The type of `kind`. None for the connect options (PodExecOptions and so on), which have no schema.
    pub fn kind_type(&self) -> Option<&'static Type> {
        by_gvk(self.kind_group, self.kind_version, self.kind)
    }
}

/// The built-in type of a kind, lists and meta kinds (`v1` Status, DeleteOptions in any group) included.
pub fn by_gvk(group: &str, version: &str, kind: &str) -> Option<&'static Type> {
    table::by_gvk(group, version, kind)
}

/// The built-in type with this OpenAPI name: `io.k8s.api.core.v1.Pod`.
pub fn by_name(name: &str) -> Option<&'static Type> {
    table::by_name(name)
}

/// All built-in types, by name. Makes every one of them: for OpenAPI and tests.
pub fn all() -> impl Iterator<Item = &'static Type> {
    (0..table::type_count()).map(table::type_at)
}

/// What discovery shows, in upstream's order.
pub fn resources() -> &'static [ResourceFact] {
    table::resources()
}
