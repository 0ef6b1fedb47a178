//! Our registry with the clients that people have: skopeo, buildah, podman, docker's own commands and containerd's `ctr`.
//!
//! Upstream counterpart: none; what each must be able to do is in its own manual. Those that this machine lacks are named
//! and passed over, all but skopeo. Each comes to the registry in all four ways that there are: plain HTTP, TLS with an
//! authority of one's own, a password over TLS, and tokens of an authorization server.
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use sampan_pki::Authority;
use sampan_pki::service_account_key::ServiceAccountKey;
use sampan_tests::peer::{AMD64, ARM64, HTPASSWD, Home, Peer, bad_line};
use sampan_tests::{Space, Suite, cases, has, seconds, wait_for};
use serde_json::{Value, json};
use tempfile::TempDir;

fn main() -> ExitCode {
    Suite::new("peers", "amd64")
        .without_nodes()
        .together(cases![
            skopeo,
            skopeo_syncs,
            buildah,
            podman,
            docker_manifest,
            containerd,
            containerd_resumes
        ])
        .run()
}

/// How a registry is come to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Access {
    Plain,
    Tls,
    /// Over TLS.
    Password,
    Token,
}

const EVERY_ACCESS: [Access; 4] = [Access::Plain, Access::Tls, Access::Password, Access::Token];
/// user:secret
const BASIC: &str = "dXNlcjpzZWNyZXQ=";

/// Our registry, served in one of the ways.
struct Site {
    peer: Peer,
    access: Access,
    /// `ca.crt` and what the registry itself reads.
    folder: TempDir,
}

impl Site {
    fn open(space: &Space, access: Access) -> Result<Site> {
        let folder = tempfile::tempdir()?;
        let at = |name: &str| folder.path().join(name).display().to_string();
        let mut args = Vec::new();
        if matches!(access, Access::Tls | Access::Password) {
            let authority = Authority::load_or_create(&folder.path().join("authority"))?;
            std::fs::write(at("ca.crt"), authority.certificate_pem())?;
            authority.server("registry", &["127.0.0.1".to_string()])?.save(&folder.path().join("own/tls"))?;
            args.push(format!("--http-tls-certificate={}", at("own/tls.crt")));
            args.push(format!("--http-tls-key={}", at("own/tls.key")));
        }
        if access == Access::Password {
            std::fs::write(at("htpasswd"), format!("{HTPASSWD}\n"))?;
            args.push(format!("--auth-htpasswd-path={}", at("htpasswd")));
        }
        if access == Access::Token {
            let key = ServiceAccountKey::load_or_create(&folder.path().join("token.key"))?;
            std::fs::write(at("jwks"), key.jwks().to_string())?;
            args.extend([
                format!("--auth-token-realm={}", token_server(key)?),
                "--auth-token-service=registry".to_string(),
                "--auth-token-issuer=tests".to_string(),
                format!("--auth-token-jwks={}", at("jwks")),
            ]);
        }
        Ok(Site { peer: Peer::ours(space, &args)?, access, folder })
    }

    fn name(&self, path: &str) -> String {
        format!("{}/{path}", self.peer.host)
    }

    fn url(&self, path: &str) -> String {
        format!("docker://{}", self.name(path))
    }

    fn is_tls(&self) -> bool {
        matches!(self.access, Access::Tls | Access::Password)
    }

    fn has_password(&self) -> bool {
        matches!(self.access, Access::Password | Access::Token)
    }

    fn authority(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// What skopeo, buildah and podman must be told to come in; `side` is "", "src-" or "dest-".
    fn flags(&self, side: &str) -> Vec<String> {
        let mut flags = match self.is_tls() {
            true => vec![format!("--{side}cert-dir={}", self.folder.path().display())],
            false => vec![format!("--{side}tls-verify=false")],
        };
        flags.extend(self.has_password().then(|| format!("--{side}creds=user:secret")));
        flags
    }
}

/// An authorization server for `user` with the password `secret`, as distribution's token specification has it; its URL.
/// It ends with the process.
fn token_server(key: ServiceAccountKey) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/token", listener.local_addr()?);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (status, body) = match read_request(&mut stream) {
                // as servers answer that know the specification's older half only
                Some(request) if !request.starts_with("GET ") => ("405 Method Not Allowed", String::new()),
                Some(request) if !request.contains(&format!("Basic {BASIC}\r\n")) => {
                    ("401 Unauthorized", String::new())
                }
                Some(request) => match key.sign(&claims(&request)) {
                    Ok(token) => ("200 OK", json!({"token": token, "expires_in": 300}).to_string()),
                    Err(error) => ("500 Internal Server Error", error.to_string()),
                },
                None => continue,
            };
            let length = body.len();
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
            let _ = stream.write_all((head + &body).as_bytes());
        }
    });
    Ok(url)
}

