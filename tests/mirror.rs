//! The embedded mirror: images that only other nodes have, whatever becomes of those nodes and of what they send.
//!
//! Upstream counterparts: k3s' tests/e2e/embeddedmirror; spegel's test/e2e. The registry `down.lab:5000` refuses every
//! connection, so that what comes under its name came from a node.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sampan_tests::image::{Entry, Image, box_layer, digest, layer};
use sampan_tests::{Space, Suite, cases, has, seconds, wait_for};
use serde_json::{Value, json};

const DOWN: &str = "down.lab:5000";
const UP: &str = "registry.lab:5000";
const SAMPAN: &str = "/run/sampan/bin/sampan";
const BLOBS: &str = "/var/lib/sampan/agent/runtime/blobs";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn main() -> ExitCode {
    Suite::new("mirror", "amd64,amd64,amd64,arm64")
        .with_registry()
        .server_arg("--embedded-registry")
        .together(cases![only_one_node_has_it, every_platform_of_a_bundle, not_for_everyone])
        .alone(cases![
            the_bytes_go_from_node_to_node,
            through_the_server,
            damaged_content_is_refused,
            a_node_that_dies_half_way,
        ])
        .limit_s(300)
        .run()
}

/// A first entry that makes a layer differ from all others, with bytes that don't compress.
fn tar_of_its_own(name: &str, filling_bytes: usize) -> Result<Vec<u8>> {
    let mut seed = name.bytes().fold(88_172_645_463_325_252_u64, |s, b| s.rotate_left(9) ^ u64::from(b));
    let mut filling = name.as_bytes().to_vec();
    while filling.len() < filling_bytes {
        for shift in [13_i32, -7, 17] {
            seed ^= if shift > 0 { seed << shift } else { seed >> -shift };
        }
        filling.extend_from_slice(&seed.to_le_bytes());
    }
    let mut tar = layer(&[Entry::File("unique", 0o644, &filling)])?;
    // without the blocks that end it
    tar.truncate(tar.len() - 1024);
    tar.extend(box_layer()?);
    Ok(tar)
}

fn image(name: &str, filling_bytes: usize) -> Result<Image> {
    Image::new(name, &tar_of_its_own(name, filling_bytes)?, json!({"Env": ["PATH=/bin"]}))
}

/// On that node and on no other.
fn import(s: &Space, node: &str, image: &Image) -> Result<()> {
    let path = s.folder().join(format!("{}.tar", digest(image.name.as_bytes()).replace(':', "-")));
    image.write_archive(&path)?;
    import_archive(s, node, &path)
}

fn import_archive(s: &Space, node: &str, path: &Path) -> Result<()> {
    s.exec(node, &[SAMPAN, "image", "import", &path.display().to_string()])?.ok().map(drop)
}

fn pull(s: &Space, node: &str, image: &str) -> Result<sampan_tests::process::Ran> {
    s.exec(node, &[SAMPAN, "image", "pull", image])
}

fn pod(s: &Space, node: &str, name: &str, image: &str) -> Result<()> {
    let body = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
        "nodeName": node, "terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": image,
        "imagePullPolicy": "Always", "command": ["sh", "-c", "echo ran; sleep 1000"]}]}});
    s.post(&s.path("pods"), &body)?.ok().map(drop)
}

fn only_one_node_has_it(s: &Space) -> Result<()> {
    let name = format!("{DOWN}/one:1");
    let made = image(&name, 0)?;
    import(s, "amd64-2", &made)?;
    pod(s, "amd64-3", "p", &name)?;
    let running = s.running("p")?;
    let id = running["status"]["containerStatuses"][0]["imageID"].as_str().unwrap_or_default().to_string();
    ensure!(id == format!("{DOWN}/one@{}", made.manifest), "the very same image: {id}");
    has(&s.k(&["logs", "p"])?, "ran")?;
    // what was pulled is shared on, by digest as well
    s.exec("amd64-2", &[SAMPAN, "image", "rm", &name])?.ok()?;
    pull(s, "amd64", &format!("{DOWN}/one@{}", made.manifest))?.ok()?;
    // and goes with the image
    s.exec("amd64", &[SAMPAN, "image", "rm", &format!("{DOWN}/one@{}", made.manifest)])?.ok()?;
    let blob = format!("{BLOBS}/{}", made.layer.replace(':', "-"));
    ensure!(s.exec("amd64-3", &["test", "-f", &blob])?.code == 0, "amd64-3 keeps the layer as it came");
    ensure!(s.exec("amd64-2", &["test", "-f", &blob])?.code != 0, "amd64-2 has removed it");
    Ok(())
}

