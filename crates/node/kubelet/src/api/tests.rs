//! The API from a client's side: hand-made frames of both protocols, and kubectl itself where it is there.
use std::collections::BTreeMap;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::spdy::tests::{Client, frames};
use super::websocket::tests::{frame, message};
use super::*;

mod fakes;

pub use fakes::Fake;
use fakes::*;

const EXEC: &str = "/exec/default/p/main";

#[tokio::test]
async fn exec_over_websocket_ends_stdin_and_tells_the_exit_code() {
    let api = api(fake());
    let path = format!("{EXEC}?command=cat&input=1&output=1");
    let (head, mut client) = open_websocket(&api, &path, "v5.channel.k8s.io, v4.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(head.to_lowercase().contains("sec-websocket-protocol: v5.channel.k8s.io\r\n"), "{head}");
    let big = "x".repeat(60_000);
    client.write_all(&frame(0x82, b"\x00hi ")).await.unwrap();
    client.write_all(&frame(0x82, format!("\0{big}").as_bytes())).await.unwrap();
    client.write_all(&frame(0x82, &[255, 0])).await.unwrap();
    let seen = channels(&mut client).await;
    assert_eq!(seen[&1], format!("hi {big}"));
    assert_eq!(seen[&3], r#"{"metadata":{},"status":"Success"}"#);

    let (_, mut client) =
        open_websocket(&api, &format!("{EXEC}?command=exit&command=3&output=1"), "v4.channel.k8s.io").await;
    let status: Value = serde_json::from_str(&channels(&mut client).await[&3]).unwrap();
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}));
    let (_, mut client) =
        open_websocket(&api, &format!("{EXEC}?command=nothing&output=1"), "v4.channel.k8s.io").await;
    let status: Value = serde_json::from_str(&channels(&mut client).await[&3]).unwrap();
    let why = "Internal error occurred: error executing command in container: no such file";
    assert_eq!((&status["message"], &status["code"]), (&json!(why), &json!(500)));
}

#[tokio::test]
async fn terminals_and_older_protocols_of_websocket() {
    let api = api(fake());
    let path = format!("{EXEC}?command=size&output=1&error=1&tty=1");
    let (_, mut client) = open_websocket(&api, &path, "v4.channel.k8s.io").await;
    client.write_all(&frame(0x82, b"\x04{\"Width\":80,\"Height\":24}")).await.unwrap();
    assert_eq!(channels(&mut client).await[&1], "80x24 true\n");
    // before v4, success has no status, and a failure only its message
    let (_, mut client) = open_websocket(&api, &format!("{EXEC}?command=exit&command=1&output=1"), "").await;
    assert!(channels(&mut client).await[&3].starts_with("command terminated with non-zero exit code"));
    let path = format!("{EXEC}?command=both&command=out&output=1&error=1");
    let (_, mut client) = open_websocket(&api, &path, "base64.channel.k8s.io").await;
    let seen = channels(&mut client).await;
    assert_eq!(seen, BTreeMap::from([(b'1', "b3V0".into()), (b'2', "ZXJy".into())]));
    let (head, _) = open_websocket(&api, &path, "v9.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
}

#[tokio::test]
async fn exec_over_spdy_has_a_stream_for_each_end() {
    let api = api(fake());
    let path = format!("{EXEC}?command=cat&input=1&output=1&error=1");
    let (head, mut client) = open_spdy(&api, &path, "v4.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 101") && head.contains("SPDY/3.1"), "{head}");
    let (mut spdy_client, mut out) = (Client::default(), Vec::new());
    for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
        spdy_client.syn_stream(&mut out, id, &[("streamtype", kind)]);
    }
    spdy::data(&mut out, 3, false, b"through ");
    spdy::ping(&mut out, 9);
    spdy::data(&mut out, 3, true, b"the pipe");
    client.write_all(&out).await.unwrap();
    let (seen, accepted) = streams(&mut client).await;
    assert_eq!(accepted, 4);
    assert_eq!(seen[&5], "through the pipe");
    assert_eq!(seen[&1], r#"{"metadata":{},"status":"Success"}"#);

    let (head, _) = open_spdy(&api, &path, "v9").await;
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    let (head, _) = ask(&api, "POST", &path, &["Connection: close"]).await;
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
}