fn read_request(stream: &mut TcpStream) -> Option<String> {
    let (mut bytes, mut buffer) = (Vec::<u8>::new(), [0; 4096]);
    stream.set_read_timeout(Some(seconds(5))).ok()?;
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return Some(text.into_owned());
            }
        }
        match stream.read(&mut buffer) {
            Ok(n @ 1..) => bytes.extend_from_slice(&buffer[..n]),
            _ => return None,
        }
    }
}

/// What the token allows: whatever is asked for.
fn claims(request: &str) -> Value {
    let target = request.split(' ').nth(1).unwrap_or_default();
    let target = target.replace("%3A", ":").replace("%2F", "/").replace("%2C", ",").replace('+', " ");
    let scopes = target.split(['?', '&']).filter_map(|p| p.strip_prefix("scope=")).flat_map(|s| s.split(' '));
    let access: Vec<Value> = scopes
        .filter_map(|scope| {
            let mut parts = scope.split(':');
            let (kind, name, actions) = (parts.next()?, parts.next()?, parts.next()?);
            Some(json!({"type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>()}))
        })
        .collect();
    let expires = sampan_world::clock::now().as_second() + 300;
    json!({"iss": "tests", "aud": "registry", "sub": "user", "exp": expires, "access": access})
}

/// Whether this machine has the program; says so where it hasn't.
fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    if !found {
        println!("peers: {program} is not on this machine, and passed over");
    }
    found
}

/// Runs a line of words and flags.
fn call(home: &Home, program: &str, words: &[&str], flags: &[String], names: &[&str]) -> Result<String> {
    let flags = flags.iter().map(String::as_str);
    let args: Vec<&str> = words.iter().copied().chain(flags).chain(names.iter().copied()).collect();
    home.command(program, &args)?.ok()
}

/// Two images, and a list of both, pushed by ourselves: `x:amd64`, `x:arm64` and `x:list`. Another payload makes others.
fn filled(space: &Space, home: &Home, payload: &str) -> Result<Site> {
    let site = Site::open(space, Access::Plain)?;
    let mut members = Vec::new();
    for (arch, machine) in [("amd64", AMD64), ("arm64", ARM64)] {
        let name = site.name(&format!("x:{arch}"));
        home.push(&name, &home.archive(arch, machine, payload.as_bytes())?, arch, "oci")?;
        members.push(name);
    }
    home.sampan(&["manifest", "push", &site.name("x:list"), "--from", &members.join(",")])?.ok()?;
    Ok(site)
}

fn strings(value: &Value) -> BTreeSet<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn skopeo(s: &Space) -> Result<()> {
    let home = Home::new(s)?;
    let (first, archive) = (filled(s, &home, "")?, home.archive("amd64", AMD64, b"")?);
    for access in EVERY_ACCESS {
        let site = Site::open(s, access)?;
        let sk = |words: &[&str], flags: &[String], names: &[&str]| {
            let words: Vec<&str> = ["--insecure-policy"].iter().chain(words).copied().collect();
            call(&home, "skopeo", &words, flags, names).with_context(|| format!("{access:?}"))
        };
        let from = format!("oci-archive:{}", archive.display());
        for format in ["oci", "v2s2"] {
            sk(
                &["copy", "-q", "--format", format],
                &site.flags("dest-"),
                &[&from, &site.url(&format!("a/b:{format}"))],
            )?;
        }
        let all = [first.flags("src-"), site.flags("dest-")].concat();
        sk(&["copy", "-q", "--all"], &all, &[&first.url("x:list"), &site.url("a/b:list")])?;
        let raw = |site: &Site, name: &str| sk(&["inspect", "--raw"], &site.flags(""), &[&site.url(name)]);
        ensure!(raw(&site, "a/b:list")? == raw(&first, "x:list")?, "{access:?}: the copy differs");
        has(&sk(&["--override-arch=arm64", "inspect"], &site.flags(""), &[&site.url("a/b:list")])?, "arm64")?;
        let folder = home.path(&format!("{access:?}"));
        let back = format!("oci:{}:list", folder.display());
        sk(&["copy", "-q", "--all"], &site.flags("src-"), &[&site.url("a/b:list"), &back])?;
        let tags = || -> Result<Value> {
            Ok(serde_json::from_str(&sk(&["list-tags"], &site.flags(""), &[&site.url("a/b")])?)?)
        };
        ensure!(
            strings(&tags()?["Tags"]) == BTreeSet::from(["list", "oci", "v2s2"]),
            "{access:?}: {}",
            tags()?
        );
        sk(&["delete"], &site.flags(""), &[&site.url("a/b:oci")])?;
        ensure!(strings(&tags()?["Tags"]) == BTreeSet::from(["list", "v2s2"]), "{access:?}: {}", tags()?);
        sk(&["copy", "-q", "--format", "oci"], &site.flags("dest-"), &[&from, &site.url("a/b:oci")])?;
        raw(&site, "a/b:oci")?;
        if site.has_password() {
            let file = format!("--authfile={}", home.path("auth.json").display());
            let login =
                [&site.flags("")[..1], &[file.clone(), "-u=user".into(), "-p=secret".into()]].concat();
            call(&home, "skopeo", &["login"], &login, &[&site.peer.host])?;
            let by_file = [&site.flags("")[..1], &[file]].concat();
            sk(&["inspect"], &by_file, &[&site.url("a/b:oci")])?;
            let (reach, name) = (site.flags("").swap_remove(0), site.url("a/b:oci"));
            let args = ["--insecure-policy", "inspect", "--creds=user:wrong", reach.as_str(), name.as_str()];
            home.command("skopeo", &args)?.refused("unauthorized")?;
        }
    }
    Ok(())
}

/// Whole repositories, from registry to registry and to a folder.
fn skopeo_syncs(s: &Space) -> Result<()> {
    let home = Home::new(s)?;
    let (first, second) = (filled(s, &home, "")?, Site::open(s, Access::Password)?);
    let flags = [first.flags("src-"), second.flags("dest-")].concat();
    let words = ["--insecure-policy", "sync", "--all", "--src", "docker", "--dest", "docker"];
    call(&home, "skopeo", &words, &flags, &[&first.name("x"), &second.name("copy")])?;
    let words = ["--insecure-policy", "list-tags"];
    let tags = call(&home, "skopeo", &words, &second.flags(""), &[&second.url("copy/x")])?;
    let tags: Value = serde_json::from_str(&tags)?;
    ensure!(strings(&tags["Tags"]) == BTreeSet::from(["amd64", "arm64", "list"]), "{tags}");
    let folder = home.path("synced").display().to_string();
    let words = ["--insecure-policy", "sync", "--all", "--src", "docker", "--dest", "dir"];
    call(&home, "skopeo", &words, &second.flags("src-"), &[&second.name("copy/x"), &folder])?;
    ensure!(home.path("synced/x:list/manifest.json").exists(), "the list did not come");
    Ok(())
}

/// Flags that keep all that buildah and podman have in the home.
fn own_storage(home: &Home) -> Result<Vec<String>> {
    let policy = home.path("policy.json");
    std::fs::write(&policy, json!({"default": [{"type": "insecureAcceptAnything"}]}).to_string())?;
    std::fs::create_dir_all(home.path(".config/containers"))?;
    std::fs::copy(&policy, home.path(".config/containers/policy.json"))?;
    let at = |name: &str| home.path(name).display().to_string();
    Ok(vec![
        format!("--root={}", at("storage")),
        format!("--runroot={}", at("run")),
        "--storage-driver=vfs".to_string(),
    ])
}

/// What buildah and podman do alike: pull, push, lists; images go as Docker's and as OCI's.
fn of_storage(s: &Space, home: &Home, program: &str, general: &[String]) -> Result<()> {
    let first = filled(s, home, "")?;
    let general: Vec<&str> = general.iter().map(String::as_str).collect();
    for access in EVERY_ACCESS {
        let site = Site::open(s, access)?;
        let run = |words: &[&str], flags: &[String], names: &[&str]| {
            let words = [&general[..], words].concat();
            call(home, program, &words, flags, names).with_context(|| format!("{access:?}"))
        };
        run(&["pull", "-q"], &first.flags(""), &[&first.name("x:amd64")])?;
        for format in ["oci", "v2s2"] {
            let to = site.url(&format!("a/b:{format}"));
            run(&["push", "-q", "--format", format], &site.flags(""), &[&first.name("x:amd64"), &to])?;
        }
        run(&["rmi"], &[], &[&first.name("x:amd64")])?;
        for format in ["oci", "v2s2"] {
            let name = site.name(&format!("a/b:{format}"));
            run(&["pull", "-q"], &site.flags(""), &[&name])?;
            run(&["rmi"], &[], &[&name])?;
        }
        let flags = [first.flags("src-"), site.flags("dest-")].concat();
        let copy = ["--insecure-policy", "copy", "-q", "--all"];
        call(home, "skopeo", &copy, &flags, &[&first.url("x:list"), &site.url("x:list")])?;
        let list = site.name("a/b:list");
        run(&["manifest", "create"], &[], &[&list])?;
        run(&["manifest", "add", "--all"], &site.flags(""), &[&list, &site.url("x:list")])?;
        run(&["manifest", "push", "-q", "--all"], &site.flags(""), &[&list, &site.url("a/b:list")])?;
        run(&["manifest", "rm"], &[], &[&list])?;
        let skopeo = ["--insecure-policy", "inspect", "--raw"];
        let pushed = call(home, "skopeo", &skopeo, &site.flags(""), &[&site.url("a/b:list")])?;
        let pushed: Value = serde_json::from_str(&pushed)?;
        ensure!(pushed["manifests"].as_array().is_some_and(|m| m.len() == 2), "{access:?}: {pushed}");
        run(&["pull", "-q", "--arch", "arm64"], &site.flags(""), &[&list])?;
        run(&["rmi"], &[], &[&list])?;
    }
    Ok(())
}

fn buildah(s: &Space) -> Result<()> {
    if !is_there("buildah") {
        return Ok(());
    }
    let home = Home::new(s)?;
    let general = own_storage(&home)?;
    of_storage(s, &home, "buildah", &general)
}

fn podman(s: &Space) -> Result<()> {
    if !is_there("podman") {
        return Ok(());
    }
    let home = Home::new(s)?;
    let mut general = own_storage(&home)?;
    general.extend(["--cgroup-manager=cgroupfs".to_string(), "--events-backend=none".to_string()]);
    of_storage(s, &home, "podman", &general)
}

/// docker's `manifest` commands against us as they are against docker-registry. They take registries on the loopback to
/// speak plain HTTP.
fn docker_manifest(s: &Space) -> Result<()> {
    if !is_there("docker") {
        return Ok(());
    }
    for access in [Access::Plain, Access::Token] {
        let (home, site) = (Home::new(s)?, Site::open(s, access)?);
        for (arch, machine) in [("amd64", AMD64), ("arm64", ARM64)] {
            let from = format!("oci-archive:{}", home.archive(arch, machine, b"")?.display());
            let words = ["--insecure-policy", "--override-arch", arch, "copy", "-q", "--format", "v2s2"];
            call(&home, "skopeo", &words, &site.flags("dest-"), &[&from, &site.url(&format!("x:{arch}"))])?;
        }
        std::fs::create_dir(home.path(".docker"))?;
        let auths = match site.has_password() {
            true => json!({&site.peer.host: {"auth": BASIC}}),
            false => json!({}),
        };
        std::fs::write(home.path(".docker/config.json"), json!({"auths": auths}).to_string())?;
        let docker = |line: &str| {
            let line = line.replace("R/", &format!("{}/", site.peer.host));
            let words: Vec<&str> = line.split(' ').collect();
            call(&home, "docker", &["manifest"], &[], &words).with_context(|| format!("{access:?}"))
        };
        docker("create --insecure R/x:list R/x:amd64 R/x:arm64")?;
        docker("annotate R/x:list R/x:arm64 --variant v8")?;
        docker("push --insecure --purge R/x:list")?;
        let shown: Value = serde_json::from_str(&docker("inspect --insecure R/x:list")?)?;
        ensure!(shown["manifests"][1]["platform"]["variant"] == "v8", "{access:?}: {shown}");
    }
    Ok(())
}

/// containerd without the parts that run anything.
struct Containerd {
    child: Child,
    socket: String,
    hosts: PathBuf,
}

impl Containerd {
    fn start(home: &Home) -> Result<Containerd> {
        let at = |name: &str| home.path(name).display().to_string();
        let disabled = [
            "grpc.v1.cri",
            "snapshotter.v1.aufs",
            "snapshotter.v1.btrfs",
            "snapshotter.v1.devmapper",
            "snapshotter.v1.zfs",
            "internal.v1.opt",
        ];
        let disabled: Vec<String> = disabled.iter().map(|p| format!("\"io.containerd.{p}\"")).collect();
        let config = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [{}]\n[grpc]\naddress = \"{}\"\n\
             [ttrpc]\naddress = \"{}\"\n",
            at("root"),
            at("state"),
            disabled.join(", "),
            at("sock"),
            at("ttrpc")
        );
        std::fs::write(home.path("containerd.toml"), config)?;
        let child = Command::new("containerd")
            .args(["-l", "error", "-c", at("containerd.toml").as_str()])
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(home.path("containerd.log"))?)
            .spawn()?;
        let containerd = Containerd { child, socket: at("sock"), hosts: home.path("hosts") };
        wait_for("containerd", seconds(30), || {
            let ran = home.command("ctr", &["-a", containerd.socket.as_str(), "version"])?;
            Ok(if ran.code == 0 { Ok(()) } else { Err(ran.text()) })
        })
        .with_context(|| std::fs::read_to_string(home.path("containerd.log")).unwrap_or_default())?;
        Ok(containerd)
    }

    /// `ctr` with what it must be told to come in.
    fn ctr(&self, home: &Home, words: &[&str], site: &Site, names: &[&str]) -> Result<String> {
        let hosts = format!("--hosts-dir={}", self.hosts.display());
        let mut flags = vec![hosts];
        flags.extend(site.has_password().then(|| "--user=user:secret".to_string()));
        let words = [&["-a", self.socket.as_str()][..], words].concat();
        call(home, "ctr", &words, &flags, names).with_context(|| format!("{:?}", site.access))
    }

    /// hosts.toml: `name` is found at that site.
    fn host(&self, name: &str, site: &Site) -> Result<()> {
        self.host_at(name, &site.peer.host, site)
    }

    fn host_at(&self, name: &str, at: &str, site: &Site) -> Result<()> {
        let folder = self.hosts.join(name);
        std::fs::create_dir_all(&folder)?;
        let scheme = if site.is_tls() { "https" } else { "http" };
        let server = if name == at { scheme } else { "https" };
        let mut text = format!("server = \"{server}://{name}\"\n[host.\"{scheme}://{at}\"]\n");
        if site.is_tls() {
            text.push_str(&format!("ca = \"{}\"\n", site.authority().display()));
        }
        Ok(std::fs::write(folder.join("hosts.toml"), text)?)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pulls and pushes of whole lists, and pulls through a mirror, which asks with `?ns=`.
fn containerd(s: &Space) -> Result<()> {
    if !is_there("containerd") || !is_there("ctr") {
        return Ok(());
    }
    let home = Home::new(s)?;
    let containerd = Containerd::start(&home)?;
    for access in EVERY_ACCESS {
        let (first, site) = (filled(s, &home, &format!("{access:?}"))?, Site::open(s, access)?);
        let flags = [first.flags("src-"), site.flags("dest-")].concat();
        let copy = ["--insecure-policy", "copy", "-q", "--all"];
        call(&home, "skopeo", &copy, &flags, &[&first.url("x:list"), &site.url("x:list")])?;
        let elsewhere = format!("{access:?}.example").to_lowercase();
        containerd.host(&site.peer.host, &site)?;
        containerd.host(&elsewhere, &site)?;
        // its own content by now: of the mirror one platform, of the registry the other
        let [mirrored, list, pushed] =
            [format!("{elsewhere}/x:list"), site.name("x:list"), site.name("pushed:list")];
        containerd.ctr(&home, &["content", "fetch", "--platform=linux/amd64"], &site, &[&mirrored])?;
        containerd.ctr(&home, &["content", "fetch", "--all-platforms"], &site, &[&list])?;
        containerd.ctr(&home, &["images", "push"], &site, &[&pushed, &list])?;
        let raw = |name: &str| {
            call(
                &home,
                "skopeo",
                &["--insecure-policy", "inspect", "--raw"],
                &site.flags(""),
                &[&site.url(name)],
            )
        };
        ensure!(raw("pushed:list")? == raw("x:list")?, "{access:?}: what was pushed differs");
    }
    Ok(())
}

/// No connection lives long enough for the layer: only pieces put together make it whole.
fn containerd_resumes(s: &Space) -> Result<()> {
    if !is_there("containerd") || !is_there("ctr") {
        return Ok(());
    }
    let (home, site) = (Home::new(s)?, Site::open(s, Access::Plain)?);
    let containerd = Containerd::start(&home)?;
    let payload: Vec<u8> = (0..6_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    // not by skopeo, which packs it
    let archive = format!("oci-archive:{}", home.archive("amd64", AMD64, &payload)?.display());
    home.sampan(&["image", "copy", &archive, &site.name("x:1")])?.ok()?;
    let (line, broken) = bad_line(&site.peer.host, 2_500_000, usize::MAX)?;
    containerd.host_at(&line, &line, &site)?;
    let fetch = ["content", "fetch", "--platform=linux/amd64"];
    containerd.ctr(&home, &fetch, &site, &[&format!("{line}/x:1")])?;
    ensure!(broken.load(Ordering::SeqCst) >= 2, "the line never broke");
    Ok(())
}
