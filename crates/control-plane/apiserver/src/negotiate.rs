//! Content negotiation: what the client sends and what it wants back.
//!
//! Upstream counterparts: k8s.io/apiserver/pkg/endpoints/handlers/negotiation, …/endpoints/handlers/response.go.
//! CBOR is not served: asked for alone it is 406, sent it is 415.
use http::{HeaderMap, header};

use crate::query::Query;
use crate::status::{Result, Status};

pub const JSON: &str = "application/json";
pub const YAML: &str = "application/yaml";
pub const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const ACCEPTED: [&str; 5] = [
    JSON,
    YAML,
    PROTOBUF,
    "application/json;stream=watch",
    "application/vnd.kubernetes.protobuf;stream=watch",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    Json,
    Yaml,
    Protobuf,
}

impl Format {
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Json => JSON,
            Self::Yaml => YAML,
            Self::Protobuf => PROTOBUF,
        }
    }

    fn of(media_type: &str) -> Option<Self> {
        match media_type {
            JSON => Some(Self::Json),
            YAML => Some(Self::Yaml),
            PROTOBUF => Some(Self::Protobuf),
            _ => None,
        }
    }
}

/// What an object is turned into before it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transform {
    None,
    Table,
    PartialObjectMetadata,
    PartialObjectMetadataList,
}

/// The answer that the client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Output {
    pub format: Format,
    pub transform: Transform,
    /// `v=v1beta1` of a transform; else v1.
    pub beta: bool,
    pub pretty: bool,
    /// The form of errors: that of the best clause that asks for no transform.
    pub errors: Format,
}

impl Output {
    pub const JSON: Self = Self {
        format: Format::Json,
        transform: Transform::None,
        beta: false,
        pretty: false,
        errors: Format::Json,
    };

    /// The API version of Table and PartialObjectMetadata.
    pub fn meta_version(&self) -> &'static str {
        if self.beta { "meta.k8s.io/v1beta1" } else { "meta.k8s.io/v1" }
    }

    /// `tables`: whether what is asked can be shown as a table; `streams`: whether it can be watched.
    pub fn parse(headers: &HeaderMap, query: &Query, tables: bool, streams: bool) -> Result<Self> {
        let pretty =
            match query.optional_flag("pretty") {
                Some(flag) => flag,
                None => headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok()).is_some_and(
                    |agent| ["curl", "Wget", "Mozilla/"].iter().any(|start| agent.starts_with(start)),
                ),
            };
        let accept = accept(headers);
        if accept.trim().is_empty() {
            return Ok(Self { pretty, ..Self::JSON });
        }
        let clauses = clauses(&accept);
        if !clauses.iter().any(|clause| clause.media_type == "*/*" || Format::of(clause.media_type).is_some())
        {
            return Err(Status::no_representation(&ACCEPTED[..if streams { 5 } else { 3 }]));
        }
        let plain = clauses.iter().filter_map(output_of).find(|output| output.transform == Transform::None);
        let errors = plain.map_or(Format::Json, |output| output.format);
        for clause in &clauses {
            if let Some(output) = output_of(clause).filter(|o| tables || o.transform != Transform::Table) {
                return Ok(Self { pretty, errors, ..output });
            }
        }
        Err(Status::not_acceptable(&ACCEPTED[..3]))
    }
}

fn accept(headers: &HeaderMap) -> String {
    let lines = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    lines.collect::<Vec<_>>().join(",")
}

/// One clause of an Accept header.
pub struct Clause<'a> {
    pub media_type: &'a str,
    pub parameters: Vec<(&'a str, &'a str)>,
    quality: f32,
}

impl Clause<'_> {
    pub fn parameter(&self, name: &str) -> &str {
        self.parameters.iter().find(|(n, _)| *n == name).map_or("", |(_, v)| v)
    }
}