#[tokio::test]
async fn a_client_that_goes_takes_its_command_with_it() {
    let api = api(fake());
    let (client, server) = tokio::io::duplex(4096);
    let serving = tokio::spawn(api.serve(Box::new(server)));
    let mut client = client;
    let request = format!(
        "GET {EXEC}?command=hang&output=1 HTTP/1.1\r\nHost: n\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n\r\n"
    );
    client.write_all(request.as_bytes()).await.unwrap();
    client.read_u8().await.unwrap();
    drop(client);
    tokio::time::timeout(Duration::from_secs(5), serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn attach_and_run() {
    let api = api(fake());
    let (_, mut client) =
        open_websocket(&api, "/attach/default/p/main?stdout=true", "v4.channel.k8s.io").await;
    assert_eq!(channels(&mut client).await[&1], "attached");
    let (head, mut client) = ask(&api, "POST", "/run/default/p/u/main?cmd=a+b", &["Connection: close"]).await;
    let mut body = String::new();
    client.read_to_string(&mut body).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && body == "a|b", "{head}{body}");
}

fn forward_frames() -> Vec<u8> {
    let (mut client, mut out) = (Client::default(), Vec::new());
    for (id, port, request) in [(1, "80", "0"), (5, "81", "1")] {
        client.syn_stream(&mut out, id, &[("streamtype", "error"), ("port", port), ("requestid", request)]);
        spdy::data(&mut out, id, true, b"");
        client.syn_stream(
            &mut out,
            id + 2,
            &[("streamtype", "data"), ("port", port), ("requestid", request)],
        );
    }
    client.syn_stream(&mut out, 9, &[("streamtype", "data"), ("port", "0")]);
    spdy::data(&mut out, 3, true, b"world");
    out
}

#[tokio::test]
async fn ports_are_forwarded_over_spdy_and_within_a_websocket() {
    let api = api(fake());
    let (_, mut client) = open_spdy(&api, "/portForward/default/p", "portforward.k8s.io").await;
    client.write_all(&forward_frames()).await.unwrap();
    let why = "error forwarding port 81 to pod p, uid u: connection refused";
    let mut bytes = Vec::new();
    // both are done when each data stream and each error stream was answered
    while !String::from_utf8_lossy(&bytes).contains("world") || !String::from_utf8_lossy(&bytes).contains(why)
    {
        bytes.push(client.read_u8().await.unwrap());
    }
    client.shutdown().await.unwrap();
    client.read_to_end(&mut bytes).await.unwrap();
    let (datas, controls) = frames(&mut Default::default(), &bytes);
    let text: Vec<u8> =
        datas.iter().filter(|(id, ..)| *id == 3).flat_map(|(.., data)| data.clone()).collect();
    assert_eq!(text, b"hello world");
    assert!(datas.iter().any(|(id, is_last, _)| *id == 3 && *is_last));
    assert!(controls.contains(&spdy::Control::Reset { id: 9, status: spdy::REFUSED_STREAM }), "{controls:?}");

    let path = "/portForward/default/p";
    let (head, mut client) = open_websocket(&api, path, "SPDY/3.1+portforward.k8s.io").await;
    assert!(head.contains("SPDY/3.1+portforward.k8s.io"), "{head}");
    for part in forward_frames().chunks(7) {
        client.write_all(&frame(0x82, part)).await.unwrap();
    }
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains("world") || !String::from_utf8_lossy(&bytes).contains(why)
    {
        let (code, payload) = message(&mut client).await.unwrap();
        assert_eq!(code, 2);
        bytes.extend(payload);
    }
    client.write_all(&frame(0x88, &[])).await.unwrap();
    while let Ok((2, payload)) = message(&mut client).await {
        bytes.extend(payload);
    }
    frames(&mut Default::default(), &bytes);
}

#[tokio::test]
async fn ports_are_forwarded_over_channels() {
    let api = api(fake());
    let path = "/portForward/default/p?port=80&port=81";
    let (_, mut client) = open_websocket(&api, path, "v4.channel.k8s.io").await;
    client.write_all(&frame(0x82, b"\x00world")).await.unwrap();
    let (mut seen, mut all) = (BTreeMap::<u8, Vec<u8>>::new(), String::new());
    while !all.contains("world") || !all.contains("refused") {
        let (_, payload) = message(&mut client).await.unwrap();
        seen.entry(payload[0]).or_default().extend_from_slice(&payload[1..]);
        all += &String::from_utf8_lossy(&payload);
    }
    assert_eq!(seen[&0], b"P\0hello world");
    assert_eq!(seen[&3], b"Q\0error forwarding port 81 to pod p, uid u: connection refused");
    assert!(open_websocket(&api, "/portForward/default/p", "").await.0.starts_with("HTTP/1.1 400"));
}

#[tokio::test]
async fn logs_are_sent_or_refused_with_a_status() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "2026-01-01T00:00:00Z stdout F one\n2026-01-01T00:00:00Z stdout F two\n")
        .unwrap();
    let api = api(Fake { log_path: file.path().into(), ..fake() });
    let (head, body) = get(&api, "/containerLogs/default/p/main?tailLines=1").await;
    assert!(
        head.starts_with("HTTP/1.1 200") && body.contains("two\n") && !body.contains("one"),
        "{head}{body}"
    );
    for (path, code, message) in [
        ("waiting", 400, "container \"waiting\" in pod \"p\" is waiting to start: ContainerCreating"),
        ("main?previous=true", 400, "previous terminated container \"main\" in pod \"p\" not found"),
        ("none", 404, "container \"none\" not found in pod \"p\""),
    ] {
        let (_, body) = get(&api, &format!("/containerLogs/default/p/{path}")).await;
        let status: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((&status["code"], &status["message"]), (&json!(code), &json!(message)));
    }
    let (_, mut client) = open_websocket(&api, "/containerLogs/default/p/main", "binary.k8s.io").await;
    assert_eq!(message(&mut client).await.unwrap(), (2, b"one\ntwo\n".to_vec()));
    assert_eq!(message(&mut client).await.unwrap().0, 8);
}

