//! `sampan image build` through the real binary: natively and by emulation, into registries, files and a node.
//!
//! Upstream counterpart: BuildKit's `frontend/dockerfile/dockerfile_test.go`. Bases are examples/images.py's busybox for
//! three platforms, in Debian's docker-registry; skopeo looks at what was pushed.
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use sampan_tests::peer::{Home, Peer};
use sampan_tests::process::{Ran, run};
use sampan_tests::{Space, Suite, cases, has, seconds, wait_for};
use serde_json::Value;

fn main() -> ExitCode {
    Suite::new("build", "amd64,arm64")
        .with_registry()
        .together(cases![
            three_platforms,
            the_same_bytes_again,
            what_copy_and_add_take,
            secrets_leave_no_trace,
            errors_say_where,
            for_this_machines_node,
            outputs_and_targets,
            on_native_nodes,
        ])
        .alone(cases![killed_builds_leave_nothing])
        .run()
}

const PLATFORMS: &str = "linux/amd64,linux/arm64,linux/arm/v7";

/// A home with a context `c`, a registry that has the base image, and a build store of its own.
struct Bench {
    home: Home,
    peer: Peer,
    base: String,
}

fn web() -> Result<PathBuf> {
    static MADE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = MADE.lock();
    let folder = sampan_tests::cluster::target_folder()?.join("tmp/example-images");
    let path = folder.join("web.tar");
    if !path.exists() {
        let project = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples/images.py");
        let mut command = Command::new("python3");
        command.arg(project).arg(&folder);
        run(&mut command, b"", seconds(120))?.ok().context("making the examples' images")?;
    }
    Ok(path)
}

impl Bench {
    fn new(s: &Space, dockerfile: &str, files: &[(&str, &str)]) -> Result<Bench> {
        let (home, peer) = (Home::new(s)?, Peer::start(None)?);
        let base = format!("{}/base:1", peer.host);
        let archive = format!("oci-archive:{}", web()?.display());
        home.sampan(&["image", "copy", "--insecure", &archive, &base])?.ok()?;
        let bench = Bench { home, peer, base };
        bench.file("Dockerfile", dockerfile)?;
        files.iter().try_for_each(|(name, text)| bench.file(name, text))?;
        Ok(bench)
    }

    /// A file of the context; `BASE` in it is the base image.
    fn file(&self, name: &str, text: &str) -> Result<()> {
        let path = self.home.path("c").join(name);
        std::fs::create_dir_all(path.parent().context("a folder")?)?;
        Ok(std::fs::write(path, text.replace("BASE", &self.base))?)
    }

    fn build(&self, args: &[&str]) -> Result<Ran> {
        let data = self.home.path("data").display().to_string();
        self.home.sampan(&[&["image", "build", "--insecure", "-d", &data], args, &["c"]].concat())
    }

    /// The Dockerfile's text is replaced first.
    fn build_of(&self, dockerfile: &str, args: &[&str]) -> Result<Ran> {
        self.file("Dockerfile", dockerfile)?;
        self.build(&[&["-o", "type=cacheonly"], args].concat())
    }

    fn name(&self, tag: &str) -> String {
        format!("{}/{tag}", self.peer.host)
    }

    fn config(&self, name: &str, arch: &str) -> Result<Value> {
        let name = format!("docker://{name}");
        let args = ["--override-arch", arch, "inspect", "--config", "--tls-verify=false", &name];
        Ok(serde_json::from_str(&self.home.skopeo(&args)?)?)
    }

