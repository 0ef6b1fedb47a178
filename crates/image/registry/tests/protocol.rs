//! The registry through its HTTP interface, in this process: what the conformance suite doesn't look at, and what it
//! does in short.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use sampan_registry::digest::Algorithm;
use sampan_registry::proxy::{Proxy, Upstream, UpstreamOptions};
use sampan_registry::storage::Disk;
use sampan_registry::{CollectOptions, Digest, Options, Quota, Registry};
use tower::ServiceExt;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

struct Lab {
    registry: Arc<Registry>,
    _folder: tempfile::TempDir,
}

/// What was answered, read to its end.
struct Answer {
    status: u16,
    headers: http::HeaderMap,
    body: Bytes,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn code(&self) -> String {
        self.json()["errors"][0]["code"].as_str().unwrap().to_string()
    }
}

/// Nothing is spared by age: only by being referred to.
fn no_grace() -> Options {
    let collect = CollectOptions { grace: Duration::ZERO, interval: None, ..CollectOptions::default() };
    Options { collect, ..Options::default() }
}

async fn lab(options: Options) -> Lab {
    lab_with(options, |registry| registry).await
}

async fn lab_with(options: Options, change: impl FnOnce(Registry) -> Registry) -> Lab {
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::open(folder.path()).unwrap();
    let registry = change(Registry::new(Arc::new(disk), options));
    registry.start().await.unwrap();
    Lab { registry: Arc::new(registry), _folder: folder }
}

impl Lab {
    async fn ask(&self, request: Request<Body>) -> Answer {
        let response: Response<Body> = self.registry.router().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        Answer { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    async fn send(&self, method: &str, path: &str, body: impl Into<Body>) -> Answer {
        self.ask(Request::builder().method(method).uri(path).body(body.into()).unwrap()).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, Body::empty()).await
    }

    async fn push_blob(&self, repository: &str, content: &[u8]) -> Digest {
        let digest = Digest::of(Algorithm::Sha256, content);
        let path = format!("/v2/{repository}/blobs/uploads/?digest={digest}");
        let answer = self.send("POST", &path, content.to_vec()).await;
        assert_eq!(answer.status, 201, "{:?}", answer.body);
        digest
    }

    async fn push_manifest(&self, repository: &str, reference: &str, manifest: &str) -> Answer {
        let request = Request::put(format!("/v2/{repository}/manifests/{reference}"))
            .body(Body::from(manifest.to_string()));
        self.ask(request.unwrap()).await
    }

    /// An image with one layer; its manifest's digest.
    async fn push_image(&self, repository: &str, tag: &str, layer: &[u8]) -> (Digest, Digest) {
        let config = self.push_blob(repository, b"{}").await;
        let layer = self.push_blob(repository, layer).await;
        let manifest = image(&config, &layer);
        let answer = self.push_manifest(repository, tag, &manifest).await;
        assert_eq!(answer.status, 201, "{:?}", answer.body);
        (answer.header("docker-content-digest").parse().unwrap(), layer)
    }
}

fn image(config: &Digest, layer: &Digest) -> String {
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"x/c","digest":"{config}","size":2}},
        "layers":[{{"mediaType":"x/l","digest":"{layer}","size":1}}]}}"#
    )
}