/// The image again, made for another architecture.
fn for_architecture(made: &Image, architecture: &str) -> Result<Image> {
    let parse = |digest: &str| -> Result<Value> { Ok(serde_json::from_slice(&made.blobs[digest])?) };
    let mut manifest = parse(&made.manifest)?;
    let mut config = parse(manifest["config"]["digest"].as_str().context("a configuration")?)?;
    config["architecture"] = architecture.into();
    let config = config.to_string().into_bytes();
    manifest["config"]["digest"] = digest(&config).into();
    manifest["config"]["size"] = config.len().into();
    let manifest = manifest.to_string().into_bytes();
    let layer = made.blobs[&made.layer].clone();
    let top = digest(&manifest);
    let blobs = [config, manifest, layer].into_iter().map(|b| (digest(&b), b));
    Ok(Image { name: made.name.clone(), blobs: blobs.collect(), manifest: top, layer: made.layer.clone() })
}

/// One archive with an index; its digest.
fn write_bundle(path: &Path, name: &str, images: &[(&str, Image)]) -> Result<String> {
    let mut blobs: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let entry = |(architecture, image): &(&str, Image)| {
        json!({"mediaType": MANIFEST, "digest": image.manifest, "size": image.blobs[&image.manifest].len(),
            "platform": {"os": "linux", "architecture": architecture}})
    };
    let manifests: Vec<Value> = images.iter().map(entry).collect();
    let index =
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).to_string().into_bytes();
    let top = digest(&index);
    let names = json!({"io.containerd.image.name": name});
    let outer = json!({"schemaVersion": 2, "manifests": [{"mediaType": INDEX, "digest": top, "size": index.len(),
        "annotations": names}]});
    blobs.insert(top.clone(), index);
    for (_, image) in images {
        blobs.extend(image.blobs.clone());
    }
    let mut tar = tar::Builder::new(std::fs::File::create(path)?);
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes)
    };
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    add("index.json", outer.to_string().as_bytes())?;
    for (digest, bytes) in &blobs {
        add(&format!("blobs/{}", digest.replacen(':', "/", 1)), bytes)?;
    }
    tar.finish()?;
    Ok(top)
}

fn every_platform_of_a_bundle(s: &Space) -> Result<()> {
    let name = format!("{DOWN}/bundle:1");
    let ours = image(&format!("{name} amd64"), 0)?;
    let theirs = for_architecture(&image(&format!("{name} arm64"), 0)?, "arm64")?;
    let path = s.folder().join("bundle.tar");
    let top = write_bundle(&path, &name, &[("amd64", ours), ("arm64", theirs.clone())])?;
    // an amd64 node has it: an arm64 node gets what is arm64's
    import_archive(s, "amd64-2", &path)?;
    pull(s, "arm64", &name)?.ok()?;
    let shown = s.exec("arm64", &[SAMPAN, "image", "inspect", &name])?.ok()?;
    has(&shown, &top)?;
    has(&shown, "\"Architecture\": \"arm64\"")?;
    // a bundle with nothing for the node that holds it
    let name = format!("{DOWN}/foreign:1");
    let theirs = for_architecture(&image(&name, 0)?, "arm64")?;
    write_bundle(&path, &name, &[("arm64", theirs)])?;
    import_archive(s, "amd64-3", &path)?;
    pull(s, "arm64", &name)?.ok()?;
    pull(s, "amd64-2", &name)?.refused("no image for linux/amd64")
}

fn not_for_everyone(s: &Space) -> Result<()> {
    // nor is it listed in registries.yaml, which says what is shared
    let name = "127.0.0.1:9/private:1";
    import(s, "amd64-2", &image(name, 0)?)?;
    pull(s, "amd64-3", name)?.refused("refused")?;
    // an administrator is no node
    let path = format!("/v1-sampan/images/holders/v2/one/manifests/1?ns={DOWN}");
    s.get(&path)?.is(401, "Unauthorized", "")?;
    // and who shows no certificate is nobody
    let program = "import ssl, socket\nc = ssl._create_unverified_context()\n\
        s = c.wrap_socket(socket.create_connection(('10.64.0.12', 10250), 5))\n\
        s.sendall(b'GET /v2/ HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n')\nprint(s.recv(100))";
    s.exec("amd64-3", &["python3", "-c", program])?.refused("ertificate")
}

fn sent_bytes(s: &Space, node: &str) -> Result<u64> {
    let text = s.exec(node, &["cat", "/sys/class/net/eth0/statistics/tx_bytes"])?.ok()?;
    Ok(text.trim().parse()?)
}

const LARGE_BYTES: usize = 24 << 20;

