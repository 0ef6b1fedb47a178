//! Two servers that share an etcd, and an agent: both serve, one leads, either may die.
//!
//! Upstream counterpart: K3s' tests/e2e/externalip and validatecluster with external databases. The lab's first node is
//! one server; the second node's agent is ended and a server started in its place; the third node is an agent.
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use sampan_tests::etcd::{self, ENDPOINT};
use sampan_tests::image::BOX;
use sampan_tests::process::Ran;
use sampan_tests::{Cluster, Space, Suite, cases, has, seconds, wait_for};
use sampan_world::clock;
use serde_json::{Value, json};

const SAMPAN: &str = "/run/sampan/bin/sampan";
const FIRST: &str = "amd64";
const SECOND: &str = "amd64-2";
const AGENT: &str = "amd64-3";
const ADDRESSES: [(&str, &str); 2] = [(FIRST, "10.64.0.11"), (SECOND, "10.64.0.12")];

fn main() -> ExitCode {
    Suite::new("servers", "amd64,amd64,amd64")
        .with_images()
        .with_etcd()
        .alone(cases![
            a_second_server_joins,
            who_may_not_be_a_server,
            two_that_start_at_once_make_one_cluster,
            service_addresses_are_given_once,
            keys_and_tokens_reach_the_other,
            a_server_that_ends_hands_over_at_once,
            a_leader_that_dies_is_replaced,
            etcd_comes_back,
        ])
        .limit_s(600)
        .run()
}

/// kubectl in a server's node, by its own API.
fn kubectl(s: &Cluster, node: &str, args: &[&str]) -> Result<Ran> {
    s.exec(node, &[&["kubectl", "--kubeconfig", "/etc/sampan/sampan.yaml"], args].concat())
}

fn told(s: &Cluster, node: &str, args: &[&str]) -> Result<String> {
    Ok(kubectl(s, node, args)?.ok()?.trim().to_string())
}

/// A script in a node; what it prints.
fn shell(s: &Cluster, node: &str, script: &str) -> Result<String> {
    s.exec(node, &["sh", "-c", script])?.ok()
}

fn other(node: &str) -> &'static str {
    if node == FIRST { SECOND } else { FIRST }
}

fn address(node: &str) -> &'static str {
    ADDRESSES.iter().find(|(name, _)| *name == node).map_or("", |(_, address)| address)
}

/// Starts a server in a node, as an owner would who wrote the flags into a file.
fn start_server(s: &Cluster, node: &str) -> Result<()> {
    shell(
        s,
        node,
        &format!(
            "grep -v '^server:\\|^tls-san:\\|^write-kube' /etc/sampan/config.yaml >/etc/sampan/server.yaml\n\
             echo \"datastore-endpoint: {ENDPOINT}\" >>/etc/sampan/server.yaml\n\
             echo 'tls-san: [127.0.0.1, localhost]' >>/etc/sampan/server.yaml\n\
             setsid {SAMPAN} server --config /etc/sampan/server.yaml </dev/null >>/var/log/server.log 2>&1 &\n\
             echo $! >/run/server.pid"
        ),
    )?;
    let ready = wait_for(&format!("the server {node}"), seconds(60), || {
        let ran = kubectl(s, node, &["get", "--raw", "/readyz"])?;
        Ok(if ran.out.trim() == "ok" { Ok(()) } else { Err(ran.text()) })
    });
    ready.with_context(|| shell(s, node, "tail -n 30 /var/log/server.log").unwrap_or_default())
}

fn end_server(s: &Cluster, node: &str, signal: &str) -> Result<()> {
    // the first node's was started by the lab
    let pid = "$(pgrep -o -f '^/run/sampan/bin/sampan server')";
    shell(s, node, &format!("kill -{signal} {pid}"))?;
    wait_for(&format!("the end of the server {node}"), seconds(30), || {
        let ran = s.exec(node, &["pgrep", "-f", "^/run/sampan/bin/sampan server"])?;
        Ok(if ran.code == 0 { Err(ran.out) } else { Ok(()) })
    })
}