#[tokio::test]
async fn images_come_back_byte_for_byte() {
    let lab = lab(Options::default()).await;
    let (digest, layer) = lab.push_image("a/b", "v1", b"0123456789").await;
    let manifest = lab.get("/v2/a/b/manifests/v1").await;
    assert!(digest.matches(&manifest.body));
    assert_eq!(manifest.header("content-type"), MANIFEST);
    let range = Request::get(format!("/v2/a/b/blobs/{layer}")).header("range", "bytes=2-4");
    let part = lab.ask(range.body(Body::empty()).unwrap()).await;
    assert_eq!((part.status, &part.body[..]), (206, &b"234"[..]));
    assert_eq!(part.header("content-range"), "bytes 2-4/10");
    let known = Request::get("/v2/a/b/manifests/v1").header("if-none-match", manifest.header("etag"));
    assert_eq!(lab.ask(known.body(Body::empty()).unwrap()).await.status, 304);
    let head = lab.send("HEAD", &format!("/v2/a/b/blobs/{layer}"), Body::empty()).await;
    assert_eq!((head.header("content-length"), head.body.len()), ("10", 0));
    assert_eq!(lab.get("/v2/_catalog").await.json()["repositories"][0], "a/b");
    for (path, status, code) in [
        (format!("/v2/other/blobs/{layer}"), 404, "BLOB_UNKNOWN"),
        ("/v2/a/b/manifests/v2".into(), 404, "MANIFEST_UNKNOWN"),
        ("/v2/nobody/tags/list".into(), 404, "NAME_UNKNOWN"),
        ("/v2/UPPER/tags/list".into(), 400, "NAME_INVALID"),
        ("/v2/a/b/blobs/sha256:%2e%2e".into(), 400, "DIGEST_INVALID"),
        ("/v2/a/b/tags/list?n=x".into(), 400, "PAGINATION_NUMBER_INVALID"),
    ] {
        let answer = lab.get(&path).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{path}");
    }
    let missing = Digest::of(Algorithm::Sha256, b"nowhere");
    let refused = lab.push_manifest("a/b", "v2", &image(&layer, &missing)).await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "MANIFEST_BLOB_UNKNOWN"));
    assert_eq!(refused.json()["errors"][0]["detail"]["digest"], missing.to_string());
}

#[tokio::test]
async fn broken_uploads_go_on() {
    let lab = lab(Options::default()).await;
    let content: Vec<u8> = (0..900_000_u32).map(|i| (i % 251) as u8).collect();
    let digest = Digest::of(Algorithm::Sha512, &content);
    let begun = lab.send("POST", "/v2/a/blobs/uploads/", Body::empty()).await;
    let location = begun.header("location").to_string();
    // the connection breaks after some 600 kB
    let pieces = content[..600_000].chunks(50_000).map(|c| Ok(Bytes::copy_from_slice(c)));
    let broken: Vec<std::io::Result<Bytes>> =
        pieces.chain([Err(std::io::Error::other("the line is dead"))]).collect();
    let answer = lab.send("PATCH", &location, Body::from_stream(futures::stream::iter(broken))).await;
    assert_eq!((answer.status, answer.code().as_str()), (400, "BLOB_UPLOAD_INVALID"));
    let status = lab.get(&location).await;
    assert_eq!((status.status, status.header("range")), (204, "0-599999"));
    let gap = Request::patch(&location).header("content-range", "700000-899999");
    let gap = lab.ask(gap.body(Body::from(content[700_000..].to_vec())).unwrap()).await;
    assert_eq!((gap.status, gap.header("range")), (416, "0-599999"));
    let rest = Request::put(format!("{location}?digest={digest}"))
        .header("content-range", "600000-899999")
        .header("content-length", "300000");
    let done = lab.ask(rest.body(Body::from(content[600_000..].to_vec())).unwrap()).await;
    assert_eq!(done.status, 201, "{:?}", done.body);
    assert_eq!(lab.get(&format!("/v2/a/blobs/{digest}")).await.body, content);
    assert_eq!(lab.get(&location).await.code(), "BLOB_UPLOAD_UNKNOWN");
    let wrong = format!("/v2/a/blobs/uploads/?digest={digest}");
    assert_eq!(lab.send("POST", &wrong, "something else").await.code(), "DIGEST_INVALID");
    assert_eq!(lab.get("/v2/a/blobs/uploads/../../../x").await.status, 404);
}

