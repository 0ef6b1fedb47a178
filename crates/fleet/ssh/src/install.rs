//! Installing: binary, configuration, service, in an order that leaves a machine as it was when a step fails early.
//!
//! Upstream counterpart: K3s' install.sh. Every step compares before it writes: what is the same is left alone, and the
//! service is started anew only when something changed. Nothing takes its final name before it was verified.
use serde_yaml_ng::{Mapping, Value};

use crate::binary::Binary;
use crate::boot;
use crate::machine::{Host, Input, MachineError};
use crate::service::{CONFIG, Service, Written};

#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("{host}: what arrived is not what was sent (SHA-256 {got}, not {want}); nothing was installed")]
    Digest { host: String, got: String, want: String },
    #[error("{host}: the program does not start there: {said}; nothing was installed")]
    DoesNotStart { host: String, said: String },
    #[error(
        "{host}: {CONFIG} is there, but is no list of `flag: value` lines ({message}); correct or remove it"
    )]
    Config { host: String, message: String },
    #[error("{host}: {path} does not look like a kernel command line; it was left alone")]
    Cmdline { host: String, path: String },
}

/// What is to be on a machine.
#[derive(Clone, Debug)]
pub struct Installation {
    pub service: Service,
    /// Keys of the configuration file; others that are there stay.
    pub config: Vec<(String, Value)>,
    /// Files that the configuration names.
    pub files: Vec<Written>,
}

/// What an upload tells: bytes sent, of how many.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Send + Sync);

const PART: &str =
    r#"umask 077; mkdir -p "$1" && cat >"$1/.sampan.part" || { rm -f "$1/.sampan.part"; exit 1; }"#;
const DIGEST: &str = r#"[ ! -e "$1" ] || sha256sum "$1" 2>/dev/null || openssl dgst -sha256 -r "$1""#;
const WRITE: &str = r#"
umask 077; mkdir -p "$(dirname "$1")"; chmod 755 "$(dirname "$1")"
cat >"$1.new" || { rm -f "$1.new"; exit 1; }
chmod "$2" "$1.new"
if [ -e "$1" ] && cmp -s "$1.new" "$1"; then rm -f "$1.new"; chmod "$2" "$1"; else mv -f "$1.new" "$1" && echo changed; fi"#;

/// What is where the binary goes: its digest, if there is one.
pub async fn installed_digest(host: &Host, bin_dir: &str) -> Result<Option<String>, MachineError> {
    let path = format!("{bin_dir}/sampan");
    let output = host.script("looking for sampan", DIGEST, &[&path]).await?;
    Ok(output.stdout.split_whitespace().next().map(String::from))
}

/// Sends the binary unless it is there, verifies it and puts it in its place. Says whether that changed anything.
pub async fn send_binary(
    host: &Host,
    binary: &Binary,
    bin_dir: &str,
    progress: Progress<'_>,
) -> Result<bool, InstallError> {
    if installed_digest(host, bin_dir).await?.as_deref() == Some(binary.digest.as_str()) {
        return Ok(false);
    }
    let sent = |bytes: u64| progress(bytes, binary.size_bytes);
    let Binary { path, offset, size_bytes, .. } = binary;
    let input = Input::File { path, offset: *offset, size_bytes: *size_bytes, sent: &sent };
    let part = format!("{bin_dir}/.sampan.part");
    host.root_with("sending the program", PART, &[bin_dir], input).await?;
    if let Err(error) = verify(host, binary, &part).await {
        let _ = host.root("cleaning up", "rm -f \"$1\"", &[&part]).await;
        return Err(error);
    }
    // hard link first: the program that runs keeps its file, and an upgrade can go back to it
    let place = r#"if [ -e "$1/sampan" ]; then ln -f "$1/sampan" "$1/sampan.previous" 2>/dev/null || cp -p "$1/sampan" "$1/sampan.previous"; fi
mv -f "$1/.sampan.part" "$1/sampan""#;
    host.root("putting the program in its place", place, &[bin_dir]).await?;
    Ok(true)
}

/// The etcd that servers run, where the machine has none of its own.
pub const ETCD: &str = "sampan-etcd";