fn holder(s: &Cluster, through: &str, lease: &str) -> Result<String> {
    let path = "jsonpath={.spec.holderIdentity}";
    let holder = told(s, through, &["-n", "kube-system", "get", "lease", lease, "-o", path])?;
    Ok(holder.rsplit_once('_').map_or("", |(node, _)| node).to_string())
}

/// The addresses that the `kubernetes` service leads to, of Endpoints and of the slice.
fn endpoints(s: &Cluster, through: &str) -> Result<[Vec<String>; 2]> {
    let list = |kind: &str, path: &str| -> Result<Vec<String>> {
        let text = told(s, through, &["get", kind, "kubernetes", "-o", &format!("jsonpath={path}")])?;
        let mut all: Vec<String> = text.split_whitespace().map(str::to_string).collect();
        all.sort();
        Ok(all)
    };
    Ok([
        list("endpoints", "{.subsets[*].addresses[*].ip}")?,
        list("endpointslices", "{.endpoints[*].addresses[0]}")?,
    ])
}

fn wait_endpoints(s: &Cluster, through: &str, want: &[&str], limit: Duration) -> Result<()> {
    wait_for(&format!("endpoints {want:?}"), limit, || {
        let seen = endpoints(s, through)?;
        Ok(if seen.iter().all(|all| all == want) { Ok(()) } else { Err(format!("{seen:?}")) })
    })
}

fn pod(namespace: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": {
        "terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": BOX}]}})
}

/// Makes a Deployment through a server and waits until its pod runs: controllers and scheduler work. It is for the agent's
/// node: the scheduler does not know at once that a server's own node went with it.
fn deploys(s: &Space, through: &str, name: &str, limit: Duration) -> Result<()> {
    let mut template = json!({"metadata": {"labels": {"app": name}}, "spec": pod(&s.name, name)["spec"]});
    template["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": AGENT});
    let object = json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": name, "namespace": s.name},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": template}});
    apply(s, through, &object)?;
    wait_for(&format!("the pod of {name}"), limit, || {
        let path = "jsonpath={.status.readyReplicas}";
        let ran = kubectl(s, through, &["-n", &s.name, "get", "deployment", name, "-o", path])?;
        Ok(if ran.out.trim() == "1" { Ok(()) } else { Err(ran.text()) })
    })
}

fn apply(s: &Cluster, through: &str, object: &Value) -> Result<()> {
    let script = format!(
        "cat <<'END' | kubectl --kubeconfig /etc/sampan/sampan.yaml create -f - 2>&1\n{object}\nEND\n"
    );
    let ran = s.exec(through, &["sh", "-c", &script])?;
    ran.ok().map(drop)
}

fn a_second_server_joins(s: &Space) -> Result<()> {
    s.lab("stop", &[SECOND])?.ok()?;
    start_server(s, SECOND)?;
    let file = "/var/lib/sampan/server/tls/server-ca.crt";
    let authority = |node| s.exec(node, &["cat", file])?.ok();
    ensure!(authority(FIRST)? == authority(SECOND)?, "one cluster, one authority");
    for path in ["tls/server-ca.key", "tls/service-account.key", "node-token"] {
        let sum = |node| shell(s, node, &format!("sha256sum </var/lib/sampan/server/{path}"));
        ensure!(sum(FIRST)? == sum(SECOND)?, "{path}");
    }
    // what is written through one is read through the other, at once
    for (from, to) in [(FIRST, SECOND), (SECOND, FIRST)] {
        for round in 0..5 {
            let name = format!("{from}-{round}");
            told(s, from, &["-n", &s.name, "create", "configmap", &name])?;
            told(s, to, &["-n", &s.name, "get", "configmap", &name])?;
        }
    }
    for node in [FIRST, SECOND] {
        let verbose = told(s, node, &["get", "--raw", "/readyz?verbose"])?;
        has(&verbose, "[+]etcd ok")?;
        has(&verbose, "readyz check passed")?;
    }
    wait_endpoints(s, FIRST, &["10.64.0.11", "10.64.0.12"], seconds(20))?;
    for lease in ["kube-controller-manager", "kube-scheduler"] {
        ensure!([FIRST, SECOND].contains(&holder(s, SECOND, lease)?.as_str()), "{lease}");
    }
    wait_for("all nodes to be Ready", seconds(60), || {
        let path = "jsonpath={.items[*].status.conditions[?(@.type==\"Ready\")].status}";
        let ready = told(s, SECOND, &["get", "nodes", "-o", path])?;
        Ok(if ready == "True True True" { Ok(()) } else { Err(ready) })
    })?;
    deploys(s, SECOND, "through-the-second", seconds(30))?;
    // kubelets are reached through either server
    let mut on_agent = pod(&s.name, "far");
    on_agent["spec"]["nodeName"] = AGENT.into();
    apply(s, FIRST, &on_agent)?;
    s.running("far")?;
    for node in [FIRST, SECOND] {
        wait_for(&format!("exec through {node}"), seconds(30), || {
            let ran = kubectl(s, node, &["-n", &s.name, "exec", "far", "--", "echo", "here"])?;
            Ok(if ran.out.trim() == "here" { Ok(()) } else { Err(ran.text()) })
        })?;
    }
    Ok(())
}

