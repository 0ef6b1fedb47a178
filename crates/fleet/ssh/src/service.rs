//! The service that starts a node, and the scripts that end it and remove it.
//!
//! Upstream counterpart: K3s' install.sh (create_systemd_service_file, create_openrc_service_file, create_killall,
//! create_uninstall). What stays true: a restart of the service leaves pods alone (KillMode=process); after the
//! uninstall script nothing of ours is there, also when it is interrupted and run again. Deliberate differences: plain
//! init scripts are written too, with a loop that starts the program again; pods are ended and interfaces and tables
//! removed by the program itself (`sampan killall`), so no ip or nft program is needed.
use crate::facts::Init;
use crate::words::{quote, quote_all};

/// What a machine is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Server,
    Agent,
}

impl Role {
    /// The subcommand.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Agent => "agent",
        }
    }

    pub fn service(self) -> &'static str {
        match self {
            Self::Server => "sampan",
            Self::Agent => "sampan-agent",
        }
    }
}

/// A service in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub role: Role,
    pub bin_dir: String,
    pub data_dir: String,
    /// Arguments besides those in the configuration file.
    pub args: Vec<String>,
}

pub const CONFIG: &str = "/etc/sampan/config.yaml";
/// Where a server has the TLS files of its datastore, when they came over SSH.
pub const DATASTORE: &str = "/etc/sampan/datastore";
/// Where plain init's and OpenRC's services write their log.
pub const LOG: &str = "/var/log/sampan.log";
/// How long pods may take to end when the machine shuts down.
const SHUTDOWN_GRACE_S: u32 = 20;
/// Stands in that log before what a start by us has to say.
const STARTED: &str = "-- started by install --";

/// A file to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub path: String,
    pub mode: &'static str,
    pub text: String,
}

impl Service {
    pub fn program(&self) -> String {
        format!("{}/sampan", self.bin_dir)
    }

    pub fn path(&self, init: Init) -> String {
        match init {
            Init::Systemd => format!("/etc/systemd/system/{}.service", self.role.service()),
            Init::OpenRc | Init::Sysv => format!("/etc/init.d/{}", self.role.service()),
        }
    }

    /// The service's file and both scripts.
    pub fn files(&self, init: Init) -> Vec<Written> {
        let (text, mode) = match init {
            Init::Systemd => (self.systemd(), "644"),
            Init::OpenRc => (self.openrc(), "755"),
            Init::Sysv => (self.sysv(), "755"),
        };
        let script =
            |name: &str, text| Written { path: format!("{}/{name}", self.bin_dir), mode: "755", text };
        vec![
            script("sampan-killall", self.killall(init)),
            script("sampan-uninstall", self.uninstall(init)),
            Written { path: self.path(init), mode, text },
        ]
    }

    fn systemd(&self) -> String {
        let mut words = vec![self.program(), self.role.verb().to_string()];
        words.extend(self.args.iter().cloned());
        let start = words.iter().map(|w| systemd_word(w)).collect::<Vec<_>>().join(" ");
        // pods outlive the service, but not the machine: systemd itself would wait 90 s for each that ignores SIGTERM
        let at_shutdown = format!(
            "test \"$(systemctl is-system-running)\" != stopping || exec {} killall --data-dir {} --grace-seconds {}",
            quote(&self.program()),
            quote(&self.data_dir),
            SHUTDOWN_GRACE_S
        );
        format!(
            "[Unit]\nDescription=Sampan, Kubernetes for small machines ({role})\nWants=network-online.target\nAfter=network-online.target\n\n\
             [Service]\nType=exec\nExecStartPre=-/sbin/modprobe -a overlay nf_tables vxlan\nExecStart={start}\n\
             ExecStopPost=-/bin/sh -c {at_shutdown}\n\
             Restart=always\nRestartSec=5s\nKillMode=process\nDelegate=yes\nLimitNOFILE=1048576\nLimitNPROC=infinity\n\
             LimitCORE=infinity\nTasksMax=infinity\nTimeoutStartSec=0\n\n[Install]\nWantedBy=multi-user.target\n",
            role = self.role.verb(),
            at_shutdown = systemd_word(&at_shutdown),
        )
    }