/// The clauses, best first.
pub fn clauses(accept: &str) -> Vec<Clause<'_>> {
    let mut clauses: Vec<Clause<'_>> = accept
        .split(',')
        .map(|clause| {
            let mut parts = clause.split(';').map(str::trim);
            let media_type = parts.next().unwrap_or("");
            let parameters: Vec<(&str, &str)> = parts
                .filter_map(|part| part.split_once('='))
                .map(|(name, value)| (name.trim(), value.trim().trim_matches('"')))
                .collect();
            let quality =
                parameters.iter().find(|(n, _)| *n == "q").and_then(|(_, q)| q.parse().ok()).unwrap_or(1.0);
            Clause { media_type, parameters, quality }
        })
        .collect();
    clauses.sort_by(|a, b| b.quality.total_cmp(&a.quality));
    clauses
}

fn output_of(clause: &Clause<'_>) -> Option<Output> {
    let format = match clause.media_type {
        "*/*" | "application/*" => Format::Json,
        media_type => Format::of(media_type)?,
    };
    let transform = match clause.parameter("as") {
        "" => return Some(Output { format, ..Output::JSON }),
        "Table" if format != Format::Protobuf => Transform::Table,
        "PartialObjectMetadata" => Transform::PartialObjectMetadata,
        "PartialObjectMetadataList" => Transform::PartialObjectMetadataList,
        _ => return None,
    };
    let beta = match (clause.parameter("g"), clause.parameter("v")) {
        ("meta.k8s.io", "v1") => false,
        ("meta.k8s.io", "v1beta1") => true,
        _ => return None,
    };
    Some(Output { format, transform, beta, ..Output::JSON })
}

/// Whether the aggregated discovery document is asked for.
pub fn wants_aggregated_discovery(headers: &HeaderMap) -> bool {
    let accept = accept(headers);
    for clause in clauses(&accept) {
        if clause.parameter("as") == "APIGroupDiscoveryList" {
            if clause.parameter("g") == "apidiscovery.k8s.io"
                && clause.parameter("v") == "v2"
                && clause.media_type == JSON
            {
                return true;
            }
        } else if matches!(clause.media_type, JSON | PROTOBUF | "*/*" | "application/*") {
            return false;
        }
    }
    false
}

/// The form of a request's body; JSON where nothing is said.
pub fn input_format(headers: &HeaderMap) -> Result<Format> {
    let content_type = content_type(headers);
    match content_type.as_str() {
        "" => Ok(Format::Json),
        media_type => Format::of(media_type).ok_or_else(|| Status::unsupported_media_type(&ACCEPTED[..3])),
    }
}

/// The media type of the body without its parameters.
pub fn content_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    value.split(';').next().unwrap_or("").trim().to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(accept: &str) -> Result<Output> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, accept.parse().unwrap());
        Output::parse(&headers, &Query::default(), true, false)
    }

    #[test]
    fn accept_headers() {
        let cases = [
            ("", Format::Json, Transform::None),
            ("*/*", Format::Json, Transform::None),
            ("application/yaml", Format::Yaml, Transform::None),
            ("application/vnd.kubernetes.protobuf,application/json", Format::Protobuf, Transform::None),
            ("application/json;q=0.5,application/yaml", Format::Yaml, Transform::None),
            ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", Format::Json, Transform::Table),
            ("application/json;as=Table;v=v9;g=meta.k8s.io,application/json", Format::Json, Transform::None),
            (
                "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
                Format::Protobuf,
                Transform::PartialObjectMetadata,
            ),
            ("application/json;stream=watch", Format::Json, Transform::None),
        ];
        for (accept, format, transform) in cases {
            let output = parse(accept).unwrap();
            assert_eq!((output.format, output.transform), (format, transform), "{accept}");
        }
        for accept in
            ["application/*", "text/html", "application/cbor", "application/json;as=Pod;g=meta.k8s.io;v=v1"]
        {
            assert_eq!(parse(accept).unwrap_err().0.code, 406, "{accept}");
        }
        let table = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
        assert_eq!(parse(table).unwrap().errors, Format::Json);
        assert_eq!(parse(&format!("{table},{PROTOBUF}")).unwrap().errors, Format::Protobuf);
    }
}