fn who_may_not_be_a_server(s: &Space) -> Result<()> {
    let token = s.token()?;
    let refused = |args: &[&str], want: &str| -> Result<()> {
        let common = ["timeout", "40", SAMPAN, "server", "--config", "/dev/null", "--disable-agent"];
        let place =
            ["--data-dir", "/tmp/other", "--node-name", "x", "--node-ip", "10.64.0.13", "-o", "/tmp/k"];
        let ran = s.exec(AGENT, &[&common[..], &place[..], args].concat())?;
        ensure!(ran.code == 1, "{args:?}: {} {}", ran.code, ran.text());
        has(&ran.text(), want)
    };
    let etcd = ["--datastore-endpoint", ENDPOINT];
    refused(&[&etcd[..], &["--token", "wrong"]].concat(), "encrypted with different token")?;
    refused(&etcd, "--datastore-endpoint needs --token")?;
    refused(
        &[&etcd[..], &["--token", &token, "--cluster-cidr", "10.99.0.0/16"]].concat(),
        "--cluster-cidr is 10.99.0.0/16 here and 10.42.0.0/16 in the cluster",
    )?;
    refused(
        &["--datastore-endpoint", "mysql://u:p@tcp(h)/k", "--token", &token],
        "mysql is not there; etcd is what there is",
    )?;
    shell(s, AGENT, "mkdir -p /tmp/other/server/db && touch /tmp/other/server/db/state.db")?;
    refused(&[&etcd[..], &["--token", &token]].concat(), "holds a cluster already")?;
    // and a server of this cluster does not begin another one by itself
    let command = ["timeout", "40", SAMPAN, "server", "--config", "/dev/null", "--node-ip", address(SECOND)];
    let ran = s.exec(SECOND, &command)?;
    ensure!(ran.code == 1, "{}", ran.text());
    has(&ran.text(), "this server's cluster is in the datastore http://10.64.0.1:2379")
}

/// On one machine, with ports of their own and an etcd that nobody used before.
fn two_that_start_at_once_make_one_cluster(s: &Space) -> Result<()> {
    let script = format!(
        "cd /tmp; setsid {} --data-dir /tmp/fresh --listen-client-urls http://127.0.0.1:3379 \
         --advertise-client-urls http://127.0.0.1:3379 --listen-peer-urls http://127.0.0.1:3380 \
         </dev/null >/tmp/fresh.log 2>&1 & pids=$!\n\
         for port in 7001 7002; do\n\
           setsid {SAMPAN} server --config /dev/null --data-dir /tmp/s$port --node-name s$port --node-ip 10.64.0.13 \
           --https-listen-port $port --disable-agent --token same --datastore-endpoint http://127.0.0.1:3379 \
           -o /tmp/s$port/kubeconfig </dev/null >/tmp/s$port.log 2>&1 & pids=\"$pids $!\"\n\
         done; echo $pids >/tmp/pids",
        etcd::program()
    );
    shell(s, AGENT, &script)?;
    let asked = |port: &str, args: &[&str]| {
        let config = format!("/tmp/s{port}/kubeconfig");
        s.exec(AGENT, &[&["kubectl", "--kubeconfig", config.as_str()], args].concat())
    };
    let result = ["7001", "7002"].into_iter().try_for_each(|port| {
        wait_for(&format!("the server at {port}"), seconds(40), || {
            let ran = asked(port, &["get", "--raw", "/readyz"])?;
            Ok(if ran.out.trim() == "ok" { Ok(()) } else { Err(ran.text()) })
        })
    });
    let result = result.and_then(|()| {
        shell(s, AGENT, "cmp /tmp/s7001/server/tls/server-ca.crt /tmp/s7002/server/tls/server-ca.crt")?;
        wait_for("both in the endpoints", seconds(20), || {
            let path = "jsonpath={range .items[*]}{.metadata.name} {.ports[0].port} {end}";
            let label = "kubernetes.io/service-name=kubernetes";
            let said = asked("7002", &["get", "endpointslices", "-l", label, "-o", path])?;
            let wanted = said.out.trim() == "kubernetes 7001 kubernetes-7002 7002";
            Ok(if wanted { Ok(()) } else { Err(said.text()) })
        })
    });
    let logs = shell(s, AGENT, "tail -n 15 /tmp/s7001.log /tmp/s7002.log").unwrap_or_default();
    shell(s, AGENT, "kill -9 $(cat /tmp/pids); rm -rf /tmp/fresh /tmp/s700*")?;
    result.context(logs)
}

