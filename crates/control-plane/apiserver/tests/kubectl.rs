//! The server on 127.0.0.1 with TLS, driven by kubectl. Does nothing where there is no kubectl.
#![allow(clippy::unwrap_used)]
use std::process::{Command, Output};
use std::sync::Arc;

use async_trait::async_trait;
use http::request::Parts;
use sampan_apiserver::{ApiServer, Authenticator, Config, status, storage};
use sampan_client::Identity;
use sampan_pki::certificate::LiveCertificate;
use sampan_store::{Options, Store};

struct Anybody;

#[async_trait]
impl Authenticator for Anybody {
    async fn authenticate(&self, _: &Parts) -> status::Result<Identity> {
        Ok(Identity::new("admin", &[Identity::MASTERS]))
    }
}

struct Kubectl {
    server: String,
    home: std::path::PathBuf,
}

impl Kubectl {
    fn run(&self, args: &[&str], input: &str) -> Output {
        use std::io::Write;
        let mut child = Command::new("kubectl")
            .args(["--server", &self.server, "--insecure-skip-tls-verify", "--token", "t"])
            .args(args)
            .env("HOME", &self.home)
            .env("KUBECONFIG", "/dev/null")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    fn check(&self, args: &[&str], input: &str, want: &str) {
        let output = self.run(args, input);
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(
            output.status.success() && text.contains(want),
            "kubectl {args:?}: wanted {want:?}, got\n{text}"
        );
    }
}

const DEPLOYMENT: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers: [{name: web, image: 'example.com/web:1'}]
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_works() {
    if Command::new("kubectl").arg("version").arg("--client").output().is_err() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let options = Options::new(folder.path().join("store.db")).deferred(storage::DEFERRED_PREFIXES);
    let api = ApiServer::new(Config::new(Store::open(options).unwrap())).await.unwrap();
    api.bootstrap().await.unwrap();
    api.install_authentication(Arc::new(Anybody));
    let authority = sampan_pki::authority::Authority::load_or_create(&folder.path().join("pki")).unwrap();
    let pair = authority.server("test", &["127.0.0.1".to_string()]).unwrap();
    let tls = sampan_pki::tls::server_config(LiveCertificate::new(&pair).unwrap()).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("https://{}", listener.local_addr().unwrap());
    let serving = tokio::spawn({
        let api = api.clone();
        async move { api.serve(listener, Arc::new(tls)).await }
    });
    let home = folder.path().to_path_buf();
    tokio::task::spawn_blocking(move || session(&Kubectl { server, home })).await.unwrap();
    api.shut_down();
    serving.await.unwrap().unwrap();
}

fn session(kubectl: &Kubectl) {
    kubectl.check(&["version"], "", "Server Version: v1.36");
    kubectl.check(&["api-resources"], "", "deployments");
    kubectl.check(&["get", "namespaces"], "", "kube-system");
    kubectl.check(&["create", "configmap", "c", "--from-literal=a=b"], "", "configmap/c created");
    kubectl.check(&["get", "configmap", "c", "-o", "yaml"], "", "a: b");
    kubectl.check(&["label", "configmap", "c", "x=y"], "", "labeled");
    kubectl.check(&["patch", "configmap", "c", "-p", r#"{"data":{"a":"z"}}"#], "", "patched");
    kubectl.check(&["get", "configmap", "c", "-o", "jsonpath={.data.a}"], "", "z");
    kubectl.check(&["apply", "-f", "-"], DEPLOYMENT, "deployment.apps/web created");
    kubectl.check(&["apply", "-f", "-"], DEPLOYMENT, "deployment.apps/web unchanged");
    let server_side = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
    kubectl.check(&server_side, DEPLOYMENT, "serverside-applied");
    kubectl.check(&["diff", "-f", "-"], DEPLOYMENT, "");
    kubectl.check(&["scale", "deployment", "web", "--replicas=3"], "", "scaled");
    kubectl.check(&["get", "deployment", "web", "-o", "jsonpath={.spec.replicas}"], "", "3");
    kubectl.check(&["explain", "pod.spec.containers"], "", "List of containers");
    kubectl.check(&["describe", "deployment", "web"], "", "Selector:");
    kubectl.check(&["get", "configmaps", "--watch", "--request-timeout=2s"], "", "c ");
    kubectl.check(&["expose", "deployment", "web", "--port=80"], "", "exposed");
    kubectl.check(&["get", "all"], "", "service/web");
    kubectl.check(&["delete", "deployment", "web", "--wait=false"], "", "deleted");
    kubectl.check(&["delete", "configmap", "c"], "", "deleted");
    kubectl.check(&["create", "-f", "-", "--dry-run=server"], DEPLOYMENT, "created (server dry run)");
    let refused = kubectl.run(&["create", "-f", "-"], &DEPLOYMENT.replace("replicas: 2", "replicaz: 2"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("unknown field \"spec.replicaz\""));
}