#[tokio::test]
async fn collection_takes_what_nothing_needs_and_nothing_else() {
    let lab = lab(no_grace()).await;
    let (manifest, layer) = lab.push_image("a", "v1", b"shared").await;
    let mount = format!("/v2/b/blobs/uploads/?mount={layer}&from=a");
    assert_eq!(lab.send("POST", &mount, Body::empty()).await.status, 201);
    let orphan = lab.push_blob("a", b"orphan").await;
    let (other, other_layer) = lab.push_image("b", "v1", b"only in b").await;
    let dry = lab.registry.collect(true).await.unwrap();
    let collected = lab.registry.collect(false).await.unwrap();
    assert_eq!((collected.blobs_removed, collected.bytes_removed, collected.missing), (1, 6, 0));
    assert_eq!(collected.links_removed, 2, "the orphan's, and the mounted layer's in b");
    assert_eq!((dry.blobs_removed, dry.links_removed), (1, 2));
    assert_eq!(lab.get(&format!("/v2/a/blobs/{orphan}")).await.status, 404);
    assert_eq!(lab.get(&format!("/v2/b/blobs/{layer}")).await.status, 404);
    assert_eq!(lab.get(&format!("/v2/a/blobs/{layer}")).await.body, "shared");
    assert_eq!(lab.get(&format!("/v2/b/blobs/{other_layer}")).await.body, "only in b");
    assert_eq!(lab.send("DELETE", &format!("/v2/b/manifests/{other}"), Body::empty()).await.status, 202);
    assert_eq!(lab.get("/v2/b/manifests/v1").await.status, 404);
    let collected = lab.registry.collect(false).await.unwrap();
    assert_eq!(collected.blobs_removed, 2, "b's manifest and layer; the configuration is a's too");
    assert_eq!(lab.get("/v2/b/tags/list").await.status, 404, "nothing is left of b");
    assert_eq!(lab.get(&format!("/v2/a/manifests/{manifest}")).await.status, 200);
    let again = lab.registry.collect(false).await.unwrap();
    assert_eq!((again.blobs_removed, again.links_removed, again.blobs_kept), (0, 0, 3));
}

#[tokio::test]
async fn grace_spares_what_is_fresh() {
    let lab = lab(Options::default()).await;
    let orphan = lab.push_blob("a", b"orphan").await;
    assert_eq!(lab.registry.collect(false).await.unwrap().blobs_removed, 0);
    assert_eq!(lab.get(&format!("/v2/a/blobs/{orphan}")).await.status, 200);
}

#[tokio::test]
async fn untagged_manifests_go_only_when_asked() {
    let mut options = no_grace();
    options.collect.delete_untagged = true;
    let lab = lab(options).await;
    let (old, _) = lab.push_image("a", "v1", b"old").await;
    let (new, _) = lab.push_image("a", "v1", b"new").await;
    let (child, _) = lab.push_image("a", "child", b"child").await;
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"{MANIFEST}","digest":"{child}","size":1}}]}}"#
    );
    assert_eq!(lab.push_manifest("a", "list", &index).await.status, 201);
    assert_eq!(lab.send("DELETE", "/v2/a/manifests/child", Body::empty()).await.status, 202);
    let config = lab.push_blob("a", b"{}").await;
    let signature = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","artifactType":"x/sig","layers":[],"annotations":{{"k":"v"}},
        "config":{{"mediaType":"x/e","digest":"{config}","size":2}},
        "subject":{{"mediaType":"{MANIFEST}","digest":"{new}","size":1}}}}"#
    );
    let signed = Digest::of(Algorithm::Sha256, signature.as_bytes());
    let answer = lab.push_manifest("a", &signed.to_string(), &signature).await;
    assert_eq!(answer.header("oci-subject"), new.to_string());
    let collected = lab.registry.collect(false).await.unwrap();
    assert_eq!((collected.manifests_removed, collected.missing), (1, 0));
    for (digest, status) in [(&old, 404), (&new, 200), (&child, 200), (&signed, 200)] {
        assert_eq!(lab.get(&format!("/v2/a/manifests/{digest}")).await.status, status);
    }
    let list = lab.get(&format!("/v2/a/referrers/{new}?artifactType=x%2Fsig")).await;
    assert_eq!(list.header("oci-filters-applied"), "artifactType");
    let entry = &list.json()["manifests"][0];
    assert_eq!(
        (entry["digest"].as_str(), entry["annotations"]["k"].as_str()),
        (Some(&*signed.to_string()), Some("v"))
    );
    assert!(lab.get(&format!("/v2/a/referrers/{new}?artifactType=y")).await.json()["manifests"][0].is_null());
    lab.send("DELETE", &format!("/v2/a/manifests/{signed}"), Body::empty()).await;
    let list = lab.get(&format!("/v2/a/referrers/{new}")).await;
    assert_eq!((list.status, list.json()["manifests"].as_array().map(Vec::len)), (200, Some(0)));
}

