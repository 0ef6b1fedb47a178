//! `RUN --mount=…`.
//!
//! Upstream counterparts: buildkit `instructions/commands_runmount.go`, and of `dockerfile2llb` what gives secrets, ssh
//! sockets and caches their default names. Deliberate difference: a mount without variables is checked when the file is
//! read, not when its stage is built.
use super::error::suggest;
use crate::dockerignore::clean;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MountType {
    #[default]
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    #[default]
    Shared,
    Private,
    Locked,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    pub kind: MountType,
    /// A stage or image ([`super::Plan::source`]); None is the build context, for a cache nothing.
    pub from: Option<String>,
    /// Within `from`; empty is its root. Never set for secrets and ssh.
    pub source: String,
    /// As written: relative ones are below the working directory, which is also what none means. `/` is not to be
    /// mounted on. A secret has its default filled in, unless it only goes to the environment; an ssh socket's is empty.
    pub target: String,
    pub read_only: bool,
    /// Of a tmpfs; 0 is no limit.
    pub size_bytes: u64,
    /// Of a cache, secret or ssh mount, default filled in.
    pub id: String,
    pub sharing: Sharing,
    pub required: bool,
    /// The environment variable that a secret goes to.
    pub env: Option<String>,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// What is wrong with a mount, and what would have been right.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadMount {
    pub message: String,
    pub expected: Option<String>,
}

impl From<String> for BadMount {
    fn from(message: String) -> BadMount {
        BadMount { message, expected: None }
    }
}

const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
];
const TYPES: [(&str, MountType); 5] = [
    ("bind", MountType::Bind),
    ("cache", MountType::Cache),
    ("tmpfs", MountType::Tmpfs),
    ("secret", MountType::Secret),
    ("ssh", MountType::Ssh),
];
const SHARINGS: [(&str, Sharing); 3] =
    [("shared", Sharing::Shared), ("private", Sharing::Private), ("locked", Sharing::Locked)];

/// The stage or image that a mount takes from. It must be known before anything is expanded.
pub(super) fn from(text: &str) -> Result<Option<String>, BadMount> {
    let mut from = None;
    for field in fields(text)? {
        let Some((key, value)) = field.split_once('=') else { continue };
        if key.eq_ignore_ascii_case("from") {
            if value.find('$').is_some_and(|at| at + 1 != value.len()) {
                let message =
                    format!("'{key}' doesn't support variable expansion, define alias stage instead");
                return Err(message.into());
            }
            from = Some(value.to_string()).filter(|v| !v.is_empty());
        }
    }
    Ok(from)
}

/// Reads `type=cache,target=/root/.cache,…`, each value through `expand`.
pub(super) fn parse(
    text: &str,
    expand: &mut dyn FnMut(&str) -> Result<String, String>,
) -> Result<Mount, BadMount> {
    from(text)?;
    let mut given = Given::default();
    for field in fields(text)? {
        given.field(&field, expand)?;
    }
    given.finish()
}

#[derive(Default)]
struct Given {
    mount: Mount,
    read_only: Option<bool>,
    sharing: Option<Sharing>,
    is_typed: bool,
}