    fn openrc(&self) -> String {
        format!(
            "#!/sbin/openrc-run\n# Sampan, Kubernetes for small machines ({role})\ndescription='Kubernetes for small machines'\n\
             supervisor=supervise-daemon\ncommand={program}\ncommand_args={args}\noutput_log={LOG}\nerror_log={LOG}\n\
             pidfile=/run/{service}.pid\nrespawn_delay=5\nrespawn_max=0\nrc_ulimit='-n 1048576'\n\n\
             depend() {{\n\twant net cgroups\n\tuse dns\n\tafter firewall\n}}\n\n\
             start_pre() {{\n\tmodprobe -a overlay nf_tables vxlan 2>/dev/null || true\n}}\n",
            role = self.role.verb(),
            program = quote(&self.program()),
            // openrc evaluates it once more
            args = quote(&self.command_words()),
            service = self.role.service(),
        )
    }

    fn command_words(&self) -> String {
        format!("{} {}", self.role.verb(), quote_all(&self.args)).trim_end().to_string()
    }

    fn sysv(&self) -> String {
        let service = self.role.service();
        format!(
            r#"#!/bin/sh
### BEGIN INIT INFO
# Provides:          {service}
# Required-Start:    $local_fs $network
# Required-Stop:     $local_fs
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: Sampan, Kubernetes for small machines ({role})
### END INIT INFO
# The program is started again when it ends. Pods outlive it.
PIDFILE=/run/{service}.pid
PROGRAM={program}

running() {{ [ -s "$PIDFILE" ] && kill -0 "$(cat "$PIDFILE")" 2>/dev/null; }}

keep_running() {{
  child=
  trap 'kill "$child" 2>/dev/null; wait "$child"; exit 0' TERM INT
  ulimit -n 1048576 2>/dev/null || ulimit -n "$(ulimit -H -n)"
  while :; do
    "$PROGRAM" {words} &
    child=$!
    wait "$child"
    echo "{service}: the program ended with $?; it is started again in 5 s"
    sleep 5 & child=$!; wait "$child"
  done
}}

case "$1" in
  start)
    running && exit 0
    modprobe -a overlay nf_tables vxlan 2>/dev/null
    # a log that is kept small without a program that does it
    [ "$(wc -c 2>/dev/null <{LOG} || echo 0)" -lt 10000000 ] || mv -f {LOG} {LOG}.1
    if command -v setsid >/dev/null 2>&1; then detach=setsid; else detach=nohup; fi
    $detach "$0" keep-running </dev/null >>{LOG} 2>&1 &
    echo $! >"$PIDFILE"
    ;;
  keep-running)
    echo $$ >"$PIDFILE"
    keep_running
    ;;
  stop)
    running || exit 0
    pid=$(cat "$PIDFILE")
    kill "$pid"
    i=0
    while kill -0 "$pid" 2>/dev/null && [ $i -lt 30 ]; do i=$((i+1)); sleep 1; done
    kill -9 "$pid" 2>/dev/null
    rm -f "$PIDFILE"
    ;;
  restart) "$0" stop; "$0" start ;;
  status) if running; then echo "{service} runs"; else echo "{service} does not run"; exit 3; fi ;;
  *) echo "usage: $0 start|stop|restart|status" >&2; exit 2 ;;
