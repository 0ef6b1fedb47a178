//! Runs a given binary of upstream's e2e suite against a lab of two amd64 nodes, and keeps docs/conformance.md: every
//! conformance test, whether it passed, why not, and when. A test is never dropped from the list by a run that did not
//! include it; one recorded as passed that fails in a run is recorded as failed.
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};

#[derive(clap::Args)]
pub struct Args {
    /// The suite: an e2e.test of Kubernetes 1.36
    #[arg(long)]
    binary: PathBuf,
    /// Only tests whose name matches this regular expression
    #[arg(long)]
    focus: Option<regex::Regex>,
    /// Only tests of these files of the suite (`common/node/pods.go`), comma-separated
    #[arg(long, value_delimiter = ',')]
    file: Vec<String>,
    /// I/N: the I-th of N parts
    #[arg(long)]
    shard: Option<String>,
    /// Leave out what is recorded as passed already
    #[arg(long)]
    resume: bool,
    /// A cluster that runs already, instead of a lab of its own
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// OCI archives of the images that the suite wants, for the lab's nodes
    #[arg(long)]
    images: Option<PathBuf>,
    /// Tests at a time; those marked [Serial] run alone, last
    #[arg(long, default_value_t = 4)]
    jobs: usize,
    /// Seconds for one test
    #[arg(long, default_value_t = 300)]
    timeout_seconds: u64,
    /// The `sampan` to test
    #[arg(long, default_value = "target/release/sampan")]
    sampan: PathBuf,
}

const LIST: &str = "docs/conformance-1.36.yaml";
const RECORD: &str = "docs/conformance.md";
const LAB: &str = "conformance";

/// A test: its name in the suite, and the suite's file.
struct Test {
    name: String,
    file: String,
}

/// What docs/conformance.md says of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    passed: bool,
    date: String,
    reason: String,
}

pub fn run(args: &Args) -> Result<()> {
    let tests = read_list(&fs::read_to_string(LIST).context(LIST)?);
    let record = read_record(&fs::read_to_string(RECORD).unwrap_or_default());
    let chosen = choose(args, &tests, &record)?;
    println!("{} of {} tests chosen", chosen.len(), tests.len());
    let scratch = std::env::temp_dir().join(format!("sampan-conformance-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let own_lab = args.kubeconfig.is_none();
    let kubeconfig = match &args.kubeconfig {
        Some(path) => path.clone(),
        None => start_lab(args, &scratch)?,
    };
    fs::write(RECORD, write_record(&tests, &record))?;
    let progress = Mutex::new(Progress { record, done: 0, passed: 0 });
    let told = |test: &Test, outcome: Outcome| -> Result<()> {
        let mut progress = progress.lock().unwrap_or_else(|e| e.into_inner());
        progress.done += 1;
        progress.passed += usize::from(outcome.passed);
        let word = if outcome.passed { "ok  " } else { "FAIL" };
        println!("{:>3}/{} {word} {}", progress.done, chosen.len(), test.name);
        if !outcome.passed {
            println!("         {}", outcome.reason);
        }
        progress.record.insert(test.name.clone(), outcome);
        Ok(fs::write(RECORD, write_record(&tests, &progress.record))?)
    };
    let (serial, parallel): (Vec<&Test>, Vec<&Test>) =
        chosen.iter().partition(|t| t.name.contains("[Serial]"));
    for (jobs, tests) in [(args.jobs.max(1), parallel), (1, serial)] {
        let next = AtomicUsize::new(0);
        let worker = |number: usize| -> Result<()> {
            while let Some(test) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
                told(test, run_one(args, &kubeconfig, &scratch.join(number.to_string()), test)?)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs).map(|number| scope.spawn(move || worker(number))).collect();
            workers.into_iter().try_for_each(|w| w.join().unwrap_or_else(|_| bail!("a worker died")))
        })?;
    }
    let passed = progress.lock().unwrap_or_else(|e| e.into_inner()).passed;
    if own_lab {
        let _ = Command::new(&args.sampan).args(["lab", "down", "--name", LAB]).status();
    }
    let _ = fs::remove_dir_all(&scratch);
    println!("{passed} passed, {} failed", chosen.len() - passed);
    Ok(())
}