impl Given {
    fn field(
        &mut self,
        field: &str,
        expand: &mut dyn FnMut(&str) -> Result<String, String>,
    ) -> Result<(), BadMount> {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.to_ascii_lowercase(), Some(expand(value)?)),
            None => (field.to_ascii_lowercase(), None),
        };
        let mount = &mut self.mount;
        match (key.as_str(), value) {
            ("readonly" | "ro", None) => self.read_only = Some(true),
            ("readwrite" | "rw", None) => self.read_only = Some(false),
            ("required", value) => {
                if !matches!(mount.kind, MountType::Secret | MountType::Ssh) {
                    return Err(self.unexpected("required"));
                }
                mount.required = value.map_or(Ok(true), |v| truth("required", &v))?;
            }
            (_, None) => {
                let message = format!("invalid field '{field}' must be a key=value pair");
                return Err(BadMount {
                    message: suggest(message, &key, KEYS),
                    expected: Some(KEYS.join(", ")),
                });
            }
            ("type", Some(v)) => {
                mount.kind = one_of(&v, &TYPES, "mount type")?;
                self.is_typed = true;
            }
            ("from", Some(v)) => mount.from = Some(v).filter(|v| !v.is_empty()),
            ("source" | "src", Some(v)) => mount.source = v,
            ("target" | "dst" | "destination", Some(v)) => mount.target = v,
            (key @ ("readonly" | "ro"), Some(v)) => self.read_only = Some(truth(key, &v)?),
            (key @ ("readwrite" | "rw"), Some(v)) => self.read_only = Some(!truth(key, &v)?),
            ("size", Some(v)) => {
                if mount.kind != MountType::Tmpfs {
                    return Err(self.unexpected("size"));
                }
                mount.size_bytes = size_bytes(&v).ok_or_else(|| format!("invalid value for size: {v}"))?;
            }
            ("id", Some(v)) => mount.id = v,
            ("sharing", Some(v)) => self.sharing = Some(one_of(&v, &SHARINGS, "sharing value")?),
            ("mode", Some(v)) => {
                mount.mode = Some(number(&v, 8).ok_or_else(|| format!("invalid value {v} for mode"))?)
            }
            ("uid", Some(v)) => {
                mount.uid = Some(number(&v, 10).ok_or_else(|| format!("invalid value {v} for uid"))?)
            }
            ("gid", Some(v)) => {
                mount.gid = Some(number(&v, 10).ok_or_else(|| format!("invalid value {v} for gid"))?)
            }
            ("env", Some(v)) => mount.env = Some(v),
            (key, Some(_)) => {
                let message = suggest(format!("unexpected key '{key}' in '{field}'"), key, KEYS);
                return Err(BadMount { message, expected: Some(KEYS.join(", ")) });
            }
        }
        Ok(())
    }

    fn unexpected(&self, key: &str) -> BadMount {
        let kind = name(self.mount.kind);
        // `required,type=secret` reads as a bind mount up to here, as upstream.
        let hint = (!self.is_typed).then(|| format!("type= ahead of {key}"));
        BadMount { message: format!("unexpected key '{key}' for mount type '{kind}'"), expected: hint }
    }

    fn finish(mut self) -> Result<Mount, BadMount> {
        let kind = self.mount.kind;
        let mount = &mut self.mount;
        if matches!(kind, MountType::Bind | MountType::Tmpfs) {
            for (key, given) in [("mode", mount.mode), ("uid", mount.uid), ("gid", mount.gid)] {
                if given.is_some() {
                    return Err(format!("{key} not allowed for {:?} type mounts", name(kind)).into());
                }
            }
        }
        if kind == MountType::Secret {
            if mount.from.is_some() {
                return Err("secret mount should not have a from".to_string().into());
            }
            if self.sharing.is_some() {
                return Err("secret mount should not define sharing".to_string().into());
            }
            if mount.source.is_empty() && mount.target.is_empty() && mount.id.is_empty() {
                return Err("invalid secret mount. one of source, target required".to_string().into());
            }
            if !mount.source.is_empty() && !mount.id.is_empty() {
                return Err("both source and id can't be set".to_string().into());
            }
        }
        if self.sharing.is_some() && kind != MountType::Cache {
            return Err(format!("invalid cache sharing set for {} mount", name(kind)).into());
        }
        if kind == MountType::Ssh && !mount.source.is_empty() {
            return Err("ssh does not support source".to_string().into());
        }
        mount.sharing = self.sharing.unwrap_or_default();
        let writable = matches!(kind, MountType::Cache | MountType::Tmpfs);
        mount.read_only = self.read_only.unwrap_or(!writable);
        mount.fill_names();
        Ok(self.mount)
    }
}

impl Mount {
    fn fill_names(&mut self) {
        let base = |path: &str| path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_string();
        match self.kind {
            MountType::Cache if self.id.is_empty() => self.id = clean(&self.target),
            MountType::Ssh if self.id.is_empty() => self.id = "default".to_string(),
            MountType::Secret => {
                let source = std::mem::take(&mut self.source);
                if !source.is_empty() {
                    self.id = source;
                } else if self.id.is_empty() {
                    self.id = base(&self.target);
                }
                if self.env.as_deref() == Some("") {
                    self.env = Some(self.id.clone());
                }
                if self.env.is_none() && self.target.is_empty() {
                    self.target = format!("/run/secrets/{}", base(&self.id));
                }
            }
            _ => {}
        }
    }
}

fn name(kind: MountType) -> &'static str {
    TYPES.iter().find(|(_, k)| *k == kind).map_or("bind", |(name, _)| *name)
}

fn one_of<T: Copy>(value: &str, options: &[(&'static str, T)], what: &str) -> Result<T, BadMount> {
    let found = options.iter().find(|(name, _)| value.eq_ignore_ascii_case(name));
    found.map(|(_, option)| *option).ok_or_else(|| {
        let names: Vec<&str> = options.iter().map(|(name, _)| *name).collect();
        let message = suggest(format!("unsupported {what} {value:?}"), value, names.iter().copied());
        BadMount { message, expected: Some(names.join(", ")) }
    })
}

/// As Go's `strconv.ParseBool`.
fn truth(key: &str, value: &str) -> Result<bool, BadMount> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => {
            let message = format!("invalid value for {key}: {value}");
            Err(BadMount { message, expected: Some("true or false".into()) })
        }
    }
}

fn number(value: &str, radix: u32) -> Option<u32> {
    value.bytes().all(|b| b.is_ascii_digit()).then(|| u32::from_str_radix(value, radix).ok()).flatten()
}

/// `512m`, `1.5GiB`: powers of 1024.
fn size_bytes(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().ok()?;
    let unit = text[digits..].strip_prefix(' ').unwrap_or(&text[digits..]).to_ascii_lowercase();
    let power = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" if !unit.starts_with('i') => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return None,
    };
    let bytes = number * 1024f64.powi(power);
    (bytes < u64::MAX as f64).then_some(bytes as u64)
}

