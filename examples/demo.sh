#!/bin/bash
# A mixed three-node cluster on this machine that runs the examples, and is taken down again, also when interrupted.
# usage: demo.sh SAMPAN_BINARY
set -euo pipefail
sampan=$(realpath "$1")
here=$(dirname "$(realpath "$0")")
export SAMPAN_LAB=demo
work=$(mktemp -d "${XDG_CACHE_HOME:-/var/cache}/sampan-demo.XXXXXX")
end() {
  local code=$?
  "$sampan" lab down >/dev/null 2>&1 || true
  rm -rf "$work"
  exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM
say() { printf '\n== %s\n' "$*"; }

"$sampan" lab down >/dev/null 2>&1 || true
say "images for three architectures"
python3 "$here/images.py" "$work/images"
say "three nodes: amd64, arm64, arm"
"$sampan" lab up --nodes amd64,arm64,arm --registry
for image in "$work"/images/*.tar; do
  "$sampan" lab exec hub -- skopeo copy --quiet --insecure-policy --all --dest-tls-verify=false \
    "oci-archive:$image" "docker://10.64.0.1:5000/$(basename "$image" .tar):latest"
done
export KUBECONFIG="$work/kubeconfig"
"$sampan" lab kubeconfig >"$KUBECONFIG"
say "the examples"
for file in node-affinity multi-arch amd64-only exporter; do kubectl apply -f "$here/$file.yaml"; done
for what in deployment/pinned deployment/selected deployment/preferred deployment/multi-arch deployment/amd64-only daemonset/exporter; do
  kubectl rollout status "$what" --timeout=120s
done
say "nodes"
kubectl get nodes -o wide
say "pods"
kubectl get pods -o wide
say "what they print"
for pod in $(kubectl get pods -o name); do printf '%-44s ' "$pod"; kubectl logs "$pod" | head -1; done
say "the exporter by name through the cluster's DNS, and by NodePort"
kubectl exec deployment/multi-arch -- wget -qO- http://exporter:9100/metrics
"$sampan" lab exec arm -- python3 -c 'import urllib.request; print(urllib.request.urlopen("http://10.64.0.12:30910/metrics").read().decode(), end="")'
say "done"