esac
exit 0
"#,
            role = self.role.verb(),
            program = quote(&self.program()),
            words = self.command_words(),
        )
    }

    fn stop(&self, init: Init) -> String {
        let service = self.role.service();
        match init {
            Init::Systemd => format!("systemctl stop {service}.service 2>/dev/null"),
            Init::OpenRc => format!("rc-service {service} stop 2>/dev/null"),
            Init::Sysv => format!("[ -x /etc/init.d/{service} ] && /etc/init.d/{service} stop"),
        }
    }

    fn killall(&self, init: Init) -> String {
        format!(
            "#!/bin/sh\n# Ends sampan and all of its pods; the next start of the service brings back what should run.\n\
             [ \"$(id -u)\" = 0 ] || exec sudo \"$0\" \"$@\"\n{}\n{} killall --data-dir {}\n",
            self.stop(init),
            quote(&self.program()),
            quote(&self.data_dir),
        )
    }

    fn uninstall(&self, init: Init) -> String {
        let service = self.role.service();
        let forget = match init {
            Init::Systemd => format!(
                "systemctl disable {service}.service 2>/dev/null\nrm -f /etc/systemd/system/{service}.service\nsystemctl daemon-reload\n\
                 systemctl reset-failed {service}.service 2>/dev/null"
            ),
            Init::OpenRc => {
                format!("rc-update delete {service} default 2>/dev/null\nrm -f /etc/init.d/{service}")
            }
            Init::Sysv => format!(
                "rm -f /etc/init.d/{service} /etc/init.d/S99{service}\n\
                 command -v update-rc.d >/dev/null 2>&1 && update-rc.d {service} remove >/dev/null 2>&1\n\
                 rm -f /etc/rc?.d/[SK]??{service} /run/{service}.pid"
            ),
        };
        let (bin, data) = (quote(&self.bin_dir), quote(&self.data_dir));
        // while its etcd runs: the others must agree
        let leave = match self.role {
            Role::Server => format!("{bin}/sampan leave --data-dir {data} || exit 1\n"),
            Role::Agent => String::new(),
        };
        format!(
            r#"#!/bin/sh
# Removes sampan from this machine, with all that it kept: pods, volumes in {data}, the cluster's state.
[ "$(id -u)" = 0 ] || exec sudo "$0" "$@"
{leave}{bin}/sampan-killall || exit 1
{forget}
if awk -v d={data}/ 'index($2, d) == 1 {{found = 1}} END {{exit !found}}' /proc/mounts; then
  echo "there are still file systems mounted below {data}: unmount them and run this again" >&2
  exit 1
fi
clear() {{ [ ! -d "$1" ] || rm -rf "$1" 2>/dev/null || find "$1" -mindepth 1 -delete; }}
clear {data}
clear /etc/sampan
find /run/sampan -mindepth 1 -maxdepth 1 ! -name bin -exec rm -rf {{}} + 2>/dev/null
rmdir /run/sampan 2>/dev/null
if [ ! -e /var/lib/kubelet ] && [ ! -e /var/lib/rancher ]; then rm -rf /var/log/pods /var/log/containers; fi
rm -f {LOG} {LOG}.1 {bin}/.sampan.part {bin}/.sampan.next {bin}/sampan.previous {bin}/sampan-etcd {bin}/sampan {bin}/sampan-killall {bin}/sampan-uninstall
if [ -d {data} ] && [ -n "$(ls -A {data})" ]; then echo "{data} could not be emptied" >&2; exit 1; fi
exit 0
"#
        )
    }

    /// A script that enables the service at boot and starts it, or starts it anew when `$1` says so.
    pub fn start_script(&self, init: Init) -> String {
        let service = self.role.service();
        match init {
            Init::Systemd => format!(
                "systemctl daemon-reload && systemctl enable {service}.service 2>/dev/null; \
                 if [ \"$1\" = restart ]; then systemctl restart {service}.service; else systemctl start {service}.service; fi"
            ),
            Init::OpenRc => format!(
                "rc-update add {service} default >/dev/null 2>&1; echo '{STARTED}' >>{LOG}; \
                 if [ \"$1\" = restart ]; then rc-service {service} restart; else rc-service {service} start; fi"
            ),
            Init::Sysv => format!(
                "if command -v update-rc.d >/dev/null 2>&1; then update-rc.d {service} defaults >/dev/null 2>&1; \
                 elif command -v chkconfig >/dev/null 2>&1; then chkconfig --add {service}; \
                 elif [ -e /etc/init.d/rcS ]; then ln -sf {service} /etc/init.d/S99{service}; \
                 else echo 'nothing here starts services at boot: call /etc/init.d/{service} start yourself' >&2; fi\necho '{STARTED}' >>{LOG}\n\
                 if [ \"$1\" = restart ]; then /etc/init.d/{service} restart; else /etc/init.d/{service} start; fi >/dev/null 2>&1 </dev/null"
            ),
        }
    }

    /// A script that prints the end of what the service said since its last start by us.
    pub fn log_script(&self, init: Init) -> String {
        let service = self.role.service();
        match init {
            Init::Systemd => format!(
                "id=$(systemctl show -p InvocationID --value {service}.service 2>/dev/null); \
                 journalctl -n 30 -o cat --no-pager _SYSTEMD_INVOCATION_ID=\"$id\" 2>/dev/null; true"
            ),
            Init::OpenRc | Init::Sysv => format!(
                "awk '/^{STARTED}/ {{n = 0; next}} {{line[n++] = $0}} \
                 END {{for (i = n > 30 ? n - 30 : 0; i < n; i++) print line[i]}}' {LOG} 2>/dev/null; true"
            ),
        }
    }
}

