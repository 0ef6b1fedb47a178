//! `sampan manifest` and `sampan image` against Debian's docker-registry, skopeo and docker's own `manifest` commands.
//!
//! Upstream counterpart: docker/cli's e2e/manifest.
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use sampan_tests::image::box_image;
use sampan_tests::peer::{AMD64, ARM64, HTPASSWD, Home, Peer, bad_line, docker};
use sampan_tests::{Space, Suite, cases, has, seconds, wait_for};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::new("manifests", "amd64")
        // what no container is made from must not go by itself while it is looked at
        .server_arg("--kubelet-arg=image-gc-high-threshold=100")
        .server_arg(
            "--kubelet-arg=eviction-hard=memory.available<64Mi,imagefs.available<1%,nodefs.available<1%",
        )
        .with_registry()
        .together(cases![
            same_as_docker,
            other_registry_and_repository,
            wrong_architectures_are_told,
            docker_credentials,
            broken_connections,
            copies_and_bundles,
            errors_say_what_to_do,
            images_of_a_node,
        ])
        .run()
}

/// The same commands by docker and by sampan: the same output, exit codes and pushed bytes.
fn same_as_docker(s: &Space) -> Result<()> {
    let (home, peer, docker) = (Home::new(s)?, Peer::start(None)?, docker()?);
    let r = &peer.host;
    let (amd, arm) = (home.archive("amd64", AMD64, b"")?, home.archive("arm64", ARM64, b"")?);
    for (format, tag) in [("v2s2", "docker"), ("oci", "oci")] {
        home.push(&format!("{r}/x:amd64-{tag}"), &amd, "amd64", format)?;
        home.push(&format!("{r}/x:arm64-{tag}"), &arm, "arm64", format)?;
        home.push(&format!("{r}/other/x:arm64-{tag}"), &arm, "arm64", format)?;
    }
    let script: &[&str] = &[
        "create --insecure R/x:list R/x:arm64-docker R/x:amd64-docker",
        "create --insecure R/x:list R/x:arm64-docker",
        "create --insecure --amend R/x:list R/x:arm64-docker",
        "inspect --insecure R/x:list",
        "annotate R/x:list R/x:arm64-docker --variant v8 --os-features a,b --os-features c --os-version 1",
        "inspect R/x:list R/x:arm64-docker",
        "inspect -v R/x:list R/x:arm64-docker",
        "inspect -v R/x:list",
        "annotate R/x:list R/x:arm64-docker --arch foo",
        "annotate R/x:list R/x:nope --arch amd64",
        "annotate R/x:nope R/x:arm64-docker --arch amd64",
        "push --insecure R/x:list",
        "inspect --insecure R/x:arm64-docker",
        "inspect --insecure -v R/x:arm64-oci",
        "create --insecure R/x:oci R/other/x:arm64-oci R/x:amd64-oci",
        "push --insecure -p R/x:oci",
        "inspect --insecure R/x:oci",
        "inspect --insecure --verbose R/x:oci",
        "push --insecure R/x:oci",
        "rm R/x:nope R/x:list",
        "inspect R/x:list R/x:nope",
        "inspect --insecure R/x:list",
    ];
    for line in script {
        let line = line.replace("R/", &format!("{r}/"));
        let words: Vec<&str> = ["manifest"].into_iter().chain(line.split(' ')).collect();
        let theirs = home.command(&docker, &words)?;
        let ours = home.sampan(&words)?;
        let shown = format!("{line}\ndocker: {}{}sampan: {}{}", theirs.out, theirs.err, ours.out, ours.err);
        ensure!((ours.code, &ours.out) == (theirs.code, &theirs.out), "{shown}");
        // errors: docker's sentence, and perhaps what to do
        ensure!(theirs.code == 0 || ours.err.contains(theirs.err.trim()), "{shown}");
    }
    let pending = home.sampan(&["manifest", "ls", "-q"])?.ok()?;
    ensure!(pending.is_empty(), "still pending: {pending}");
    home.sampan(&["manifest", "create", &format!("{r}/x:l"), &format!("{r}/x:amd64-oci")])?.ok()?;
    let shown = home.sampan(&["manifest", "ls"])?.ok()?;
    has(&shown, "/x:l")?;
    has(&shown, "linux/amd64")?;
    home.sampan(&["manifest", "rm", &format!("{r}/x:l")])?.ok().map(drop)
}

