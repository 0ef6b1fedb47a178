//! One API request after routing: who asks for what, of which resource, and how the answer is to look.
use std::sync::Arc;

use http::request::Parts;
use parking_lot::Mutex;
use sampan_client::Identity;
use sampan_kinds::{ErrorList, FieldError, Path, meta};
use serde_json::Value;

use crate::Server;
use crate::cache::{Cache, Object, Predicate};
use crate::negotiate::Output;
use crate::query::Query;
use crate::registry::Resource;
use crate::request_info::RequestInfo;
use crate::selector::{FieldSelector, LabelSelector};
use crate::status::{Result, Status};

/// What a request carries through its handling.
pub struct Call {
    pub server: Arc<Server>,
    pub info: RequestInfo,
    pub resource: Arc<Resource>,
    pub identity: Identity,
    pub query: Query,
    pub parts: Parts,
    pub output: Output,
    /// For the answer's `Warning` headers.
    pub warnings: Arc<Mutex<Vec<String>>>,
}

/// What to do about fields that the schema doesn't know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

/// The options of a write.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    pub dry_run: bool,
    pub validation: FieldValidation,
    /// Who manages the fields written: the option, or the user agent's first word.
    pub manager: String,
    pub force: Option<bool>,
}

impl Call {
    pub fn warn(&self, warning: impl Into<String>) {
        let warning = warning.into();
        let mut warnings = self.warnings.lock();
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }

    pub async fn cache(&self) -> Result<Arc<Cache>> {
        self.server.caches.cache(&self.resource.storage).await
    }

    pub fn key(&self) -> String {
        self.resource.storage.key(&self.info.namespace, &self.info.name)
    }

    pub fn not_found(&self) -> Status {
        Status::not_found(self.resource.group_resource(), &self.info.name)
    }

    /// The object that the request names, as of now.
    pub async fn present(&self) -> Result<Arc<Object>> {
        let cache = self.cache().await?;
        self.server.caches.catch_up().await?;
        cache.get(&self.key()).ok_or_else(|| self.not_found())
    }

    /// The same request, about another resource of its namespace.
    pub fn on(&self, group: &str, version: &str, resource: &str, name: &str) -> Result<Self> {
        let found = self.server.registry.find(group, version, resource).ok_or_else(Status::no_such_path)?;
        let info = RequestInfo {
            group: group.into(),
            version: version.into(),
            resource: resource.into(),
            subresource: String::new(),
            name: name.into(),
            ..self.info.clone()
        };
        Ok(Self {
            server: self.server.clone(),
            info,
            resource: found,
            identity: self.identity.clone(),
            query: self.query.clone(),
            parts: self.parts.clone(),
            output: self.output,
            warnings: self.warnings.clone(),
        })
    }

    /// An error about the request's object.
    pub fn invalid(&self, name: &str, errors: &ErrorList) -> Status {
        Status::invalid(&self.resource.group, &self.resource.kind, name, errors)
    }

    /// The selectors of a list, watch or deletecollection.
    pub fn predicate(&self) -> Result<Predicate> {
        let labels = LabelSelector::parse(self.query.get("labelSelector"))?;
        let mut fields = self.fields()?;
        if !self.info.name.is_empty() {
            match fields.requires("metadata.name") {
                None if fields.is_empty() => fields = FieldSelector::name(&self.info.name),
                Some(name) if name == self.info.name => {}
                _ => {
                    return Err(Status::bad_request(
                        "fieldSelector metadata.name doesn't match requested name",
                    ));
                }
            }
        }
        Ok(Predicate { namespace: self.info.namespace.clone(), labels, fields })
    }

    fn fields(&self) -> Result<FieldSelector> {
        let parsed = FieldSelector::parse(self.query.get("fieldSelector"))?;
        let known = (self.resource.storage.rules.selectable)(&Value::Null);
        let mut terms = Vec::with_capacity(parsed.terms().len());
        let served = (self.resource.rules.selectable)(&Value::Null);
        for term in parsed.terms() {
            let mut term = term.clone();
            let own =
                term.field.starts_with("metadata.") || served.iter().any(|(name, _)| *name == term.field);
            if self.resource.convert.is_some() && !own && !served.is_empty() {
                return Err(Status::bad_request(self.unknown_field(&term.field, false)));
            }
            if self.resource.convert.is_some() {
                term.field = term.field.replace("regarding.", "involvedObject.");
                term.field = term.field.replace("reportingController", "reportingComponent");
            }
            let field = term.field.as_str();
            let namespace = field == "metadata.namespace" && (self.resource.namespaced || known.is_empty());
            if field != "metadata.name" && !namespace && !known.iter().any(|(name, _)| *name == field) {
                return Err(Status::bad_request(self.unknown_field(field, known.is_empty())));
            }
            terms.push(term);
        }
        Ok(terms.into_iter().collect())
    }

    /// What is said of a field that can't be selected on; upstream says it in three ways.
    fn unknown_field(&self, field: &str, plain: bool) -> String {
        let resource = &self.resource;
        match (resource.group.as_str(), resource.name.as_str()) {
            _ if plain => format!(
                "{field:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
            ),
            ("batch", "jobs") => format!("field label {field:?} not supported for Job"),
            ("resource.k8s.io", _) => format!(
                "field label not supported for {}, Kind={}: {field}",
                resource.api_version(),
                resource.kind
            ),
            _ => format!("field label not supported: {field}"),
        }
    }

    /// The options of a create, update or patch; `kind` names them in errors.
    pub fn write_options(&self, kind: &str) -> Result<WriteOptions> {
        let mut errors = ErrorList::new();
        let dry_run = dry_run(&self.query, &mut errors);
        let validation = match self.query.get("fieldValidation") {
            "" | "Warn" => FieldValidation::Warn,
            "Ignore" => FieldValidation::Ignore,
            "Strict" => FieldValidation::Strict,
            other => {
                let supported = ["", "Ignore", "Strict", "Warn"];
                errors.push(FieldError::not_supported(&Path::new("fieldValidation"), other, &supported));
                FieldValidation::Warn
            }
        };
        let manager = self.query.get("fieldManager");
        errors.extend(meta::validate_field_manager(manager, &Path::new("fieldManager")));
        if !errors.is_empty() {
            return Err(Status::invalid("meta.k8s.io", kind, "", &errors));
        }
        let agent = self.parts.headers.get(http::header::USER_AGENT).and_then(|agent| agent.to_str().ok());
        let manager = sampan_schema::apply::manager_name(manager, agent.unwrap_or(""));
        Ok(WriteOptions { dry_run, validation, manager, force: self.query.optional_flag("force") })
    }
}

/// `dryRun=All`, from the query.
pub fn dry_run(query: &Query, errors: &mut ErrorList) -> bool {
    let values: Vec<&str> = query.all("dryRun").collect();
    if values.iter().any(|value| *value != "All") {
        let list = Value::from(values.clone());
        errors.push(FieldError::not_supported(&Path::new("dryRun"), list, &["All"]));
    }
    !values.is_empty()
}
