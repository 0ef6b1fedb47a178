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