/// Members from another registry and another repository are brought along; the list is pushed in one step.
fn other_registry_and_repository(s: &Space) -> Result<()> {
    let (home, one, two) = (Home::new(s)?, Peer::start(None)?, Peer::start(None)?);
    let (amd, arm) = (home.archive("amd64", AMD64, b"")?, home.archive("arm64", ARM64, b"")?);
    let (first, second) = (format!("{}/a/amd:1", one.host), format!("{}/b/arm:1", two.host));
    home.push(&first, &amd, "amd64", "oci")?;
    home.push(&second, &arm, "arm64", "oci")?;
    let target = format!("{}/c/both:1", one.host);
    let from = format!("--from={first},{second}");
    let ran = home.sampan(&["manifest", "push", &target, &from])?;
    has(&ran.err, "mounted")?;
    has(&ran.err, "copied")?;
    ensure!(ran.err.lines().all(|l| !l.contains('\x1b')), "bars though nobody looks: {}", ran.err);
    let pushed = ran.ok()?;
    let list = home.raw(&target)?;
    ensure!(list["mediaType"] == "application/vnd.oci.image.index.v1+json", "{list}");
    ensure!(list["manifests"].as_array().is_some_and(|m| m.len() == 2), "{list}");
    let top = home.skopeo(&[
        "inspect",
        "--tls-verify=false",
        "--format",
        "{{.Digest}}",
        &format!("docker://{target}"),
    ])?;
    ensure!(pushed.lines().last() == Some(top.trim()), "{pushed}{top}");
    // all of it is there: skopeo takes every platform
    let everything = format!("oci:{}", home.path("all").display());
    home.skopeo(&[
        "copy",
        "-q",
        "--all",
        "--src-tls-verify=false",
        &format!("docker://{target}"),
        &everything,
    ])?;
    // nothing stale: the member's tag moved, `create` sees what it is now
    let list = format!("{}/c/again:1", one.host);
    home.sampan(&["manifest", "create", &list, &first])?.ok()?;
    home.push(&first, &home.archive("amd64", AMD64, b"newer")?, "amd64", "oci")?;
    let before = home.sampan(&["manifest", "inspect", &list])?.ok()?;
    home.sampan(&["manifest", "create", "-a", &list, &first])?.ok()?;
    ensure!(before != home.sampan(&["manifest", "inspect", &list])?.ok()?, "an old manifest was kept");
    Ok(())
}

fn wrong_architectures_are_told(s: &Space) -> Result<()> {
    let (home, peer) = (Home::new(s)?, Peer::start(None)?);
    let (list, name) = (format!("{}/x:l", peer.host), format!("{}/x:a", peer.host));
    // labelled amd64, made of arm64 programs: the usual slip of a cross build
    home.push(&name, &home.archive("amd64", ARM64, b"")?, "amd64", "oci")?;
    let made = home.sampan(&["manifest", "create", &list, &name])?;
    has(&made.err, "warning: ")?;
    has(&made.err, "/bin/busybox in it is a program for arm64, the list will say linux/amd64")?;
    ensure!(made.code == 0, "{}", made.text());
    let right = home.sampan(&["manifest", "annotate", &list, &name, "--arch", "arm64"])?;
    has(&right.err, "its configuration says linux/amd64, the list will say linux/arm64")?;
    ensure!(!right.err.contains("program"), "{}", right.err);
    let wrong = home.sampan(&["manifest", "annotate", &list, &name, "--arch", "riscv64"])?;
    has(&wrong.err, "is a program for arm64")?;
    let quiet = home.sampan(&["manifest", "create", "--no-check", "--amend", &list, &name])?;
    ensure!(quiet.err.is_empty(), "{}", quiet.err);
    Ok(())
}

