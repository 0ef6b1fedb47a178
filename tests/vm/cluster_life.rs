//! Several machines: an arm64 one like a Raspberry Pi joins, a lab node too, pods talk across them; then all is gone.
use anyhow::{Result, ensure};
use sampan_tests::{has, seconds, wait_for};

use crate::node_life::{IMAGE, serves, small_image, traces};
use crate::site::{AMD64, ARM64, NODE, NODE_IP, Site};

/// Its firmware turns the memory controller off: told, cured and rebooted when that is agreed to.
pub fn a_pi_without_cgroups(site: &Site) -> Result<()> {
    let boot = site.wait_for_login(&ARM64, "")?;
    let told = site.on(&ARM64, "uname -rm; cat /sys/fs/cgroup/cgroup.controllers")?.ok()?;
    println!("  {}", told.trim().replace('\n', ", "));
    has(&told, "aarch64")?;
    ensure!(!told.contains("memory"), "{told}");
    let before = traces(site, &ARM64)?;
    site.write("before-arm64", &before.join("\n"))?;
    let line = format!(
        "join {} --binary-dir bin --server-ip {} --server-user {} --server-ssh-key key-amd64",
        Site::way(&ARM64),
        AMD64.ip,
        AMD64.user
    );
    let refused = site.sampan(&line, 120)?;
    ensure!(refused.code == 6, "{} {}", refused.code, refused.text());
    has(&refused.text(), "cgroup_enable=memory` to /boot/firmware/cmdline.txt")?;
    let after = traces(site, &ARM64)?;
    let new: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
    ensure!(new.is_empty(), "left by a refused join: {new:?}");
    let start = sampan_world::clock::monotonic();
    let ran = site.sampan(&format!("{line} --yes --wait 300"), 720)?;
    let told = ran.text();
    ran.ok()?;
    println!("  enabled, rebooted, joined and Ready in {:.0} s", start.elapsed().as_secs_f32());
    has(&told, "the memory control group is enabled; rebooting")?;
    has(&told, "node vm-arm64 is Ready")?;
    let cmdline = site.with_machine(&ARM64, |m| m.firmware_file("cmdline.txt"))??;
    ensure!(cmdline.trim().ends_with("cgroup_memory=1 cgroup_enable=memory"), "{cmdline}");
    ensure!(site.with_machine(&ARM64, crate::machine::Machine::boots)? == 2, "one reboot");
    ensure!(boot != site.wait_for_login(&ARM64, "")?, "another boot");
    has(
        &site.on(&ARM64, "systemctl is-enabled sampan-agent; systemctl is-active sampan-agent")?.out,
        "enabled\nactive",
    )
}

/// All three as a list: those that are nodes already are left alone.
pub fn apply(site: &Site) -> Result<()> {
    let hosts = format!(
        "- {{hostname: vm-amd64, ip: {}, user: {}, ssh-key: key-amd64, extra-args: --kubelet-arg=pod-max-pids=300}}\n\
         - {{hostname: vm-arm64, ip: {}, user: {}, ssh-password-file: pi-password}}\n\
         - {{hostname: {NODE}, ip: {NODE_IP}, ssh-key: key-amd64}}\n",
        AMD64.ip, AMD64.user, ARM64.ip, ARM64.user
    );
    site.write("hosts.yaml", &hosts)?;
    // what the server was upgraded to
    std::fs::copy(site.file("bin/sampan-arm64"), site.file("next/sampan-arm64"))?;
    let line =
        "apply hosts.yaml --binary-dir next --accept-new-host-keys --local-path kubeconfig --context vm";
    let ran = site.sampan(line, 300)?;
    let told = ran.text();
    ran.ok()?;
    has(&told, "vm-amd64: the program is there already")?;
    has(&told, "vm-arm64: sampan-agent runs already")?;
    has(&told, &format!("node {NODE} is Ready"))?;
    let nodes = site.kubectl("get nodes -L kubernetes.io/arch --no-headers")?;
    print!("{}", nodes.lines().map(|l| format!("  {l}\n")).collect::<String>());
    for (node, arch) in [("vm-amd64", "amd64"), ("vm-arm64", "arm64"), (NODE, "amd64")] {
        let line = nodes.lines().find(|l| l.starts_with(&format!("{node} "))).unwrap_or_default();
        ensure!(line.contains(" Ready ") && line.ends_with(arch), "{nodes}");
    }
    Ok(())
}

