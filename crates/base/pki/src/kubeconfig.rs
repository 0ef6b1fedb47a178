//! Writes kubeconfig files with everything embedded. Upstream counterpart: client-go tools/clientcmd.
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::Pair;

/// A kubeconfig (YAML) for `server`; `name` names cluster, user and context.
pub fn kubeconfig(name: &str, server: &str, authority_pem: &str, client: &Pair) -> String {
    // a JSON string is a YAML string
    let quoted = |s: &str| serde_json::Value::from(s).to_string();
    let (name, server) = (quoted(name), quoted(server));
    let [authority, certificate, key] =
        [authority_pem, &client.certificate_pem, &client.key_pem].map(|pem| BASE64.encode(pem));
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: {name}
  cluster:
    server: {server}
    certificate-authority-data: {authority}
users:
- name: {name}
  user:
    client-certificate-data: {certificate}
    client-key-data: {key}
contexts:
- name: {name}
  context:
    cluster: {name}
    user: {name}
current-context: {name}
preferences: {{}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeds_everything() {
        let pair = Pair { certificate_pem: "cert".into(), key_pem: "key".into() };
        let text = kubeconfig("de\"fault", "https://127.0.0.1:6443", "ca", &pair);
        for line in [
            r#"- name: "de\"fault""#,
            r#"    server: "https://127.0.0.1:6443""#,
            "    certificate-authority-data: Y2E=",
            "    client-certificate-data: Y2VydA==",
            "    client-key-data: a2V5",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
    }
}