#[tokio::test]
async fn numbers_are_the_runtimes() {
    let api = api(fake());
    let (_, body) = get(&api, "/stats/summary").await;
    let summary: Value = serde_json::from_str(&body).unwrap();
    let container = &summary["pods"][0]["containers"][0];
    assert_eq!(summary["pods"][0]["podRef"], json!({"name": "p", "namespace": "default", "uid": "u"}));
    assert_eq!(container["cpu"]["usageCoreNanoSeconds"], 1_500_000_000_u64);
    assert_eq!(
        (&container["memory"]["workingSetBytes"], &container["rootfs"]["usedBytes"]),
        (&json!(4096), &json!(7))
    );
    assert!(summary["node"]["memory"]["workingSetBytes"].as_u64().unwrap() > 0);
    let (_, body) = get(&api, "/metrics/resource").await;
    assert!(body.contains(
        "container_cpu_usage_seconds_total{container=\"main\",namespace=\"default\",pod=\"p\"} 1.5 "
    ));
    assert!(body.contains("resource_scrape_error 0\n"));
    assert!(
        get(&api, "/metrics").await.1.contains("kubelet_running_containers{container_state=\"running\"} 1\n")
    );
    assert_eq!(get(&api, "/healthz").await.1, "ok");
    assert!(get(&api, "/pods").await.1.contains("\"PodList\""));
    assert!(get(&api, "/nothing").await.0.starts_with("HTTP/1.1 404"));
}

/// As much of an API server as kubectl needs, in front of the API.
async fn front(api: Api) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let api = api.clone();
            let service = service_fn(move |mut request: Request<Incoming>| {
                let api = api.clone();
                async move {
                    let answer = front_answer(&api, &mut request).await;
                    answer.session.map(tokio::spawn);
                    Ok::<_, Infallible>(answer.response)
                }
            });
            tokio::spawn(
                http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades(),
            );
        }
    });
    format!("http://{address}")
}