pub fn native_arm64_pod(site: &Site) -> Result<()> {
    let archive = site.file("small-arm64.tar");
    small_image(ARM64.arch, &site.rootfs(&ARM64).busybox())?.write_archive(&archive)?;
    site.ssh(&ARM64, "cat >small.tar", &std::fs::read(&archive)?)?.ok()?;
    let script = format!("cd /home/{} && sampan image import small.tar && rm small.tar", ARM64.user);
    site.on(&ARM64, &script)?.ok()?;
    let pod = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: native}}\nspec:\n  nodeSelector: {{kubernetes.io/arch: arm64}}\n  containers:\n  \
         - name: c\n    image: {IMAGE}\n    command: [sh, -c, 'uname -m; exec sleep 100000']\n    resources: {{limits: {{memory: 32Mi}}}}\n    \
         securityContext: {{seccompProfile: {{type: RuntimeDefault}}}}\n"
    );
    site.apply(&pod)?;
    site.kubectl("wait --for=condition=Ready pod/native --timeout=120s")?;
    let logs = site.kubectl("logs native")?;
    ensure!(logs.trim() == "aarch64", "{logs}");
    let said =
        site.in_pod("native", "grep Seccomp: /proc/self/status; cat /sys/fs/cgroup/memory.max")?.ok()?;
    ensure!(said.contains("\t2") && said.contains("33554432"), "{said}");
    // native: no interpreter of foreign programs in this machine
    let other = site.on(&ARM64, "ls /proc/sys/fs/binfmt_misc 2>/dev/null | grep qemu; true")?.ok()?;
    ensure!(other.is_empty(), "{other}");
    Ok(())
}

/// A pod in one machine reaches the service whose pod is in the other, by name.
pub fn across_nodes(site: &Site) -> Result<()> {
    let ip = site.kubectl("get service web -o jsonpath={.spec.clusterIP}")?;
    wait_for("the service's name on arm64", seconds(60), || {
        let ran = site.in_pod("native", "nslookup web.default.svc.cluster.local")?;
        Ok(if ran.out.contains(&ip) { Ok(()) } else { Err(ran.text()) })
    })?;
    let pod = crate::node_life::web_pod(site)?;
    wait_for("the service from arm64", seconds(60), || {
        let ran = site.in_pod("native", &format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {ip} 80"))?;
        Ok(if ran.out.contains(&pod) { Ok(()) } else { Err(ran.text()) })
    })?;
    // networkd begins anew: routes to other nodes' pods are there again, or still
    site.on(&ARM64, "systemctl restart systemd-networkd")?.ok()?;
    wait_for("the service after networkd's restart", seconds(60), || {
        let ran = site.in_pod("native", &format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {ip} 80"))?;
        Ok(if ran.out.contains(&pod) { Ok(()) } else { Err(ran.text()) })
    })?;
    serves(site, 30)
}

pub fn nothing_is_left(site: &Site) -> Result<()> {
    let ran = site.sampan("uninstall --hosts hosts.yaml", 240)?;
    let told = ran.text();
    ran.ok()?;
    has(&told, "vm-amd64: sampan is removed")?;
    for recipe in [&AMD64, &ARM64] {
        let before = std::fs::read_to_string(site.file(&format!("before-{}", recipe.arch)))?;
        let after = traces(site, recipe)?;
        let new: Vec<_> = after.iter().filter(|line| !before.lines().any(|b| b == *line)).collect();
        ensure!(new.is_empty(), "left on {}: {new:#?}", recipe.host);
    }
    has(&site.sampan("uninstall --hosts hosts.yaml", 120)?.text(), "vm-arm64: sampan is not installed")
}
