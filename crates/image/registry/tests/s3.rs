//! Images in S3: against a bucket in memory that checks little, or with `SAMPAN_REGISTRY_S3_ENDPOINT` (and
//! `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`) against the bucket `sampan-registry-test` of a real server.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures::StreamExt;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use sampan_registry::digest::Algorithm;
use sampan_registry::registry::Reference;
use sampan_registry::storage::{S3, S3Options};
use sampan_registry::{CollectOptions, Digest, Options, Registry};

const BUCKET: &str = "sampan-registry-test";

/// As much of S3 as the registry asks for.
#[derive(Default)]
struct Bucket {
    objects: BTreeMap<String, Bytes>,
    uploads: BTreeMap<String, BTreeMap<usize, Bytes>>,
}

type Shared = Arc<Mutex<Bucket>>;

fn parameters(uri: &http::Uri) -> BTreeMap<String, String> {
    let pairs = uri.query().unwrap_or("").split('&').filter_map(|p| p.split_once('='));
    pairs.map(|(n, v)| (n.to_string(), v.replace("%2F", "/"))).collect()
}

fn reply(status: u16, body: impl Into<Bytes>) -> Response<Body> {
    let body: Bytes = body.into();
    let response =
        Response::builder().status(status).header("etag", "\"e\"").header("content-length", body.len());
    response.header("last-modified", "Wed, 21 Oct 2015 07:28:00 GMT").body(Body::from(body)).unwrap()
}

async fn bucket(shared: Shared, request: Request<Body>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    assert!(parts.headers["authorization"].to_str().unwrap().starts_with("AWS4-HMAC-SHA256 Credential=k/"));
    let body = body.collect().await.unwrap().to_bytes();
    let query = parameters(&parts.uri);
    let key = parts.uri.path().strip_prefix(&format!("/{BUCKET}/")).unwrap().to_string();
    let mut bucket = shared.lock();
    let upload = query.get("uploadId");
    match (parts.method.as_str(), upload) {
        ("GET", None) if key.is_empty() => list(&bucket, &query),
        ("POST", None) => {
            let id = format!("u{}", bucket.uploads.len());
            bucket.uploads.insert(id.clone(), BTreeMap::new());
            reply(200, format!("<UploadId>{id}</UploadId>"))
        }
        ("PUT", Some(id)) => {
            let number = query["partNumber"].parse().unwrap();
            bucket.uploads.get_mut(id).unwrap().insert(number, body);
            reply(200, "")
        }
        ("GET", Some(id)) => match bucket.uploads.get(id) {
            None => reply(404, ""),
            Some(parts) => {
                let part = |(n, b): (&usize, &Bytes)| {
                    format!("<Part><PartNumber>{n}</PartNumber><Size>{}</Size><ETag>e</ETag></Part>", b.len())
                };
                reply(200, parts.iter().map(part).collect::<String>())
            }
        },
        ("POST", Some(id)) => {
            let parts = bucket.uploads.remove(id).unwrap();
            let small = parts.values().rev().skip(1).any(|p| p.len() < 5 << 20);
            assert!(!small, "only the last part may be small");
            bucket.objects.insert(key, parts.into_values().collect::<Vec<_>>().concat().into());
            reply(200, "")
        }
        ("DELETE", Some(id)) => {
            bucket.uploads.remove(id);
            reply(204, "")
        }
        ("PUT", None) => {
            let content = match parts.headers.get("x-amz-copy-source") {
                Some(source) => {
                    let source = source.to_str().unwrap().strip_prefix(&format!("/{BUCKET}/")).unwrap();
                    bucket.objects[source].clone()
                }
                None => body,
            };
            bucket.objects.insert(key, content);
            reply(200, "")
        }
        ("DELETE", None) => {
            bucket.objects.remove(&key);
            reply(204, "")
        }
        _ => match bucket.objects.get(&key) {
            None => reply(404, ""),
            Some(content) => match parts.headers.get("range").map(|r| r.to_str().unwrap()) {
                Some(range) => {
                    let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                    let last = last.parse::<usize>().unwrap().min(content.len() - 1);
                    reply(206, content.slice(first.parse().unwrap()..=last))
                }
                None => reply(200, content.clone()),
            },
        },
    }
}

