//! A suite: one lab, and the cases that share it.
//!
//! A runner of our own (`harness = false`) since the lab must go down after the last case, also when the run is
//! interrupted; statics are never dropped. Output and the name filter are those of `cargo test`. Cases of `together`
//! run two at a time, those of `alone` (they disturb the cluster) one after the other afterwards.
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::cluster::{Cluster, Setup, Space};

pub type Run = fn(&Space) -> Result<()>;
pub type Case = (&'static str, Run);

/// How many cases run at a time.
const WORKERS: usize = 2;

/// `cases![first, second]`: the functions with their names.
#[macro_export]
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        vec![$((stringify!($name), $name as $crate::suite::Run)),*]
    };
}

pub struct Suite {
    name: &'static str,
    setup: Setup,
    together: Vec<Case>,
    alone: Vec<Case>,
    limit: Duration,
}

impl Suite {
    /// `nodes` as in `sampan lab up --nodes`.
    pub fn new(name: &'static str, nodes: &str) -> Self {
        let setup = Setup { suite: name, nodes: nodes.to_string(), wait_for_nodes: true, ..Setup::default() };
        Self { name, setup, together: Vec::new(), alone: Vec::new(), limit: Duration::from_secs(240) }
    }

    /// The control plane only: the API without a node.
    pub fn without_nodes(mut self) -> Self {
        self.setup.server_args.push("--disable-agent".to_string());
        self.setup.wait_for_nodes = false;
        self
    }

    pub fn server_arg(mut self, arg: &str) -> Self {
        self.setup.server_args.push(arg.to_string());
        self
    }

    /// The small image that pods run, imported by every node.
    pub fn with_images(mut self) -> Self {
        self.setup.box_image = true;
        self
    }

    /// A registry in the lab's hub; nodes find it behind the mirror `registry.lab:5000`.
    pub fn with_registry(mut self) -> Self {
        self.setup.registry = true;
        self
    }

    /// An etcd in the lab's hub, which the server uses.
    pub fn with_etcd(mut self) -> Self {
        self.setup.etcd = true;
        self.setup.wait_for_nodes = false;
        self.server_arg(&format!("--datastore-endpoint={}", crate::etcd::ENDPOINT))
    }

    pub fn together(mut self, cases: Vec<Case>) -> Self {
        self.together = cases;
        self
    }

    pub fn alone(mut self, cases: Vec<Case>) -> Self {
        self.alone = cases;
        self
    }

    /// After this the whole run is given up.
    pub fn limit_s(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    pub fn run(self) -> ExitCode {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let filters: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
        let wanted = |case: &Case| {
            filters.is_empty() || filters.iter().any(|f| case.0.contains(f.as_str()) || *f == self.name)
        };
        let together: Vec<Case> = self.together.iter().copied().filter(wanted).collect();
        let alone: Vec<Case> = self.alone.iter().copied().filter(wanted).collect();
        if args.iter().any(|a| a == "--list") {
            together.iter().chain(&alone).for_each(|(name, _)| println!("{name}: test"));
            return ExitCode::SUCCESS;
        }
        let count = together.len() + alone.len();
        println!("\nrunning {count} tests of suite {}", self.name);
        if count == 0 {
            return ExitCode::SUCCESS;
        }
        let cluster = match Cluster::up(&self.setup) {
            Ok(cluster) => Arc::new(cluster),
            Err(error) => {
                println!("\nsuite {} cannot start: {error:#}", self.name);
                return ExitCode::FAILURE;
            }
        };
        watch_over(&cluster, self.limit);
        let failed = Mutex::new(Vec::new());
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| {
                    while let Some(case) = together.get(next.fetch_add(1, Ordering::Relaxed)) {
                        run_case(&cluster, case, &failed);
                    }
                });
            }
        });
        alone.iter().for_each(|case| run_case(&cluster, case, &failed));
        let failed = failed.into_inner().unwrap_or_default();
        let (verdict, code) = match failed.is_empty() {
            true => ("ok", ExitCode::SUCCESS),
            false => ("FAILED", ExitCode::FAILURE),
        };
        if !failed.is_empty() {
            println!("{}\nfailures:", cluster.node_logs());
            failed.iter().for_each(|(name, error)| println!("\n---- {name}\n{error}"));
        }
        cluster.down();
        println!(
            "\ntest result: {verdict}. {} passed; {} failed; suite {}\n",
            count - failed.len(),
            failed.len(),
            self.name
        );
        code
    }
}

fn run_case(cluster: &Arc<Cluster>, (name, run): &Case, failed: &Mutex<Vec<(String, String)>>) {
    let start = sampan_world::clock::monotonic();
    let result = Space::new(cluster.clone(), name).and_then(|space| {
        let result = catch_unwind(AssertUnwindSafe(|| run(&space)))
            .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_message(panic.as_ref()))));
        let result = result.map_err(|error| anyhow!("{error:#}\n{}", space.tell()));
        space.end();
        result
    });
    let seconds = start.elapsed().as_secs_f32();
    match result {
        Ok(()) => println!("test {name} ... ok ({seconds:.1} s)"),
        Err(error) => {
            println!("test {name} ... FAILED ({seconds:.1} s)\n{error:#}");
            if let Ok(mut failed) = failed.lock() {
                failed.push(((*name).to_string(), format!("{error:#}")));
            }
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// Takes the lab down when the run is interrupted, or takes longer than it may.
fn watch_over(cluster: &Arc<Cluster>, limit: Duration) {
    let watched = cluster.clone();
    cluster.spawn(async move {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut terminate), Ok(mut interrupt)) =
            (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        else {
            return;
        };
        let why = tokio::select! {
            _ = terminate.recv() => "terminated".to_string(),
            _ = interrupt.recv() => "interrupted".to_string(),
            () = tokio::time::sleep(limit) => format!("not done after {} s", limit.as_secs()),
        };
        println!("{}\nthe run was given up: {why}", watched.node_logs());
        watched.down();
        std::process::exit(130);
    });
}