async fn front_answer(api: &Api, request: &mut Request<Incoming>) -> Answer {
    let (path, query) =
        (request.uri().path().to_string(), request.uri().query().unwrap_or_default().to_string());
    let json = |value: Value| Answer::typed(value.to_string(), "application/json");
    let pod = "/api/v1/namespaces/default/pods/p";
    match path.strip_prefix(pod) {
        Some("") => json(json!({"kind": "Pod", "apiVersion": "v1", "status": {"phase": "Running"},
            "metadata": {"name": "p", "namespace": "default", "uid": "u"},
            "spec": {"containers": [{"name": "main", "image": "i"}]}})),
        Some(subresource) => {
            let path = match subresource {
                "/log" => "/containerLogs/default/p/main",
                "/portforward" => "/portForward/default/p",
                "/exec" => EXEC,
                _ => "/none",
            };
            *request.uri_mut() = format!("{path}?{query}").parse().unwrap();
            api.answer(request).await
        }
        None if path == "/api" => json(json!({"kind": "APIVersions", "versions": ["v1"]})),
        None if path == "/api/v1" => {
            json(json!({"kind": "APIResourceList", "groupVersion": "v1", "resources": [
            {"name": "pods", "singularName": "pod", "namespaced": true, "kind": "Pod", "verbs": ["get", "list"]}]}))
        }
        None => json(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})),
    }
}

/// Runs `$KUBECTL`, or `kubectl`; protocols are chosen by its environment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs kubectl"]
async fn kubectl_itself_is_content() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "2026-01-01T00:00:00Z stdout F one\n").unwrap();
    let server =
        front(api(Fake { log_path: file.path().into(), is_running: false.into(), ..Fake::default() })).await;
    let home = tempfile::tempdir().unwrap();
    let kubectl = |args: &str, is_websocket: bool| {
        let program = std::env::var("KUBECTL").unwrap_or("kubectl".into());
        let mut command = tokio::process::Command::new(program);
        command.arg("--server").arg(&server).args(args.split(' ')).kill_on_drop(true);
        command.env_clear().env("HOME", home.path()).env("KUBECONFIG", "/dev/null");
        command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", is_websocket.to_string());
        command.env("KUBECTL_PORT_FORWARD_WEBSOCKETS", is_websocket.to_string());
        command.stdin(std::process::Stdio::piped());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command
    };
    for is_websocket in [true, false] {
        let mut child = kubectl("exec -i p -- cat", is_websocket).spawn().unwrap();
        let (mut stdin, big) = (child.stdin.take().unwrap(), "0123456789".repeat(100_000));
        let sent = big.clone();
        tokio::spawn(async move { stdin.write_all(sent.as_bytes()).await });
        let output = child.wait_with_output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == big.as_bytes(), "{} bytes", output.stdout.len());
        let output = kubectl("exec p -- exit 3", is_websocket).output().await.unwrap();
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        let output = kubectl("exec p -- both out", is_websocket).output().await.unwrap();
        assert!(output.stdout == b"out" && output.stderr.starts_with(b"err"), "{output:?}");
        let output = kubectl("logs p --follow", is_websocket).output().await.unwrap();
        assert_eq!(output.stdout, b"one\n", "{output:?}");
        let output = kubectl("logs p --previous", is_websocket).output().await.unwrap();
        let why =
            "Error from server (BadRequest): previous terminated container \"main\" in pod \"p\" not found\n";
        assert_eq!(String::from_utf8_lossy(&output.stderr), why);

        let mut child = kubectl("port-forward p :80", is_websocket).spawn().unwrap();
        let mut line = String::new();
        let mut stdout = tokio::io::BufReader::new(child.stdout.take().unwrap());
        tokio::io::AsyncBufReadExt::read_line(&mut stdout, &mut line).await.unwrap();
        let address = line.split(' ').nth(2).unwrap().to_string();
        for _ in 0..3 {
            let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
            let (mut read, mut write) = stream.into_split();
            let sent = big.clone();
            tokio::spawn(async move {
                write.write_all(sent.as_bytes()).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut text = String::new();
            read.read_to_string(&mut text).await.unwrap();
            assert!(text == format!("hello {big}"), "{} bytes", text.len());
        }
        child.kill().await.unwrap();
    }
}
