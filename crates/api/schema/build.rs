//! Turns the table of API facts into the text that `src/table.rs` reads, and k8s-openapi's doc comments into
//! the compressed descriptions that `src/descriptions.rs` inflates.
//!
//! Plain text without Rust statics on purpose: references would need relocations, which cost every process
//! their pages, and 771 types of generated code would cost compile time.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

type Failure = Box<dyn Error>;
type Facts = serde_json::Map<String, Value>;

fn main() -> Result<(), Failure> {
    for input in ["build.rs", "data/api-1.36.json", "data/api-sampan.json", "data/go-1.36.txt"] {
        println!("cargo::rerun-if-changed={input}");
    }
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut api: Value = serde_json::from_str(&fs::read_to_string("data/api-1.36.json")?)?;
    add_own(&mut api, serde_json::from_str(&fs::read_to_string("data/api-sampan.json")?)?)?;
    let go_text = fs::read_to_string("data/go-1.36.txt")?;
    let go = GoFacts::parse(&go_text);
    let mut types = api["types"].as_object().ok_or("types")?.clone();
    add_meta_types(&mut types)?;
    let wire_only = api["wireOnly"].as_object().ok_or("wireOnly")?;
    let table = Table::write(&types, wire_only, &go)?;
    fs::write(out.join("types.txt"), &table.text)?;
    fs::write(out.join("kinds.txt"), &table.kinds)?;
    fs::write(out.join("resources.txt"), resources(&api, &types)?)?;
    let mut index = String::new();
    numbers(&mut index, "TYPES", &table.offsets)?;
    numbers(&mut index, "KINDS", &table.kind_offsets)?;
    fs::write(out.join("index.rs"), index)?;
    fs::write(out.join("descriptions.z"), deflate(&descriptions(&types)?)?)?;
    Ok(())
}

/// Kinds of our own groups, which stand in a file of the same form. Beyond it, a field may say with `go` what the list
/// of Go's struct tags says of upstream's, and types and fields carry their descriptions.
fn add_own(api: &mut Value, mut own: Value) -> Result<(), Failure> {
    let types = api["types"].as_object_mut().ok_or("types")?;
    for (name, facts) in std::mem::take(own["types"].as_object_mut().ok_or("own types")?) {
        if types.insert(name.clone(), facts).is_some() {
            return Err(format!("{name} is there twice").into());
        }
    }
    let resources = api["resources"].as_array_mut().ok_or("resources")?;
    resources.append(own["resources"].as_array_mut().ok_or("own resources")?);
    Ok(())
}

