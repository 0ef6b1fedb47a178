//! Following, tailing and rotation of log files, on real files.
use std::io::Write;
use std::sync::atomic::Ordering;

use super::*;
use crate::api::tests::Fake;

const LOG: &str = "2026-01-01T00:00:00.000000001Z stdout F one\n\
    2026-01-01T00:00:01Z stderr F two\n\
    2026-01-01T00:00:02.5Z stdout P thr\n\
    2026-01-01T00:00:02.6Z stdout F ee\n\
    nonsense\n\
    2026-01-01T01:00:03+01:00 stdout F:x four\n\
    2026-01-01T00:00:04Z stdout F \n";

async fn read(text: &str, options: Options) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let fake = Arc::new(Fake::default());
    let mut reader = LogReader::open(file.path(), options, fake, "c".into(), "u".into()).await.unwrap();
    let mut out = Vec::new();
    while let Some(chunk) = reader.next().await.unwrap() {
        out.extend_from_slice(&chunk);
    }
    String::from_utf8(out).unwrap()
}

#[test]
fn lines_are_parsed_or_not() {
    let line = Line::parse(b"2026-01-01T00:00:00Z stderr P:tag a b \n").unwrap();
    assert_eq!((line.source, line.text), (Source::Stderr, &b"a b "[..]));
    assert_eq!(Line::parse(b"2026-01-01T00:00:00Z stdout F a\n").unwrap().text, b"a\n");
    for bad in
        ["", "x", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z stdin F a", "2026-01-01T00:00:00Z stdout F"]
    {
        assert_eq!(Line::parse(bad.as_bytes()), None, "{bad}");
    }
}

#[tokio::test]
async fn logs_are_printed_as_the_options_say() {
    let none = Options::default;
    let since = Some("2026-01-01T00:00:02.6Z".parse().unwrap());
    for (options, expected) in [
        (none(), "one\ntwo\nthree\nfour\n\n"),
        (Options { tail_lines: Some(2), ..none() }, "four\n\n"),
        (Options { tail_lines: Some(0), ..none() }, ""),
        (Options { tail_lines: Some(100), ..none() }, "one\ntwo\nthree\nfour\n\n"),
        (Options { limit_bytes: Some(6), ..none() }, "one\ntw"),
        (Options { source: Some(Source::Stderr), ..none() }, "two\n"),
        (Options { since, ..none() }, "ee\nfour\n\n"),
        (
            Options { timestamps: true, tail_lines: Some(5), ..none() },
            "2026-01-01T00:00:02.500000000Z three\n2026-01-01T00:00:03.000000000Z four\n\
             2026-01-01T00:00:04.000000000Z \n",
        ),
    ] {
        assert_eq!(read(LOG, options.clone()).await, expected, "{options:?}");
    }
    // a last line without its end is printed, and not counted
    let cut = format!("{LOG}2026-01-01T00:00:05Z stdout F cut");
    assert_eq!(read(&cut, none()).await, "one\ntwo\nthree\nfour\n\ncut");
    assert_eq!(read(&cut, Options { tail_lines: Some(2), ..none() }).await, "four\n\n");
    // across many blocks
    let long: String = (0..5000).map(|i| format!("2026-01-01T00:00:00Z stdout F line {i}\n")).collect();
    let tail: String = (4000..5000).map(|i| format!("line {i}\n")).collect();
    assert_eq!(read(&long, Options { tail_lines: Some(1000), ..none() }).await, tail);
    assert_eq!(read(&long, none()).await.lines().count(), 5000);
    // what is no line is skipped, whatever its length
    let junk = format!("{}\n2026-01-01T00:00:00Z stdout F end\n", "x".repeat(LINE_BYTES_MAX + 10));
    assert_eq!(read(&junk, none()).await, "end\n");
}

#[tokio::test]
async fn a_followed_log_goes_on_across_rotation_until_the_container_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("0.log");
    let mut file = std::fs::File::create(&path).unwrap();
    let line = |text: &str| format!("2026-01-01T00:00:00Z stdout F {text}\n");
    file.write_all(line("one").as_bytes()).unwrap();
    let fake = Arc::new(Fake::default());
    fake.is_running.store(true, Ordering::SeqCst);
    let options = Options { follow: true, tail_lines: Some(1), ..Options::default() };
    let mut reader = LogReader::open(&path, options, fake.clone(), "c".into(), "u".into()).await.unwrap();
    let (sender, mut chunks) = mpsc::channel(8);
    let task = tokio::spawn(async move {
        while let Some(chunk) = reader.next().await.unwrap() {
            sender.send(String::from_utf8(chunk.to_vec()).unwrap()).await.unwrap();
        }
    });
    assert_eq!(chunks.recv().await.unwrap(), "one\n");
    let (begin, end) = {
        let line = line("two");
        let (begin, end) = line.split_at(10);
        (begin.to_string(), end.to_string())
    };
    file.write_all(begin.as_bytes()).unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    file.write_all(end.as_bytes()).unwrap();
    assert_eq!(chunks.recv().await.unwrap(), "two\n");
    std::fs::rename(&path, folder.path().join("0.log.old")).unwrap();
    file.write_all(line("three").as_bytes()).unwrap();
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(line("four").as_bytes()).unwrap();
    let mut seen = String::new();
    while !seen.ends_with("four\n") {
        seen += &chunks.recv().await.unwrap();
    }
    assert_eq!(seen, "three\nfour\n");
    file.write_all(line("five").as_bytes()).unwrap();
    assert_eq!(chunks.recv().await.unwrap(), "five\n");
    // the end is told by an event, with nothing written
    fake.is_running.store(false, Ordering::SeqCst);
    fake.tell("u").await;
    assert_eq!(chunks.recv().await, None);
    task.await.unwrap();
}