/// Pushes, mounts and deletions go on while collections without any grace run into them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn collections_and_pushes_do_not_hurt_each_other() {
    let lab = Arc::new(lab(no_grace()).await);
    let collecting = tokio::spawn({
        let lab = lab.clone();
        async move {
            loop {
                assert_eq!(lab.registry.collect(false).await.unwrap().missing, 0);
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        }
    });
    let mut pushing = Vec::new();
    for pusher in 0..4 {
        let lab = lab.clone();
        pushing.push(tokio::spawn(async move {
            let repository = format!("r{}", pusher % 2);
            for round in 0..15 {
                // everyone shares a layer, and deletes what it pushed in every other round
                let (tag, layer) = (format!("t{pusher}-{round}"), format!("layer {}", round % 3));
                let config = Digest::of(Algorithm::Sha256, b"{}");
                // a collection between blob and manifest may take the blob: a client pushes it again
                let mut pushed = None;
                for _ in 0..200 {
                    lab.push_blob(&repository, b"{}").await;
                    let layer = lab.push_blob(&repository, layer.as_bytes()).await;
                    let answer = lab.push_manifest(&repository, &tag, &image(&config, &layer)).await;
                    if answer.status == 201 {
                        pushed = Some((answer, layer));
                        break;
                    }
                    assert_eq!(answer.code(), "MANIFEST_BLOB_UNKNOWN");
                }
                let (_, layer) = pushed.expect("a push between two collections");
                let path = format!("/v2/{repository}/blobs/{layer}");
                let tagged = lab.get(&format!("/v2/{repository}/manifests/{tag}")).await;
                assert_eq!(tagged.status, 200, "{tag} is gone");
                assert_eq!(lab.get(&path).await.status, 200, "{layer} of {tag} is gone");
                if round % 2 == 1 {
                    lab.send("DELETE", &format!("/v2/{repository}/manifests/{tag}"), Body::empty()).await;
                }
            }
        }));
    }
    for pusher in pushing {
        pusher.await.unwrap();
    }
    collecting.abort();
    assert!(collecting.await.unwrap_err().is_cancelled());
    let last = lab.registry.collect(false).await.unwrap();
    assert_eq!(last.missing, 0);
}

#[tokio::test]
async fn quotas_refuse_before_they_are_passed() {
    let quota = Quota { total_bytes: Some(2000), repository_bytes: Some(1500) };
    let lab = lab(Options { quota, ..no_grace() }).await;
    lab.push_blob("a", &[1; 700]).await;
    lab.push_blob("a", &[1; 700]).await;
    let more = Digest::of(Algorithm::Sha256, &[2; 900]);
    let refused = lab.send("POST", &format!("/v2/a/blobs/uploads/?digest={more}"), vec![2; 900]).await;
    assert_eq!((refused.status, refused.code().as_str()), (403, "DENIED"));
    let message = refused.json()["errors"][0]["message"].as_str().unwrap().to_string();
    assert!(message.contains("repository a uses 700 of 1500 bytes"), "{message}");
    lab.push_blob("b", &[2; 600]).await;
    let begun = lab.send("POST", "/v2/c/blobs/uploads/", Body::empty()).await;
    let stream = futures::stream::iter((0..8).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![3; 150]))));
    let refused = lab.send("PATCH", begun.header("location"), Body::from_stream(stream)).await;
    assert_eq!(refused.code(), "DENIED");
    lab.send("DELETE", begun.header("location"), Body::empty()).await;
    lab.registry.collect(false).await.unwrap();
    lab.push_blob("c", &[4; 1500]).await;
}