/// The fields of one line of CSV.
fn fields(text: &str) -> Result<Vec<String>, BadMount> {
    let bad = |what: &str| BadMount::from(format!("failed to parse csv mounts: {what}"));
    let mut fields = vec![String::new()];
    let mut chars = text.chars().peekable();
    let (mut quoted, mut closed) = (false, false);
    while let Some(c) = chars.next() {
        let field = fields.last_mut().ok_or_else(|| bad("no field"))?;
        match c {
            '"' if quoted && chars.next_if_eq(&'"').is_some() => field.push('"'),
            '"' if quoted => (quoted, closed) = (false, true),
            c if quoted => field.push(c),
            ',' => {
                fields.push(String::new());
                closed = false;
            }
            '"' if field.is_empty() && !closed => quoted = true,
            '"' => return Err(bad("bare \" in non-quoted field")),
            _ if closed => return Err(bad("extraneous or missing \" in quoted field")),
            c => field.push(c),
        }
    }
    if quoted {
        return Err(bad("extraneous or missing \" in quoted field"));
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(text: &str) -> Result<Mount, String> {
        parse(text, &mut |value| Ok(value.to_string())).map_err(|bad| bad.message)
    }

    #[test]
    fn mounts_and_their_defaults() {
        let with = |kind, target: &str| Mount { kind, target: target.into(), ..Mount::default() };
        for (text, wanted) in [
            ("target=/a", Mount { read_only: true, ..with(MountType::Bind, "/a") }),
            ("dst=.,rw", with(MountType::Bind, ".")),
            (
                "type=bind,from=build,src=/x,dst=/a,ro=false",
                Mount { from: Some("build".into()), source: "/x".into(), ..with(MountType::Bind, "/a") },
            ),
            (
                "type=cache,target=/root/.cache/",
                Mount { id: "/root/.cache".into(), ..with(MountType::Cache, "/root/.cache/") },
            ),
            (
                "type=CACHE,id=go,target=/g,sharing=Locked,mode=0755,uid=1000,gid=50,ro",
                Mount {
                    id: "go".into(),
                    sharing: Sharing::Locked,
                    mode: Some(0o755),
                    uid: Some(1000),
                    gid: Some(50),
                    read_only: true,
                    ..with(MountType::Cache, "/g")
                },
            ),
            ("type=tmpfs,target=/t,size=64m", Mount { size_bytes: 64 << 20, ..with(MountType::Tmpfs, "/t") }),
            (
                "type=secret,id=aws,required",
                Mount {
                    id: "aws".into(),
                    required: true,
                    read_only: true,
                    ..with(MountType::Secret, "/run/secrets/aws")
                },
            ),
            (
                "type=secret,target=/root/.netrc,mode=0444",
                Mount {
                    id: ".netrc".into(),
                    mode: Some(0o444),
                    read_only: true,
                    ..with(MountType::Secret, "/root/.netrc")
                },
            ),
            (
                "type=secret,source=tok,env=",
                Mount {
                    id: "tok".into(),
                    env: Some("tok".into()),
                    read_only: true,
                    ..with(MountType::Secret, "")
                },
            ),
            ("type=ssh", Mount { id: "default".into(), read_only: true, ..with(MountType::Ssh, "") }),
            ("\"target=/a,b\",rw", with(MountType::Bind, "/a,b")),
        ] {
            assert_eq!(mount(text).unwrap(), wanted, "{text}");
        }
    }

    #[test]
    fn wrong_mounts() {
        for (text, wanted) in [
            ("type=cash,target=/a", "unsupported mount type \"cash\" (did you mean cache?)"),
            ("traget=/a", "unexpected key 'traget' in 'traget=/a' (did you mean target?)"),
            ("target", "invalid field 'target' must be a key=value pair"),
            (
                "type=cache,target=/a,sharing=lock",
                "unsupported sharing value \"lock\" (did you mean locked?)",
            ),
            ("target=/a,ro=maybe", "invalid value for ro: maybe"),
            ("target=/a,size=1k", "unexpected key 'size' for mount type 'bind'"),
            ("required,type=secret,id=a", "unexpected key 'required' for mount type 'bind'"),
            ("type=tmpfs,target=/a,size=1x", "invalid value for size: 1x"),
            ("target=/a,mode=0755", "mode not allowed for \"bind\" type mounts"),
            ("type=cache,target=/a,mode=9", "invalid value 9 for mode"),
            ("type=cache,target=/a,uid=-1", "invalid value -1 for uid"),
            ("type=secret", "invalid secret mount. one of source, target required"),
            ("type=secret,id=a,source=b", "both source and id can't be set"),
            ("type=secret,id=a,from=b", "secret mount should not have a from"),
            ("type=ssh,source=a", "ssh does not support source"),
            ("target=/a,sharing=locked", "invalid cache sharing set for bind mount"),
            ("from=$X,target=/a", "'from' doesn't support variable expansion, define alias stage instead"),
            ("target=a\"b", "failed to parse csv mounts: bare \" in non-quoted field"),
            ("\"target=a", "failed to parse csv mounts: extraneous or missing \" in quoted field"),
            ("", "invalid field '' must be a key=value pair"),
        ] {
            assert_eq!(mount(text).unwrap_err(), wanted, "{text}");
        }
    }
}