    /// The files of a build, as they are in its image.
    fn files(&self, args: &[&str]) -> Result<PathBuf> {
        let out = self.home.path("out");
        let _ = std::fs::remove_dir_all(&out);
        let to = out.display().to_string();
        self.build(&[&["-o", &to], args].concat())?.ok()?;
        Ok(out)
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn three_platforms(s: &Space) -> Result<()> {
    let dockerfile = "FROM --platform=$BUILDPLATFORM BASE AS build\n\
        RUN uname -m > /machine\n\
        FROM BASE\nARG TARGETARCH\nLABEL made=here\nWORKDIR /app\n\
        COPY --from=build /machine built-on\n\
        RUN test $(uname -m) != x86_64 || test $TARGETARCH = amd64; echo $(uname -m) $TARGETARCH\n\
        ENTRYPOINT [\"cat\", \"built-on\"]\n";
    let bench = Bench::new(s, dockerfile, &[])?;
    let name = bench.name("app:1");
    let args = ["-t", &name, "--platform", PLATFORMS, "--push", "--label", "more=too"];
    let first = bench.build(&args)?;
    ensure!(first.code == 0, "{}", first.text());
    for said in ["aarch64 arm64", "armv7l arm", "x86_64 amd64", "[linux/arm/v7 stage-1 4/4] RUN"] {
        has(&first.err, said)?;
    }
    // the stage for the machine itself ran once
    let builds = first.err.lines().filter(|l| l.contains("build 2/2] RUN")).count();
    let cached = first.err.lines().filter(|l| l.ends_with("CACHED")).count();
    ensure!((builds, cached) == (3, 2), "{builds} builds, {cached} cached:\n{}", first.err);
    let index = bench.home.raw(&name)?;
    ensure!(index["mediaType"] == "application/vnd.oci.image.index.v1+json", "{index}");
    let platforms: Vec<String> =
        index["manifests"].as_array().into_iter().flatten().map(|m| m["platform"].to_string()).collect();
    ensure!(platforms.len() == 3 && platforms[2].contains("v7"), "{platforms:?}");
    let config = bench.config(&name, "arm64")?;
    ensure!(config["architecture"] == "arm64", "{config}");
    let run = &config["config"];
    ensure!(run["Labels"]["made"] == "here" && run["Labels"]["more"] == "too", "{config}");
    ensure!(run["Entrypoint"][1] == "built-on" && run["Cmd"].is_null(), "{config}");
    ensure!(run["WorkingDir"] == "/app", "{config}");
    let made = |h: &Value| h.as_array().into_iter().flatten().filter(|e| e["empty_layer"] != true).count();
    let layers = config["rootfs"]["diff_ids"].as_array().map_or(0, Vec::len);
    ensure!(made(&config["history"]) == layers, "{config}");
    // once more: everything from the cache, the same image
    let again = bench.build(&args)?;
    ensure!(!again.err.contains("x86_64 amd64"), "a step ran again:\n{}", again.err);
    ensure!(again.ok()?.lines().last() == first.out.lines().last(), "another image");
    // and with --no-cache they run
    let anew = bench.build(&["-o", "type=cacheonly", "--no-cache"])?;
    has(&anew.err, "x86_64 amd64")
}

fn the_same_bytes_again(s: &Space) -> Result<()> {
    let dockerfile = "FROM BASE\nRUN date > /dev/null; echo x > /x; ln /x /y; mkdir /d; touch /d/z\nCOPY f /f\nWORKDIR /w\n";
    let bench = Bench::new(s, dockerfile, &[("f", "f")])?;
    let mut digests = Vec::new();
    for out in ["a.tar", "b.tar"] {
        let to = format!("type=oci,dest={}", bench.home.path(out).display());
        let epoch = "SOURCE_DATE_EPOCH=1700000000";
        let args = [
            "-t",
            "r:1",
            "-o",
            &to,
            "--no-cache",
            "--build-arg",
            epoch,
            "--platform",
            "linux/amd64,linux/arm64",
        ];
        digests.push(bench.build(&args)?.ok()?);
        // times of the second build are others
        std::thread::sleep(std::time::Duration::from_millis(1100));
        bench.file("f", "f")?;
    }
    ensure!(digests[0] == digests[1], "{digests:?}");
    let [a, b] = ["a.tar", "b.tar"].map(|n| std::fs::read(bench.home.path(n)));
    ensure!(a? == b?, "the archives differ");
    let from = format!("oci-archive:{}", bench.home.path("a.tar").display());
    let config: Value = serde_json::from_str(&bench.home.skopeo(&["inspect", "--config", &from])?)?;
    ensure!(config["created"] == "2023-11-14T22:13:20Z", "{config}");
    let to = format!("oci:{}", bench.home.path("loose").display());
    bench.home.skopeo(&["copy", "-q", &from, &to])?;
    Ok(())
}

fn what_copy_and_add_take(s: &Space) -> Result<()> {
    let dockerfile = "FROM BASE AS one\n\
        RUN mkdir -p /from/sub && echo 1 > /from/a && echo 2 > /from/sub/b && ln -s a /from/link\n\
        FROM scratch\nENV WHO=you\n\
        COPY . /all/\n\
        COPY --from=one /from /from/\n\
        COPY --chown=7:8 --chmod=u=rw,go= *.txt /modes/\n\
        COPY --parents dir/sub/*.md /parents/\n\
        COPY --exclude=**/*.md dir /excluded/\n\
        COPY <<EOF <<\"RAW\" /inline/\nhello $WHO\nEOF\nhello $WHO\nRAW\n\
        ADD packed.tar.gz /unpacked/\n\
        COPY packed.tar.gz /packed\n";
    let files = [
        ("a.txt", "a"),
        ("dir/b.txt", "b"),
        ("dir/sub/c.md", "c"),
        ("secret/key", "no"),
        ("secret/public", "yes"),
        (".dockerignore", "secret\n!secret/public\n*.log\n"),
        ("x.log", "log"),
    ];
    let bench = Bench::new(s, dockerfile, &files)?;
    let mut tar = Command::new("tar");
    tar.args(["czf", "packed.tar.gz", "dir"]).current_dir(bench.home.path("c"));
    run(&mut tar, b"", seconds(20))?.ok()?;
    let out = bench.files(&[])?;
    for (path, text) in [
        ("all/a.txt", "a"),
        ("all/secret/public", "yes"),
        ("from/sub/b", "2\n"),
        ("from/link", "1\n"),
        ("parents/dir/sub/c.md", "c"),
        ("excluded/b.txt", "b"),
        ("inline/EOF", "hello you\n"),
        ("inline/RAW", "hello $WHO\n"),
        ("unpacked/dir/sub/c.md", "c"),
    ] {
        let found = read(&out.join(path))?;
        ensure!(found == text, "{path}: {found:?}");
    }
    for path in ["all/secret/key", "all/x.log", "parents/dir/b.txt", "excluded/sub/c.md"] {
        ensure!(!out.join(path).exists(), "{path} is there");
    }
    ensure!(std::fs::symlink_metadata(out.join("from/link"))?.is_symlink(), "the link is none");
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(out.join("modes/a.txt"))?;
    ensure!((meta.uid(), meta.gid(), meta.mode() & 0o777) == (7, 8, 0o600), "{meta:?}");
    ensure!(std::fs::metadata(out.join("packed"))?.is_file(), "COPY unpacks nothing");
    // what is left out may change without a step being done again, what is copied may not
    bench.file("secret/key", "other")?;
    let same = bench.build(&["-o", "type=cacheonly"])?;
    ensure!(same.err.matches("CACHED").count() == 9, "{}", same.err);
    bench.file("a.txt", "changed")?;
    let changed = bench.build(&["-o", "type=cacheonly"])?;
    ensure!(changed.err.matches("CACHED").count() == 1, "{}", changed.err);
    Ok(())
}

fn secrets_leave_no_trace(s: &Space) -> Result<()> {
    const VALUE: &str = "correct-horse-battery-staple";
    let dockerfile = "FROM BASE\n\
        RUN --mount=type=secret,id=token,required --mount=type=secret,id=word,env=WORD \
        wc -c < /run/secrets/token > /length; echo ${#WORD} >> /length; ls -l /run/secrets/token\n\
        RUN --mount=type=cache,target=/cache,id=c echo run >> /cache/runs; cat /cache/runs > /runs\n\
        RUN --mount=type=bind,target=/src --mount=type=tmpfs,target=/t cat /src/f > /f; touch /t/x; ! touch /src/y\n\
        RUN --network=none grep -c : /proc/net/dev > /nics\n\
        RUN test ! -e /run/secrets && test ! -e /cache && test ! -e /src\n";
    let bench = Bench::new(s, dockerfile, &[("f", "bound")])?;
    std::fs::write(bench.home.path("token"), VALUE)?;
    bench.build(&["-o", "type=cacheonly"])?.refused("secret token: not found")?;
    let src = format!("id=token,src={}", bench.home.path("token").display());
    let args = ["--secret", &src, "--secret", "id=word,env=HOME"];
    let out = bench.files(&args)?;
    has(&read(&out.join("length"))?, &format!("{}\n", VALUE.len()))?;
    ensure!(read(&out.join("f"))? == "bound" && read(&out.join("nics"))? == "1\n", "binds and networks");
    ensure!(read(&out.join("runs"))? == "run\n", "the cache was not new");
    for place in ["run", "cache", "src", "t"] {
        ensure!(!out.join(place).exists(), "/{place} is left in the image");
    }
    // the cache mount stays, the secret does not
    let out = bench.files(&[&args[..], &["--no-cache"]].concat())?;
    ensure!(read(&out.join("runs"))? == "run\nrun\n", "the cache is gone");
    let data = bench.home.path("data");
    let found = bench.home.command("grep", &["-rl", VALUE, &data.display().to_string()])?;
    ensure!(found.out.is_empty(), "the secret is in {}", found.out);
    Ok(())
}

fn errors_say_where(s: &Space) -> Result<()> {
    let bench = Bench::new(s, "", &[])?;
    for (dockerfile, args, wanted) in [
        (
            "FROM BASE\n\nRUNN x\n",
            &[][..],
            "Dockerfile:3:1: dockerfile parse error on line 3: unknown instruction: RUNN",
        ),
        ("FROM BASE\nRUN echo before; exit 7\n", &[], "did not complete successfully: exit code: 7"),
        (
            "FROM BASE\nRUN echo before; exit 7\n",
            &[],
            "Dockerfile:2:1: process \"/bin/sh -c echo before; exit 7\"",
        ),
        ("FROM BASE\nRUN echo before; exit 7\n", &[], "------\nbefore\n------"),
        ("FROM BASE\nRUN [\"/none\"]\n", &[], "no such file or directory"),
        ("FROM BASE\nCOPY none /\n", &[], "Dockerfile:2:1: \"none\" not found in the build context"),
        ("FROM BASE\nCOPY --chown=nobody Dockerfile /\n", &[], "unable to find user nobody"),
        ("FROM BASE\nRUN --mount=type=ssh true\n", &[], "type=ssh is not supported"),
        ("FROM BASE\nADD https://example.com/x.git /\n", &[], "git repositories is not supported"),
        ("FROM BASE\nRUN true\n", &["--platform", "linux/s390x"], "linux/s390x"),
        ("FROM BASE\nCOPY Dockerfile /\n", &["--platform", "linux/riscv64"], "linux/riscv64"),
        ("FROM BASE-none\n", &[], "not found"),
        ("FROM BASE\n", &["--sbom"], "attestations are not made here"),
        ("FROM BASE\n", &["--push"], "-t"),
        ("FROM BASE\n", &["-o", "type=none,dest=x"], "type none is unknown"),
        ("FROM BASE\n", &["--load"], "no node runs here"),
    ] {
        let ran = bench.build_of(dockerfile, args)?;
        ensure!(ran.code == 1, "{dockerfile} {args:?}: {} {}", ran.code, ran.text());
        let text = ran.text().replace(&bench.base, "BASE");
        has(&text, wanted).with_context(|| dockerfile.to_string())?;
        ensure!(text.matches("--------------------").count() <= 2, "the error is told twice:\n{text}");
    }
    // nothing was run where it was known that it can't
    let ran = bench.build_of("FROM BASE\nRUN true\n", &["--platform", "linux/amd64,linux/s390x"])?;
    ensure!(!ran.err.contains("\n#2 "), "{}", ran.err);
    Ok(())
}

/// In the lab's node: into its store, out of it as a base, and a pod that runs it.
fn for_this_machines_node(s: &Space) -> Result<()> {
    let sampan = s.cluster.sampan.display().to_string();
    let folder = s.folder().join("node");
    std::fs::create_dir_all(&folder)?;
    let copied = folder.join("web.tar");
    std::fs::copy(web()?, &copied)?;
    let node = |args: &[&str]| s.exec("amd64", &[&[sampan.as_str(), "image"], args].concat());
    // no registry has it
    node(&["import", &copied.display().to_string()])?.ok()?;
    let id = node(&["ls", "-q"])?.ok()?;
    let base = "base.example/web:1";
    node(&["tag", id.lines().next().context("an image")?, base])?.ok()?;
    let dockerfile = format!(
        "FROM {base}\nRUN echo made on the node > /said\nCMD [\"sh\", \"-c\", \"cat /said; sleep 1000\"]\n"
    );
    std::fs::write(folder.join("Dockerfile"), dockerfile)?;
    let context = folder.display().to_string();
    let name = "built.example/here:1";
    let built = node(&["build", "-t", name, &context])?;
    ensure!(built.code == 0, "{}", built.text());
    has(&node(&["ls"])?.ok()?, name)?;
    let pod = serde_json::json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {
        "terminationGracePeriodSeconds": 1, "nodeName": "amd64",
        "containers": [{"name": "c", "image": name, "imagePullPolicy": "Never"}]}});
    s.post(&s.path("pods"), &pod)?.ok()?;
    s.running("p")?;
    wait_for("the pod's words", seconds(10), || {
        let said = s.k(&["logs", "p"])?;
        Ok(if said.contains("made on the node") { Ok(()) } else { Err(said) })
    })?;
    has(&node(&["prune", "--build-cache", "-f"])?.ok()?, "freed")
}

