//! An image's configuration on its way: what instructions change of it, its history, and what it becomes.
//!
//! Upstream counterparts: `opencontainers/image-spec`'s config.md, moby's docker image spec, BuildKit's
//! `dockerfile2llb` and image exporter. The base's configuration is kept as it is but for what instructions change:
//! fields that nobody here knows stay. What stays true: history has as many entries that made a layer as there are
//! layers.
use std::collections::BTreeMap;

use jiff::Timestamp;
use sampan_image::manifest::{self, OCI_MANIFEST};
use sampan_image::{ImageError, Platform, platform};
use serde_json::{Map, Value, json};

use crate::dockerfile::{CommandLine, Healthcheck, KeyValue};
use crate::store::{GZIP_LAYER, Layer};

pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const COMMENT: &str = "sampan";

#[derive(Clone, Debug)]
pub struct Image {
    /// `config` of the configuration: what a container is started with.
    run: Map<String, Value>,
    /// All else but `config`, `rootfs` and `history`.
    rest: Map<String, Value>,
    history: Vec<Value>,
    /// CMD was set in this stage: ENTRYPOINT leaves it then.
    cmd_is_set: bool,
    /// When the last layer was made: entries without a layer have the same time, so that a build whose steps all come
    /// from the cache gives the same image.
    pub created: Option<String>,
}

