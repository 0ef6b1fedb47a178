//! The registry killed with -9 in the middle of uploads, again and again: what it acknowledged is there afterwards, and
//! the garbage collection finds no lost and no unreferenced blob.
//!
//! `SAMPAN_REGISTRY_KILLS=1000` kills it that often instead of for a few seconds.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use parking_lot::Mutex;
use sampan_registry::digest::Algorithm;
use sampan_registry::storage::Disk;
use sampan_registry::{CollectOptions, Digest, Options, Registry};

const FOLDER: &str = "SAMPAN_REGISTRY_CRASH_FOLDER";
const UPLOADERS: usize = 4;
/// For so long it is killed, without `SAMPAN_REGISTRY_KILLS`.
const BUDGET: Duration = Duration::from_secs(12);

fn options() -> Options {
    let collect = CollectOptions {
        grace: Duration::ZERO,
        interval: None,
        upload_age: Duration::ZERO,
        ..Default::default()
    };
    Options { collect, ..Options::default() }
}

/// Not a test: the server that the test below starts and kills, this same program.
#[test]
fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let disk = Disk::open(Path::new(&folder)).unwrap();
        disk.recover().unwrap();
        // While it serves it also collects, sparing what the last hour made.
        let collect =
            CollectOptions { grace: Duration::from_secs(3600), interval: None, ..Default::default() };
        let registry = Arc::new(Registry::new(Arc::new(disk), Options { collect, ..Options::default() }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("\nport {}", listener.local_addr().unwrap().port());
        let collecting = registry.clone();
        tokio::spawn(async move {
            loop {
                collecting.collect(false).await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let (_never, end) = tokio::sync::watch::channel(false);
        sampan_registry::serve::serve(registry, listener, None, end).await;
    });
}

struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(folder: &Path) -> Server {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(FOLDER, folder)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = lines.find_map(|l| l.unwrap().strip_prefix("port ").map(str::to_string));
        let url = format!("http://127.0.0.1:{}", port.expect("the server says its port"));
        std::thread::spawn(move || for _ in lines {});
        Server { child, url }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

type Http = Client<HttpConnector, Full<Bytes>>;

/// A client that pushes images of its own, goes on with broken uploads, and notes what was acknowledged.
struct Uploader {
    name: String,
    http: Http,
    /// tag to manifest digest
    acknowledged: BTreeMap<String, Digest>,
    /// the upload that broke: where, and what it is to become
    pending: Option<(String, Vec<u8>)>,
    next: u64,
    resumed: u64,
}

/// The connection broke: the server was killed.
struct Broken;

impl Uploader {
    fn new(number: usize) -> Uploader {
        let http = Client::builder(TokioExecutor::new()).build_http();
        let name = format!("crash/r{}", number % 3);
        Uploader {
            name,
            http,
            acknowledged: BTreeMap::new(),
            pending: None,
            next: number as u64 * 1_000_000,
            resumed: 0,
        }
    }

    async fn ask(
        &self,
        method: Method,
        url: String,
        body: &[u8],
        range: Option<String>,
    ) -> Result<Response<Incoming>, Broken> {
        let mut request = Request::builder().method(method).uri(url);
        if let Some(range) = range {
            request = request.header("content-range", range);
        }
        let request = request.body(Full::new(Bytes::copy_from_slice(body))).unwrap();
        self.http.request(request).await.map_err(|_| Broken)
    }

    /// Pushes images until the server dies.
    async fn work(&mut self, url: &str) {
        if self.resume(url).await.is_ok() {
            while self.image(url).await.is_ok() {}
        }
    }

    async fn resume(&mut self, url: &str) -> Result<(), Broken> {
        let Some((location, content)) = self.pending.clone() else { return Ok(()) };
        let status = self.ask(Method::GET, format!("{url}{location}"), &[], None).await?;
        if status.status() == 204 {
            let range = status.headers()["range"].to_str().unwrap().strip_prefix("0-").unwrap().to_string();
            // nothing and one byte are told alike
            let have = match range.parse::<usize>().unwrap() {
                0 => 0,
                last => last + 1,
            };
            if have > 0 {
                self.finish(url, &location, &content, have).await?;
                self.resumed += 1;
            }
        }
        self.pending = None;
        Ok(())
    }

    async fn finish(&self, url: &str, location: &str, content: &[u8], have: usize) -> Result<(), Broken> {
        let digest = Digest::of(Algorithm::Sha256, content);
        let range = (have < content.len()).then(|| format!("{have}-{}", content.len() - 1));
        let url = format!("{url}{location}?digest={digest}");
        let done = self.ask(Method::PUT, url, &content[have..], range).await?;
        assert_eq!(done.status(), 201, "resuming at {have} of {}", content.len());
        Ok(())
    }

    async fn blob(&mut self, url: &str, content: Vec<u8>) -> Result<Digest, Broken> {
        let uploads = format!("{url}/v2/{}/blobs/uploads/", self.name);
        let begun = self.ask(Method::POST, uploads, &[], None).await?;
        assert_eq!(begun.status(), 202);
        let location = begun.headers()["location"].to_str().unwrap().to_string();
        self.pending = Some((location.clone(), content.clone()));
        let half = content.len() / 2;
        let patched = self.ask(Method::PATCH, format!("{url}{location}"), &content[..half], None).await?;
        assert_eq!(patched.status(), 202);
        self.finish(url, &location, &content, half).await?;
        self.pending = None;
        Ok(Digest::of(Algorithm::Sha256, &content))
    }

    async fn image(&mut self, url: &str) -> Result<(), Broken> {
        self.next += 1;
        let number = self.next;
        let size = 1000 + (number * 7919 % 400_000) as usize;
        let mut layer: Vec<u8> = (0..size).map(|i| (i as u64 * number % 253) as u8).collect();
        layer.extend_from_slice(&number.to_le_bytes());
        let config = self.blob(url, format!("{{\"n\":{}}}", number % 5).into_bytes()).await?;
        let layer = self.blob(url, layer).await?;
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"x/c","digest":"{config}","size":1}},"layers":[{{"digest":"{layer}","size":1}}]}}"#
        );
        let tag = format!("t{number}");
        let path = format!("{url}/v2/{}/manifests/{tag}", self.name);
        let pushed = self.ask(Method::PUT, path, manifest.as_bytes(), None).await?;
        assert_eq!(pushed.status(), 201, "{:?}", pushed.into_body().collect().await.map(|b| b.to_bytes()));
        self.acknowledged.insert(tag.clone(), Digest::of(Algorithm::Sha256, manifest.as_bytes()));
        if number.is_multiple_of(4) {
            // deleted, or not: a broken answer leaves it open
            let digest = self.acknowledged.remove(&tag).unwrap();
            let path = format!("{url}/v2/{}/manifests/{digest}", self.name);
            let deleted = self.ask(Method::DELETE, path, &[], None).await?;
            assert_eq!(deleted.status(), 202);
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_lose_nothing_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let kills_wanted = std::env::var("SAMPAN_REGISTRY_KILLS").ok().and_then(|n| n.parse::<u64>().ok());
    let begun = tokio::time::Instant::now();
    let uploaders: Vec<_> =
        (0..UPLOADERS).map(|n| Arc::new(tokio::sync::Mutex::new(Uploader::new(n)))).collect();
    let kills = Mutex::new(0_u64);
    loop {
        let done = *kills.lock();
        if kills_wanted.map_or(done > 4 && begun.elapsed() > BUDGET, |wanted| done >= wanted) {
            break;
        }
        let server = Server::start(folder.path());
        let mut working = Vec::new();
        for uploader in &uploaders {
            let (uploader, url) = (uploader.clone(), server.url.clone());
            working.push(tokio::spawn(async move { uploader.lock().await.work(&url).await }));
        }
        let pause = 5 + sampan_world::random::below(250);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        server.kill();
        for work in working {
            // its port may be another program's by now, which would answer for ever
            work.abort();
            if let Err(error) = work.await
                && error.is_panic()
            {
                std::panic::resume_unwind(error.into_panic());
            }
        }
        *kills.lock() += 1;
    }
    let disk = Disk::open(folder.path()).unwrap();
    disk.recover().unwrap();
    let registry = Registry::new(Arc::new(disk), options());
    let collected = registry.collect(false).await.unwrap();
    assert_eq!(collected.missing, 0, "{collected}: {:?}", collected.missing_digests);
    let (mut images, mut resumed, mut needed) = (0, 0, std::collections::BTreeSet::new());
    for uploader in &uploaders {
        let uploader = uploader.lock().await;
        resumed += uploader.resumed;
        for (tag, digest) in &uploader.acknowledged {
            let reference = sampan_registry::registry::Reference::Tag(tag.clone());
            let manifest = registry.manifest(&uploader.name, &reference).await.unwrap();
            assert_eq!(manifest.digest, *digest);
            images += 1;
        }
    }
    // every manifest that is there has all it needs, with the right content; and nothing else is there
    for repository in registry.repositories().await.unwrap() {
        for tag in registry.tags(&repository).await.unwrap() {
            let reference = sampan_registry::registry::Reference::Tag(tag);
            let manifest = registry.manifest(&repository, &reference).await.unwrap();
            needed.insert(manifest.digest.clone());
            let parsed: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap();
            for descriptor in [&parsed["config"], &parsed["layers"][0]] {
                let digest: Digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
                let info = registry.blob(&repository, &digest).await.unwrap();
                let body = axum::body::Body::from_stream(
                    registry.read_blob(&digest, 0, info.size_bytes).await.unwrap(),
                );
                assert!(digest.matches(&body.collect().await.unwrap().to_bytes()));
                needed.insert(digest);
            }
        }
    }
    let again = registry.collect(false).await.unwrap();
    // a manifest whose deletion was cut short may have lost its tag only
    assert!(again.blobs_kept >= needed.len() as u64, "{again}");
    assert_eq!((again.blobs_removed, again.links_removed, again.uploads_removed), (0, 0, 0), "{again}");
    assert_eq!(files(&folder.path().join("docker/registry/v2/blobs")), again.blobs_kept);
    assert_eq!(files(&folder.path().join("docker/registry/v2/_sampan")), 1, "the lock");
    println!("{} kills, {images} images acknowledged, {resumed} uploads resumed; {collected}", kills.lock());
    assert!(images > 0, "nothing was ever pushed");
}

fn files(folder: &Path) -> u64 {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() { files(&entry.path()) } else { 1 }
        })
        .sum()
}