fn outputs_and_targets(s: &Space) -> Result<()> {
    let dockerfile = "FROM BASE AS first\nARG WHAT=default\nRUN echo $WHAT > /what\nFROM first AS second\nRUN echo two > /two\n";
    let bench = Bench::new(s, dockerfile, &[])?;
    let out = bench.files(&["--target", "first", "--build-arg", "WHAT=given"])?;
    ensure!(read(&out.join("what"))? == "given\n" && !out.join("two").exists(), "the target was not kept to");
    let out = bench.files(&["--platform", "linux/amd64,linux/arm64"])?;
    ensure!(read(&out.join("linux_arm64/two"))? == "two\n", "a folder for each platform");
    let tar = bench.home.path("files.tar").display().to_string();
    bench.build(&["-o", &format!("type=tar,dest={tar}")])?.ok()?;
    let listed = bench.home.command("tar", &["tf", &tar])?.ok()?;
    has(&listed, "what")?;
    let (id, about) =
        (bench.home.path("id").display().to_string(), bench.home.path("about").display().to_string());
    let quiet = bench.build(&[
        "-q",
        "-t",
        "a:1",
        "-t",
        "b:2",
        "-o",
        "type=cacheonly",
        "--iidfile",
        &id,
        "--metadata-file",
        &about,
    ])?;
    ensure!(quiet.err.is_empty() && quiet.out.trim() == read(Path::new(&id))?, "{}", quiet.text());
    let about: Value = serde_json::from_str(&read(Path::new(&about))?)?;
    ensure!(about["image.name"] == "docker.io/library/a:1,docker.io/library/b:2", "{about}");
    // what was built here is a base, though no registry has it
    let ran = bench.build_of("FROM a:1\nRUN cat /two\n", &[])?;
    has(&ran.err, "two")?;
    // and from standard input
    let data = bench.home.path("data").display().to_string();
    let mut command = Command::new(&s.cluster.sampan);
    command
        .args(["image", "build", "-d", &data, "-o", "type=cacheonly", "-f", "-"])
        .arg(bench.home.path("c"));
    let text = "FROM a:1\nRUN echo from standard input\n";
    has(&run(&mut command, text.as_bytes(), seconds(60))?.err, "from standard input")
}