/// As many at once through both as clients can: no address or port comes twice.
fn service_addresses_are_given_once(s: &Space) -> Result<()> {
    let service = |name: String| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"type": "NodePort", "ports": [{"port": 80}]}})
    };
    // five kubectls a server, of ten services each
    let script = |server: &str| {
        let batch = |batch: usize| {
            let items: Vec<Value> = (0..10).map(|n| service(format!("s-{server}-{batch}-{n}"))).collect();
            let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
            format!(
                "kubectl --kubeconfig /etc/sampan/sampan.yaml -n {} create -f - <<'END' &\n{list}\nEND\n\
                 pids=\"$pids $!\"\n",
                s.name
            )
        };
        (0..5).map(batch).collect::<String>() + "for pid in $pids; do wait $pid || exit 1; done"
    };
    std::thread::scope(|scope| {
        let both = [FIRST, SECOND].map(|node| {
            let script = script(node);
            scope.spawn(move || shell(s, node, &script))
        });
        both.into_iter().try_for_each(|one| match one.join() {
            Ok(ran) => ran.map(drop),
            Err(_) => bail!("a thread panicked"),
        })
    })?;
    for node in [FIRST, SECOND] {
        let list: Value = serde_json::from_str(&told(s, node, &["get", "services", "-A", "-o", "json"])?)?;
        let items = list["items"].as_array().context("a list")?;
        let own = items.iter().filter(|item| item["metadata"]["namespace"] == s.name.as_str()).count();
        ensure!(own == 100, "{own} of 100 services through {node}");
        let mut addresses: Vec<&Value> = items.iter().map(|item| &item["spec"]["clusterIP"]).collect();
        let mut ports: Vec<&Value> =
            items.iter().map(|item| &item["spec"]["ports"][0]["nodePort"]).filter(|p| p.is_u64()).collect();
        for all in [&mut addresses, &mut ports] {
            let count = all.len();
            all.sort_by_key(ToString::to_string);
            all.dedup();
            ensure!(all.len() == count, "{} of {count} are different", all.len());
        }
    }
    Ok(())
}

