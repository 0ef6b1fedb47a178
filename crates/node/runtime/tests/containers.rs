//! Real containers in real namespaces, with Debian's static busybox. Needs root; without it says so and passes.
//!
//! Run without libtest: the test program is its own shim, and a shim must not have threads.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use sampan_drivers::Runtime;
use sampan_drivers::runtime::*;
use sampan_runtime::Node;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[path = "containers/bench.rs"]
mod bench;
use bench::{Bench, LIMIT, run, sh, wait_for, write_image};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().map(String::as_str) == Some("shim") {
        return sampan_runtime::shim_main(&args[1..]);
    }
    if args.iter().any(|a| a == "--list") {
        return ExitCode::SUCCESS;
    }
    let root = nix_root();
    if !root || !Path::new("/bin/busybox").exists() {
        println!("skipped: needs root and /bin/busybox (busybox-static)");
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(all());
    ExitCode::SUCCESS
}

fn nix_root() -> bool {
    fs::read_to_string("/proc/self/status").unwrap().lines().any(|l| l == "Uid:\t0\t0\t0\t0")
}

async fn all() {
    let mut bench = Bench {
        folder: tempfile::tempdir().unwrap(),
        cgroup: format!("sampan-test-{}", sampan_world::random::suffix(6)),
        image: String::new(),
    };
    fs::create_dir_all(bench.folder.path().join("agent/images")).unwrap();
    write_image(&bench.folder.path().join("agent/images/busybox.tar"));
    let node = bench.node().await;
    let image = match node.image_status("test/busybox:1").await.unwrap() {
        Some(image) => image,
        None => panic!("{:?}", node.import(&bench.folder.path().join("agent/images/busybox.tar")).await),
    };
    bench.image = image.id;
    macro_rules! test {
        ($name:ident) => {
            let start = Instant::now();
            $name(&bench, &node).await;
            println!("test {} ... ok ({} ms)", stringify!($name), start.elapsed().as_millis());
        };
    }
    test!(prints_and_exits);
    test!(isolation_and_limits);
    test!(users_and_capabilities);
    test!(failures_to_start);
    test!(exec_attach_and_terminals);
    test!(stop_and_logs);
    test!(shared_processes);
    test!(out_of_memory);
    test!(volumes);
    test!(port_forwarding);
    test!(takeover);
    test!(shim_death);
    test!(measures);
}

async fn prints_and_exits(bench: &Bench, node: &Node) {
    let pod = node.run_sandbox(&bench.sandbox("prints")).await.unwrap();
    let mut events = node.events();
    let config = bench.container("echo $GREETING; echo err >&2; hostname; exit 3");
    let ended = run(bench, node, &pod, &config).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
    assert_eq!(events.recv().await.unwrap().pod_uid, "uid-prints");
    let log = bench.log("prints", &config);
    assert!(
        log.contains(" stdout F hello\n")
            && log.contains(" stderr F err\n")
            && log.contains(" stdout F prints\n"),
        "{log}"
    );
    let done = run(bench, node, &pod, &bench.container("true")).await;
    assert_eq!((done.exit_code, done.reason.as_str()), (0, "Completed"));
    node.remove_sandbox(&pod).await.unwrap();
    node.remove_sandbox(&pod).await.unwrap();
    assert!(node.list_containers().await.unwrap().is_empty());
}

