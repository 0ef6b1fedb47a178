//! Clusters of virtual machines: stock Debian with systemd and cgroup v2 on amd64, a Raspberry Pi's like on arm64.
//!
//! What a lab cannot show: a service that survives a reboot and a power cut, limits and device rules of cgroup v2, a
//! distribution's own kernel, foreign machines whose kernel is emulated, too. Emulated processors are slow, so `make
//! test-vm` runs this, and plain `cargo test` does not (all cases are ignored, as libtest has it). The cases are steps of
//! one cluster's life; an essential one that fails ends the run.
mod cluster_life;
mod machine;
mod node_life;
mod rootfs;
mod site;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use sampan_tests::seconds;

use crate::site::Site;

type Step = fn(&Site) -> Result<()>;

/// Name, whether all later ones need it, what it does.
const STEPS: &[(&str, bool, Step)] = &[
    ("a_bare_machine", true, node_life::a_bare_machine),
    ("install", true, node_life::install),
    ("pods_and_services", true, node_life::pods_and_services),
    ("limits_of_cgroup_v2", false, node_life::limits_of_cgroup_v2),
    ("devices_and_seccomp", false, node_life::devices_and_seccomp),
    ("probes_and_figures", false, node_life::probes_and_figures),
    ("systemd_goes_its_way", false, node_life::systemd_goes_its_way),
    ("reboot", true, node_life::reboot),
    ("power_cut", true, node_life::power_cut),
    ("upgrade", false, node_life::upgrade),
    ("a_pi_without_cgroups", true, cluster_life::a_pi_without_cgroups),
    ("apply", true, cluster_life::apply),
    ("native_arm64_pod", false, cluster_life::native_arm64_pod),
    ("across_nodes", false, cluster_life::across_nodes),
    ("nothing_is_left", false, cluster_life::nothing_is_left),
];
/// The first ones need the amd64 machine only.
const ALONE: usize = 10;
/// After this the run is given up: twice what an idle machine needs. Building the root file systems, which happens once, does not count.
const LIMIT_S: u64 = 2700;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|a| a == flag);
    let chosen = has("--ignored") || has("--include-ignored");
    if has("--list") {
        STEPS.iter().filter(|_| !has("--ignored") || chosen).for_each(|(name, ..)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests of suite vm", if chosen { STEPS.len() } else { 0 });
    if !chosen {
        println!("test result: ok. {} ignored: `make test-vm` runs them\n", STEPS.len());
        return ExitCode::SUCCESS;
    }
    // one machine alone, for the impatient: `-- --ignored amd64`
    let all = !has("amd64");
    let steps = &STEPS[..if all { STEPS.len() } else { ALONE }];
    let site = match Site::up(all) {
        Ok(site) => Arc::new(site),
        Err(error) => {
            println!("\nsuite vm cannot start: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    watch_over(site.clone());
    let begin = sampan_world::clock::monotonic();
    let (mut passed, mut failed) = (0, 0);
    for (name, is_essential, step) in steps {
        let start = sampan_world::clock::monotonic();
        let result = step(&site);
        let took = start.elapsed().as_secs_f32();
        match result {
            Ok(()) => {
                passed += 1;
                println!("test {name} ... ok ({took:.1} s)");
            }
            Err(error) => {
                failed += 1;
                println!("test {name} ... FAILED ({took:.1} s)\n{error:#}\n{}", site.tell());
                if *is_essential {
                    break;
                }
            }
        }
    }
    site.end();
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    let left = STEPS.len() - passed - failed;
    let took = begin.elapsed().as_secs();
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; {left} not run; suite vm, {took} s\n"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Takes everything down when the run is interrupted, or takes longer than it may.
fn watch_over(site: Arc<Site>) {
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        let why = runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (mut terminate, mut interrupt) =
                (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            Ok::<_, std::io::Error>(tokio::select! {
                _ = terminate.recv() => "terminated".to_string(),
                _ = interrupt.recv() => "interrupted".to_string(),
                () = tokio::time::sleep(seconds(LIMIT_S)) => format!("not done after {LIMIT_S} s"),
            })
        });
        let Ok(why) = why else { return };
        println!("the run was given up: {why}");
        site.end();
        std::process::exit(130);
    });
}
