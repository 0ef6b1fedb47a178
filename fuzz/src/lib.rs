//! What each fuzz target does with foreign bytes, and what must hold whatever they are.
//!
//! None may panic, overflow the stack or take memory without bound. Beyond that: what was read once reads the same when
//! written and read again. `make fuzz` runs every target for a while; the tests below run them over seeds, so that
//! they keep working without cargo-fuzz.
use sampan_schema::types::{Type, by_name};
use sampan_schema::{apply as server_side, conform, decode, patch, proto};
use serde_json::Value;

/// Kinds that between them have every shape: maps, sets, unions, quantities, raw extensions.
const TYPES: &[&str] = &[
    "io.k8s.api.core.v1.Pod",
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.apps.v1.Deployment",
    "io.k8s.api.core.v1.Service",
];

/// The first byte chooses the type.
fn typed(data: &[u8]) -> Option<(&'static Type, &[u8])> {
    let (first, rest) = data.split_first()?;
    let at = usize::from(*first) % TYPES.len();
    let found = by_name(TYPES[at]).or_else(|| {
        let kind = TYPES[at].rsplit('.').next()?;
        sampan_schema::types::all().find(|ty| ty.short_name() == kind)
    });
    Some((found?, rest))
}

/// A document of two parts, divided by a NUL.
fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    let at = data.iter().position(|b| *b == 0).unwrap_or(data.len());
    (&data[..at], data.get(at + 1..).unwrap_or_default())
}

fn writes_again(ty: &Type, mut value: Value) {
    if conform::conform(ty, &mut value).is_err() {
        return;
    }
    // what conforms stays as it is
    let mut again = value.clone();
    assert!(conform::conform(ty, &mut again).is_ok());
    assert_eq!(value, again);
    if let Ok(bytes) = proto::encode(ty, &value) {
        let _ = proto::envelope(&bytes);
        let _ = proto::decode(&bytes, None);
    }
}

pub fn decode_json(data: &[u8]) {
    let Some((ty, data)) = typed(data) else { return };
    let _ = decode::json(data, None);
    if let Ok(decoded) = decode::json(data, Some(ty)) {
        let _ = decoded.strict_message();
        writes_again(ty, decoded.value);
    }
}

pub fn decode_yaml(data: &[u8]) {
    let Some((ty, data)) = typed(data) else { return };
    if let Ok(decoded) = decode::yaml(data, Some(ty)) {
        writes_again(ty, decoded.value);
    }
}

pub fn decode_protobuf(data: &[u8]) {
    let _ = proto::decode(data, None);
    let _ = proto::decode(data, Some(("v1", "Pod")));
    let Some((ty, data)) = typed(data) else { return };
    if let Ok(value) = proto::decode_message(ty, data) {
        let mut first = Vec::new();
        if proto::encode_message(ty, &value, &mut first).is_ok() {
            assert_eq!(proto::decode_message(ty, &first).ok().as_ref(), Some(&value));
        }
    }
}

/// FieldsV1.
pub fn fields(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
    let Ok(set) = server_side::codec::decode(&value) else { return };
    let written = server_side::codec::encode(&set);
    let again = server_side::codec::decode(&written);
    assert_eq!(again.map(|s| server_side::codec::encode(&s)).ok(), Some(written));
    let paths = set.paths();
    paths.iter().for_each(|path| drop(server_side::show_path(path)));
    paths.iter().for_each(|path| assert!(set.contains(path)));
}

pub fn patches(data: &[u8]) {
    let Some((ty, data)) = typed(data) else { return };
    let (document, change) = halves(data);
    let Ok(document) = serde_json::from_slice::<Value>(document) else { return };
    let Ok(change) = patch::parse(change) else { return };
    let _ = patch::json::unknown_fields(&change);
    let _ = patch::json(document.clone(), &change);
    let _ = patch::strategic(ty, document.clone(), change.clone());
    let _ = patch::merge(document, change);
}

pub fn apply(data: &[u8]) {
    let Some((ty, data)) = typed(data) else { return };
    let (live, config) = halves(data);
    let (Ok(live), Ok(config)) = (decode::json(live, Some(ty)), decode::json(config, Some(ty))) else {
        return;
    };
    let reset = server_side::Reset::fields(["status"]);
    let writer = server_side::Writer {
        manager: "fuzz",
        subresource: "",
        api_version: "v1",
        now: jiff::Timestamp::UNIX_EPOCH,
        reset: &reset,
    };
    let _ = server_side::apply(ty, None, &config.value, false, &writer);
    let _ = server_side::apply(ty, Some(&live.value), &config.value, true, &writer);
}

pub fn quantity_and_time(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    use sampan_schema::quantity::{canonical, parse};
    if let Ok(once) = canonical(text) {
        // as upstream's: a binary quantity that is no multiple of 1024 is written without a suffix, reads as a decimal one,
        // and may get one of those
        let Ok(twice) = canonical(&once) else { panic!("{once} is refused") };
        assert_eq!(canonical(&twice).as_ref(), Ok(&twice));
        assert_eq!(parse(&twice).ok(), parse(&once).ok());
    }
    if let Some(written) = sampan_schema::time::parse(text).and_then(sampan_schema::time::format_micros) {
        let again = sampan_schema::time::parse(&written).and_then(sampan_schema::time::format_micros);
        assert_eq!(again, Some(written));
    }
}