fn docker_credentials(s: &Space) -> Result<()> {
    let (home, peer) = (Home::new(s)?, Peer::start(Some(HTPASSWD))?);
    let archive = format!("oci-archive:{}", home.archive("amd64", AMD64, b"")?.display());
    let target = format!("{}/x:1", peer.host);
    let copy = ["image", "copy", &archive, &target];
    home.sampan(&copy)?.refused("docker login")?;
    std::fs::create_dir(home.path(".docker"))?;
    let config = |value: Value| std::fs::write(home.path(".docker/config.json"), value.to_string());
    config(json!({"auths": {&peer.host: {"auth": "dXNlcjp3cm9uZw=="}}}))?;
    home.sampan(&copy)?.refused(&peer.host)?;
    config(json!({"auths": {&peer.host: {"auth": "dXNlcjpzZWNyZXQ="}}}))?;
    home.sampan(&copy)?.ok()?;
    config(json!({"credHelpers": {&peer.host: "nowhere"}}))?;
    home.sampan(&["manifest", "inspect", &target])?.refused("docker-credential-nowhere")?;
    let helper = home.path("docker-credential-here");
    let script =
        "#!/bin/sh\n[ \"$1\" = get ] && read host\necho '{\"Username\":\"user\",\"Secret\":\"secret\"}'\n";
    std::fs::write(&helper, script)?;
    std::fs::set_permissions(&helper, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    config(json!({"credsStore": "here"}))?;
    has(&home.sampan(&["manifest", "inspect", &target])?.ok()?, "schemaVersion")?;
    // registries.yaml, as nodes have it
    config(json!({}))?;
    let file = home.path("registries.yaml");
    let yaml = format!("configs: {{'{}': {{auth: {{username: user, password: secret}}}}}}", peer.host);
    std::fs::write(&file, yaml)?;
    let file = format!("--private-registry={}", file.display());
    home.sampan(&["manifest", "inspect", &file, &target])?.ok().map(drop)
}

fn broken_connections(s: &Space) -> Result<()> {
    let (home, peer, ours) = (Home::new(s)?, Peer::start(None)?, Peer::ours(s, &[])?);
    let payload: Vec<u8> = (0..6_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let archive = home.archive("amd64", AMD64, &payload)?;
    let from = format!("oci-archive:{}", archive.display());
    // no connection lives long enough for the layer: only pieces put together make it whole
    let (line, broken) = bad_line(&ours.host, 2_000_000, usize::MAX)?;
    home.sampan(&["image", "copy", &from, &format!("{line}/x:1")])?.ok().context("pushing in pieces")?;
    ensure!(broken.load(Ordering::SeqCst) >= 2, "the line never broke");
    let plain = home.raw(&format!("{}/x:1", ours.host))?;
    let (line, broken) = bad_line(&ours.host, 2_500_000, usize::MAX)?;
    let out = home.path("out.tar").display().to_string();
    home.sampan(&["image", "export", "-o", &out, &format!("{line}/x:1")])?
        .ok()
        .context("fetching in pieces")?;
    ensure!(broken.load(Ordering::SeqCst) >= 2, "the line never broke");
    let copied = home.skopeo(&["inspect", "--raw", &format!("oci-archive:{out}")])?;
    ensure!(serde_json::from_str::<Value>(&copied)? == plain, "{copied}");
    // a registry that forgets is sent all of it again
    let (line, broken) = bad_line(&peer.host, 2_000_000, 2)?;
    home.sampan(&["image", "copy", &from, &format!("{line}/x:1")])?.ok().context("pushing anew")?;
    ensure!(broken.load(Ordering::SeqCst) >= 2, "the line never broke");
    // one that breaks for good is told, not waited for
    let (line, _) = bad_line(&peer.host, 1_000, usize::MAX)?;
    home.sampan(&["image", "copy", &from, &format!("{line}/y:1")])?.refused(&line)
}

fn copies_and_bundles(s: &Space) -> Result<()> {
    let (home, one, two) = (Home::new(s)?, Peer::start(None)?, Peer::start(None)?);
    let (amd, arm) = (home.archive("amd64", AMD64, b"")?, home.archive("arm64", ARM64, b"")?);
    let [a, b, list] = ["x:amd64", "x:arm64", "x:1"].map(|n| format!("{}/{n}", one.host));
    home.push(&a, &amd, "amd64", "oci")?;
    home.push(&b, &arm, "arm64", "v2s2")?;
    let pushed = home.sampan(&["manifest", "push", &list, "--from", &format!("{a},{b}")])?.ok()?;
    let top = pushed.trim().to_string();
    // registry to registry: every platform, the same digest
    let there = format!("{}/y/x:2", two.host);
    has(&home.sampan(&["image", "copy", &list, &there])?.ok()?, &top)?;
    ensure!(home.raw(&there)? == home.raw(&list)?, "the copy differs");
    let single = format!("{}/y/x:arm", two.host);
    home.sampan(&["image", "copy", "--platform", "linux/arm64", &list, &single])?.ok()?;
    ensure!(home.raw(&single)?["manifests"].is_null(), "a single platform needs no list");
    home.sampan(&["image", "copy", "--platform", "linux/s390x", &list, &single])?
        .refused("linux/amd64, linux/arm64")?;
    // several images, all platforms, in one bundle, and into a registry without the first
    let bundle = home.path("bundle.tar").display().to_string();
    home.sampan(&["image", "export", "-o", &bundle, &list, &a])?.ok()?;
    drop(one);
    let three = Peer::start(None)?;
    let ran = home.sampan(&["image", "push", "--from", &bundle, "--to-registry", &three.host])?.ok()?;
    has(&ran, &top)?;
    ensure!(home.raw(&format!("{}/x:1", three.host))? == home.raw(&there)?, "the bundle differs");
    // compressed, it is read as well
    home.command("gzip", &["-k", &bundle])?.ok()?;
    let four = Peer::start(None)?;
    let packed = format!("{bundle}.gz");
    home.sampan(&["image", "push", "--from", &packed, "--to-registry", &four.host])?.ok()?;
    // what others make of the same file
    let names = [format!("oci-archive:{bundle}:1"), format!("docker-archive:{bundle}:{list}")];
    home.skopeo(&["inspect", "--raw", &names[0]])?;
    has(&home.skopeo(&["inspect", "--config", &names[1]])?, "amd64")?;
    // a byte that is not what its digest says
    let mut bytes = std::fs::read(&bundle)?;
    let at = bytes.windows(3).position(|w| w == [0x1f, 0x8b, 8]).context("a layer")?;
    bytes[at + 40] ^= 1;
    std::fs::write(home.path("bad.tar"), bytes)?;
    let bad = home.path("bad.tar").display().to_string();
    let five = Peer::start(None)?;
    home.sampan(&["image", "push", "--from", &bad, "--to-registry", &five.host])?.refused("digest")
}

fn errors_say_what_to_do(s: &Space) -> Result<()> {
    let (home, peer) = (Home::new(s)?, Peer::start(None)?);
    let missing = format!("{}/none:1", peer.host);
    for (args, want) in [
        (vec!["manifest", "inspect", &missing], format!("no such manifest: {missing}")),
        (vec!["manifest", "inspect", &missing], "check name and tag".into()),
        (vec!["manifest", "push", &missing], format!("No such manifest: {missing}")),
        (vec!["manifest", "inspect", "X!"], "invalid reference format".into()),
        (vec!["manifest", "create", "127.0.0.1:1/x", "127.0.0.1:1/y"], "127.0.0.1:1/y:latest".into()),
        (vec!["image", "copy", "127.0.0.1:1/y", "127.0.0.1:1/x"], "refused".into()),
        (vec!["image", "copy", "oci-archive:none.tar", "127.0.0.1:1/x"], "none.tar".into()),
        (vec!["image", "copy", "--platform", "a/b/c/d", &missing, &missing], "OS/ARCH".into()),
        (vec!["image", "export", "-o", "x.tar", &missing], missing.clone()),
        (vec!["image", "ls", "--data-dir", "nowhere"], "no node runs here".into()),
    ] {
        home.sampan(&args)?.refused(&want)?;
    }
    ensure!(
        std::fs::read_dir(home.path(""))?.all(|e| e.is_ok_and(|e| e.path().is_dir())),
        "an archive is left"
    );
    Ok(())
}

/// Import, list, name, take out, throw away; and which nodes can run it.
fn images_of_a_node(s: &Space) -> Result<()> {
    let (home, peer) = (Home::new(s)?, Peer::start(None)?);
    let (amd, arm) = (home.archive("amd64", AMD64, b"")?, home.archive("arm64", ARM64, b"")?);
    let [a, b, list] = ["x:amd64", "x:arm64", "x:1"].map(|n| format!("{}/{n}", peer.host));
    home.push(&a, &amd, "amd64", "oci")?;
    home.push(&b, &arm, "arm64", "oci")?;
    home.sampan(&["manifest", "push", &list, "--from", &format!("{a},{b}")])?.ok()?;
    let bundle = s.folder().join("bundle.tar").display().to_string();
    home.sampan(&["image", "export", "-o", &bundle, &list, &b])?.ok()?;
    let sampan = s.cluster.sampan.display().to_string();
    let node = |args: &[&str]| s.exec("amd64", &[&[sampan.as_str(), "image"], args].concat());
    has(&node(&["import", &bundle])?.ok()?, &list)?;
    let shown = node(&["ls"])?.ok()?;
    has(&shown, &list)?;
    has(&shown, "linux/amd64, linux/arm64")?;
    ensure!(!shown.contains("x:arm64"), "another machine's image is listed:\n{shown}");
    node(&["tag", &list, "here.example/named:1"])?.ok()?;
    let told: Value = serde_json::from_str(&node(&["inspect", "here.example/named:1"])?.ok()?)?;
    ensure!(told[0]["Architecture"] == "amd64" && told[0]["Config"]["Cmd"][0] == "sh", "{told}");
    // out of the node's store into a registry, which has it whole then
    let pushed = "127.0.0.1:5999/pushed:1";
    let serve = "registry serve --http-addr 127.0.0.1:5999 --storage-filesystem-rootdirectory /root/registry";
    let serve = format!("{sampan} {serve} >/dev/null 2>&1 & echo $!");
    let registry = s.exec("amd64", &["sh", "-c", &serve])?.ok()?;
    node(&["tag", &list, pushed])?.ok()?;
    wait_for("the registry on the node", seconds(20), || {
        let ran = node(&["push", pushed])?;
        Ok(if ran.code == 0 { Ok(()) } else { Err(ran.text()) })
    })?;
    node(&["rm", pushed])?.ok()?;
    node(&["pull", pushed])?.ok()?;
    has(&s.exec("amd64", &["find", "/root/registry", "-name", "pushed"])?.ok()?, "repositories/pushed")?;
    node(&["rm", pushed])?.ok()?;
    s.exec("amd64", &["kill", registry.trim()])?.ok()?;
    // taken out and in again, it is an image still
    let out = "/root/out.tar";
    node(&["export", "--from-node", "-o", out, "here.example/named:1"])?.ok()?;
    let skopeo = ["skopeo", "--insecure-policy", "inspect", "--config", "oci-archive:/root/out.tar"];
    has(&s.exec("amd64", &skopeo)?.ok()?, "amd64")?;
    node(&["rm", &list, "here.example/named:1"])?.ok()?;
    node(&["import", out])?.ok()?;
    has(&node(&["ls"])?.ok()?, "here.example/named:1")?;
    node(&["prune", "-a", "-f"])?.ok()?;
    ensure!(!node(&["ls"])?.ok()?.contains("named"), "it was not pruned");
    node(&["rm", "here.example/named:1"])?.refused("not on this node")?;
    let nodes = s.sampan(&["image", "platforms", &list])?.ok()?;
    has(&nodes, "linux/amd64, linux/arm64")?;
    has(&nodes, "yes")?;
    has(&s.sampan(&["image", "platforms", &b])?.ok()?, "there is no build for linux/amd64")?;
    // pulled by hand, then used by a pod, which keeps it
    let name = "registry.lab:5000/by-hand:1";
    s.cluster.registry.as_ref().context("the suite has a registry")?.push("by-hand", &box_image()?)?;
    has(&node(&["pull", name])?.ok()?, name)?;
    node(&["pull", "registry.lab:5000/none:1"])?.refused("registry.lab:5000/none:1")?;
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": name, "imagePullPolicy": "Never", "command": ["sleep", "1000"]}]}});
    s.post(&s.path("pods"), &pod)?.ok()?;
    s.running("p")?;
    node(&["rm", name])?.refused("images-of-a-node/p/c is made from it")?;
    node(&["prune", "-a", "-f"])?.ok()?;
    has(&node(&["ls"])?.ok()?, name)
}
