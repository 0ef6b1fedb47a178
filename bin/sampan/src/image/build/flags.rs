//! What the flags of `sampan image build` say.
//!
//! Upstream counterparts: buildx' `util/buildflags`, docker/cli's `opts`.
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

const SECRET_MAX_BYTES: u64 = 500 * 1024;

/// Where an image goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Load,
    Push,
    /// An OCI layout that `docker load` takes too.
    Archive(PathBuf),
    Tar(PathBuf),
    Folder(PathBuf),
    /// Stays in the build cache.
    Nothing,
}

/// `type=oci,dest=x.tar`, or a path: a folder, or `-` for a tar on standard output.
pub fn output(text: &str) -> Result<Output> {
    if !text.contains('=') {
        return Ok(match text {
            "-" => Output::Tar("-".into()),
            path => Output::Folder(path.into()),
        });
    }
    let mut fields = BTreeMap::new();
    for field in text.split(',') {
        let Some((key, value)) = field.split_once('=') else {
            bail!("-o {text}: {field:?} is no KEY=VALUE");
        };
        fields.insert(key.trim().to_ascii_lowercase(), value.to_string());
    }
    let kind = fields.remove("type").with_context(|| format!("-o {text}: type= is missing"))?;
    let dest = fields.remove("dest").map(PathBuf::from);
    let push = fields.remove("push").is_some_and(|p| p == "true" || p == "1");
    let archive = fields.remove("tar").is_none_or(|t| t != "false");
    let needed = || dest.clone().with_context(|| format!("-o {text}: dest= is missing"));
    let found = match kind.as_str() {
        "oci" | "docker" if !archive => bail!("-o {text}: a folder is not written; leave out tar=false"),
        "oci" => Output::Archive(needed()?),
        "docker" => dest.clone().map_or(Output::Load, Output::Archive),
        "tar" => Output::Tar(needed()?),
        "local" => Output::Folder(needed()?),
        "registry" => Output::Push,
        "image" if push => Output::Push,
        "image" => Output::Load,
        "cacheonly" => Output::Nothing,
        other => bail!(
            "-o {text}: type {other} is unknown; oci, docker, tar, local, image, registry or cacheonly are"
        ),
    };
    if let Some(key) = fields.keys().next() {
        bail!("-o {text}: {key} is not supported; images are named by -t");
    }
    Ok(found)
}

/// `NAME=VALUE` each; a name alone has no value, where that may be.
pub fn pairs(flag: &str, given: &[String], alone: bool) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for text in given {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => drop(all.insert(name.to_string(), value.to_string())),
            None if alone && !text.is_empty() => drop(all.insert(text.clone(), String::new())),
            _ => bail!("--{flag} {text}: NAME=VALUE expected"),
        }
    }
    Ok(all)
}

/// `id=NAME[,src=FILE|,env=VARIABLE]`; without either the variable or file of that name.
pub fn secret(text: &str) -> Result<(String, Vec<u8>)> {
    let mut fields: BTreeMap<String, &str> = BTreeMap::new();
    for field in text.split(',') {
        let Some((key, value)) = field.split_once('=') else {
            bail!("--secret: {field:?} is no KEY=VALUE; expected id=NAME,src=FILE or id=NAME,env=VARIABLE");
        };
        let key = match key {
            "source" => "src",
            key @ ("id" | "src" | "env" | "type") => key,
            key => bail!("--secret: {key:?} is unknown; id, src, env and type are known"),
        };
        fields.insert(key.to_string(), value);
    }
    let id = *fields.get("id").context("--secret: id= is missing")?;
    let is_env = fields.get("type") == Some(&"env");
    let variable = match (fields.get("env"), fields.get("src")) {
        (Some(name), _) => Some(*name),
        (None, Some(name)) if is_env => Some(*name),
        (None, None) if std::env::var_os(id).is_some() => Some(id),
        _ => None,
    };
    if let Some(name) = variable {
        let value = std::env::var_os(name);
        let value = value.with_context(|| format!("--secret id={id}: variable {name} is not set"))?;
        return Ok((id.to_string(), std::os::unix::ffi::OsStrExt::as_bytes(value.as_os_str()).to_vec()));
    }
    let path = *fields.get("src").unwrap_or(&id);
    let file = std::fs::File::open(path).with_context(|| format!("--secret id={id}: {path}"))?;
    let mut value = Vec::new();
    file.take(SECRET_MAX_BYTES + 1)
        .read_to_end(&mut value)
        .with_context(|| format!("--secret id={id}: {path}"))?;
    if value.len() as u64 > SECRET_MAX_BYTES {
        bail!("--secret id={id}: more than {SECRET_MAX_BYTES} bytes");
    }
    Ok((id.to_string(), value))
}

/// `name:address`, and `name=address`.
pub fn host(text: &str) -> Result<(String, std::net::IpAddr)> {
    let (name, address) =
        text.split_once([':', '=']).with_context(|| format!("--add-host {text}: NAME:ADDRESS expected"))?;
    let address = match address {
        "host-gateway" => "127.0.0.1",
        address => address.trim_start_matches('[').trim_end_matches(']'),
    };
    let parsed = address.parse().with_context(|| format!("--add-host {text}: {address:?} is no address"))?;
    Ok((name.to_string(), parsed))
}

/// What belongs to the Dockerfile comes before what belongs to the context.
pub fn ignore_file(context: &Path, dockerfile: Option<&Path>) -> Result<Option<(String, String)>> {
    let own = dockerfile.map(|p| {
        let mut name = p.as_os_str().to_os_string();
        name.push(".dockerignore");
        PathBuf::from(name)
    });
    for path in own.into_iter().chain([context.join(".dockerignore")]) {
        match std::fs::read(&path) {
            Ok(bytes) => {
                let name = path.file_name().map_or(String::new(), |n| n.to_string_lossy().into_owned());
                return Ok(Some((name, String::from_utf8_lossy(&bytes).into_owned())));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| path.display().to_string()),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_buildx_outputs() {
        for (text, wanted) in [
            ("out", Output::Folder("out".into())),
            ("-", Output::Tar("-".into())),
            ("type=oci,dest=a.tar", Output::Archive("a.tar".into())),
            ("type=docker", Output::Load),
            ("type=docker,dest=-", Output::Archive("-".into())),
            ("type=tar,dest=a", Output::Tar("a".into())),
            ("type=local,dest=a", Output::Folder("a".into())),
            ("type=image,push=true", Output::Push),
            ("type=registry", Output::Push),
            ("type=cacheonly", Output::Nothing),
        ] {
            assert_eq!(output(text).unwrap(), wanted, "{text}");
        }
        for bad in [
            "type=oci",
            "type=none,dest=a",
            "dest=a",
            "type=oci,dest=a,tar=false",
            "type=image,name=x",
            "a=b,c",
        ] {
            assert!(output(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_and_hosts_are_read() {
        assert_eq!(secret("id=a,env=PATH").unwrap().0, "a");
        for bad in ["src=x", "id=a,src=/none/such", "id=a,env=NONE_SUCH_VARIABLE", "id", "id=a,mode=1"] {
            assert!(secret(bad).is_err(), "{bad}");
        }
        assert_eq!(host("a:10.0.0.1").unwrap().1.to_string(), "10.0.0.1");
        assert_eq!(host("a=[::1]").unwrap().1.to_string(), "::1");
        assert!(host("a").is_err() && host("a:b").is_err());
        assert_eq!(pairs("label", &["a=b=c".into(), "d".into()], true).unwrap()["a"], "b=c");
        assert!(pairs("annotation", &["d".into()], false).is_err());
    }
}