#[tokio::test]
async fn read_only_registries_refuse_changes() {
    let read_only = lab(Options { read_only: true, ..Options::default() }).await;
    let refused = read_only.send("POST", "/v2/a/blobs/uploads/", Body::empty()).await;
    assert_eq!((refused.status, refused.code().as_str()), (405, "UNSUPPORTED"));
    assert_eq!(read_only.get("/v2/").await.status, 200);
    let kept = lab(Options { delete_enabled: false, ..Options::default() }).await;
    kept.push_image("a", "v1", b"x").await;
    assert_eq!(kept.send("DELETE", "/v2/a/manifests/v1", Body::empty()).await.status, 405);
}

#[tokio::test]
async fn sha512_manifests_and_tags_by_query() {
    let lab = lab(Options::default()).await;
    let config = lab.push_blob("a", b"{}").await;
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"x/c","digest":"{config}","size":2}},"layers":[]}}"#
    );
    let digest = Digest::of(Algorithm::Sha512, manifest.as_bytes());
    let pushed = lab.push_manifest("a", &format!("{digest}?tag=one&tag=two"), &manifest).await;
    assert_eq!(pushed.status, 201, "{:?}", pushed.body);
    let tags: Vec<_> = pushed.headers.get_all("oci-tag").iter().collect();
    assert_eq!(tags, ["one", "two"]);
    assert_eq!(lab.get("/v2/a/manifests/two").await.header("docker-content-digest"), digest.to_string());
    let page = lab.get("/v2/a/tags/list?n=1").await;
    assert_eq!(page.header("link"), "</v2/a/tags/list?last=one&n=1>; rel=\"next\"");
    assert_eq!(page.json()["tags"], serde_json::json!(["one"]));
    let other = format!("sha256:{}", "0".repeat(64));
    assert_eq!(lab.push_manifest("a", &other, &manifest).await.code(), "DIGEST_INVALID");
    let large = " ".repeat(5 << 20);
    assert_eq!(lab.push_manifest("a", "big", &large).await.status, 413);
}

