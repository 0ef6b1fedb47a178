//! The client against a small registry on the loopback.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::manifest::digest;

/// Serves requests with `answer(request head) -> response bytes`, a connection each.
async fn serve(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    head.push(byte);
                }
                let _ = stream.write_all(&answer(&String::from_utf8_lossy(&head))).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    address
}

fn http(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let mut out =
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n")
            .into_bytes();
    out.extend_from_slice(body);
    out
}

#[derive(Default)]
struct Memory(Vec<u8>);
impl Sink for Memory {
    fn offset(&self) -> u64 {
        self.0.len() as u64
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
    fn restart(&mut self) -> io::Result<()> {
        self.0.clear();
        Ok(())
    }
}

fn descriptor(bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: String::new(),
        digest: digest(bytes),
        size: bytes.len() as u64,
        platform: None,
        annotations: Default::default(),
    }
}

#[tokio::test]
async fn tokens_are_fetched_with_the_pods_credentials() {
    let config = br#"{"architecture":"arm64","os":"linux"}"#;
    let body = format!(r#"{{"schemaVersion":2,"config":{{"digest":"{}"}},"layers":[]}}"#, digest(config));
    let own = Arc::new(std::sync::OnceLock::<String>::new());
    let known = own.clone();
    let address = serve(move |head| {
        let line = head.lines().next().unwrap();
        let realm = format!("http://{}/token", known.get().unwrap());
        let lower = head.to_ascii_lowercase();
        if line.contains("/token?") {
            assert!(line.contains("scope=repository%3Aa%2Fb%3Apull"), "{line}");
            return match head.contains("Basic bWU6cGFzcw==") {
                true => http("200 OK", "", br#"{"access_token":"T"}"#),
                false => http("401 Unauthorized", "", b""),
            };
        }
        if !lower.contains("authorization: bearer t\r\n") {
            let challenge = format!("WWW-Authenticate: Bearer realm=\"{realm}\",service=\"s\"\r\n");
            return http("401 Unauthorized", &challenge, b"");
        }
        if line.contains("/blobs/") {
            http("200 OK", "", config)
        } else {
            http("200 OK", "", body.as_bytes())
        }
    })
    .await;
    own.set(address.clone()).unwrap();
    let client = Client::new(Registries::default());
    let reference = Reference::parse(&format!("{address}/a/b")).unwrap();
    let wrong = Auth { username: "x".into(), password: "y".into(), ..Auth::default() };
    let right = Auth { username: "me".into(), password: "pass".into(), ..Auth::default() };
    let platforms = client.platforms(&reference, &[wrong.clone(), right]).await.unwrap();
    assert_eq!(crate::platform::list(&platforms), "linux/arm64");
    assert!(matches!(client.platforms(&reference, &[wrong]).await, Err(ImageError::Denied(_))));
}

#[tokio::test]
async fn broken_downloads_go_on_where_they_stopped() {
    let blob: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    let served = blob.clone();
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    let address = serve(move |head| {
        counted.fetch_add(1, Ordering::Relaxed);
        let range = head.to_ascii_lowercase();
        let from =
            range.split("range: bytes=").nth(1).and_then(|r| r.split('-').next()?.parse::<usize>().ok());
        let mut answer = match from {
            Some(n) => http("206 Partial Content", "", &served[n..]),
            None => http("200 OK", "", &served),
        };
        if from.is_none() {
            answer.truncate(40_000);
        }
        answer
    })
    .await;
    let client = Client::new(Registries::default());
    let reference = Reference::parse(&format!("{address}/a")).unwrap();
    let mut sink = Memory::default();
    client.blob(&reference, &descriptor(&blob), &[], &mut sink).await.unwrap();
    assert!(sink.0 == blob);
    assert_eq!(requests.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn wrong_digests_missing_images_and_dead_registries_are_told_apart() {
    let address = serve(|head| {
        let line = head.lines().next().unwrap();
        if line.contains("/missing/") { http("404 Not Found", "", b"") } else { http("200 OK", "", b"{}") }
    })
    .await;
    let client = Client::new(Registries::default());
    let pull = |name: String| {
        let client = &client;
        async move { client.resolve(&Reference::parse(&name).unwrap(), &[]).await.map(|r| r.digest) }
    };
    assert!(matches!(pull(format!("{address}/missing")).await, Err(ImageError::NotFound(_))));
    let wrong = pull(format!("{address}/x@{}", digest(b"other"))).await;
    assert!(matches!(&wrong, Err(ImageError::Invalid(m)) if m.contains("digest")), "{wrong:?}");
    let dead = pull("127.0.0.1:1/x".into()).await;
    assert!(matches!(&dead, Err(ImageError::Unavailable(m)) if m.contains("refused")), "{dead:?}");
}

/// A source that sends what it is told to from the offset on, in two pieces; the connection may break in between.
struct Holder {
    bytes: Vec<u8>,
    breaks: bool,
    asked: Arc<Mutex<Vec<String>>>,
    name: &'static str,
}

#[async_trait::async_trait]
impl crate::mirror::MirrorSource for Holder {
    fn name(&self) -> &str {
        self.name
    }

    async fn get(&self, offset: u64) -> Result<Response<Body>, ImageError> {
        self.asked.lock().push(format!("{} {offset}", self.name));
        if self.bytes.is_empty() {
            return Err(ImageError::NotFound("it is gone".into()));
        }
        let rest = Bytes::from(self.bytes[offset as usize..].to_vec());
        let half = rest.len() / 2;
        let second = match self.breaks {
            true => Err(io::Error::other("the node is gone")),
            false => Ok(http_body::Frame::data(rest.slice(half..))),
        };
        let frames = [Ok(http_body::Frame::data(rest.slice(..half))), second];
        let body = http_body_util::StreamBody::new(futures::stream::iter(frames)).boxed_unsync();
        let status = if offset > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
        Ok(Response::builder().status(status).header(CONTENT_TYPE, manifest::OCI_INDEX).body(body).unwrap())
    }
}

/// `name`, its bytes, and whether the connection breaks half-way.
struct Nodes {
    holders: Vec<(&'static str, Vec<u8>, bool)>,
    asked: Arc<Mutex<Vec<String>>>,
}

#[async_trait::async_trait]
impl Mirror for Nodes {
    fn covers(&self, registry: &str) -> bool {
        registry != "127.0.0.2:1"
    }

    async fn sources(&self, _: &Reference, _: &str) -> Vec<Box<dyn crate::mirror::MirrorSource>> {
        let holder = |(name, bytes, breaks): &(&'static str, Vec<u8>, bool)| {
            let holder = Holder { bytes: bytes.clone(), breaks: *breaks, asked: self.asked.clone(), name };
            Box::new(holder) as Box<dyn crate::mirror::MirrorSource>
        };
        self.holders.iter().map(holder).collect()
    }
}

/// As a node's ingest: it knows the digest of what it has.
#[derive(Default)]
struct Ingest(Memory);
impl Sink for Ingest {
    fn offset(&self) -> u64 {
        self.0.offset()
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write(bytes)
    }
    fn restart(&mut self) -> io::Result<()> {
        self.0.restart()
    }
    fn digest(&self) -> Option<String> {
        Some(digest(&self.0.0))
    }
}

#[tokio::test]
async fn nodes_are_asked_one_after_the_other() {
    let good = b"a layer of some length".to_vec();
    let wrong = b"A layer of some length".to_vec();
    let registry = {
        let good = good.clone();
        serve(move |head| match head.contains("bytes=") {
            true => http("206 Partial Content", "", &good[11..]),
            false => http("200 OK", "", &good),
        })
        .await
    };
    let cases: [(&[(&'static str, &[u8], bool)], &[&str]); 6] = [
        (&[("a", &good, false), ("b", &good, false)], &["a 0"]),
        // gone half-way: the next goes on from there
        (&[("a", &good, true), ("b", &good, false)], &["a 0", "b 11"]),
        // wrong bytes are refused, and the next begins anew
        (&[("a", &wrong, false), ("b", &good, false)], &["a 0", "b 0"]),
        // the first half was wrong: the second is asked for all of it
        (&[("a", &wrong, true), ("b", &good, false)], &["a 0", "b 11", "b 0"]),
        // nobody has it right: the registry does
        (&[("a", &[], false), ("b", &wrong, false)], &["a 0", "b 0"]),
        // what is left of a broken transfer is the registry's to go on with
        (&[("a", &good, true)], &["a 0"]),
    ];
    for (holders, wanted) in cases {
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let holders = holders.iter().map(|(name, bytes, breaks)| (*name, bytes.to_vec(), *breaks)).collect();
        let nodes = Arc::new(Nodes { holders, asked: asked.clone() });
        let client = Client::new(Registries::default()).with_mirror(Some(nodes));
        let reference = Reference::parse(&format!("{registry}/a/b:1")).unwrap();
        let mut sink = Ingest::default();
        client.blob(&reference, &descriptor(&good), &[], &mut sink).await.unwrap();
        assert_eq!(
            (sink.0.0, asked.lock().clone()),
            (good.clone(), wanted.to_vec().iter().map(ToString::to_string).collect())
        );
    }
}

#[tokio::test]
async fn the_registry_says_what_latest_is_while_it_can() {
    let index =
        |text: &str| format!(r#"{{"schemaVersion":2,"manifests":[],"annotations":{{"of":"{text}"}}}}"#);
    let theirs = index("registry");
    let registry = serve(move |_| {
        http("200 OK", &format!("Content-Type: {}\r\n", manifest::OCI_INDEX), theirs.as_bytes())
    })
    .await;
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let nodes = Arc::new(Nodes { holders: vec![("a", index("node").into_bytes(), false)], asked });
    let client = Client::new(Registries::default()).with_mirror(Some(nodes));
    // nothing listens on port 1
    for (image, wanted) in [
        (format!("{registry}/a/b:1"), Some("node")),
        (format!("{registry}/a/b"), Some("registry")),
        ("127.0.0.1:1/a/b".to_string(), Some("node")),
        (format!("{registry}/a/b@{}", digest(index("registry").as_bytes())), Some("registry")),
        ("127.0.0.2:1/a/b:1".to_string(), None),
    ] {
        let reference = Reference::parse(&image).unwrap();
        let got = tokio::time::timeout(Duration::from_secs(5), client.resolve(&reference, &[])).await;
        let got = got.ok().and_then(Result::ok).map(|r| String::from_utf8_lossy(&r.bytes).into_owned());
        assert_eq!(got, wanted.map(index), "{image}");
    }
}
