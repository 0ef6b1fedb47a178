//! The served resources: what routing, discovery, OpenAPI and the verbs all read.
//!
//! Upstream counterparts: pkg/controlplane/instance.go, k8s.io/apiserver/pkg/endpoints/installer.go. Built-in
//! resources come from the table of facts with the rules of `sampan-kinds`. The set can change at run time: a
//! custom resource is a [`Resource`] with a custom [`Schema`], added with [`Registry::replace`], and an aggregated
//! group is served by whoever answers for its group before this registry is asked.
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use parking_lot::RwLock;
use sampan_kinds::Kind;
use sampan_schema::{ResourceFact, Type};
use serde_json::Value;

use crate::convert;
use crate::status::GroupResource;
use crate::storage::{Storage, api_version};

/// The type of a resource's objects.
#[derive(Clone, Debug)]
pub enum Schema {
    BuiltIn(&'static Type),
    Custom(Arc<Type>),
}

impl Deref for Schema {
    type Target = Type;
    fn deref(&self) -> &Type {
        match self {
            Self::BuiltIn(ty) => ty,
            Self::Custom(ty) => ty,
        }
    }
}

/// A subresource as discovery shows it.
#[derive(Clone, Debug)]
pub struct Subresource {
    pub kind: String,
    pub group: String,
    pub version: String,
    pub verbs: Vec<String>,
}

/// One resource in one version.
pub struct Resource {
    /// Its number, unique while the process lives.
    pub id: u32,
    pub group: String,
    pub version: String,
    pub name: String,
    pub singular: String,
    pub kind: String,
    pub namespaced: bool,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
    pub verbs: Vec<String>,
    pub schema: Schema,
    /// The rules of this version's kind; writes go by those of the stored version, `storage.rules`.
    pub rules: Kind,
    pub storage: Arc<Storage>,
    /// Between this version and the stored one; None where they are the same.
    pub convert: Option<convert::Conversion>,
    pub subresources: BTreeMap<String, Subresource>,
}

impl Resource {
    pub fn group_resource(&self) -> GroupResource<'_> {
        GroupResource { group: &self.group, resource: &self.name }
    }

    /// `v1`, `apps/v1`.
    pub fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    pub fn allows(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }

    /// The stored object in this version.
    pub fn from_storage(&self, object: Value) -> Value {
        match &self.convert {
            Some(convert) => self.typed((convert.from_storage)(object)),
            None => object,
        }
    }

    /// An object of this version as it is stored.
    pub fn to_storage(&self, object: Value) -> Value {
        match &self.convert {
            Some(convert) => {
                let mut object = (convert.to_storage)(object);
                object["apiVersion"] = self.storage.api_version.as_str().into();
                object["kind"] = self.storage.kind.as_str().into();
                object
            }
            None => object,
        }
    }

    fn typed(&self, mut object: Value) -> Value {
        object["apiVersion"] = self.api_version().into();
        object["kind"] = self.kind.as_str().into();
        object
    }
}

type Key = (String, String, String);

/// All that is served.
pub struct Registry {
    resources: RwLock<Arc<Vec<Arc<Resource>>>>,
    index: RwLock<BTreeMap<Key, Arc<Resource>>>,
}

impl Registry {
    /// The built-in resources.
    pub fn built_in() -> Self {
        let registry = Self { resources: RwLock::default(), index: RwLock::default() };
        let mut all: Vec<Resource> = Vec::new();
        for fact in sampan_schema::resources().iter().filter(|fact| fact.served_by_default) {
            match fact.subresource() {
                None => all.extend(resource(fact, all.len() as u32)),
                Some(sub) => {
                    let parent = all.iter_mut().find(|resource| {
                        resource.group == fact.group
                            && resource.version == fact.version
                            && resource.name == fact.resource()
                    });
                    if let Some(parent) = parent {
                        parent.subresources.insert(sub.to_string(), subresource(fact));
                    }
                }
            }
        }
        registry.replace(all.into_iter().map(Arc::new).collect());
        registry
    }

    /// Serves these resources from now on, in discovery's order.
    pub fn replace(&self, resources: Vec<Arc<Resource>>) {
        let key = |r: &Resource| (r.group.clone(), r.version.clone(), r.name.clone());
        *self.index.write() = resources.iter().map(|resource| (key(resource), resource.clone())).collect();
        *self.resources.write() = Arc::new(resources);
    }

    pub fn find(&self, group: &str, version: &str, resource: &str) -> Option<Arc<Resource>> {
        let key = (group.to_string(), version.to_string(), resource.to_string());
        self.index.read().get(&key).cloned()
    }

    /// The facts of what is served, for OpenAPI.
    pub fn facts(&self) -> Vec<ResourceFact> {
        sampan_schema::resources().iter().filter(|fact| fact.served_by_default).cloned().collect()
    }

    /// Every resource, in discovery's order.
    pub fn all(&self) -> Arc<Vec<Arc<Resource>>> {
        self.resources.read().clone()
    }
}

fn resource(fact: &'static ResourceFact, id: u32) -> Option<Resource> {
    let schema = Schema::BuiltIn(fact.kind_type()?);
    let rules = sampan_kinds::registry::find(fact.group, fact.version, fact.kind)
        .copied()
        .unwrap_or(Kind::plain(fact.group, fact.version, fact.kind));
    let (storage, convert) = convert::storage_of(fact);
    let texts = |list: &[&'static str]| list.iter().map(|text| (*text).to_string()).collect::<Vec<_>>();
    Some(Resource {
        id,
        group: fact.group.into(),
        version: fact.version.into(),
        name: fact.name.into(),
        singular: fact.singular.into(),
        kind: fact.kind.into(),
        namespaced: fact.namespaced,
        short_names: texts(&fact.short_names),
        categories: texts(&fact.categories),
        verbs: texts(&fact.verbs),
        schema,
        rules,
        storage: Arc::new(storage),
        convert,
        subresources: BTreeMap::new(),
    })
}

fn subresource(fact: &ResourceFact) -> Subresource {
    Subresource {
        kind: fact.kind.into(),
        group: fact.kind_group.into(),
        version: fact.kind_version.into(),
        verbs: fact.verbs.iter().map(|verb| (*verb).to_string()).collect(),
    }
}