/// The lab's nodes pull the base from the lab's registry; who asks needs no root and no data folder.
fn on_native_nodes(s: &Space) -> Result<()> {
    let registry = s.cluster.registry.as_ref().context("the suite has a registry")?;
    registry.push_archive("web", &web()?)?;
    let folder = s.folder().join("on-cluster");
    std::fs::create_dir_all(folder.join("dir"))?;
    let dockerfile = "FROM registry.lab:5000/web:latest\nCOPY . /sent/\n\
        RUN --mount=type=secret,id=word uname -m > /machine; cat /run/secrets/word > /word; ls /sent\n";
    std::fs::write(folder.join("Dockerfile"), dockerfile)?;
    std::fs::write(folder.join("dir/file"), "content")?;
    std::fs::write(folder.join("left-out"), "no")?;
    std::fs::write(folder.join(".dockerignore"), "left-out\nDockerfile\n")?;
    std::fs::write(s.folder().join("word"), "said")?;
    let (context, out) = (folder.display().to_string(), s.folder().join("out.tar").display().to_string());
    let (to, secret) =
        (format!("type=oci,dest={out}"), format!("id=word,src={}", s.folder().join("word").display()));
    let args =
        ["image", "build", "--on-cluster", "--platform", "linux/amd64,linux/arm64", "-t", "n:1", "-o", &to];
    let ran = s.sampan(&[&args[..], &["--secret", &secret, &context]].concat())?;
    ensure!(ran.code == 0, "{}", ran.text());
    has(&ran.err, "linux/arm64 on node arm64")?;
    has(&ran.err, "arm64: [linux/arm64 stage-0 3/3] RUN")?;
    ensure!(!ran.err.contains("left-out"), "{}", ran.err);
    for (arch, machine) in [("amd64", "x86_64"), ("arm64", "aarch64")] {
        let to = s.folder().join(arch).display().to_string();
        let from = format!("oci-archive:{out}");
        let args = ["--insecure-policy", "--override-arch", arch, "copy", "-q", &from, &format!("dir:{to}")];
        run(Command::new("skopeo").args(args), b"", seconds(30))?.ok()?;
        let script =
            format!("for f in {to}/*; do tar xzOf $f machine word sent/dir/file 2>/dev/null; done; true");
        let text = run(Command::new("sh").args(["-c", &script]), b"", seconds(30))?.ok()?;
        has(&text, machine)?;
        has(&text, "said")?;
        has(&text, "content")?;
    }
    // what goes wrong there is told here
    std::fs::write(
        folder.join("Dockerfile"),
        "FROM registry.lab:5000/web:latest\nRUN echo on the node; exit 9\n",
    )?;
    let failed =
        s.sampan(&["image", "build", "--on-cluster", "--platform", "linux/arm64", "-o", &to, &context])?;
    has(&failed.err, "building on node arm64")?;
    failed.refused("exit code: 9")
}