fn the_bytes_go_from_node_to_node(s: &Space) -> Result<()> {
    let name = format!("{DOWN}/direct:1");
    import(s, "amd64-2", &image(&name, LARGE_BYTES)?)?;
    let before = (sent_bytes(s, "amd64-2")?, sent_bytes(s, "amd64")?);
    let began = sampan_world::clock::monotonic();
    pull(s, "amd64-3", &name)?.ok()?;
    println!("  | {} MiB directly: {} ms", LARGE_BYTES >> 20, began.elapsed().as_millis());
    let (holder, server) = (sent_bytes(s, "amd64-2")? - before.0, sent_bytes(s, "amd64")? - before.1);
    ensure!(
        holder > LARGE_BYTES as u64 && server < LARGE_BYTES as u64 / 4,
        "{holder} and {server} bytes sent"
    );
    Ok(())
}

fn through_the_server(s: &Space) -> Result<()> {
    let name = format!("{DOWN}/tunnel:1");
    import(s, "amd64-2", &image(&name, LARGE_BYTES)?)?;
    // what goes to that node directly gets lost; its tunnel and the server's answers don't pass here
    let lost =
        ["neigh", "replace", "10.64.0.12", "lladdr", "02:00:00:00:00:01", "dev", "eth0", "nud", "permanent"];
    s.exec("amd64-3", &[&["ip"], &lost[..]].concat())?.ok()?;
    let before = sent_bytes(s, "amd64")?;
    let began = sampan_world::clock::monotonic();
    let pulled = pull(s, "amd64-3", &name);
    let took = began.elapsed();
    println!("  | {} MiB through the server: {} ms", LARGE_BYTES >> 20, took.as_millis());
    let again = format!("{DOWN}/tunnel-again:1");
    import(s, "amd64-2", &image(&again, 0)?)?;
    let began = sampan_world::clock::monotonic();
    let pulled_again = pull(s, "amd64-3", &again);
    let took_again = began.elapsed();
    s.exec("amd64-3", &["ip", "neigh", "del", "10.64.0.12", "dev", "eth0"])?.ok()?;
    pulled?.ok()?;
    pulled_again?.ok()?;
    let server = sent_bytes(s, "amd64")? - before;
    ensure!(server > LARGE_BYTES as u64, "the server sent {server} bytes");
    // what can't be reached is not tried each time
    ensure!(took_again < Duration::from_millis(1500), "{took:?}, then {took_again:?}");
    Ok(())
}

fn registry(s: &Space) -> Result<&sampan_tests::registry::Registry> {
    s.cluster.registry.as_ref().context("the suite has a registry")
}

fn damaged_content_is_refused(s: &Space) -> Result<()> {
    let name = format!("{UP}/damaged:1");
    let made = image(&name, 1 << 20)?;
    import(s, "amd64-2", &made)?;
    registry(s)?.push("damaged", &made)?;
    let blob = format!("{BLOBS}/{}", made.layer.replace(':', "-"));
    let damage = format!("printf damaged | dd of={blob} bs=1 seek=300000 conv=notrunc");
    s.exec("amd64-2", &["sh", "-c", &damage])?.ok()?;
    pod(s, "amd64-3", "p", &name)?;
    s.running("p")?;
    let log = s.lab("logs", &["amd64-3"])?.ok()?;
    let refused = log.lines().filter(|l| l.contains("what the node sent is refused")).collect::<Vec<_>>();
    ensure!(refused.iter().any(|l| l.contains(&made.layer)), "{refused:?}");
    Ok(())
}

fn a_node_that_dies_half_way(s: &Space) -> Result<()> {
    let name = format!("{UP}/half:1");
    let made = image(&name, 96 << 20)?;
    import(s, "amd64-2", &made)?;
    registry(s)?.push("half", &made)?;
    pod(s, "amd64-3", "p", &name)?;
    let growing = PathBuf::from("/var/lib/sampan/agent/runtime/ingest").join(made.layer.replace(':', "-"));
    let growing = growing.display().to_string();
    wait_for("the transfer to begin", seconds(20), || {
        let size = s.exec("amd64-3", &["stat", "-c", "%s", &growing])?;
        Ok(if size.out.trim().parse().unwrap_or(0) > 1_u64 << 20 { Ok(()) } else { Err(size.text()) })
    })?;
    s.lab("stop", &["--kill", "amd64-2"])?.ok()?;
    let whole = s.exec("amd64-3", &["stat", "-c", "%s", &growing])?.out;
    let running = s.pod("p", seconds(60), |pod| (pod["status"]["phase"] == "Running").then_some(()));
    s.lab("start", &["amd64-2"])?.ok()?;
    running?;
    let whole: usize = whole.trim().parse().unwrap_or(0);
    ensure!(whole < made.blobs[&made.layer].len(), "the node died in time: {whole} bytes");
    Ok(())
}