struct Progress {
    record: BTreeMap<String, Outcome>,
    done: usize,
    passed: usize,
}

fn start_lab(args: &Args, scratch: &Path) -> Result<PathBuf> {
    let _ = Command::new(&args.sampan).args(["lab", "down", "--name", LAB]).stderr(Stdio::null()).status();
    let mut up = Command::new(&args.sampan);
    up.args(["lab", "up", "--name", LAB, "--nodes", "amd64,amd64"]);
    if let Some(images) = &args.images {
        up.arg("--images").arg(images);
    }
    if !up.status().with_context(|| format!("running {}", args.sampan.display()))?.success() {
        bail!("the lab did not start");
    }
    let text = Command::new(&args.sampan).args(["lab", "kubeconfig", "--name", LAB]).output()?.stdout;
    let path = scratch.join("kubeconfig");
    fs::write(&path, text)?;
    Ok(path)
}

fn run_one(args: &Args, kubeconfig: &Path, scratch: &Path, test: &Test) -> Result<Outcome> {
    fs::create_dir_all(scratch)?;
    let log = scratch.join("e2e.log");
    let status = Command::new(&args.binary)
        .arg(format!("--kubeconfig={}", kubeconfig.display()))
        .args(["--provider=skeleton", "--num-nodes=2", "--ginkgo.no-color", "--disable-log-dump=true"])
        .arg(format!("--ginkgo.focus={}$", regex_quote(&test.name)))
        .arg(format!("--ginkgo.timeout={}s", args.timeout_seconds))
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("running {}", args.binary.display()))?;
    let output = fs::read_to_string(&log).unwrap_or_default();
    let ran_one = output.contains("Ran 1 of");
    let reason = match (status.success(), ran_one) {
        (true, true) => String::new(),
        (true, false) => "the suite has no test of that name".to_string(),
        (false, _) => failure(&output),
    };
    let date = Command::new("date")
        .arg("+%F")
        .output()
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string());
    Ok(Outcome { passed: status.success() && ran_one, date: date.unwrap_or_default(), reason })
}

/// The line that says why, from the suite's output: `[FAILED] …`, but not the one that only says how long it took.
fn failure(output: &str) -> String {
    let words = output.lines().filter_map(|l| l.split_once("[FAILED]")).map(|(_, why)| why.trim());
    let why = words.into_iter().find(|w| !w.is_empty() && !w.ends_with("seconds]"));
    why.unwrap_or("the suite ended without a verdict").chars().filter(|c| *c != '|').take(160).collect()
}

fn choose<'a>(args: &Args, tests: &'a [Test], record: &BTreeMap<String, Outcome>) -> Result<Vec<&'a Test>> {
    let part = match &args.shard {
        None => (0, 1),
        Some(shard) => {
            let (i, n) = shard.split_once('/').context("--shard takes I/N")?;
            let (i, n): (usize, usize) = (i.parse()?, n.parse()?);
            if i == 0 || i > n {
                bail!("--shard {shard}: I is 1 to N");
            }
            (i - 1, n)
        }
    };
    let matches = |t: &&Test| {
        args.focus.as_ref().is_none_or(|focus| focus.is_match(&t.name))
            && (args.file.is_empty() || args.file.iter().any(|f| t.file.ends_with(f.as_str())))
            && !(args.resume && record.get(&t.name).is_some_and(|o| o.passed))
    };
    Ok(tests
        .iter()
        .filter(matches)
        .enumerate()
        .filter(|(i, _)| i % part.1 == part.0)
        .map(|(_, t)| t)
        .collect())
}

