//! /etc/sampan/config.yaml: the flags' names as keys, as in K3s. What the command line says wins.
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_yaml_ng::Value;

const DEFAULT: &str = "/etc/sampan/config.yaml";

/// Puts the file's flags between the subcommand and its own arguments.
pub fn merge(args: Vec<String>) -> Result<Vec<String>> {
    if !matches!(args.get(1).map(String::as_str), Some("server" | "agent")) {
        return Ok(args);
    }
    let (mut args, named) = take_config_flag(args);
    let path = named.clone().or_else(|| std::env::var_os("SAMPAN_CONFIG_FILE").map(PathBuf::from));
    let path = path.unwrap_or_else(|| PathBuf::from(DEFAULT));
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && named.is_none() => return Ok(args),
        Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
    };
    let flags = flags(&path, &text)?;
    args.splice(2..2, flags);
    Ok(args)
}

/// `--config FILE`, `--config=FILE` or `-c FILE`, taken out.
fn take_config_flag(args: Vec<String>) -> (Vec<String>, Option<PathBuf>) {
    let (mut rest, mut found) = (Vec::new(), None);
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        match arg.strip_prefix("--config=") {
            Some(path) => found = Some(PathBuf::from(path)),
            None if arg == "--config" || arg == "-c" => found = args.next().map(PathBuf::from),
            None => rest.push(arg),
        }
    }
    (rest, found)
}

fn flags(path: &Path, text: &str) -> Result<Vec<String>> {
    let value: Value =
        serde_yaml_ng::from_str(text).with_context(|| format!("{} is not YAML", path.display()))?;
    let map = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Mapping(map) => map,
        _ => bail!("{}: expected `flag: value` lines", path.display()),
    };
    let mut flags = Vec::new();
    for (key, value) in map {
        let Some(key) = key.as_str() else { bail!("{}: a key is not a string", path.display()) };
        let values = match value {
            Value::Sequence(values) => values,
            single => vec![single],
        };
        for value in values {
            match value {
                Value::Bool(true) => flags.push(format!("--{key}")),
                Value::Bool(false) | Value::Null => {}
                Value::String(text) => flags.push(format!("--{key}={text}")),
                Value::Number(number) => flags.push(format!("--{key}={number}")),
                _ => bail!("{}: {key} takes a string, a number, a boolean or a list of them", path.display()),
            }
        }
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_flags() {
        let text =
            "node-name: a\ntls-san: [x, y]\ndisable-agent: true\nother: false\nhttps-listen-port: 7443\n";
        let got = flags(Path::new("c.yaml"), text).unwrap();
        assert_eq!(
            got,
            ["--node-name=a", "--tls-san=x", "--tls-san=y", "--disable-agent", "--https-listen-port=7443"]
        );
        assert!(flags(Path::new("c.yaml"), "a: {b: c}").unwrap_err().to_string().contains("a takes"));
        assert!(flags(Path::new("c.yaml"), "- x").is_err());
        assert!(flags(Path::new("c.yaml"), "").unwrap().is_empty());
        let args = ["sampan", "server", "-c", "f", "--x"].map(String::from).to_vec();
        let (rest, found) = take_config_flag(args);
        assert_eq!((rest.len(), found), (3, Some("f".into())));
    }
}