pub fn image_reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(reference) = sampan_image::Reference::parse(text) {
        let shown = reference.to_string();
        let again = sampan_image::Reference::parse(&shown).map(|r| r.to_string());
        assert_eq!(again.ok(), Some(shown));
    }
}

pub fn image_manifest(data: &[u8]) {
    let (kind, body) = halves(data);
    let _ = sampan_image::manifest::parse(&String::from_utf8_lossy(kind), body);
    let _ = sampan_image::manifest::ImageConfig::parse(body);
}

pub fn image_archive(data: &[u8]) {
    let Ok(file) = tempfile::NamedTempFile::new() else { return };
    if std::fs::write(file.path(), data).is_err() {
        return;
    }
    if let Ok(mut archive) = sampan_image::archive::Archive::open(file.path()) {
        let _ = archive.images();
    }
}

/// registries.yaml.
pub fn registries(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(registries) = sampan_image::Registries::parse(text) else { return };
    if let Ok(reference) = sampan_image::Reference::parse("example.com/a/b:1") {
        let _ = registries.endpoints(&reference);
    }
    let _ = registries.auth("example.com");
}

/// Tokens that nodes join with, and bootstrap tokens.
pub fn tokens(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(token) = sampan_pki::JoinToken::parse(text) {
        let shown = token.to_string();
        assert_eq!(sampan_pki::JoinToken::parse(&shown).map(|t| t.to_string()).ok(), Some(shown));
        let _ = token.trusted(text);
    }
    let _ = sampan_pki::BootstrapToken::parse(text);
    let _ = sampan_pki::service_account_key::unverified_claims(text);
    let _ = sampan_pki::certificate::certificates(text);
}

/// A Dockerfile, ahead of a NUL build arguments.
pub fn dockerfile(data: &[u8]) {
    use sampan_build::dockerfile::{Dockerfile, Options, Source};
    let (args, text) = match data.contains(&0) {
        true => halves(data),
        false => (&b""[..], data),
    };
    let file = match Dockerfile::parse("Dockerfile", text) {
        Ok(file) => file,
        Err(error) => return drop(error.to_string()),
    };
    let args = String::from_utf8_lossy(args);
    let platform = |text: &str| sampan_image::platform::parse(text);
    let (Some(platform), Some(build_platform)) = (platform("linux/arm/v7"), platform("linux/amd64")) else {
        return;
    };
    let build_args = args.lines().filter_map(|line| line.split_once('='));
    let build_args = build_args.map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let mut plan = match file.plan(&Options { build_args, target: None, platform, build_platform }) {
        Ok(plan) => plan,
        Err(error) => return drop(error.to_string()),
    };
    let triggers: Vec<String> = args.lines().filter(|line| !line.contains('=')).map(str::to_string).collect();
    let _ = plan.onbuild(plan.target, &triggers);
    let mut scopes: std::collections::BTreeMap<usize, _> = Default::default();
    for index in &plan.order {
        let stage = &plan.stages[*index];
        assert!(stage.needs.iter().all(|need| need < index && plan.order.contains(need)));
        let mut scope = match &stage.base {
            Source::Stage(base) => scopes.get(base).cloned().unwrap_or_else(|| plan.scope(&[])),
            _ => plan.scope(&["PATH=/bin".to_string()]),
        };
        for instruction in &stage.instructions {
            match scope.evaluate(instruction) {
                Ok(evaluated) => drop(plan.error(&evaluated, "x").to_string()),
                Err(error) => return drop(error.to_string()),
            }
        }
        let _ = (scope.build_args(), scope.proxy_env(), scope.take_warnings());
        scopes.insert(*index, scope);
    }
}

/// .dockerignore, behind a NUL a path.
pub fn dockerignore(data: &[u8]) {
    let (patterns, path) = halves(data);
    let (patterns, path) = (String::from_utf8_lossy(patterns), String::from_utf8_lossy(path));
    let Ok(ignore) = sampan_build::dockerignore::parse(&patterns) else { return };
    // where a file is wanted, its folders are walked
    if !ignore.excluded(&path) && !path.contains("..") {
        let folders = path.match_indices('/').map(|(at, _)| &path[..at]);
        folders.for_each(|folder| assert!(ignore.descend(folder), "{folder:?} of {path:?}"));
    }
}

/// known_hosts.
pub fn known_hosts(data: &[u8]) {
    use sampan_fleet::known_hosts::{KnownHosts, Verdict};
    let Ok(file) = tempfile::NamedTempFile::new() else { return };
    if std::fs::write(file.path(), data).is_err() {
        return;
    }
    let path = file.path().to_path_buf();
    let Ok(known) = KnownHosts::load(std::slice::from_ref(&path)) else { return };
    for (host, port) in [("example.com", 22), ("192.0.2.1", 2222)] {
        let _ = known.kinds(host, port);
        let before = known.check(host, port, "ssh-ed25519", "AAAA");
        // a host that nothing is known of is known once it is remembered
        if before == (Verdict::Unknown { others: false })
            && sampan_fleet::known_hosts::remember(&path, host, port, "ssh-ed25519", "AAAA").is_ok()
        {
            let again = KnownHosts::load(std::slice::from_ref(&path))
                .map(|k| k.check(host, port, "ssh-ed25519", "AAAA"));
            assert_eq!(again.ok(), Some(Verdict::Known));
        }
    }
}