fn killed_builds_leave_nothing(s: &Space) -> Result<()> {
    let bench = Bench::new(s, "FROM BASE\nRUN --mount=type=tmpfs,target=/t echo started; sleep 300\n", &[])?;
    let data = bench.home.path("data");
    let shown = data.display().to_string();
    for signal in ["KILL", "INT"] {
        let log = std::fs::File::create(bench.home.path("log"))?;
        let mut child = Command::new(&s.cluster.sampan)
            .args(["image", "build", "--insecure", "-d", &shown, "-o", "type=cacheonly", "c"])
            .current_dir(bench.home.path("."))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        wait_for("the step", seconds(20), || {
            let said = read(&bench.home.path("log"))?;
            Ok(if said.contains("0.") && said.contains("started\n") { Ok(()) } else { Err(said) })
        })?;
        bench.home.command("kill", &["-s", signal, &child.id().to_string()])?.ok()?;
        let status = child.wait()?;
        ensure!(signal == "KILL" || status.code() == Some(130), "{signal}: {status}");
        wait_for("the step's end", seconds(10), || {
            let left = bench.home.command("pgrep", &["-f", &format!("step {shown}")])?.out;
            Ok(if left.is_empty() { Ok(()) } else { Err(left) })
        })?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(!mounts.contains(&shown), "still mounted after {signal}");
    }
    bench.build_of("FROM BASE\nRUN true\n", &[])?.ok()?;
    let left = std::fs::read_dir(data.join("build/work"))?.count();
    ensure!(left == 0, "{left} folders are left");
    for entry in std::fs::read_dir("/sys/fs/cgroup")?.flatten() {
        ensure!(!entry.path().join("sampan-build").exists(), "a control group is left");
    }
    let freed = bench.home.sampan(&["image", "prune", "--build-cache", "-d", &shown])?.ok()?;
    has(&freed, "freed")
}