fn list(bucket: &Bucket, query: &BTreeMap<String, String>) -> Response<Body> {
    let mut entries = std::collections::BTreeSet::new();
    for key in bucket.objects.keys() {
        let Some(rest) = key.strip_prefix(&query["prefix"]) else { continue };
        match rest.split_once('/').filter(|_| query.contains_key("delimiter")) {
            Some((folder, _)) => entries.insert(format!(
                "<CommonPrefixes><Prefix>{}{folder}/</Prefix></CommonPrefixes>",
                query["prefix"]
            )),
            None => entries.insert(format!("<Contents><Key>{key}</Key></Contents>")),
        };
    }
    reply(200, entries.into_iter().collect::<String>())
}

async fn storage() -> S3 {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let mut options = S3Options {
        bucket: BUCKET.into(),
        region_endpoint: variable("SAMPAN_REGISTRY_S3_ENDPOINT"),
        root_directory: format!("run-{}", sampan_world::random::uuid()),
        access_key: variable("AWS_ACCESS_KEY_ID"),
        secret_key: variable("AWS_SECRET_ACCESS_KEY"),
        ..S3Options::default()
    };
    if options.region_endpoint.is_empty() {
        let shared = Shared::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        options.region_endpoint = format!("http://{}", listener.local_addr().unwrap());
        options.access_key = "k".into();
        let router = axum::Router::new()
            .fallback(move |request: Request<Body>| bucket(shared.clone(), request))
            .layer(axum::extract::DefaultBodyLimit::disable());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    }
    S3::new(options).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_holds_what_a_disk_does() {
    let storage: Arc<S3> = Arc::new(storage().await);
    let grace = Duration::ZERO;
    let collect = CollectOptions { grace, interval: None, upload_age: Duration::ZERO, ..Default::default() };
    let options = Options { collect, ..Options::default() };
    let registry = Registry::new(storage.clone(), options.clone());
    let large: Vec<u8> = (0..9_500_000_u32).map(|i| (i % 249) as u8).collect();
    let upload = registry.start_upload("a/b").await.unwrap();
    let first = Body::from(large[..8_600_000].to_vec());
    registry.write_upload("a/b", &upload.id, None, None, Algorithm::Sha256, first).await.unwrap();
    // another process goes on with it
    let registry = Registry::new(storage, options);
    assert_eq!(registry.upload_status("a/b", &upload.id).await.unwrap().offset, 8_600_000);
    let rest = Body::from(large[8_600_000..].to_vec());
    let range = Some((8_600_000, 9_499_999));
    registry.write_upload("a/b", &upload.id, range, None, Algorithm::Sha256, rest).await.unwrap();
    let layer = Digest::of(Algorithm::Sha256, &large);
    registry.finish_upload("a/b", &upload.id, &layer).await.unwrap();
    let upload = registry.start_upload("a/b").await.unwrap();
    registry.write_upload("a/b", &upload.id, None, None, Algorithm::Sha256, Body::from("{}")).await.unwrap();
    let config = Digest::of(Algorithm::Sha256, b"{}");
    registry.finish_upload("a/b", &upload.id, &config).await.unwrap();
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"{config}"}},"layers":[{{"digest":"{layer}"}}]}}"#
    );
    let tag = Reference::parse("v1").unwrap();
    let stored = registry.put_manifest("a/b", &tag, &[], None, manifest.clone().into()).await.unwrap();
    assert_eq!(registry.tags("a/b").await.unwrap(), ["v1"]);
    assert_eq!(registry.manifest("a/b", &tag).await.unwrap().bytes, manifest);
    let part: Vec<Bytes> =
        registry.read_blob(&layer, 100, 1000).await.unwrap().map(Result::unwrap).collect().await;
    assert_eq!(part.concat(), &large[100..1100]);
    assert!(registry.mount("c", &layer, Some("a/b")).await.unwrap().is_some());
    let idle = registry.start_upload("c").await.unwrap();
    // ages are told in whole seconds
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let collected = registry.collect(false).await.unwrap();
    assert_eq!((collected.blobs_removed, collected.links_removed, collected.uploads_removed), (0, 1, 1));
    assert_eq!((collected.missing, collected.blobs_kept), (0, 3));
    assert!(registry.upload_status("c", &idle.id).await.is_err());
    assert_eq!(registry.repositories().await.unwrap(), ["a/b"]);
    registry.delete_manifest("a/b", &Reference::Digest(stored.digest)).await.unwrap();
    assert_eq!(registry.collect(false).await.unwrap().blobs_removed, 3);
    assert!(registry.repositories().await.unwrap().is_empty());
    assert_eq!(StatusCode::NOT_FOUND, registry.blob("a/b", &layer).await.unwrap_err().status());
}
