//! Whole Dockerfiles: as people write them, and wrong in one place each.
use super::*;
use sampan_image::{Platform, platform};
use std::collections::BTreeMap;

fn read(text: &str) -> Dockerfile {
    Dockerfile::parse("Dockerfile", text).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

fn options(args: &[(&str, &str)], target: Option<&str>) -> Options {
    Options {
        build_args: args.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<BTreeMap<_, _>>(),
        target: target.map(str::to_string),
        platform: platform::parse("linux/arm/v7").unwrap(),
        build_platform: platform::parse("linux/amd64").unwrap(),
    }
}

fn planned(text: &str, args: &[(&str, &str)], target: Option<&str>) -> Plan {
    read(text).plan(&options(args, target)).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

/// All instructions of the target's own stage, evaluated on a base without environment.
fn evaluated(text: &str, args: &[(&str, &str)]) -> Result<(Vec<Kind>, Scope), Error> {
    let plan = planned(text, args, None);
    let mut scope = plan.scope(&[]);
    let instructions = &plan.stages[plan.target].instructions;
    let kinds: Result<Vec<Kind>, Error> = instructions.iter().map(|i| Ok(scope.evaluate(i)?.kind)).collect();
    Ok((kinds?, scope))
}

fn shell(line: &str) -> CommandLine {
    CommandLine::Shell(line.into())
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| w.to_string()).collect()
}

const GO: &str = r#"# syntax=docker/dockerfile:1.7
ARG GO_VERSION=1.22
ARG BASE=alpine:${ALPINE:-3.20}

FROM --platform=$BUILDPLATFORM golang:${GO_VERSION}-alpine AS Build
WORKDIR /src
RUN --mount=type=cache,target=/go/pkg/mod \
    --mount=type=bind,source=go.sum,target=go.sum \
    # modules first
    --mount=type=bind,source=go.mod,target=go.mod \
    go mod download -x
ARG TARGETOS TARGETARCH TARGETVARIANT
COPY . .
RUN --mount=type=cache,id=go-$TARGETARCH,target=/root/.cache,sharing=locked \
    --mount=type=secret,id=netrc,target=/root/.netrc,required --network=none \
    GOOS=$TARGETOS GOARCH=$TARGETARCH GOARM=${TARGETVARIANT#v} go build -o /out/app ./cmd/app

FROM ${BASE} AS tests
COPY --from=build /out/app /app
RUN ["/app", "--self-test"]

FROM scratch
LABEL org.opencontainers.image.title="An app" \
      org.opencontainers.image.version=$VERSION
COPY --from=build --chown=65532:65532 --chmod=0755 --link /out/app /usr/bin/
USER 65532:65532
EXPOSE 8080 9000-9001/udp
VOLUME ["/data"]
HEALTHCHECK --interval=30s --timeout=1m30s --retries=3 CMD wget -qO- localhost:8080/healthz || exit 1
STOPSIGNAL SIGQUIT
ENTRYPOINT ["/usr/bin/app"]
CMD ["--listen", ":8080"]
"#;

#[test]
fn a_go_program_for_every_architecture() {
    let file = read(GO);
    assert_eq!(file.syntax.as_deref(), Some("docker/dockerfile:1.7"));
    assert_eq!(file.stages[0].name.as_deref(), Some("build"));
    let plan = planned(GO, &[("ALPINE", "3.19"), ("GO_VERSION", "1.23")], None);
    // ALPINE is no ARG, so it counts for nothing.
    let bases: Vec<_> = plan.stages.iter().map(|stage| stage.base.clone()).collect();
    let image = |name: &str| Source::Image(name.into());
    assert_eq!(bases, [image("golang:1.23-alpine"), image("alpine:3.20"), Source::Scratch]);
    let platforms: Vec<_> = plan.stages.iter().map(|stage| platform::format(&stage.platform)).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm/v7", "linux/arm/v7"]);
    assert_eq!((plan.target, &plan.order[..]), (2, &[0, 2][..]));
    assert_eq!(plan.unused_build_args(), ["ALPINE"]);
    let shown: Vec<String> = plan.warnings.iter().map(Warning::to_string).collect();
    assert_eq!(shown, ["[Warning] One or more build-args [ALPINE] were not consumed"]);

    let mut scope = plan.scope(&["PATH=/go/bin".to_string()]);
    let kinds: Vec<Kind> =
        plan.stages[0].instructions.iter().map(|i| scope.evaluate(i).unwrap().kind).collect();
    let Kind::Run(download) = &kinds[1] else { panic!("{:?}", kinds[1]) };
    assert_eq!(download.command, shell("go mod download -x"));
    assert_eq!(
        download.mounts.iter().map(|m| m.target.as_str()).collect::<Vec<_>>(),
        ["/go/pkg/mod", "go.sum", "go.mod"]
    );
    let Kind::Run(build) = &kinds[4] else { panic!("{:?}", kinds[4]) };
    assert_eq!(
        (build.network, build.mounts[0].id.as_str(), build.mounts[0].sharing),
        (Network::None, "go-arm", Sharing::Locked)
    );
    assert!(build.mounts[1].required && build.mounts[1].kind == MountType::Secret);
    // RUN leaves variables to the shell.
    assert!(matches!(&build.command, CommandLine::Shell(line) if line.contains("${TARGETVARIANT#v}")));
    let args: Vec<String> = scope.build_args().iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(args, ["TARGETOS=linux", "TARGETARCH=arm", "TARGETVARIANT=v7"]);
    assert_eq!(scope.image_env(), [("PATH".to_string(), "/go/bin".to_string())]);

    let (kinds, mut scope) = evaluated(GO, &[]).unwrap();
    let title = KeyValue { key: "org.opencontainers.image.title".into(), value: "An app".into() };
    let version = KeyValue { key: "org.opencontainers.image.version".into(), value: String::new() };
    assert_eq!(kinds[0], Kind::Label(vec![title, version]));
    let sources = Sources { paths: strings(&["/out/app"]), inline: vec![], destination: "/usr/bin/".into() };
    let (chown, chmod) = (Some("65532:65532".into()), Some("0755".into()));
    assert_eq!(
        kinds[1],
        Kind::Copy(Copy {
            sources,
            from: Some("build".into()),
            chown,
            chmod,
            link: true,
            ..Default::default()
        })
    );
    assert_eq!(kinds[3], Kind::Expose(strings(&["8080/tcp", "9000/udp", "9001/udp"])));
    assert_eq!(kinds[4], Kind::Volume(strings(&["/data"])));
    let test = strings(&["CMD-SHELL", "wget -qO- localhost:8080/healthz || exit 1"]);
    let (interval_ns, timeout_ns) = (30_000_000_000, 90_000_000_000);
    assert_eq!(
        kinds[5],
        Kind::Healthcheck(Healthcheck { test, interval_ns, timeout_ns, retries: 3, ..Default::default() })
    );
    assert_eq!(kinds[8], Kind::Cmd(CommandLine::Exec(strings(&["--listen", ":8080"]))));
    let warnings: Vec<String> = scope.take_warnings().iter().map(Warning::to_string).collect();
    assert_eq!(warnings, ["[Warning] line 24: Usage of undefined variable '$VERSION'"]);
}

#[test]
fn heredocs_of_run_copy_and_add() {
    let text = "FROM a\nENV X=1\nRUN <<EOF\napk add \\\n  curl\n# not a comment\nEOF\nCOPY --chmod=755 <<one.sh <<-'two' /d/\n\
        echo \"$X\" \\$X\none.sh\n\t$X\n\ttwo\nRUN python3 <<A && sh <<B\nprint(1)\nA\nls\nB\nADD <<EOF /e\nEOF\nCMD x\n";
    let (kinds, _) = evaluated(text, &[]).unwrap();
    let script = |kind: &Kind| match kind {
        Kind::Run(run) => run.script(),
        other => panic!("{other:?}"),
    };
    assert_eq!(script(&kinds[1]), Script::Shell("apk add \\\n  curl\n# not a comment\n".into()));
    let Kind::Copy(copy) = &kinds[2] else { panic!() };
    let inline = |name: &str, contents: &str, expand| InlineFile {
        name: name.into(),
        contents: contents.into(),
        expand,
    };
    assert_eq!(
        copy.sources.inline,
        [inline("one.sh", "echo \"1\" $X\n", true), inline("two", "$X\n", false)]
    );
    assert_eq!(copy.sources.destination, "/d/");
    assert_eq!(script(&kinds[3]), Script::Shell("python3 <<A && sh <<B\nprint(1)\nA\nls\nB".into()));
    assert_eq!(kinds[5], Kind::Cmd(shell("x")));
    let file = read(text);
    let ends: Vec<usize> = file.stages[0].instructions.iter().map(|i| i.end_line).collect();
    assert_eq!(ends, [2, 7, 12, 17, 19, 20]);
}

#[test]
fn windows_style_escapes_and_old_forms() {
    let text = "# escape=`\nFROM a\nMAINTAINER Jo Do\nENV path C:\\tools and more\nENV a=`$b c=\"d `\" e\" f='g`h'\n\
        RUN dir `\n    C:\\\nWORKDIR C:\\x\nLABEL a\tb c\nCMD [ 'not json' ]\nONBUILD COPY --from=x a b\nSHELL [\"/bin/bash\", \"-c\"]\n";
    let (kinds, _) = evaluated(text, &[]).unwrap();
    let pair = |key: &str, value: &str| KeyValue { key: key.into(), value: value.into() };
    assert_eq!(kinds[0], Kind::Maintainer("Jo Do".into()));
    assert_eq!(kinds[1], Kind::Env(vec![pair("path", "C:\\tools and more")]));
    assert_eq!(kinds[2], Kind::Env(vec![pair("a", "$b"), pair("c", "d \" e"), pair("f", "g`h")]));
    assert!(matches!(&kinds[3], Kind::Run(run) if run.command == shell("dir     C:\\")));
    assert_eq!(kinds[4], Kind::Workdir("C:\\x".into()));
    assert_eq!(kinds[5], Kind::Label(vec![pair("a", "b c")]));
    assert_eq!(kinds[6], Kind::Cmd(shell("[ 'not json' ]")));
    assert_eq!(kinds[7], Kind::Onbuild("COPY --from=x a b".into()));
    assert_eq!(kinds[8], Kind::Shell(strings(&["/bin/bash", "-c"])));
    assert_eq!(read(text).warnings.len(), 3);
}

/// What each message says, where, and what would have been right.
#[test]
fn malformed_files_name_line_and_column() {
    for (text, at, message, expected) in [
        ("FROM a\n\n  RUNN x", "3:3", "unknown instruction: RUNN (did you mean RUN?)", "ADD, ARG"),
        ("from a\ncoyp x y", "2:1", "unknown instruction: coyp (did you mean copy?)", "ADD"),
        ("FROM a\nBANANA", "2:1", "unknown instruction: BANANA", "ADD"),
        (
            "FROM",
            "1:5",
            "FROM requires either one or three arguments",
            "FROM [--platform=PLATFORM] IMAGE [AS NAME]",
        ),
        ("FROM a b", "1:8", "FROM requires either one or three arguments", "FROM"),
        ("FROM a AS b c", "1:8", "FROM requires either one or three arguments", "FROM"),
        (
            "FROM a AS 1b",
            "1:11",
            "invalid name for build stage: \"1b\", name can't start with a number or contain symbols",
            "letters",
        ),
        ("FROM --platfrom=x a", "1:6", "unknown flag: --platfrom (did you mean platform?)", "--platform"),
        ("RUN x", "1:1", "no build stage in current context", "FROM ahead of it"),
        (
            "FROM a\nCOPY \\\n  --form=b c d",
            "3:3",
            "unknown flag: --form (did you mean from?)",
            "--from, --chown",
        ),
        (
            "FROM a\nCOPY x",
            "2:7",
            "COPY requires at least two arguments, but only one was provided. Destination could not be determined",
            "COPY SOURCE… DESTINATION",
        ),
        ("FROM a\nCOPY [\"x\", 1] y", "", "", ""),
        (
            "FROM a\nCOPY [\"x\", 1]",
            "2:6",
            "when using JSON array syntax, arrays must be comprised of strings only",
            "[\"word\"",
        ),
        ("FROM a\nCOPY x <<EOF\nEOF", "2:8", "COPY cannot accept a heredoc as a destination", ""),
        ("FROM a\nRUN <<EOF\nx\n", "2:5", "unterminated heredoc", "a line with nothing but EOF"),
        ("FROM a\nENV a", "2:5", "ENV must have two arguments", "ENV NAME=VALUE"),
        (
            "FROM a\nENV a=b \\\n  c",
            "3:3",
            "Syntax error - can't find = in \"c\". Must be of the form: name=value",
            "name=value",
        ),
        ("FROM a\nENV =b", "2:5", "ENV names can not be blank", "ENV"),
        ("FROM a\nLABEL", "2:6", "LABEL requires at least one argument", "LABEL NAME=VALUE"),
        ("FROM a\nARG b =c", "2:7", "ARG names can not be blank", "NAME=DEFAULT"),
        ("FROM a\nRUN", "2:4", "RUN requires at least one argument", "RUN COMMAND"),
        ("FROM a\nRUN --network=lan x", "2:5", "invalid network mode \"lan\"", "default, none or host"),
        (
            "FROM a\nRUN --mount=type=cash,target=/x \\\n y",
            "2:5",
            "unsupported mount type \"cash\" (did you mean cache?)",
            "bind, cache",
        ),
        (
            "FROM a\nRUN --mount=from=$X,target=/$Y y",
            "2:5",
            "'from' doesn't support variable expansion, define alias stage instead",
            "",
        ),
        ("FROM a\nRUN --device=x y", "2:5", "unknown flag: --device", "--mount"),
        ("FROM a\nUSER", "2:5", "USER requires exactly one argument", "USER VALUE"),
        ("FROM a\nSHELL bash -c", "2:7", "SHELL requires the arguments to be in JSON form", "SHELL ["),
        ("FROM a\nVOLUME [\"\"]", "2:8", "VOLUME specified can not be an empty string", ""),
        ("FROM a\nHEALTHCHECK NONE x", "2:13", "HEALTHCHECK NONE takes no arguments", ""),
        ("FROM a\nHEALTHCHECK x", "2:13", "Unknown type \"X\" in HEALTHCHECK (try CMD)", "CMD or NONE"),
        ("FROM a\nHEALTHCHECK CMD", "2:13", "Missing command after HEALTHCHECK CMD", "HEALTHCHECK"),
        (
            "FROM a\nHEALTHCHECK --timeout=5 CMD x",
            "2:13",
            "time: missing unit in duration \"5\"",
            "a duration",
        ),
        (
            "FROM a\nHEALTHCHECK --interval=1us CMD x",
            "2:13",
            "Interval \"interval\" cannot be less than 1ms",
            "",
        ),
        ("FROM a\nHEALTHCHECK --retries=-1 CMD x", "2:13", "--retries cannot be negative (-1)", ""),
        ("FROM a\nONBUILD ONBUILD RUN x", "2:9", "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed", ""),
        ("FROM a\nONBUILD from x", "2:9", "FROM isn't allowed as an ONBUILD trigger", ""),
        ("FROM a\nONBUILD RNU x", "2:9", "unknown instruction: RNU (did you mean RUN?)", ""),
        (
            "FROM a\nONBUILD COPY x",
            "2:15",
            "COPY requires at least two arguments, but only one was provided. Destination could not be determined",
            "",
        ),
    ] {
        let Err(error) = Dockerfile::parse("Dockerfile", text) else {
            assert_eq!(message, "", "{text} is fine");
            continue;
        };
        let line = error.at().line;
        assert_eq!(error.message(), format!("dockerfile parse error on line {line}: {message}"), "{text}");
        assert_eq!(error.at().to_string(), at, "{text}");
        let shown = error.to_string();
        assert!(shown.contains(&format!("expected: {expected}")) || expected.is_empty(), "{shown}");
        assert!(shown.contains(" >>> "), "{shown}");
    }
    for (text, shown) in [
        (&b""[..], "Dockerfile: the Dockerfile cannot be empty"),
        (b"# only\n", "Dockerfile: file with no instructions"),
        (b"ARG a\n", "Dockerfile: dockerfile contains no stages to build"),
        (b"FROM a\nRUN \xff", "Dockerfile:2:5: dockerfile parse error on line 2: not UTF-8"),
    ] {
        let error = Dockerfile::parse("Dockerfile", text).unwrap_err().to_string();
        assert_eq!(error.lines().next(), Some(shown));
    }
}

#[test]
fn a_message_shows_the_lines_around() {
    let error =
        Dockerfile::parse("app/Dockerfile", "FROM alpine\nRUN apk add \\\n    curl\nCOPPY . .\nCMD sh\n")
            .unwrap_err();
    let wanted = "app/Dockerfile:4:1: dockerfile parse error on line 4: unknown instruction: COPPY (did you mean COPY?)\n\
        --------------------\n   2 |     RUN apk add \\\n   3 |         curl\n   4 | >>> COPPY . .\n     |     ^\n   5 |     CMD sh\n\
        --------------------\nexpected: ADD, ARG, CMD, COPY, ENTRYPOINT, ENV, EXPOSE, FROM, HEALTHCHECK, LABEL, MAINTAINER, \
        ONBUILD, RUN, SHELL, STOPSIGNAL, USER, VOLUME, WORKDIR";
    assert_eq!(error.to_string(), wanted);
}

#[test]
fn everything_is_bounded() {
    let many = format!("FROM a\n{}", "RUN x\n".repeat(limits::INSTRUCTIONS));
    let stages = "FROM a\n".repeat(limits::STAGES + 1);
    let heredoc = format!("FROM a\nRUN <<E\n{}", "x\n".repeat(limits::HEREDOC_SIZE_BYTES / 2 + 1));
    let opened = format!("FROM a\nRUN {}", "<<E ".repeat(limits::HEREDOCS_PER_LINE + 1));
    let flags = format!("FROM a\nRUN {}x", "--mount=target=/x ".repeat(limits::FLAGS + 1));
    let ports = format!("FROM a\nEXPOSE{}", " 0-65535".repeat(10));
    for (text, message) in [
        ("x".repeat(limits::FILE_SIZE_BYTES + 1), "longer than 1048576 bytes"),
        (many, "more than 10000 instructions"),
        (stages, "more than 1000 stages"),
        (heredoc, "heredoc E is longer than 524288 bytes"),
        (opened, "more than 64 heredocs on a line"),
        (flags, "more than 256 flags"),
    ] {
        let error = Dockerfile::parse("Dockerfile", &text).unwrap_err().message();
        assert!(error.ends_with(message), "{error}");
    }
    assert_eq!(evaluated(&ports, &[]).unwrap_err().message(), "more than 196608 ports");
    let doubled = format!("FROM a\nENV a=xxxxxxxx\n{}", "ENV a=$a$a\n".repeat(30));
    assert!(
        evaluated(&doubled, &[]).unwrap_err().message().ends_with("the outcome is longer than 1048576 bytes")
    );
    let filled: String = (0..10).map(|i| format!("ENV v{i}=$a\n")).collect();
    let filled = format!("FROM a\nENV a=xxxxxxxx\n{}{filled}", "ENV a=$a$a\n".repeat(17));
    assert_eq!(
        evaluated(&filled, &[]).unwrap_err().message(),
        "the environment is larger than 4194304 bytes"
    );
}

#[test]
fn arguments_have_dockers_scopes() {
    let text = "ARG A=global\nARG B=$A-b C\nFROM x AS one\nARG A\nENV E=$A$B\nARG B=own\nARG E=arg\nARG TARGETPLATFORM BUILDARCH=mine\n\
        ENV R=$A/$B/$C/$E/$TARGETPLATFORM/$BUILDARCH/$BUILDOS\nFROM one\nARG C\nENV S=$A/$C/$R F=1 G=$F\n";
    let value = |args: &[(&str, &str)], key: &str| {
        let plan = planned(text, args, None);
        let mut scope = plan.scope(&["F=base".into()]);
        for index in &plan.order {
            scope = scope.clone();
            for instruction in &plan.stages[*index].instructions {
                scope.evaluate(instruction).unwrap();
            }
        }
        scope.image_env().iter().find(|(k, _)| k == key).map(|(_, v)| v.clone())
    };
    // B is not declared where E is set; a later ARG hides an ENV, but not in the image.
    assert_eq!(value(&[], "E").as_deref(), Some("global"));
    assert_eq!(value(&[], "R").as_deref(), Some("global/own//arg/linux/arm/v7/mine/"));
    assert_eq!(
        value(&[("A", "1"), ("B", "2"), ("C", "3")], "R").as_deref(),
        Some("1/2//arg/linux/arm/v7/mine/")
    );
    assert_eq!(
        value(&[("C", "3"), ("BUILDARCH", "z")], "S").as_deref(),
        Some("global/3/global/own//arg/linux/arm/v7/z/")
    );
    assert_eq!(value(&[], "G").as_deref(), Some("base"));
    assert_eq!(value(&[], "A"), None);
    let staged = |target| {
        let plan = planned("ARG S=$TARGETSTAGE\nFROM a$S AS x\n", &[], target);
        plan.stages[0].base.clone()
    };
    assert_eq!((staged(None), staged(Some(""))), (Source::Image("ax".into()), Source::Image("ax".into())));
    let path = (String::from("PATH"), scope::DEFAULT_PATH.to_string());
    assert!(evaluated("FROM a\n", &[]).unwrap().1.image_env().contains(&path));
    let (_, scope) =
        evaluated("FROM a\nARG https_proxy\n", &[("http_proxy", "p"), ("https_proxy", "q")]).unwrap();
    let proxies: Vec<String> = scope.proxy_env().into_iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(proxies, ["HTTPS_PROXY=q", "HTTP_PROXY=p", "http_proxy=p"]);
}

#[test]
fn evaluation_errors_name_their_place() {
    for (line, at, message) in [
        ("ENV a=1 \\\n  b=${C:?missing}", "3:5", "failed to process \"${C:?missing}\": C: missing"),
        ("COPY a ${}", "2:8", "failed to process \"${}\": syntax error: bad substitution"),
        (
            "COPY 'a b",
            "2:6",
            "failed to process \"'a\": unexpected end of statement while looking for matching single-quote",
        ),
        ("STOPSIGNAL SIGNOPE", "2:12", "invalid signal: SIGNOPE"),
        ("EXPOSE 80 x/tcp", "2:11", "invalid containerPort: x"),
        ("RUN --mount=type=$T,target=/a b", "2:5", "unsupported mount type \"\""),
        ("VOLUME $NOTHING", "2:8", "VOLUME specified can not be an empty string"),
    ] {
        let error = evaluated(&format!("FROM a\n{line}\n"), &[]).unwrap_err();
        assert_eq!((error.at().to_string().as_str(), error.message().as_str()), (at, message), "{line}");
    }
}

#[test]
fn stages_are_resolved() {
    let text = "FROM a AS one\nFROM one AS two\nRUN x\nFROM b AS three\nCOPY --from=ONE /x /y\nFROM c\nRUN --mount=from=two,target=/t \
        --mount=type=cache,target=/c y\nCOPY --from=2 /a /b\nCOPY --from=busybox:1 /a /b\nFROM 0\n";
    for (target, order) in [
        (Some("three"), &[0, 2][..]),
        (Some("TWO"), &[0, 1]),
        (Some("3"), &[0, 1, 2, 3]),
        (Some("stage-3"), &[]),
        (None, &[0, 4]),
    ] {
        let plan = read(text).plan(&options(&[], target));
        assert_eq!(plan.as_ref().map_or(&[][..], |plan| &plan.order), order, "{target:?}");
    }
    let plan = planned(text, &[], None);
    assert_eq!(plan.source("busybox:1"), Source::Image("busybox:1".into()));
    assert_eq!(
        (plan.source("Two"), plan.source("2"), plan.source("scratch")),
        (Source::Stage(1), Source::Stage(2), Source::Scratch)
    );
    assert_eq!(plan.similar_stage("thre"), Some("three"));
    let names: Vec<&str> = plan.stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names, ["one", "two", "three", "stage-3", "stage-4"]);
}

#[test]
fn plans_that_cannot_be() {
    for (text, target, wanted) in [
        (
            "FROM a AS build\n",
            Some("biuld"),
            "Dockerfile: target stage \"biuld\" could not be found (did you mean build?)",
        ),
        (
            "FROM a AS b\nCOPY --from=b x y\n",
            None,
            "Dockerfile:2:13: circular dependency detected on stage: b",
        ),
        (
            "FROM a AS b\nCOPY --from=c x y\nFROM a AS c\nCOPY \\\n --from=b x y\n",
            None,
            "Dockerfile:2:13: circular dependency detected on stage: b",
        ),
        (
            "FROM a AS b\nCOPY --from=c x y\nFROM a AS c\n",
            Some("b"),
            "Dockerfile:2:13: cannot copy from stage \"c\", it needs to be defined before current stage \"b\"",
        ),
        ("FROM a AS b\nCOPY --from=c x y\nFROM a AS c\n", Some("c"), ""),
        ("FROM a\nCOPY --from=7 x y\n", None, "Dockerfile:2:13: invalid stage index 7"),
        (
            "FROM a\nCOPY --from=$X x y\n",
            None,
            "Dockerfile:2:13: variable expansion is not supported for --from, define a new stage with FROM using ARG from \
             global scope as a workaround",
        ),
        ("FROM $NONE\n", None, "Dockerfile:1:6: base name ($NONE) should not be blank"),
        ("FROM ${NONE\n", None, "Dockerfile:1:6: failed to process \"${NONE\": syntax error: missing '}'"),
        (
            "FROM Alpine\n",
            None,
            "Dockerfile:1:6: failed to parse stage name \"Alpine\": couldn't parse image name: invalid reference format: \
             repository name must be lowercase: \"Alpine\"",
        ),
        ("FROM --platform=$NONE a\n", None, "Dockerfile:1:17: empty platform value from expression $NONE"),
        (
            "FROM --platform=linux/toaster a\n",
            None,
            "Dockerfile:1:17: failed to parse platform linux/toaster: \"linux/toaster\": unknown operating system or \
             architecture",
        ),
        (
            "FROM --platform=windows/amd64 a\n",
            None,
            "Dockerfile:1:17: failed to parse platform windows/amd64: \"windows\": only Linux images are built",
        ),
        (
            "ARG A=${B?no B}\nFROM a\n",
            None,
            "Dockerfile:1:7: failed to process \"${B?no\": syntax error: missing '}'",
        ),
        ("ARG SOURCE_DATE_EPOCH=now\nFROM a\n", None, "Dockerfile: invalid SOURCE_DATE_EPOCH: now"),
    ] {
        let outcome = read(text).plan(&options(&[], target));
        let shown = outcome.map_or_else(|error| error.to_string(), |_| String::new());
        assert_eq!(shown.lines().next().unwrap_or_default(), wanted, "{text}");
    }
    assert_eq!(
        planned("FROM a", &[("SOURCE_DATE_EPOCH", "1700000000")], None).source_date_epoch_s,
        Some(1_700_000_000)
    );
    assert_eq!(planned("FROM a", &[("SOURCE_DATE_EPOCH", "")], None).source_date_epoch_s, None);
}

#[test]
fn warnings_are_collected() {
    let text =
        "ARG BASE=a\nFROM ${BASEE:-a} AS x\nFROM a$BSAE AS x\nENV a b\nCMD x \\\n\n y\nFROM a AS scratch\n";
    let plan = planned(text, &[("UNUSED", ""), ("http_proxy", ""), ("TARGETARCH", "arm64")], None);
    let shown: Vec<String> = plan.warnings.iter().map(Warning::to_string).collect();
    assert_eq!(
        shown,
        [
            "[Warning] line 4: \"ENV key=value\" should be used instead of legacy \"ENV key value\" format",
            "[Warning] line 6: Empty continuation line (these will become errors in a future release)",
            "[Warning] line 3: FROM argument 'BSAE' is not declared (did you mean BASE?)",
            "[Warning] line 3: Duplicate stage name \"x\", stage names should be unique",
            "[Warning] line 8: Stage name should not use the same name as reserved stage \"scratch\"",
            "[Warning] One or more build-args [UNUSED] were not consumed",
        ]
    );
    let (_, mut scope) =
        evaluated("FROM a\nENV HOME=/h\nWORKDIR $HOEM\nWORKDIR ${X:-y}\nARG Z\nWORKDIR $Z\n", &[]).unwrap();
    let shown: Vec<String> = scope.take_warnings().iter().map(Warning::to_string).collect();
    assert_eq!(shown, ["[Warning] line 3: Usage of undefined variable '$HOEM' (did you mean $HOME?)"]);
}

#[test]
fn onbuild_triggers_come_first() {
    let text = "FROM x AS other\nFROM x AS base\nONBUILD COPY --from=other a b\nONBUILD RUN <<E\nls\nE\nFROM base\nCMD y\n";
    let plan = planned(text, &[], None);
    let instructions = &plan.stages[2].instructions;
    assert_eq!(instructions.iter().map(Instruction::name).collect::<Vec<_>>(), ["COPY", "RUN", "CMD"]);
    assert!(instructions[0].onbuild && !instructions[2].onbuild);
    assert!(matches!(&instructions[1].kind, Kind::Run(run) if run.script() == Script::Shell("ls\n".into())));
    assert_eq!(plan.order, [0, 1, 2]);

    let mut plan = planned("FROM x AS tools\nFROM node:onbuild\nCMD y\n", &[("V", "1")], None);
    assert_eq!((&plan.order[..], plan.unused_build_args()), (&[1][..], strings(&["V"])));
    plan.onbuild(1, &strings(&["ARG V", "COPY --from=tools a b", "COPY $V ${}"])).unwrap();
    assert_eq!((&plan.order[..], plan.unused_build_args().len(), plan.warnings.len()), (&[0, 1][..], 0, 0));
    let mut scope = plan.scope(&[]);
    let outcome: Result<Vec<_>, Error> =
        plan.stages[1].instructions.iter().map(|i| scope.evaluate(i)).collect();
    assert_eq!(outcome.unwrap_err().at().to_string(), "2:1");
    for (trigger, wanted) in [
        ("FORM x", "ONBUILD trigger \"FORM x\": unknown instruction: FORM (did you mean FROM?)"),
        ("FROM x", "ONBUILD trigger \"FROM x\": FROM isn't allowed as an ONBUILD trigger"),
        ("RUN a\nRUN b", "ONBUILD trigger \"RUN a\\nRUN b\": onbuild trigger should be a single expression"),
        (" ", "ONBUILD trigger \" \": it is empty"),
    ] {
        let error = plan.onbuild(1, &strings(&[trigger])).unwrap_err();
        assert_eq!((error.at().line, error.message().as_str()), (2, wanted));
    }
}

#[test]
fn platforms_follow_bases() {
    let text = "FROM --platform=linux/arm64 a AS x\nFROM x\nFROM --platform=$BUILDPLATFORM scratch\nFROM --platform=amd64 a\n";
    let plan = planned(text, &[], None);
    let shown: Vec<String> = plan.stages.iter().map(|stage| platform::format(&stage.platform)).collect();
    assert_eq!(shown, ["linux/arm64", "linux/arm64", "linux/arm/v7", "linux/amd64"]);
    let odd = Options {
        platform: Platform { os: "linux".into(), architecture: "aarch64".into(), variant: Some("v8".into()) },
        ..options(&[], None)
    };
    let plan = read("FROM a\nARG TARGETPLATFORM TARGETVARIANT\nENV P=$TARGETPLATFORM$TARGETVARIANT\n")
        .plan(&odd)
        .unwrap();
    let mut scope = plan.scope(&[]);
    plan.stages[0].instructions.iter().for_each(|i| drop(scope.evaluate(i).unwrap()));
    assert!(scope.image_env().contains(&("P".into(), "linux/arm64".into())));
}