fn object(value: Option<Value>) -> Map<String, Value> {
    match value {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

impl Image {
    pub fn scratch(of: &Platform) -> Image {
        let mut image =
            Image { run: Map::new(), rest: Map::new(), history: vec![], cmd_is_set: false, created: None };
        image.set_platform(of);
        image.ensure_path();
        image
    }

    /// From a base's configuration, which has `layers` layers.
    pub fn from_config(bytes: &[u8], layers: usize) -> Result<Image, ImageError> {
        let wrong = |e: serde_json::Error| ImageError::Invalid(format!("image configuration: {e}"));
        let mut rest = object(Some(serde_json::from_slice(bytes).map_err(wrong)?));
        let run = object(rest.remove("config"));
        let history = match rest.remove("history") {
            Some(Value::Array(history)) => fitting(history, layers),
            _ => fitting(Vec::new(), layers),
        };
        rest.remove("rootfs");
        // a container's, not an image's
        for name in ["container", "container_config", "id", "parent", "docker_version"] {
            rest.remove(name);
        }
        let created = rest.get("created").and_then(Value::as_str).map(String::from);
        let mut image = Image { run, rest, history, cmd_is_set: false, created };
        image.ensure_path();
        Ok(image)
    }

    /// For a stage that begins where another ended.
    pub fn as_base(&self) -> Image {
        let mut image = self.clone();
        image.run.remove("OnBuild");
        image.cmd_is_set = false;
        image
    }

    /// Triggers for the stage that has this image as its base, which it then has no more.
    pub fn take_triggers(&mut self) -> Vec<String> {
        let triggers = self.strings("OnBuild");
        self.run.remove("OnBuild");
        triggers
    }

    pub fn set_platform(&mut self, of: &Platform) {
        let of = platform::normalise(of);
        self.rest.insert("os".into(), of.os.into());
        self.rest.insert("architecture".into(), of.architecture.into());
        match of.variant {
            Some(variant) => self.rest.insert("variant".into(), variant.into()),
            None => self.rest.remove("variant"),
        };
    }

    pub fn platform(&self) -> Platform {
        let text = |name: &str| self.rest.get(name).and_then(Value::as_str).map(String::from);
        platform::normalise(&Platform {
            os: text("os").unwrap_or_default(),
            architecture: text("architecture").unwrap_or_default(),
            variant: text("variant"),
        })
    }

    fn ensure_path(&mut self) {
        let mut env = self.env();
        if !env.iter().any(|e| e.starts_with("PATH=")) {
            env.push(DEFAULT_PATH.into());
            self.run.insert("Env".into(), json!(env));
        }
    }

    fn strings(&self, name: &str) -> Vec<String> {
        let values = self.run.get(name).and_then(Value::as_array);
        values.into_iter().flatten().filter_map(|v| v.as_str().map(String::from)).collect()
    }

    pub fn env(&self) -> Vec<String> {
        self.strings("Env")
    }

    pub fn user(&self) -> &str {
        self.run.get("User").and_then(Value::as_str).unwrap_or_default()
    }

    pub fn workdir(&self) -> &str {
        let set = self.run.get("WorkingDir").and_then(Value::as_str).filter(|w| !w.is_empty());
        set.unwrap_or("/")
    }

    /// With SHELL's words before it when it is the shell's to read.
    pub fn words(&self, command: &CommandLine) -> Vec<String> {
        match command {
            CommandLine::Exec(words) => words.clone(),
            CommandLine::Shell(text) => self.shell(text),
        }
    }

    pub fn shell(&self, text: &str) -> Vec<String> {
        let mut words = self.strings("Shell");
        if words.is_empty() {
            words = vec!["/bin/sh".into(), "-c".into()];
        }
        words.push(text.into());
        words
    }

    pub fn set_env(&mut self, pairs: &[KeyValue]) {
        let mut env = self.env();
        for KeyValue { key, value } in pairs {
            let entry = format!("{key}={value}");
            match env.iter_mut().find(|e| e.split('=').next() == Some(key)) {
                Some(old) => *old = entry,
                None => env.push(entry),
            }
        }
        self.run.insert("Env".into(), json!(env));
    }

    pub fn set_cmd(&mut self, command: &CommandLine) -> Vec<String> {
        let words = self.words(command);
        self.run.insert("Cmd".into(), json!(words));
        self.cmd_is_set = true;
        words
    }

    /// A base's CMD was meant for the base's ENTRYPOINT, so it goes.
    pub fn set_entrypoint(&mut self, command: &CommandLine) -> Vec<String> {
        let words = self.words(command);
        self.run.insert("Entrypoint".into(), json!(words));
        if !self.cmd_is_set {
            self.run.remove("Cmd");
        }
        words
    }

    pub fn set_text(&mut self, name: &str, value: &str) {
        self.run.insert(name.into(), value.into());
    }

    pub fn set_author(&mut self, author: &str) {
        self.rest.insert("author".into(), author.into());
    }

    pub fn set_shell(&mut self, words: &[String]) {
        self.run.insert("Shell".into(), json!(words));
    }

    pub fn add_trigger(&mut self, text: &str) {
        let mut triggers = self.strings("OnBuild");
        triggers.push(text.into());
        self.run.insert("OnBuild".into(), json!(triggers));
    }

    pub fn add_labels<'a>(&mut self, labels: impl IntoIterator<Item = (&'a str, &'a str)>) {
        let mut all = object(self.run.remove("Labels"));
        for (key, value) in labels {
            all.insert(key.into(), value.into());
        }
        if !all.is_empty() {
            self.run.insert("Labels".into(), Value::Object(all));
        }
    }

    /// Ports and volumes are keys of an object.
    pub fn add_keys(&mut self, name: &str, keys: &[String]) {
        let mut all = object(self.run.remove(name));
        for key in keys {
            all.insert(key.clone(), json!({}));
        }
        self.run.insert(name.into(), Value::Object(all));
    }

    pub fn set_healthcheck(&mut self, check: &Healthcheck) {
        let mut value = Map::new();
        if !check.test.is_empty() {
            value.insert("Test".into(), json!(check.test));
        }
        let numbers = [
            ("Interval", check.interval_ns),
            ("Timeout", check.timeout_ns),
            ("StartPeriod", check.start_period_ns),
            ("StartInterval", check.start_interval_ns),
            ("Retries", i64::from(check.retries)),
        ];
        for (name, number) in numbers.into_iter().filter(|(_, n)| *n != 0) {
            value.insert(name.into(), number.into());
        }
        self.run.insert("Healthcheck".into(), Value::Object(value));
    }

    /// An instruction that made a layer, or none.
    pub fn add_history(&mut self, created_by: &str, has_layer: bool, epoch_s: Option<i64>) {
        let mut entry = Map::new();
        if let Some(created) = epoch_s.map(time).or_else(|| self.created.clone()) {
            entry.insert("created".into(), created.into());
        }
        entry.insert("created_by".into(), created_by.into());
        entry.insert("comment".into(), COMMENT.into());
        if !has_layer {
            entry.insert("empty_layer".into(), true.into());
        }
        self.history.push(Value::Object(entry));
    }

    /// The configuration's bytes.
    pub fn config(&self, layers: &[Layer], epoch_s: Option<i64>) -> Vec<u8> {
        let mut config = self.rest.clone();
        if let Some(created) = epoch_s.map(time).or_else(|| self.created.clone()) {
            config.insert("created".into(), created.into());
        }
        let diff_ids: Vec<&str> = layers.iter().map(|l| l.diff_id.as_str()).collect();
        config.insert("config".into(), Value::Object(self.run.clone()));
        config.insert("rootfs".into(), json!({"type": "layers", "diff_ids": diff_ids}));
        config.insert("history".into(), Value::Array(self.history.clone()));
        Value::Object(config).to_string().into_bytes()
    }
}

/// Seconds since 1970, as image configurations write times.
pub fn time(seconds: i64) -> String {
    Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

/// A base's history, made to say as many layers as the base has: not every tool writes it whole.
fn fitting(mut history: Vec<Value>, layers: usize) -> Vec<Value> {
    let mut said = 0;
    for entry in &mut history {
        if entry["empty_layer"] == json!(true) {
            continue;
        }
        said += 1;
        if said > layers
            && let Some(entry) = entry.as_object_mut()
        {
            entry.insert("empty_layer".into(), true.into());
        }
    }
    for _ in said..layers {
        history
            .push(json!({"created_by": "unknown", "comment": "a layer of the base image without history"}));
    }
    history
}

/// An OCI manifest's bytes.
pub fn manifest(config: &[u8], layers: &[Layer], annotations: &BTreeMap<String, String>) -> Vec<u8> {
    let described =
        |l: &Layer| json!({"mediaType": oci_type(&l.media_type), "digest": l.digest, "size": l.size_bytes});
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": manifest::digest(config), "size": config.len()},
        "layers": layers.iter().map(described).collect::<Vec<_>>(),
    });
    if !annotations.is_empty() {
        manifest["annotations"] = json!(annotations);
    }
    manifest.to_string().into_bytes()
}