/// Sends that etcd unless it is there, verifies it and puts it in its place. Says whether that changed anything.
pub async fn send_etcd(host: &Host, binary: &Binary, bin_dir: &str) -> Result<bool, InstallError> {
    let path = format!("{bin_dir}/{ETCD}");
    let there = host.root("looking for etcd", DIGEST, &[&path]).await?;
    if there.split_whitespace().next() == Some(binary.digest.as_str()) {
        return Ok(false);
    }
    let Binary { path: from, offset, size_bytes, .. } = binary;
    let input = Input::File { path: from, offset: *offset, size_bytes: *size_bytes, sent: &|_| {} };
    let part = format!("{bin_dir}/.sampan.part");
    host.root_with("sending etcd", PART, &[bin_dir], input).await?;
    if let Err(error) = verify(host, binary, &part).await {
        let _ = host.root("cleaning up", "rm -f \"$1\"", &[&part]).await;
        return Err(error);
    }
    host.root("putting etcd in its place", "mv -f \"$1\" \"$2\"", &[&part, &path]).await?;
    Ok(true)
}

async fn verify(host: &Host, binary: &Binary, part: &str) -> Result<(), InstallError> {
    let said = host.root("verifying the program", DIGEST, &[part]).await?;
    let got = said.split_whitespace().next().unwrap_or_default();
    if got != binary.digest {
        let (got, want) = (got.to_string(), binary.digest.clone());
        return Err(InstallError::Digest { host: host.name.clone(), got, want });
    }
    // etcd 3.4 wants to be told where it was less tested
    let script = r#"chmod 755 "$1" && ETCD_UNSUPPORTED_ARCH="$2" "$1" --version"#;
    match host.root("starting the program", script, &[part, &binary.arch]).await {
        Ok(_) => Ok(()),
        Err(MachineError::Failed { host, said, .. }) => Err(InstallError::DoesNotStart { host, said }),
        Err(error) => Err(error.into()),
    }
}

/// Puts back the program that was there before the last one was sent.
pub async fn previous_binary(host: &Host, bin_dir: &str) -> Result<(), MachineError> {
    let script = r#"[ -e "$1/sampan.previous" ] && mv -f "$1/sampan.previous" "$1/sampan""#;
    host.root("going back to the program before", script, &[bin_dir]).await.map(drop)
}

/// Writes configuration and service. Says whether anything changed.
pub async fn configure(host: &Host, installation: &Installation) -> Result<bool, InstallError> {
    let init = host.facts.init;
    let there = host.root("reading the configuration", "[ ! -e \"$1\" ] || cat \"$1\"", &[CONFIG]).await?;
    let config = merge_config(&there, &installation.config)
        .map_err(|message| InstallError::Config { host: host.name.clone(), message })?;
    let mut files = installation.files.clone();
    files.push(Written { path: CONFIG.to_string(), mode: "600", text: config });
    files.extend(installation.service.files(init));
    let mut changed = false;
    for file in files {
        let what = format!("writing {}", file.path);
        let input = Input::Bytes(file.text.as_bytes());
        let said = host.root_with(&what, WRITE, &[&file.path, file.mode], input).await?;
        changed |= said.contains("changed");
    }
    Ok(changed)
}

/// Enables the service and starts it, anew when something changed.
pub async fn start(host: &Host, service: &Service, anew: bool) -> Result<(), MachineError> {
    let script = service.start_script(host.facts.init);
    let how = if anew { "restart" } else { "start" };
    host.root("starting the service", &script, &[how]).await.map(drop)
}

pub async fn log(host: &Host, service: &Service) -> Vec<String> {
    let script = service.log_script(host.facts.init);
    let said = host.root("reading the log", &script, &[]).await.unwrap_or_default();
    said.lines().map(String::from).collect()
}

/// The file's own keys in their order, ours put in.
pub fn merge_config(there: &str, ours: &[(String, Value)]) -> Result<String, String> {
    let mut map = match serde_yaml_ng::from_str::<Value>(there) {
        Ok(Value::Null) => Mapping::new(),
        Ok(Value::Mapping(map)) => map,
        Ok(_) => return Err("it is another kind of YAML".to_string()),
        Err(error) => return Err(error.to_string()),
    };
    for (key, value) in ours {
        let key = Value::String(key.clone());
        match (map.get_mut(&key), value) {
            // names that an owner added to the certificate stay
            (Some(Value::Sequence(old)), Value::Sequence(new)) => {
                let fresh: Vec<Value> = new.iter().filter(|v| !old.contains(v)).cloned().collect();
                old.extend(fresh);
            }
            _ => drop(map.insert(key, value.clone())),
        }
    }
    if map.is_empty() {
        return Ok("# flags of sampan, one a line: `node-label: [a=b]`\n".to_string());
    }
    serde_yaml_ng::to_string(&map).map_err(|e| e.to_string())
}

