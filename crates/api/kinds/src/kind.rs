//! What a built-in kind is made of: one [`Kind`] each, with a [`Rest`] strategy.
//!
//! Upstream counterpart: pkg/registry/*/strategy.go, pkg/apis/*/defaults.go and validation.go,
//! pkg/printers/internalversion. Deliberately different: all of it works on the versioned JSON object (there is no
//! internal type), and deep logic reads it into the k8s-openapi struct.
use serde_json::Value;

use crate::field::ErrorList;

/// A column of a `Table` answer (`priority` 0 always shown, 1 only with `-o wide`).
#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub name: &'static str,
    /// OpenAPI type: `string`, `integer`, ….
    pub kind: &'static str,
    /// OpenAPI format: `name` for the first column, else "".
    pub format: &'static str,
    pub description: &'static str,
    pub priority: i32,
}

/// The rules of one endpoint's writes: the resource itself, or a subresource such as `status`.
#[derive(Clone, Copy)]
pub struct Rest {
    /// Upstream's PrepareForCreate: drops what a client may not set, sets generation 1 where the kind has one.
    pub prepare_create: fn(&mut Value),
    /// Upstream's PrepareForUpdate, given the new object and the stored one: keeps status, bumps generation.
    pub prepare_update: fn(&mut Value, &Value),
    /// All that is wrong with a new object besides its ObjectMeta, which the API server validates with
    /// [`crate::meta`] for every kind.
    pub validate: fn(&Value) -> ErrorList,
    /// All that is wrong with an update besides ObjectMeta: (new, stored).
    pub validate_update: fn(&Value, &Value) -> ErrorList,
    /// Warnings for the client (`Warning` headers): (new, stored).
    pub warnings: fn(&Value, Option<&Value>) -> Vec<String>,
}

impl Rest {
    /// Accepts everything the schema accepts and keeps nothing back.
    pub const ANY: Self = Self {
        prepare_create: |_| {},
        prepare_update: |_, _| {},
        validate: |_| Vec::new(),
        validate_update: |_, _| Vec::new(),
        warnings: |_, _| Vec::new(),
    };
}

/// How `metadata.name` is checked on create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameRule {
    /// RFC 1123 subdomain, 253 characters: most kinds.
    DnsSubdomain,
    /// RFC 1123 label, 63 characters: Namespace and others.
    DnsLabel,
    /// RFC 1035 label, 63 characters: Service.
    Dns1035Label,
    /// Path segment (no `/`, `%`, `.`, `..`): RBAC.
    PathSegment,
}

/// One built-in kind at one version.
#[derive(Clone, Copy)]
pub struct Kind {
    /// "" for the core group.
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub name_rule: NameRule,
    /// Upstream's SetObjectDefaults for this kind, on the versioned object; also run on objects read from the store.
    pub defaults: fn(&mut Value),
    pub rest: Rest,
    /// The `status` subresource's rules; `None` where the kind has no such subresource.
    pub status: Option<Rest>,
    /// The rules of further subresources that update the stored object: `resize`, `ephemeralcontainers`, `finalize`.
    pub subresources: &'static [(&'static str, Rest)],
    /// PUT creates what does not exist (upstream's AllowCreateOnUpdate).
    pub create_on_update: bool,
    /// PUT without resourceVersion overwrites (upstream's AllowUnconditionalUpdate).
    pub unconditional_update: bool,
    /// True where deletion honours `gracePeriodSeconds` (Pod).
    pub graceful: bool,
    /// Table columns, without the `Age` that [`Kind::columns`] users expect: each kind lists all of its own.
    pub columns: &'static [Column],
    /// The cells of one object's row, in the columns' order. `now` is for ages.
    pub row: fn(&Value, now: jiff::Timestamp) -> Vec<Value>,
    /// Field labels usable in field selectors besides metadata.name and metadata.namespace.
    pub selectable: fn(&Value) -> Vec<(&'static str, String)>,
}

impl Kind {
    /// A kind with the whole schema and ObjectMeta validation and nothing of its own yet; see docs/api.md.
    pub const fn plain(group: &'static str, version: &'static str, kind: &'static str) -> Self {
        Self {
            group,
            version,
            kind,
            name_rule: NameRule::DnsSubdomain,
            defaults: |_| {},
            rest: Rest::ANY,
            status: None,
            subresources: &[],
            create_on_update: false,
            unconditional_update: true,
            graceful: false,
            columns: NAME_AND_AGE,
            row: crate::table::name_and_age,
            selectable: |_| Vec::new(),
        }
    }
}

/// The columns of a kind that prints nothing of its own.
pub const NAME_AND_AGE: &[Column] = &[Column::NAME, Column::AGE];

impl Column {
    pub const NAME: Self = Self {
        name: "Name",
        kind: "string",
        format: "name",
        description: "Name must be unique within a namespace.",
        priority: 0,
    };
    pub const AGE: Self = Self {
        name: "Age",
        kind: "string",
        format: "",
        description: "Time since the object was created.",
        priority: 0,
    };
    pub const fn string(name: &'static str, description: &'static str) -> Self {
        Self { name, kind: "string", format: "", description, priority: 0 }
    }
    pub const fn integer(name: &'static str, description: &'static str) -> Self {
        Self { name, kind: "integer", format: "", description, priority: 0 }
    }
    /// Shown with `-o wide` only.
    pub const fn wide(self) -> Self {
        Self { priority: 1, ..self }
    }
}