/// The list of hosts that `plan` and `apply` take, and command lines in it.
pub fn hosts(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(words) = sampan_fleet::words::split(text) {
        assert_eq!(sampan_fleet::words::split(&sampan_fleet::words::quote_all(&words)), Ok(words));
    }
    if let Ok(plan) = sampan_fleet::Plan::parse("hosts", text) {
        let (servers, agents) = plan.roles(1);
        assert_eq!(servers.len() + agents.len(), plan.hosts.len());
    }
}

/// A layer, whose programs are looked at.
pub fn image_program(data: &[u8]) {
    let run = sampan_image::manifest::RunConfig { cmd: Some(vec!["app".to_string()]), ..Default::default() };
    let (top, below) = data.split_at(data.len() / 2);
    let _ = sampan_manifests::inspect::program_in(&run, &[data]);
    let _ = sampan_manifests::inspect::program_in(&run, &[top, below]);
}

/// Documents as `manifest inspect` lays them out.
pub fn image_json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(value) = serde_json::from_str::<Value>(text) else { return };
    for shown in
        [sampan_manifests::json::indent(text, "\t"), sampan_manifests::json::marshal_indent(text, "  ")]
    {
        assert_eq!(serde_json::from_str::<Value>(&shown).ok().as_ref(), Some(&value));
    }
}

#[cfg(test)]
mod tests {
    type Target = fn(&[u8]);
    const TARGETS: &[Target] = &[
        super::decode_json,
        super::decode_yaml,
        super::decode_protobuf,
        super::fields,
        super::patches,
        super::apply,
        super::quantity_and_time,
        super::image_reference,
        super::image_manifest,
        super::image_archive,
        super::registries,
        super::tokens,
        super::dockerfile,
        super::dockerignore,
        super::known_hosts,
        super::hosts,
        super::image_program,
        super::image_json,
    ];
    const SEEDS: &[&[u8]] = &[
        b"",
        b"\0{\"metadata\":{\"name\":\"a\"},\"spec\":{\"containers\":[{\"name\":\"c\",\"image\":\"i\"}]}}",
        b"\0{\"spec\":{\"containers\":[{\"name\":\"c\"}]}}\0{\"spec\":{\"containers\":[{\"name\":\"c\",\"image\":\"i\"}]}}",
        b"\x01metadata: {name: a}\ndata: {k: v}\n",
        b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12\x05\x0a\x03\x0a\x01x",
        b"{\"f:spec\":{\"f:containers\":{\"k:{\\\"name\\\":\\\"c\\\"}\":{\".\":{},\"f:image\":{}}},\"f:x\":{\"v:1\":{}}}}",
        b"\x02{\"spec\":{}}\0[{\"op\":\"add\",\"path\":\"/spec/a\",\"value\":1}]",
        b"100.5Mi",
        b"2026-01-02T03:04:05.678901Z",
        b"registry.example.com:5000/a/b:tag@sha256:0000000000000000000000000000000000000000000000000000000000000000",
        b"application/vnd.oci.image.index.v1+json\0{\"schemaVersion\":2,\"manifests\":[]}",
        b"mirrors:\n  docker.io:\n    endpoint: ['http://mirror:5000']\n    rewrite: {'^a': 'b'}\n",
        b"K100000000000000000000000000000000000000000000000000000000000000000::server:secret",
        b"abcdef.0123456789abcdef",
        b"A=1\nRUN x\0ARG A\nFROM a$A AS b\nRUN --mount=type=cache,target=/c <<E\n$A\nE\nFROM b\nCOPY --from=0 ${A%1*} /x\nENV C=${A//1/$A} D='e'\n",
        b"# escape=`\nFROM a\nONBUILD COPY <<\"x\" /y\nz\nx\nHEALTHCHECK --timeout=1m CMD [\"x\"]\nEXPOSE 1-3/udp `\n 9\n",
        b"**/a*\n!b/[^c-e]?\n#x\n/d\n\0b/fg/h",
        b"|1|AAAA|AAAA ssh-ed25519 AAAA\n@revoked *.example.com,!a ssh-rsa BBBB\n",
        b"- {ip: 192.0.2.1, role: server, extra-args: \"--x 'a b'\"}\n- hostname: b\n",
    ];

    #[test]
    fn every_target_takes_every_seed_and_what_is_left_of_it() {
        for seed in SEEDS {
            for target in TARGETS {
                (0..=seed.len()).for_each(|end| target(&seed[..end]));
                for at in 0..seed.len() {
                    for flip in [1, 0x20, 0x80] {
                        let mut changed = seed.to_vec();
                        changed[at] ^= flip;
                        target(&changed);
                    }
                }
            }
        }
    }
}