fn keys_and_tokens_reach_the_other(s: &Space) -> Result<()> {
    let file = |node: &str, path: &str| shell(s, node, &format!("cat /var/lib/sampan/server/{path}"));
    let reaches = |what: &str, path: &str, before: &str| {
        wait_for(what, seconds(20), || {
            let (one, two) = (file(FIRST, path)?, file(SECOND, path)?);
            Ok(if one == two && one != before { Ok(()) } else { Err(format!("{one}\n{two}")) })
        })
    };
    let before = file(FIRST, "tls/server-ca.crt")?;
    s.exec(SECOND, &[SAMPAN, "certificate", "rotate-ca"])?.ok()?;
    reaches("the new authority on the first", "tls/server-ca.crt", &before)?;
    let serial = "openssl x509 -noout -issuer -in /var/lib/sampan/server/tls/serving-apiserver.crt";
    wait_for("certificates of the new authority", seconds(20), || {
        let issuers = [shell(s, FIRST, serial)?, shell(s, SECOND, serial)?];
        Ok(if issuers[0] == issuers[1] { Ok(()) } else { Err(issuers.concat()) })
    })?;
    for node in [FIRST, SECOND] {
        wait_for(&format!("the API of {node}"), seconds(20), || {
            let ran = kubectl(s, node, &["get", "nodes"])?;
            Ok(if ran.code == 0 { Ok(()) } else { Err(ran.text()) })
        })?;
    }
    let (before, present) = (file(FIRST, "token")?, s.token()?);
    s.exec(FIRST, &[SAMPAN, "token", "rotate", "--new-token", "anothersecret"])?.ok()?;
    reaches("the new token on the second", "token", &before)?;
    // what the owner wrote into files stays true for the cases to come
    s.exec(SECOND, &[SAMPAN, "token", "rotate", "--new-token", &present])?.ok()?;
    reaches("the token of before on the first", "token", "anothersecret\n")
}

fn a_server_that_ends_hands_over_at_once(s: &Space) -> Result<()> {
    let leader = holder(s, FIRST, "kube-scheduler")?;
    let survivor = other(&leader);
    end_server(s, &leader, "TERM")?;
    wait_endpoints(s, survivor, &[address(survivor)], seconds(3))?;
    wait_for("another leader", seconds(6), || {
        let leases = ["kube-scheduler", "kube-controller-manager"];
        let holders = leases.map(|lease| holder(s, survivor, lease).unwrap_or_default());
        Ok(if holders.iter().all(|h| h == survivor) { Ok(()) } else { Err(holders.join(" ")) })
    })?;
    deploys(s, survivor, "after-a-clean-end", seconds(20))?;
    start_server(s, &leader)?;
    wait_endpoints(s, survivor, &["10.64.0.11", "10.64.0.12"], seconds(20))
}

fn a_leader_that_dies_is_replaced(s: &Space) -> Result<()> {
    let leader = holder(s, FIRST, "kube-scheduler")?;
    let survivor = other(&leader);
    let start = clock::monotonic();
    end_server(s, &leader, "KILL")?;
    deploys(s, survivor, "after-a-death", seconds(40))?;
    let took = start.elapsed();
    println!("  the leader killed to a new Deployment's pod Ready: {:.1} s", took.as_secs_f32());
    ensure!(took < seconds(30), "it took {took:?}");
    ensure!(holder(s, survivor, "kube-scheduler")? == survivor, "the survivor leads");
    wait_endpoints(s, survivor, &[address(survivor)], seconds(40))?;
    start_server(s, &leader)?;
    wait_endpoints(s, survivor, &["10.64.0.11", "10.64.0.12"], seconds(20))
}

fn etcd_comes_back(s: &Space) -> Result<()> {
    apply(s, FIRST, &pod(&s.name, "stays"))?;
    s.running("stays")?;
    etcd::kill(s)?;
    for node in [FIRST, SECOND] {
        wait_for(&format!("{node} to be not ready"), seconds(20), || {
            let ran = kubectl(s, node, &["get", "--raw", "/readyz?verbose"])?;
            Ok(if ran.text().contains("[-]etcd failed") { Ok(()) } else { Err(ran.text()) })
        })?;
    }
    // long enough for the leader to give up
    std::thread::sleep(seconds(16));
    etcd::start_again(s)?;
    for node in [FIRST, SECOND] {
        wait_for(&format!("{node} to be ready again"), seconds(60), || {
            let ran = kubectl(s, node, &["get", "--raw", "/readyz"])?;
            Ok(if ran.out.trim() == "ok" { Ok(()) } else { Err(ran.text()) })
        })?;
    }
    deploys(s, SECOND, "after-the-datastore", seconds(60))?;
    let path = "jsonpath={.status.containerStatuses[0].restartCount}";
    let restarts = told(s, FIRST, &["-n", &s.name, "get", "pod", "stays", "-o", path])?;
    ensure!(restarts == "0", "the pod ran on: {restarts}");
    Ok(())
}