/// Docker's names for layers in OCI's words: a manifest is one or the other.
fn oci_type(media_type: &str) -> &str {
    match media_type {
        "application/vnd.docker.image.rootfs.diff.tar.gzip" | "" => GZIP_LAYER,
        "application/vnd.docker.image.rootfs.diff.tar" => "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => {
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn instructions_change_what_they_say() {
        let base = json!({
            "architecture": "arm64", "os": "linux", "variant": "v8", "created": "2020-01-01T00:00:00Z",
            "config": {"Env": ["A=1", "PATH=/bin"], "Cmd": ["old"], "Entrypoint": ["init"], "OnBuild": ["RUN x"],
                "Future": {"kept": true}},
            "history": [{"created_by": "one"}, {"created_by": "two", "empty_layer": true}],
        });
        let mut image = Image::from_config(base.to_string().as_bytes(), 2).unwrap();
        assert_eq!(image.take_triggers(), ["RUN x"]);
        assert!(image.take_triggers().is_empty());
        let pair = |k: &str, v: &str| KeyValue { key: k.into(), value: v.into() };
        image.set_env(&[pair("B", "x=y"), pair("A", "2")]);
        assert_eq!(image.env(), ["A=2", "PATH=/bin", "B=x=y"]);
        // the base's CMD goes with its ENTRYPOINT, one of this stage stays
        image.set_entrypoint(&CommandLine::Exec(text(&["new"])));
        assert!(!image.run.contains_key("Cmd"));
        image.set_shell(&text(&["/bin/ash", "-ec"]));
        image.set_cmd(&CommandLine::Shell("echo $A".into()));
        image.set_entrypoint(&CommandLine::Exec(text(&["newer"])));
        assert_eq!(image.run["Cmd"], json!(["/bin/ash", "-ec", "echo $A"]));
        image.add_labels([("a", "b")]);
        image.add_keys("ExposedPorts", &text(&["80/tcp"]));
        image.add_history("CMD x", false, None);
        let bytes = image.config(&[], Some(1));
        let config: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(config["config"]["Future"]["kept"], true);
        assert_eq!(config["created"], "1970-01-01T00:00:01Z");
        assert_eq!(config["history"][3]["created"], "2020-01-01T00:00:00Z");
        let layers = |h: &Value| h.as_array().unwrap().iter().filter(|e| e["empty_layer"] != true).count();
        assert_eq!(layers(&config["history"]), 2);
        assert_eq!(platform::format(&image.platform()), "linux/arm64");
        // a stage over this one begins anew with CMD
        let mut next = image.as_base();
        next.set_entrypoint(&CommandLine::Exec(text(&["sh"])));
        assert!(!next.run.contains_key("Cmd"));
    }

    #[test]
    fn scratch_has_a_path_and_its_platform() {
        let of = platform::parse("linux/arm/v7").unwrap();
        let image = Image::scratch(&of);
        assert_eq!(image.env(), [DEFAULT_PATH]);
        assert_eq!(image.platform(), of);
        assert_eq!((image.workdir(), image.user()), ("/", ""));
        assert_eq!(fitting(vec![json!({}), json!({})], 1)[1]["empty_layer"], true);
    }
}