/// Enables a Raspberry Pi's memory control group. Says whether the machine must reboot for it.
pub async fn enable_cgroups(host: &Host) -> Result<bool, InstallError> {
    let Some(path) = &host.facts.cmdline_path else { return Ok(false) };
    let text = host.root("reading the kernel's command line", "cat \"$1\"", &[path]).await?;
    if !boot::is_cmdline(&text) {
        return Err(InstallError::Cmdline { host: host.name.clone(), path: path.clone() });
    }
    let Some(changed) = boot::with_memory_controller(&text) else { return Ok(true) };
    let keep = "[ -e \"$1.before-sampan\" ] || cp \"$1\" \"$1.before-sampan\"";
    host.root("keeping the kernel's command line", keep, &[path]).await?;
    // a FAT file system: written beside and moved, so that no half line is ever booted
    let write = "cat >\"$1.new\" && sync && mv -f \"$1.new\" \"$1\" && sync";
    let input = Input::Bytes(changed.as_bytes());
    host.root_with("writing the kernel's command line", write, &[path], input).await?;
    Ok(true)
}

/// Reboots; the answer may be lost with the connection.
pub async fn reboot(host: &Host) {
    let script = "(sleep 1; reboot || shutdown -r now) >/dev/null 2>&1 </dev/null &";
    let _ = host.root("rebooting", script, &[]).await;
}

/// Removes all of it, and what a half-done installation left.
pub async fn uninstall(host: &Host, bin_dir: &str) -> Result<bool, MachineError> {
    let script = r#"
if [ -x "$1/sampan-uninstall" ]; then "$1/sampan-uninstall" </dev/null || exit 1; echo removed
elif [ -e "$1/sampan" ] || [ -e "$1/.sampan.part" ] || [ -e "$1/sampan-killall" ]; then
  rm -f "$1/sampan" "$1/sampan-etcd" "$1/.sampan.part" "$1/.sampan.next" "$1/sampan.previous" "$1/sampan-killall"; rm -rf /etc/sampan; echo removed
fi"#;
    let said = host.root("uninstalling", script, &[bin_dir]).await?;
    Ok(said.contains("removed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(pairs: &[(&str, &str)]) -> Vec<(String, Value)> {
        pairs.iter().map(|(k, v)| ((*k).to_string(), serde_yaml_ng::from_str(v).unwrap())).collect()
    }

    /// A Pi's file is changed once, with what was there kept beside it.
    #[tokio::test]
    async fn a_pis_command_line() {
        use crate::facts::Facts;
        use crate::machine::{Machine, Root};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cmdline.txt").display().to_string();
        let facts = Facts { cmdline_path: Some(path.clone()), ..Facts::default() };
        let host = Host { name: "pi".to_string(), machine: Machine::Local, root: Root::Own, facts };
        let line = "console=tty1 root=PARTUUID=1-02 rootwait\n";
        std::fs::write(&path, line).unwrap();
        for _ in 0..2 {
            assert!(enable_cgroups(&host).await.unwrap());
            let now = std::fs::read_to_string(&path).unwrap();
            assert_eq!(
                now,
                "console=tty1 root=PARTUUID=1-02 rootwait cgroup_memory=1 cgroup_enable=memory\n"
            );
        }
        assert_eq!(std::fs::read_to_string(format!("{path}.before-sampan")).unwrap(), line);
        std::fs::write(&path, "").unwrap();
        assert!(matches!(enable_cgroups(&host).await, Err(InstallError::Cmdline { .. })));
    }

    #[test]
    fn an_owners_keys_stay() {
        for (there, ours_in, want) in [
            ("", &[("server", "https://a:6443")][..], "server: https://a:6443\n"),
            ("# note\nnode-name: x\nserver: old\n", &[("server", "new")], "node-name: x\nserver: new\n"),
            ("tls-san: [a, b]\n", &[("tls-san", "[b, c]")], "tls-san:\n- a\n- b\n- c\n"),
            ("tls-san: a\n", &[("tls-san", "[b]")], "tls-san:\n- b\n"),
        ] {
            let once = merge_config(there, &ours(ours_in)).unwrap();
            assert_eq!(once, want, "{there}");
            assert_eq!(merge_config(&once, &ours(ours_in)).unwrap(), once, "again: {there}");
        }
        assert!(merge_config("- a\n", &[]).is_err());
        assert!(merge_config("a: [\n", &[]).is_err());
    }
}