/// One word of ExecStart: systemd expands `%` and `$` also within quotes.
fn systemd_word(word: &str) -> String {
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@+".contains(c);
    if !word.is_empty() && word.chars().all(plain) { escaped } else { format!("\"{escaped}\"") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Service {
        Service {
            role: Role::Agent,
            bin_dir: "/usr/local/bin".to_string(),
            data_dir: "/var/lib/sampan".to_string(),
            args: vec!["--node-label=a=it's 5 % $x".to_string()],
        }
    }

    #[test]
    fn arguments_come_through() {
        let service = service();
        assert!(
            service
                .systemd()
                .contains(r#"ExecStart=/usr/local/bin/sampan agent "--node-label=a=it's 5 %% $$x""#)
        );
        let stop =
            r#"ExecStopPost=-/bin/sh -c "test \"$$(systemctl is-system-running)\" != stopping || exec "#;
        assert!(service.systemd().contains(stop), "{}", service.systemd());
        let sysv = service.sysv();
        assert!(sysv.contains(r#""$PROGRAM" agent '--node-label=a=it'\''s 5 % $x' &"#), "{sysv}");
        let args = service.openrc();
        let args = args.lines().find_map(|l| l.strip_prefix("command_args=")).unwrap();
        let once = crate::words::split(args).unwrap().remove(0);
        assert_eq!(crate::words::split(&once).unwrap(), ["agent", "--node-label=a=it's 5 % $x"]);
    }

    #[test]
    fn scripts_are_shell() {
        for init in [Init::Systemd, Init::OpenRc, Init::Sysv] {
            let service = service();
            let scripts = service.files(init).into_iter().filter(|f| f.mode == "755").map(|f| f.text);
            for text in scripts.chain([service.start_script(init), service.log_script(init)]) {
                let mut sh = std::process::Command::new("sh");
                let mut child = sh.arg("-n").stdin(std::process::Stdio::piped()).spawn().unwrap();
                std::io::Write::write_all(&mut child.stdin.take().unwrap(), text.as_bytes()).unwrap();
                assert!(child.wait().unwrap().success(), "{text}");
            }
        }
    }

    /// The plain init script keeps its program running, and stops it.
    #[test]
    fn plain_init_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let service = Service { bin_dir: at.display().to_string(), args: Vec::new(), ..service() };
        let program = "#!/bin/sh\necho $$ >>\"$(dirname \"$0\")/started\"\nexec sleep 60\n";
        let text = service
            .sysv()
            .replace("/run/", &format!("{}/", at.display()))
            .replace(LOG, &format!("{}/log", at.display()))
            .replace("sleep 5 ", "sleep 0.1 ");
        use std::os::unix::fs::PermissionsExt;
        for (name, text) in [("sampan", program), ("init", text.as_str())] {
            std::fs::write(at.join(name), text).unwrap();
            std::fs::set_permissions(at.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let init =
            |verb: &str| std::process::Command::new(at.join("init")).arg(verb).status().unwrap().code();
        let started = |count: usize| {
            for _ in 0..200 {
                let text = std::fs::read_to_string(at.join("started")).unwrap_or_default();
                if text.lines().count() >= count {
                    return text.lines().last().unwrap().to_string();
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            panic!("not started {count} times: {:?}", std::fs::read_to_string(at.join("log")));
        };
        assert_eq!(init("status"), Some(3));
        assert_eq!(init("start"), Some(0));
        let first = started(1);
        assert_eq!(init("status"), Some(0));
        assert_eq!(init("start"), Some(0), "twice is no fault");
        std::process::Command::new("kill").arg(&first).status().unwrap();
        let second = started(2);
        assert_eq!(init("stop"), Some(0));
        assert_eq!(init("status"), Some(3));
        let alive = |pid: &str| std::path::Path::new(&format!("/proc/{pid}")).exists();
        assert!(!alive(&first) && !alive(&second));
    }
}