/// Types that exist on the wire and in the meta group but in no OpenAPI document.
fn add_meta_types(types: &mut Facts) -> Result<(), Failure> {
    let extra = r#"{
      "io.k8s.apimachinery.pkg.apis.meta.v1.PartialObjectMetadata": {"hidden": true,
        "gvk": ["meta.k8s.io/v1/PartialObjectMetadata", "meta.k8s.io/v1beta1/PartialObjectMetadata"],
        "fields": {"apiVersion": {"type": "string"}, "kind": {"type": "string"},
          "metadata": {"tag": 1, "type": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta", "wire": "m"}}},
      "io.k8s.apimachinery.pkg.apis.meta.v1.PartialObjectMetadataList": {"hidden": true,
        "gvk": ["meta.k8s.io/v1/PartialObjectMetadataList"],
        "fields": {"apiVersion": {"type": "string"}, "kind": {"type": "string"},
          "metadata": {"tag": 1, "type": "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta", "wire": "m"},
          "items": {"tag": 2, "type": "[io.k8s.apimachinery.pkg.apis.meta.v1.PartialObjectMetadata]", "wire": "m"}}},
      "io.k8s.apimachinery.pkg.apis.meta.v1.List": {"hidden": true, "gvk": ["v1/List"],
        "fields": {"apiVersion": {"type": "string"}, "kind": {"type": "string"},
          "metadata": {"tag": 1, "type": "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta", "wire": "m"},
          "items": {"tag": 2, "type": "[io.k8s.apimachinery.pkg.runtime.RawExtension]", "wire": "m"}}}
    }"#;
    let extra: Facts = serde_json::from_str(extra)?;
    for (name, facts) in extra {
        types.entry(name).or_insert(facts);
    }
    Ok(())
}

/// What Go's struct tags say and the table doesn't: lines ` field flags [type]` under a line with the type.
struct GoFacts<'a>(BTreeMap<(&'a str, &'a str), (&'a str, &'a str)>);

impl<'a> GoFacts<'a> {
    fn parse(text: &'a str) -> GoFacts<'a> {
        let mut facts = BTreeMap::new();
        let mut ty = "";
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            match line.strip_prefix(' ') {
                None => ty = line,
                Some(rest) => {
                    let mut words = rest.split(' ');
                    let name = words.next().unwrap_or("");
                    let flags = words.next().unwrap_or("");
                    facts.insert((ty, name), (flags, words.next().unwrap_or("")));
                }
            }
        }
        GoFacts(facts)
    }
}

struct Table<'a> {
    text: String,
    offsets: Vec<usize>,
    kinds: String,
    kind_offsets: Vec<usize>,
    numbers: BTreeMap<&'a str, usize>,
    types: &'a Facts,
    wire_only: &'a Facts,
    go: &'a GoFacts<'a>,
}

impl<'a> Table<'a> {
    /// A record a type: a line for the type, then a line a field, words separated by tabs.
    fn write(types: &'a Facts, wire_only: &'a Facts, go: &'a GoFacts<'a>) -> Result<Table<'a>, Failure> {
        let mut names: Vec<&str> = types.keys().map(String::as_str).collect();
        names.sort_unstable();
        let numbers = names.iter().enumerate().map(|(at, name)| (*name, at)).collect();
        let mut table = Table {
            text: String::new(),
            offsets: Vec::new(),
            kinds: String::new(),
            kind_offsets: Vec::new(),
            numbers,
            types,
            wire_only,
            go,
        };
        let mut kinds = BTreeMap::new();
        for (at, name) in names.iter().enumerate() {
            table.offsets.push(table.text.len());
            let ty = &types[*name];
            table.type_line(name, ty)?;
            let fields = ty["fields"].as_object().into_iter().flatten();
            let sorted: BTreeMap<&String, &Value> = fields.collect();
            for (field, facts) in sorted {
                table.field_line(name, field, facts)?;
            }
            for gvk in ty["gvk"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                kinds.insert(gvk.to_owned(), at);
            }
        }
        table.offsets.push(table.text.len());
        for (gvk, at) in kinds {
            table.kind_offsets.push(table.kinds.len());
            writeln!(table.kinds, "{gvk}\t{at}")?;
        }
        table.kind_offsets.push(table.kinds.len());
        Ok(table)
    }

    fn type_line(&mut self, name: &str, ty: &Value) -> Result<(), Failure> {
        let map = match ty["map"].as_str() {
            Some("atomic") => "a",
            Some(_) => "g",
            None => "",
        };
        let gvk: Vec<&str> = ty["gvk"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let any = ty["gvk"].as_str().is_some();
        let hidden = ty["hidden"].as_bool().unwrap_or(false);
        let unions = ty.get("unions").map(Value::to_string).unwrap_or_default();
        let gvk = if any { "*".to_owned() } else { gvk.join(",") };
        writeln!(self.text, "{name}\t{map}\t{gvk}\t{unions}\t{}", if hidden { "h" } else { "" })?;
        Ok(())
    }

    fn field_line(&mut self, ty: &str, name: &str, facts: &Value) -> Result<(), Failure> {
        let (within, tag) = match facts["tag"].as_u64() {
            Some(tag) => (Vec::new(), tag),
            None => self.embedded_tag(&self.types[ty]["embedded"], name).unwrap_or_default(),
        };
        let within: Vec<String> = within.iter().map(u64::to_string).collect();
        let shape = self.shape(facts["type"].as_str().ok_or("type")?)?;
        let own_flags = facts["go"].as_str().unwrap_or("");
        let (go_flags, go_type) = self.go.0.get(&(ty, name)).copied().unwrap_or((own_flags, ""));
        let mut flags = go_flags.replace('-', "");
        if facts["required"].as_bool().unwrap_or(false) {
            flags.push('r');
        }
        let wire = facts["wire"].as_str().unwrap_or("");
        if wire.contains("ExtraValue") || wire.ends_with(".Verbs") {
            flags.push('w');
        }
        let patch = facts["patch"].as_str().unwrap_or("");
        flags.extend(patch.contains("merge").then_some('m'));
        flags.extend(patch.contains("replace").then_some('p'));
        flags.extend(patch.contains("retainKeys").then_some('k'));
        let keys: Vec<&str> =
            facts["keys"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let list = match facts["list"].as_str() {
            Some("map") => keys.join(","),
            Some("set") => "=set".into(),
            Some(_) => "=atomic".into(),
            None => String::new(),
        };
        // The effective map kind, so that a reader needn't make the type that is referred to.
        let referred = &self.types.get(facts["type"].as_str().unwrap_or("")).unwrap_or(&Value::Null)["map"];
        match (facts["map"].as_str(), referred.as_str()) {
            (Some("atomic"), _) => flags.push_str("aS"),
            (Some(_), _) => flags.push('S'),
            (None, Some("atomic")) => flags.push('a'),
            (None, _) => {}
        }
        let merge_key = facts["mergeKey"].as_str().unwrap_or("");
        let default = facts.get("schemaDefault").map(Value::to_string).unwrap_or_default();
        let within = within.join(",");
        writeln!(
            self.text,
            "{name}\t{tag}\t{within}\t{shape}\t{flags}\t{list}\t{merge_key}\t{default}\t{go_type}"
        )?;
        Ok(())
    }

    /// Path and tag of a field that JSON shows here but the wire keeps in an embedded message.
    fn embedded_tag(&self, embedded: &Value, field: &str) -> Option<(Vec<u64>, u64)> {
        for message in embedded.as_object()?.values() {
            let (outer, wire) = (message["tag"].as_u64()?, message["wire"].as_str()?);
            let name = wire.replacen("k8s.io", "io.k8s", 1).replace("apiextensions_", "apiextensions-");
            let (fields, deeper) = match self.types.get(&name) {
                Some(ty) => (&ty["fields"], &ty["embedded"]),
                None => (self.wire_only.get(wire)?, &Value::Null),
            };
            if let Some(tag) = fields[field]["tag"].as_u64() {
                return Some((vec![outer], tag));
            }
            if let Some((mut path, tag)) = self.embedded_tag(deeper, field) {
                path.insert(0, outer);
                return Some((path, tag));
            }
            // A message that only the wire knows can embed another one that only the wire knows.
            for inner in fields.as_object().into_iter().flatten().map(|(_, inner)| inner) {
                let wire = inner["wire"].as_str().unwrap_or("");
                if let Some(tag) = self.wire_only.get(wire).and_then(|message| message[field]["tag"].as_u64())
                {
                    return Some((vec![outer, inner["tag"].as_u64()?], tag));
                }
            }
        }
        None
    }

    fn shape(&self, ty: &str) -> Result<String, Failure> {
        if let Some(inner) = ty.strip_prefix('[') {
            return Ok(format!("[{}", self.shape(inner.strip_suffix(']').ok_or("]")?)?));
        }
        if let Some(inner) = ty.strip_prefix("map<") {
            return Ok(format!("{{{}", self.shape(inner.strip_suffix('>').ok_or(">")?)?));
        }
        let code = match ty {
            "boolean" => "b",
            "integer:int32" => "i",
            "integer:int64" => "l",
            "number:double" => "d",
            "string" => "s",
            "string:byte" => "B",
            _ => match ty.rsplit('.').next().unwrap_or("") {
                "Time" => "T",
                "MicroTime" => "M",
                "Quantity" => "Q",
                "IntOrString" => "I",
                "RawExtension" => "R",
                "FieldsV1" => "F",
                "JSON" => "J",
                "JSONSchemaPropsOrArray" => "A",
                "JSONSchemaPropsOrBool" => "O",
                "JSONSchemaPropsOrStringArray" => "S",
                _ => {
                    let number = self.numbers.get(ty).ok_or_else(|| format!("no type {ty}"))?;
                    let atomic = self.types[ty]["map"].as_str() == Some("atomic");
                    return Ok(format!("{}{number}", if atomic { '@' } else { '#' }));
                }
            },
        };
        Ok(code.to_owned())
    }
}

fn numbers(out: &mut String, name: &str, numbers: &[usize]) -> Result<(), Failure> {
    writeln!(out, "static {name}: [u32; {}] = {numbers:?};", numbers.len())?;
    Ok(())
}

/// A line a resource.
fn resources(api: &Value, types: &Facts) -> Result<String, Failure> {
    let mut out = String::new();
    for fact in api["resources"].as_array().ok_or("resources")? {
        let text = |key: &str| fact[key].as_str().unwrap_or("");
        let join = |key: &str| {
            let words: Vec<&str> =
                fact[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            words.join(",")
        };
        let (group, version, kind) = (text("group"), text("version"), text("kind"));
        let exists = |group: &str, version: &str| {
            let gvk = if group.is_empty() {
                format!("{version}/{kind}")
            } else {
                format!("{group}/{version}/{kind}")
            };
            types.values().any(|ty| {
                ty["gvk"].as_array().into_iter().flatten().any(|known| known.as_str() == Some(&gvk))
            })
        };
        // responseGroup is empty for most subresources whose kind is of the resource's own group.
        let (kind_group, kind_version) = match (text("responseGroup"), text("responseVersion")) {
            ("", "") => (group, version),
            (other, "") if exists(other, "v1") => (other, "v1"),
            ("", _) => (group, version),
            (other, "") => (other, version),
            (other, theirs) => (other, theirs),
        };
        let flag = |key: &str| if fact[key].as_bool().unwrap_or(false) { "y" } else { "" };
        writeln!(
            out,
            "{group}\t{version}\t{kind}\t{kind_group}\t{kind_version}\t{}\t{}\t{}\t{}\t{}\t{}\t{}",
            text("name"),
            text("singularName"),
            flag("namespaced"),
            join("shortNames"),
            join("categories"),
            join("verbs"),
            flag("servedByDefault"),
        )?;
    }
    Ok(out)
}

/// Lines `type`, ` field<tab>text` and ` <tab>text` (of the type itself), newlines in texts as `\n`.
fn descriptions(types: &Facts) -> Result<String, Failure> {
    let source = k8s_openapi_source()?;
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    let mut folders = vec![source.join("src/v1_36")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                read_docs(&fs::read_to_string(&path)?, &mut found);
            }
        }
    }
    let mut names: Vec<&String> = types.keys().collect();
    names.sort();
    let mut out = String::new();
    for name in names {
        if let Some(texts) = found.get(name) {
            writeln!(out, "{name}\n{texts}")?;
        } else if let Some(text) = types[name.as_str()]["description"].as_str() {
            writeln!(out, "{name}\n \t{text}")?;
            for (field, facts) in types[name.as_str()]["fields"].as_object().into_iter().flatten() {
                if let Some(text) = facts["description"].as_str() {
                    writeln!(out, " {field}\t{text}")?;
                }
            }
            writeln!(out)?;
        }
    }
    if out.is_empty() {
        return Err("k8s-openapi's source holds no descriptions".into());
    }
    Ok(out)
}

/// Where cargo keeps the source of the build dependency.
fn k8s_openapi_source() -> Result<PathBuf, Failure> {
    let cargo = std::env::var("CARGO")?;
    let host = std::env::var("HOST")?;
    let arguments =
        ["metadata", "--format-version", "1", "--manifest-path", "Cargo.toml", "--filter-platform", &host];
    let ask = |offline: bool| {
        std::process::Command::new(&cargo).args(arguments).args(offline.then_some("--offline")).output()
    };
    let mut output = ask(true)?;
    if !output.status.success() {
        // a fresh checkout has fetched what this build needs, but not yet all that the workspace names
        output = ask(false)?;
    }
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().ok_or("packages")?;
    let package = packages.iter().find(|package| package["name"] == "k8s-openapi").ok_or("k8s-openapi")?;
    let manifest = package["manifest_path"].as_str().ok_or("manifest_path")?;
    Ok(Path::new(manifest).parent().ok_or("no folder")?.to_owned())
}

/// Collects the doc comments of one generated file: `// Generated from definition X`, then the struct with
/// its fields; the JSON names stand further down as `"dnsConfig" => Field::Key_dns_config`.
fn read_docs(source: &str, found: &mut BTreeMap<String, String>) {
    let Some(rest) = source.strip_prefix("// Generated from definition ") else { return };
    let Some((name, rest)) = rest.split_once('\n') else { return };
    let keys: BTreeMap<&str, &str> = rest
        .lines()
        .filter_map(|line| line.trim().strip_prefix('"')?.strip_suffix(',')?.split_once("\" => Field::Key_"))
        .map(|(json, rust)| (rust, json))
        .collect();
    let mut out = String::new();
    let mut doc: Vec<&str> = Vec::new();
    let mut inside = false;
    for line in rest.lines() {
        let trimmed = line.trim();
        if let Some(text) = trimmed.strip_prefix("///") {
            doc.push(text.strip_prefix(' ').unwrap_or(text));
        } else if trimmed.starts_with("pub struct") || trimmed.starts_with("pub enum") {
            inside = true;
            push_doc(&mut out, "", &mut doc);
        } else if inside && line.starts_with("    pub ") {
            let rust = trimmed.strip_prefix("pub ").and_then(|rest| rest.split(':').next()).unwrap_or("");
            push_doc(&mut out, keys.get(rust).copied().unwrap_or(rust), &mut doc);
        } else if trimmed == "}" {
            break;
        }
    }
    found.insert(name.to_owned(), out);
}

fn push_doc(out: &mut String, name: &str, doc: &mut Vec<&str>) {
    if !doc.is_empty() {
        let text = doc.join("\\n");
        out.push_str(&format!(" {name}\t{text}\n"));
    }
    doc.clear();
}

fn deflate(text: &str) -> Result<Vec<u8>, Failure> {
    use std::io::Write as _;
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(text.as_bytes())?;
    Ok(encoder.finish()?)
}