async fn isolation_and_limits(bench: &Bench, node: &Node) {
    let mut sandbox = bench.sandbox("isolated");
    sandbox.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
    let pod = node.run_sandbox(&sandbox).await.unwrap();
    let mut config = bench.container("sleep 1000");
    config.resources = Resources {
        memory_limit_bytes: 64 << 20,
        cpu_quota_us: 50_000,
        pids_limit: 50,
        ..Resources::default()
    };
    config.working_dir = Some("/made/for/me".into());
    let id = node.create_container(&pod, &config).await.unwrap();
    node.start_container(&id).await.unwrap();
    for (script, wanted) in [
        ("echo $$ | grep -q . && cat /proc/1/cmdline | head -c 5", "sleep"),
        ("pwd", "/made/for/me\n"),
        ("cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "0\n"),
        (
            "touch /proc/sys/kernel/hostname 2>/dev/null; echo x > /proc/sys/kernel/hostname 2>/dev/null || echo no",
            "no\n",
        ),
        ("cat /proc/kcore | head -c1; ls /sys/firmware", ""),
        ("touch /sys/x 2>/dev/null || echo no", "no\n"),
        ("ls -d /dev/shm/ /dev/pts/ /dev/ptmx; echo x > /dev/null", "/dev/ptmx\n/dev/pts/\n/dev/shm/\n"),
        ("mount -t tmpfs t /tmp 2>/dev/null || echo no", "no\n"),
        ("unshare -U true 2>/dev/null || echo no", "no\n"),
        ("mknod /tmp/disk b 254 0 && head -c1 /tmp/disk >/dev/null 2>&1 || echo no", "no\n"),
        ("grep Seccomp: /proc/self/status", "Seccomp:\t2\n"),
        ("grep NoNewPrivs: /proc/self/status", "NoNewPrivs:\t0\n"),
        ("grep CapBnd: /proc/self/status", "CapBnd:\t00000000a80425fb\n"),
        ("ls /proc/self/fd | grep -c .", "4\n"),
    ] {
        let (out, err, _) = sh(node, &id, script).await;
        assert_eq!(out, wanted, "{script}: {err}");
    }
    let memory = ["/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max"];
    let (out, ..) = sh(node, &id, &format!("cat {} {} 2>/dev/null", memory[0], memory[1])).await;
    assert_eq!(out, "67108864\n");
    let stats = node.container_stats().await.unwrap();
    assert!(stats.iter().any(|s| s.container_id == id && s.memory_working_set_bytes > 0), "{stats:?}");
    node.remove_sandbox(&pod).await.unwrap();
}

async fn users_and_capabilities(bench: &Bench, node: &Node) {
    let pod = node.run_sandbox(&bench.sandbox("users")).await.unwrap();
    let mut config = bench.container("id; grep CapEff /proc/self/status; echo out > /dev/stdout; sleep 1000");
    config.security.run_as_user = Some(1000);
    config.security.supplemental_groups = vec![7];
    config.security.no_new_privileges = true;
    config.security.add_capabilities = vec!["NET_ADMIN".into()];
    let id = node.create_container(&pod, &config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let (out, ..) = sh(node, &id, "id -u; id -G; echo $HOME; grep -E 'NoNew|CapEff' /proc/self/status").await;
    assert_eq!(out, "1000\n1000 7 44\n/home/web\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n");
    assert_eq!(node.container_status(&id).await.unwrap().user, Some((1000, 1000, vec![1000, 44, 7])));
    assert!(bench.said("users", &config).contains("out\n"), "{}", bench.said("users", &config));
    let mut config = bench.container("touch /x || echo readonly; grep CapEff /proc/self/status");
    config.security.readonly_rootfs = true;
    config.security.drop_capabilities = vec!["ALL".into()];
    run(bench, node, &pod, &config).await;
    let said = bench.said("users", &config);
    assert!(said.contains("readonly") && said.contains("CapEff:\t0000000000000000"), "{said}");
    let mut config =
        bench.container("mount -t tmpfs t /tmp && echo mounted; ls /dev/loop-control /dev/kmsg 2>/dev/null");
    config.security.privileged = true;
    run(bench, node, &pod, &config).await;
    assert!(bench.said("users", &config).contains("mounted"), "{}", bench.said("users", &config));
    node.remove_sandbox(&pod).await.unwrap();
}

async fn failures_to_start(bench: &Bench, node: &Node) {
    let pod = node.run_sandbox(&bench.sandbox("failures")).await.unwrap();
    for (command, wanted) in [
        ("foo", r#"exec: "foo": executable file not found in $PATH"#),
        ("/no/such", "no such file or directory"),
        ("/etc/passwd", "permission denied"),
    ] {
        let mut config = bench.container("");
        config.command = vec![command.into()];
        let id = node.create_container(&pod, &config).await.unwrap();
        let error = node.start_container(&id).await.unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
        let status = node.container_status(&id).await.unwrap();
        assert_eq!(
            (status.state, status.exit_code, status.reason.as_str()),
            (ContainerState::Exited, 128, "StartError")
        );
        assert!(status.message.contains(wanted));
    }
    let mut config = bench.container("true");
    config.mounts = vec![Mount {
        container_path: "/x".into(),
        host_path: "/no/such/folder".into(),
        readonly: false,
        recursive_readonly: false,
        propagation: Propagation::Private,
    }];
    let id = node.create_container(&pod, &config).await.unwrap();
    assert!(node.start_container(&id).await.unwrap_err().to_string().contains("/no/such/folder"));
    assert!(matches!(
        node.pull_image("UPPER", &[]).await,
        Err(RuntimeError::Image { source: ImageError::InvalidName(_), .. })
    ));
    node.remove_sandbox(&pod).await.unwrap();
}

fn streams(stdin: &[u8], tty: bool) -> (Streams, tokio::io::DuplexStream, tokio::io::DuplexStream) {
    let (out, out_theirs) = tokio::io::duplex(1 << 16);
    let (err, err_theirs) = tokio::io::duplex(1 << 16);
    let stdin = std::io::Cursor::new(stdin.to_vec());
    let streams = Streams {
        stdin: Some(Box::new(stdin)),
        stdout: Some(Box::new(out_theirs)),
        stderr: if tty { None } else { Some(Box::new(err_theirs)) },
        tty,
        resize: None,
    };
    (streams, out, err)
}

async fn exec_attach_and_terminals(bench: &Bench, node: &Node) {
    let pod = node.run_sandbox(&bench.sandbox("execs")).await.unwrap();
    let mut config = bench.container("while read line; do echo got $line; done; echo end");
    config.stdin = true;
    config.stdin_once = true;
    let id = node.create_container(&pod, &config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let command = |c: &str| vec!["/bin/sh".to_string(), "-c".into(), c.into()];
    let (s, mut out, mut err) = streams(b"typed", false);
    let done = node.exec(&id, &command("cat; echo; echo e >&2; exit 7"), s).await.unwrap();
    assert_eq!(done, ExecResult::Exited(7));
    let (mut a, mut b) = (String::new(), String::new());
    out.read_to_string(&mut a).await.unwrap();
    err.read_to_string(&mut b).await.unwrap();
    assert_eq!((a.as_str(), b.as_str()), ("typed\n", "e\n"));
    let (mut s, mut out, _) = streams(b"", true);
    let (sizes, receiver) = tokio::sync::mpsc::channel(1);
    s.resize = Some(receiver);
    sizes.send(TerminalSize { width: 91, height: 17 }).await.unwrap();
    let done = node.exec(&id, &command("sleep 0.3; stty size; test -t 0 && echo tty"), s).await.unwrap();
    assert_eq!(done, ExecResult::Exited(0));
    let mut a = String::new();
    out.read_to_string(&mut a).await.unwrap();
    assert_eq!(a, "17 91\r\ntty\r\n");
    let failed = node.exec(&id, &["nope".to_string()], streams(b"", false).0).await.unwrap();
    assert!(
        matches!(&failed, ExecResult::Failed(m) if m.contains("executable file not found in $PATH")),
        "{failed:?}"
    );
    let slow = node.exec_sync(&id, &command("sleep 1000"), Duration::from_millis(200), 100).await;
    assert!(slow.unwrap_err().to_string().contains("timed out"));
    let (out, ..) = node.exec_sync(&id, &command("seq 1 10000"), LIMIT, 10).await.unwrap();
    assert_eq!(out.len(), 10);
    let (s, mut out, _) = streams(b"one\ntwo\n", false);
    node.attach(&id, s).await.unwrap();
    let mut a = String::new();
    out.read_to_string(&mut a).await.unwrap();
    assert_eq!(a, "got one\ngot two\nend\n");
    wait_for(node, &id, ContainerState::Exited).await;
    assert_eq!(bench.said("execs", &config), a);
    let mut config = bench.container("stty -echo; read x; echo said $x");
    config.stdin = true;
    config.tty = true;
    let id = node.create_container(&pod, &config).await.unwrap();
    node.start_container(&id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (s, mut out, _) = streams(b"yes\n", true);
    node.attach(&id, s).await.unwrap();
    let mut a = String::new();
    out.read_to_string(&mut a).await.unwrap();
    assert!(a.contains("said yes"), "{a:?}");
    node.remove_sandbox(&pod).await.unwrap();
}

async fn stop_and_logs(bench: &Bench, node: &Node) {
    let pod = node.run_sandbox(&bench.sandbox("stops")).await.unwrap();
    let config = bench.container("trap 'echo bye; exit 5' TERM; echo up; while true; do sleep 0.05; done");
    let id = node.create_container(&pod, &config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let path = bench.folder.path().join("logs/stops").join(&config.log_path);
    while !bench.log("stops", &config).contains("up") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    fs::rename(&path, path.with_extension("old")).unwrap();
    node.reopen_container_log(&id).await.unwrap();
    node.stop_container(&id, 10).await.unwrap();
    assert_eq!(node.container_status(&id).await.unwrap().exit_code, 5);
    assert_eq!(bench.said("stops", &config), "bye\n");
    let stubborn = bench.container("trap '' TERM; while true; do sleep 0.05; done");
    let id = node.create_container(&pod, &stubborn).await.unwrap();
    node.start_container(&id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let start = Instant::now();
    node.stop_container(&id, 1).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(900) && start.elapsed() < Duration::from_secs(5));
    assert_eq!(node.container_status(&id).await.unwrap().exit_code, 137);
    node.remove_sandbox(&pod).await.unwrap();
}

async fn shared_processes(bench: &Bench, node: &Node) {
    let mut sandbox = bench.sandbox("shared");
    sandbox.pid = NamespaceMode::Pod;
    let pod = node.run_sandbox(&sandbox).await.unwrap();
    let one = node.create_container(&pod, &bench.container("sleep 1111 & sleep 2222")).await.unwrap();
    node.start_container(&one).await.unwrap();
    let two = node.create_container(&pod, &bench.container("sleep 3333")).await.unwrap();
    node.start_container(&two).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (out, ..) = sh(node, &two, "ps").await;
    assert!(out.contains("1111") && out.contains("2222") && out.contains("3333"), "{out}");
    node.stop_container(&one, 0).await.unwrap();
    let (out, ..) = sh(node, &two, "ps").await;
    assert!(!out.contains("1111") && out.contains("3333"), "what a container leaves is killed: {out}");
    node.remove_sandbox(&pod).await.unwrap();
}

async fn out_of_memory(bench: &Bench, node: &Node) {
    let pod = node.run_sandbox(&bench.sandbox("oom")).await.unwrap();
    let mut config = bench.container("exec tail /dev/zero");
    config.resources.memory_limit_bytes = 16 << 20;
    config.resources.oom_score_adj = 1000;
    let ended = run(bench, node, &pod, &config).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"));
    // as containerd has it: also where only a child was killed, and the first process ended well
    let mut child = bench.container("tail /dev/zero; exit 0");
    child.resources = config.resources.clone();
    let ended = run(bench, node, &pod, &child).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (0, "OOMKilled"));
    node.remove_sandbox(&pod).await.unwrap();
    let mut limited = bench.sandbox("limited");
    limited.resources.memory_limit_bytes = 16 << 20;
    let pod = node.run_sandbox(&limited).await.unwrap();
    let mut config = bench.container("exec tail /dev/zero");
    config.resources.oom_score_adj = 1000;
    let ended = run(bench, node, &pod, &config).await;
    assert_eq!(ended.exit_code, 137, "the pod's limit holds where the container has none");
    node.remove_sandbox(&pod).await.unwrap();
}

async fn volumes(bench: &Bench, node: &Node) {
    let pod = node.run_sandbox(&bench.sandbox("volumes")).await.unwrap();
    let host = bench.folder.path().join("volume");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("file"), "content\n").unwrap();
    let mount = |path: &str, host_path: PathBuf, readonly| Mount {
        container_path: path.into(),
        host_path,
        readonly,
        recursive_readonly: false,
        propagation: Propagation::Private,
    };
    let mut config =
        bench.container("cat /data/file /etc/one; touch /data/new; touch /ro/new || echo ro; ls /dev/shm");
    config.mounts = vec![
        mount("/data", host.clone(), false),
        mount("/ro", host.clone(), true),
        mount("/etc/one", host.join("file"), true),
    ];
    run(bench, node, &pod, &config).await;
    let said = bench.said("volumes", &config);
    assert!(said.starts_with("content\ncontent\n") && said.contains("ro\n"), "{said}");
    assert!(host.join("new").exists());
    node.remove_sandbox(&pod).await.unwrap();
}

async fn port_forwarding(bench: &Bench, node: &Node) {
    let pod = node.run_sandbox(&bench.sandbox("ports")).await.unwrap();
    let id = node
        .create_container(&pod, &bench.container("while true; do echo served | nc -l -p 8080; done"))
        .await
        .unwrap();
    node.start_container(&id).await.unwrap();
    let end = Instant::now() + LIMIT;
    let mut text = String::new();
    while text.is_empty() && Instant::now() < end {
        if let Ok(mut stream) = node.port_forward(&pod, 8080).await {
            let _ = stream.write_all(b"x").await;
            let _ = stream.shutdown().await;
            let _ = stream.read_to_string(&mut text).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(text, "served\n");
    assert!(node.port_forward(&pod, 1).await.is_err());
    node.remove_sandbox(&pod).await.unwrap();
}

/// Another agent takes over what the first one left running, and what ended meanwhile.
async fn takeover(bench: &Bench, node: &Node) {
    let pod = node.run_sandbox(&bench.sandbox("takeover")).await.unwrap();
    let stays = node.create_container(&pod, &bench.container("sleep 1000")).await.unwrap();
    node.start_container(&stays).await.unwrap();
    let next = bench.node().await;
    assert_eq!(next.container_status(&stays).await.unwrap().state, ContainerState::Running);
    let config = bench.container("exit 4");
    let ended = run(bench, &next, &pod, &config).await;
    assert_eq!(ended.exit_code, 4);
    drop(next);
    let next = bench.node().await;
    assert_eq!(next.container_status(&ended.id).await.unwrap().exit_code, 4);
    assert_eq!(sh(&next, &stays, "echo hi").await.0, "hi\n");
    next.remove_sandbox(&pod).await.unwrap();
    assert!(next.list_sandboxes().await.unwrap().is_empty());
    node.remove_sandbox(&pod).await.unwrap();
}

async fn shim_death(bench: &Bench, node: &Node) {
    for mode in [NamespaceMode::Container, NamespaceMode::Node] {
        let mut sandbox = bench.sandbox("dies");
        sandbox.pid = mode;
        let pod = node.run_sandbox(&sandbox).await.unwrap();
        let script = "sleep 98765 & sleep 98765";
        let id = node.create_container(&pod, &bench.container(script)).await.unwrap();
        node.start_container(&id).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let pid = fs::read_to_string(
            bench.folder.path().join("agent/runtime/sandboxes").join(&pod).join("shim.pid"),
        )
        .unwrap();
        Command::new("kill").args(["-9", pid.trim()]).status().unwrap();
        let ended = wait_for(node, &id, ContainerState::Exited).await;
        assert_eq!((ended.exit_code, ended.reason.as_str()), (255, "Unknown"));
        let sandboxes = node.list_sandboxes().await.unwrap();
        assert_eq!(sandboxes.iter().find(|s| s.id == pod).unwrap().state, SandboxState::NotReady);
        let left = Command::new("sh")
            .args(["-c", "grep -lsz 98765 /proc/[0-9]*/cmdline | grep -v self"])
            .output()
            .unwrap();
        let left = String::from_utf8(left.stdout).unwrap();
        let mine: Vec<&str> =
            left.lines().filter(|l| fs::read(l).is_ok_and(|c| c.starts_with(b"sleep\0"))).collect();
        assert!(mine.is_empty(), "{mine:?}");
        assert!(node.create_container(&pod, &bench.container("true")).await.is_ok());
        node.remove_sandbox(&pod).await.unwrap();
    }
}

/// Prints what a pod costs: times in the middle of several, the shim's memory.
async fn measures(bench: &Bench, node: &Node) {
    let (mut sandboxes, mut containers, mut private, mut rss) = (vec![], vec![], 0, 0);
    for n in 0..10 {
        let name = format!("measure{n}");
        let start = Instant::now();
        let pod = node.run_sandbox(&bench.sandbox(&name)).await.unwrap();
        sandboxes.push(start.elapsed().as_micros());
        let start = Instant::now();
        let id = node.create_container(&pod, &bench.container("sleep 1000")).await.unwrap();
        node.start_container(&id).await.unwrap();
        assert_eq!(node.container_status(&id).await.unwrap().state, ContainerState::Running);
        containers.push(start.elapsed().as_micros());
        sh(node, &id, "true").await;
        let pid = fs::read_to_string(
            bench.folder.path().join("agent/runtime/sandboxes").join(&pod).join("shim.pid"),
        )
        .unwrap();
        let smaps = fs::read_to_string(format!("/proc/{}/smaps_rollup", pid.trim())).unwrap();
        let sum = |names: &[&str]| -> u64 {
            let line = |l: &str| {
                names
                    .iter()
                    .any(|n| l.starts_with(n))
                    .then(|| l.split_whitespace().nth(1)?.parse::<u64>().ok())
                    .flatten()
            };
            smaps.lines().filter_map(line).sum()
        };
        private = sum(&["Private_Dirty", "Private_Clean"]);
        rss = sum(&["Rss"]);
        if n == 0 {
            println!("first shim alone: private {private} kB");
        }
        if n % 2 == 1 {
            node.remove_sandbox(&pod).await.unwrap();
        }
    }
    sandboxes.sort_unstable();
    containers.sort_unstable();
    println!(
        "sandbox {} us, create to running {} us (medians); shim private {private} kB, RSS {rss} kB",
        sandboxes[5], containers[5]
    );
    for sandbox in node.list_sandboxes().await.unwrap() {
        node.remove_sandbox(&sandbox.id).await.unwrap();
    }
}