/// A registry on a port of its own, to be cached.
async fn upstream() -> (Lab, String, tokio::task::JoinHandle<()>) {
    let lab = lab(Options::default()).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = lab.registry.router();
    let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (lab, url, serving)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pulling_through_caches_what_was_checked() {
    let (origin, url, serving) = upstream().await;
    let content: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 241) as u8).collect();
    let (digest, layer) = origin.push_image("lib/x", "v1", &content).await;
    let host = url.trim_start_matches("http://").to_string();
    let upstream = Upstream::new(UpstreamOptions { url, ..UpstreamOptions::default() }).unwrap();
    let cache = lab_with(no_grace(), |r| r.with_proxy(Proxy::new(upstream, None))).await;
    // one mirror entry for all registries: what is another's is not answered with this one's
    for (namespace, status) in [(host.as_str(), 200), ("", 200), ("docker.io", 404)] {
        let answer = cache.get(&format!("/v2/lib/x/manifests/v1?ns={namespace}")).await;
        assert_eq!(answer.status, status, "{namespace}");
    }
    assert_eq!(cache.get("/v2/lib/x/tags/list").await.json()["tags"][0], "v1");
    let manifest = cache.get("/v2/lib/x/manifests/v1").await;
    assert_eq!(manifest.header("docker-content-digest"), digest.to_string());
    let path = format!("/v2/lib/x/blobs/{layer}");
    let head = cache.send("HEAD", &path, Body::empty()).await;
    assert_eq!(head.header("content-length"), "3000000");
    let range = Request::get(&path).header("range", "bytes=2500000-2500009").body(Body::empty()).unwrap();
    let (whole, again, part) = tokio::join!(cache.get(&path), cache.get(&path), cache.ask(range));
    assert_eq!((whole.body == content, again.body == content), (true, true));
    assert_eq!((part.status, &part.body[..]), (206, &content[2_500_000..2_500_010]));
    assert_eq!(cache.send("POST", "/v2/lib/x/blobs/uploads/", Body::empty()).await.status, 405);
    // the tag moves on
    let (moved, _) = origin.push_image("lib/x", "v1", b"new").await;
    let now = cache.get("/v2/lib/x/manifests/v1").await;
    assert_eq!(now.header("docker-content-digest"), moved.to_string());
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    assert_eq!(cache.get("/v2/lib/x/manifests/v1").await.status, 200);
    assert_eq!(cache.get(&path).await.body, content);
    assert_eq!(cache.get("/v2/lib/x/tags/list").await.json()["tags"][0], "v1");
    assert_eq!(cache.get("/v2/lib/x/manifests/v2").await.status, 502);
    assert_eq!(cache.registry.collect(false).await.unwrap().missing, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lying_upstream_is_neither_believed_nor_kept() {
    let lie = axum::Router::new().fallback(|| async { "x".repeat(100_000) });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, lie).await.unwrap() });
    let upstream = Upstream::new(UpstreamOptions { url, ..UpstreamOptions::default() }).unwrap();
    let cache = lab_with(no_grace(), |r| r.with_proxy(Proxy::new(upstream, None))).await;
    let digest = Digest::of(Algorithm::Sha256, b"truth");
    assert_eq!(cache.get(&format!("/v2/a/manifests/{digest}")).await.status, 502);
    let blob = cache.get(&format!("/v2/a/blobs/{digest}")).await;
    assert!(blob.body.len() < 100_000, "the transfer must break off");
    assert!(cache.registry.blob("a", &digest).await.is_err());
    let collected = cache.registry.collect(false).await.unwrap();
    assert_eq!((collected.blobs_kept, collected.uploads_removed), (0, 0));
}

#[tokio::test]
async fn listening_ends_when_told() {
    let lab = lab(Options::default()).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, end) = tokio::sync::watch::channel(false);
    let serving = tokio::spawn(sampan_registry::serve::serve(lab.registry.clone(), listener, None, end));
    let upstream = Upstream::new(UpstreamOptions { url: format!("http://{address}"), ..Default::default() });
    let cache = lab_with(no_grace(), |r| r.with_proxy(Proxy::new(upstream.unwrap(), None))).await;
    assert_eq!(cache.get("/v2/x/manifests/v1").await.status, StatusCode::NOT_FOUND.as_u16());
    sender.send(true).unwrap();
    tokio::time::timeout(Duration::from_secs(10), serving).await.unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

/// A client that only looks for the answer once it has sent everything must get it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_reach_clients_that_still_send() {
    use std::io::{Read, Write};
    let quota = Quota { total_bytes: Some(1_000_000), repository_bytes: None };
    let lab = lab(Options { quota, ..Options::default() }).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (_never, end) = tokio::sync::watch::channel(false);
    tokio::spawn(sampan_registry::serve::serve(lab.registry.clone(), listener, None, end));
    let begun = lab.send("POST", "/v2/a/blobs/uploads/", Body::empty()).await;
    let location = begun.header("location").to_string();
    let answer = tokio::task::spawn_blocking(move || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let head = format!(
            "PATCH {location} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 30000000\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        for _ in 0..30 {
            stream.write_all(&[7; 1_000_000]).expect("the registry goes on reading");
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let answer = answer.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("quota exceeded"), "{answer}");
}