/// The names are folded in YAML: continuation lines are indented deeper than the key.
fn read_list(text: &str) -> Vec<Test> {
    let (mut tests, mut name): (Vec<Test>, Option<String>) = (Vec::new(), None);
    let mut in_name = false;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("  codename: ") {
            name = Some(rest.to_string());
            in_name = true;
        } else if let Some(file) = line.strip_prefix("  file: ") {
            in_name = false;
            if let Some(name) = name.take() {
                let name = name.trim_matches('\'').trim_matches('"').replace("''", "'").replace("\\\"", "\"");
                tests.extend(
                    file.split(", ").take(1).map(|f| Test { name: name.clone(), file: f.to_string() }),
                );
            }
        } else if in_name && line.starts_with("    ") {
            if let Some(name) = name.as_mut() {
                name.push(' ');
                name.push_str(line.trim());
            }
        } else {
            in_name = false;
        }
    }
    tests
}

fn read_record(text: &str) -> BTreeMap<String, Outcome> {
    let rows = text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    rows.filter_map(|row| {
        let cells: Vec<&str> = row.split(" | ").map(str::trim).collect();
        let [name, verdict, date, reason] = cells.as_slice() else { return None };
        let passed = match *verdict {
            "pass" => true,
            "fail" => false,
            _ => return None,
        };
        let (date, reason) = ((*date).to_string(), (*reason).to_string());
        Some((name.replace("\\|", "|"), Outcome { passed, date, reason }))
    })
    .collect()
}

fn write_record(tests: &[Test], record: &BTreeMap<String, Outcome>) -> String {
    let passed = record.values().filter(|o| o.passed).count();
    let mut text = format!(
        "# Conformance\n\nKubernetes 1.36's conformance tests against a lab of two amd64 nodes on SQLite, one row a test, \
         written by `cargo xtask conformance`. {passed} of {} pass; a test without a verdict has not been run.\n\n\
         | test | verdict | date | reason |\n| --- | --- | --- | --- |\n",
        tests.len()
    );
    for test in tests {
        let name = test.name.replace('|', "\\|");
        match record.get(&test.name) {
            Some(o) => {
                let verdict = if o.passed { "pass" } else { "fail" };
                text.push_str(&format!("| {name} | {verdict} | {} | {} |\n", o.date, o.reason));
            }
            None => text.push_str(&format!("| {name} | not run |  |  |\n")),
        }
    }
    text
}

fn regex_quote(text: &str) -> String {
    let special = |c: char| "\\.+*?()|[]{}^$".contains(c);
    text.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn project_file(name: &str) -> String {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        fs::read_to_string(root.join(name)).unwrap_or_default()
    }

    #[test]
    fn the_list_has_every_conformance_test() {
        let tests = read_list(&project_file(LIST));
        assert_eq!(tests.len(), 446);
        assert!(tests.iter().all(|t| t.name.ends_with("[Conformance]")), "a name was cut");
    }

    #[test]
    fn no_test_that_passed_is_dropped_from_the_record() {
        let text = project_file(RECORD);
        let tests = read_list(&project_file(LIST));
        let record = read_record(&text);
        let claimed: Option<usize> =
            text.split(" of 446 pass").next().and_then(|t| t.rsplit(' ').next()?.parse().ok());
        let passed = record.values().filter(|o| o.passed).count();
        assert_eq!(
            claimed,
            (!text.is_empty()).then_some(passed),
            "the count in the text and the rows differ"
        );
        let known = |name: &String| tests.iter().any(|t| t.name == *name);
        assert!(record.keys().all(known), "the record names a test that the suite does not have");
        assert_eq!(write_record(&tests, &record), text, "the record was edited by hand or a row was dropped");
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let tests = vec![Test { name: "a b [Conformance]".into(), file: "x.go".into() }];
        let outcome = Outcome { passed: false, date: "2026-01-02".into(), reason: "timed out".into() };
        let record = BTreeMap::from([(tests[0].name.clone(), outcome)]);
        assert_eq!(read_record(&write_record(&tests, &record)), record);
        assert_eq!(regex_quote("[a] b.c"), "\\[a\\] b\\.c");
        assert_eq!(failure("x [FAILED] [3.1 seconds]\n  [FAILED] no such pod\n"), "no such pod");
    }
}
