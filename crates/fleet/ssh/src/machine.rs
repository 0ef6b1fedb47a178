//! A machine to be worked on: one reached by SSH, or this one; and how its root is become.
//!
//! Upstream counterpart: k3sup's pkg/operator (ExecOperator, SSHOperator), which knows only sudo without a password.
//! Scripts are POSIX sh and get their values as arguments, never spliced in. What stays true: a password goes through
//! standard input only, and never into what the script reads.
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use crate::connection::{Address, ConnectError, Connection, Feed, Login};
use crate::facts::{self, Facts};
use crate::prompt::{Ask, Secret};
use crate::words::quote_all;

/// What is kept of a command's output.
const MAX_OUTPUT_BYTES: usize = 1 << 20;
/// For scripts that only look or write small files.
const SCRIPT_LIMIT: Duration = Duration::from_secs(120);
/// Parts the password from what the script reads.
const MARK: &str = "--sampan--";

pub type Tell<'a> = dyn FnMut(bool, &[u8]) + Send + 'a;

/// Keeps a command's output, up to a bound, and passes it on.
#[derive(Default)]
pub struct OutputSink<'a> {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// Told of every piece: whether it is an error's, and its bytes.
    pub tell: Option<Box<Tell<'a>>>,
}

impl OutputSink<'_> {
    pub fn stdout(&mut self, data: &[u8]) {
        let room = MAX_OUTPUT_BYTES.saturating_sub(self.stdout.len());
        self.stdout.extend_from_slice(&data[..data.len().min(room)]);
        if let Some(tell) = &mut self.tell {
            tell(false, data);
        }
    }

    pub fn stderr(&mut self, data: &[u8]) {
        let room = MAX_OUTPUT_BYTES.saturating_sub(self.stderr.len());
        self.stderr.extend_from_slice(&data[..data.len().min(room)]);
        if let Some(tell) = &mut self.tell {
            tell(true, data);
        }
    }

    pub fn output(&mut self, code: i32) -> Output {
        let text = |bytes: &mut Vec<u8>| String::from_utf8_lossy(&std::mem::take(bytes)).into_owned();
        Output { code, stdout: text(&mut self.stdout), stderr: text(&mut self.stderr) }
    }
}

/// What a command left behind.
#[derive(Clone, Debug, Default)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// The last thing it said, for an error.
    pub fn said(&self) -> String {
        let last = |text: &str| text.lines().rev().map(str::trim).find(|l| !l.is_empty()).map(String::from);
        last(&self.stderr)
            .or_else(|| last(&self.stdout))
            .unwrap_or_else(|| format!("exit code {}", self.code))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("running sh here: {0}")]
    Local(std::io::Error),
    #[error("reading {path}: {source}")]
    Read { path: String, source: std::io::Error },
    #[error("{host}: {what} took longer than {seconds} s")]
    TooLong { host: String, what: String, seconds: u64 },
    #[error("{host}: {what}: {said}")]
    Failed { host: String, what: String, said: String },
    #[error("{host}: there is no space left: {said}")]
    NoSpace { host: String, said: String },
    #[error("{host}: {what} needs root, and {why}")]
    NoRoot { host: String, what: String, why: String },
}

/// What a script reads.
pub enum Input<'a> {
    Empty,
    Bytes(&'a [u8]),
    /// So many bytes of a file, from one on.
    File {
        path: &'a Path,
        offset: u64,
        size_bytes: u64,
        sent: &'a (dyn Fn(u64) + Send + Sync),
    },
}

pub enum Machine {
    Remote(Arc<Connection>),
    Local,
}

/// How root is become on a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    Own,
    Sudo,
    SudoWithPassword(Secret),
    Doas,
    /// It is not, and why.
    Missing(String),
}

/// A machine that answers, with what is known of it.
pub struct Host {
    /// What the owner calls it.
    pub name: String,
    pub machine: Machine,
    pub root: Root,
    pub facts: Facts,
}

/// How sudo is to be used.
#[derive(Clone, Debug, Default)]
pub struct Sudo {
    pub never: bool,
    pub password: Option<Secret>,
}

impl Host {
    /// Connects, asks the machine what it is, and finds out how to become root.
    pub async fn reach(
        name: &str,
        address: Option<&Address>,
        login: &Login,
        sudo: &Sudo,
        ask: Arc<dyn Ask>,
    ) -> Result<Self, MachineError> {
        let (machine, login_password) = match address {
            Some(address) => {
                let connection = Connection::open(address, login, ask.clone()).await?;
                let password = connection.password.clone();
                (Machine::Remote(Arc::new(connection)), password)
            }
            None => (Machine::Local, None),
        };
        let mut host = Self {
            name: name.to_string(),
            machine,
            root: Root::Missing("it was not asked for".to_string()),
            facts: Facts::default(),
        };
        let said = host.script("asking what it is", facts::PROBE, &[]).await?;
        host.facts = Facts::parse(&said.stdout);
        host.root = host.find_root(sudo, login_password, ask).await?;
        Ok(host)
    }

    async fn find_root(
        &self,
        sudo: &Sudo,
        login_password: Option<Secret>,
        ask: Arc<dyn Ask>,
    ) -> Result<Root, MachineError> {
        if self.facts.uid == Some(0) {
            return Ok(Root::Own);
        }
        if sudo.never {
            return Ok(Root::Missing("the user is not root (and --sudo=false was given)".to_string()));
        }
        let quiet = self.run("env LC_ALL=C sudo -n true", Input::Empty, None).await?;
        if quiet.code == 0 {
            return Ok(Root::Sudo);
        }
        if quiet.code == 127 || quiet.stderr.contains("not found") {
            let doas = self.run("doas -n true", Input::Empty, None).await?;
            return Ok(match doas.code {
                0 => Root::Doas,
                _ => Root::Missing("there is no sudo, and no doas without a password".to_string()),
            });
        }
        let given = sudo.password.clone().or(login_password);
        let prompted = given.is_none();
        let password = match given {
            Some(password) => Some(password),
            None => {
                let prompt = format!("sudo's password on {}", self.name);
                tokio::task::spawn_blocking(move || ask.secret(&prompt)).await.ok().flatten()
            }
        };
        let Some(password) = password else {
            return Ok(Root::Missing(format!("sudo says: {}", quiet.said())));
        };
        let line = format!("{}\n", password.reveal());
        let command = "env LC_ALL=C sudo -k -S -p '' true";
        let tried = self.run(command, Input::Bytes(line.as_bytes()), None).await?;
        Ok(match tried.code {
            0 => Root::SudoWithPassword(password),
            _ => Root::Missing(sudo_refusal(&tried.stderr, prompted)),
        })
    }

    /// A script as the user who logged in; whatever it says is the answer, also when it fails.
    pub async fn script(&self, what: &str, script: &str, args: &[&str]) -> Result<Output, MachineError> {
        let command = shell(script, args);
        let run = self.run(&command, Input::Empty, None);
        tokio::time::timeout(SCRIPT_LIMIT, run).await.map_err(|_| self.too_long(what))?
    }

    /// A script as root; it must succeed.
    pub async fn root(&self, what: &str, script: &str, args: &[&str]) -> Result<String, MachineError> {
        let output = self.try_root(what, script, args, Input::Empty).await?;
        self.good(what, output)
    }

    /// A script as root that reads something.
    pub async fn root_with(
        &self,
        what: &str,
        script: &str,
        args: &[&str],
        input: Input<'_>,
    ) -> Result<String, MachineError> {
        let output = self.try_root(what, script, args, input).await?;
        self.good(what, output)
    }

    fn good(&self, what: &str, output: Output) -> Result<String, MachineError> {
        if output.code == 0 {
            return Ok(output.stdout);
        }
        let (host, said) = (self.name.clone(), output.said());
        match output.stderr.contains("No space left") || output.stderr.contains("Disk quota exceeded") {
            true => Err(MachineError::NoSpace { host, said }),
            false => Err(MachineError::Failed { host, what: what.to_string(), said }),
        }
    }

    fn too_long(&self, what: &str) -> MachineError {
        let (host, what) = (self.name.clone(), what.to_string());
        MachineError::TooLong { host, what, seconds: SCRIPT_LIMIT.as_secs() }
    }

    /// A script as root; whatever it says is the answer. Files may take their time, the rest may not.
    pub async fn try_root(
        &self,
        what: &str,
        script: &str,
        args: &[&str],
        input: Input<'_>,
    ) -> Result<Output, MachineError> {
        let patient = matches!(input, Input::File { .. });
        let plain = shell(script, args);
        let run = self.root_command(what, &plain, script, args, input, None);
        match patient {
            true => run.await,
            false => tokio::time::timeout(SCRIPT_LIMIT, run).await.map_err(|_| self.too_long(what))?,
        }
    }

    /// A command line of the owner's, told as it goes on; as root when `as_root`.
    pub async fn exec(
        &self,
        command: &str,
        as_root: bool,
        tell: Box<Tell<'_>>,
    ) -> Result<Output, MachineError> {
        match as_root {
            false => self.run(command, Input::Empty, Some(tell)).await,
            true => {
                let plain = shell(command, &[]);
                self.root_command("the command", &plain, command, &[], Input::Empty, Some(tell)).await
            }
        }
    }

    async fn root_command(
        &self,
        what: &str,
        plain: &str,
        script: &str,
        args: &[&str],
        input: Input<'_>,
        tell: Option<Box<Tell<'_>>>,
    ) -> Result<Output, MachineError> {
        let command = match &self.root {
            Root::Own => plain.to_string(),
            Root::Sudo => format!("sudo -n {plain}"),
            Root::Doas => format!("doas -n {plain}"),
            Root::SudoWithPassword(password) => {
                // sudo may or may not read the password; the mark says where the script's own input starts
                let guarded = format!("IFS= read -r l; [ \"$l\" = {MARK} ] || IFS= read -r l; {script}");
                let command = format!("env LC_ALL=C sudo -k -S -p '' {}", shell(&guarded, args));
                let head = format!("{}\n{MARK}\n", password.reveal());
                return self.run_after(head.into_bytes(), &command, input, tell).await;
            }
            Root::Missing(why) => {
                let (host, what) = (self.name.clone(), what.to_string());
                return Err(MachineError::NoRoot { host, what, why: why.clone() });
            }
        };
        self.run(&command, input, tell).await
    }

    async fn run(
        &self,
        command: &str,
        input: Input<'_>,
        tell: Option<Box<Tell<'_>>>,
    ) -> Result<Output, MachineError> {
        self.run_after(Vec::new(), command, input, tell).await
    }

    async fn run_after(
        &self,
        head: Vec<u8>,
        command: &str,
        input: Input<'_>,
        tell: Option<Box<Tell<'_>>>,
    ) -> Result<Output, MachineError> {
        let head_bytes = head.len() as u64;
        let head = std::io::Cursor::new(head);
        let nobody = |_: u64| {};
        let (from, sent): (Box<dyn AsyncRead + Send + Unpin + '_>, &(dyn Fn(u64) + Send + Sync)) = match input
        {
            Input::Empty => (Box::new(head), &nobody),
            Input::Bytes(bytes) => (Box::new(head.chain(bytes)), &nobody),
            Input::File { path, offset, size_bytes, sent } => {
                let failed = |source| MachineError::Read { path: path.display().to_string(), source };
                let mut file = tokio::fs::File::open(path).await.map_err(failed)?;
                file.seek(std::io::SeekFrom::Start(offset)).await.map_err(failed)?;
                (Box::new(head.chain(file.take(size_bytes))), sent)
            }
        };
        let sent = move |total: u64| sent(total.saturating_sub(head_bytes));
        let mut sink = OutputSink { tell, ..OutputSink::default() };
        let feed = Feed { from, sent: &sent };
        match &self.machine {
            Machine::Remote(connection) => Ok(connection.run(command, feed, &mut sink).await?),
            Machine::Local => run_here(command, feed, &mut sink).await.map_err(MachineError::Local),
        }
    }
}

/// `sh -c SCRIPT sh ARGS…`, as one command line for whatever shell the user has.
fn shell(script: &str, args: &[&str]) -> String {
    format!("sh -c {} sh {}", quote_all(&[script]), quote_all(args)).trim_end().to_string()
}

/// Why sudo says no, from what it says.
fn sudo_refusal(said: &str, prompted: bool) -> String {
    let has = |text: &str| said.contains(text);
    if has("not in the sudoers") || has("may not run sudo") || has("not allowed to") {
        return "this user may not use sudo".to_string();
    }
    if has("incorrect password") || has("Sorry, try again") || has("no password was provided") {
        let hint = if prompted { "" } else { " (--sudo-password-file names another)" };
        return format!("sudo does not take the password{hint}");
    }
    let last = said.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("nothing");
    format!("sudo says: {}", last.trim())
}

async fn run_here(command: &str, feed: Feed<'_>, sink: &mut OutputSink<'_>) -> std::io::Result<Output> {
    let mut child = tokio::process::Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (stdin, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let Feed { mut from, sent } = feed;
    let feeding = async move {
        let Some(mut stdin) = stdin else { return };
        let (mut buffer, mut total) = (vec![0; 128 * 1024], 0);
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            if stdin.write_all(&buffer[..count]).await.is_err() {
                break;
            }
            total += count as u64;
            sent(total);
        }
    };
    let collecting = async {
        let (Some(mut out), Some(mut err)) = (out, err) else { return };
        let (mut from_out, mut from_err) = (vec![0; 16 * 1024], vec![0; 16 * 1024]);
        let (mut out_open, mut err_open) = (true, true);
        while out_open || err_open {
            tokio::select! {
                read = out.read(&mut from_out), if out_open => match read {
                    Ok(count @ 1..) => sink.stdout(&from_out[..count]),
                    _ => out_open = false,
                },
                read = err.read(&mut from_err), if err_open => match read {
                    Ok(count @ 1..) => sink.stderr(&from_err[..count]),
                    _ => err_open = false,
                },
            }
        }
    };
    tokio::join!(feeding, collecting);
    let status = child.wait().await?;
    Ok(sink.output(status.code().unwrap_or(128)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::Nobody;

    #[test]
    fn why_sudo_refuses() {
        for (said, want) in [
            (
                "Sorry, try again.\nsudo: no password was provided\nsudo: 1 incorrect password attempt\n",
                "does not take",
            ),
            ("pi is not in the sudoers file.  This incident will be reported.\n", "may not use sudo"),
            ("Sorry, user pi is not allowed to execute '/bin/true' as root on pi.\n", "may not use sudo"),
            ("sudo: sorry, you must have a tty to run sudo\n", "must have a tty"),
        ] {
            assert!(sudo_refusal(said, true).contains(want), "{said}: {}", sudo_refusal(said, true));
        }
    }

    #[tokio::test]
    async fn this_machine_runs_scripts() {
        let host = Host {
            name: "here".to_string(),
            machine: Machine::Local,
            root: Root::Own,
            facts: Facts::default(),
        };
        let output =
            host.script("x", "printf '%s|' \"$@\"; echo oops >&2; exit 3", &["a b", "it's", "$HOME"]).await;
        let output = output.unwrap();
        assert_eq!((output.code, output.stdout.as_str()), (3, "a b|it's|$HOME|"));
        assert_eq!(output.said(), "oops");
        let read = host.root_with("x", "cat", &[], Input::Bytes(b"hello")).await.unwrap();
        assert_eq!(read, "hello");
        // the guard finds where the script's own input starts, whether or not sudo took the password
        for head in ["secret\n--sampan--\nrest", "--sampan--\nrest"] {
            let script = format!("IFS= read -r l; [ \"$l\" = {MARK} ] || IFS= read -r l; cat");
            assert_eq!(
                host.root_with("x", &script, &[], Input::Bytes(head.as_bytes())).await.unwrap(),
                "rest"
            );
        }
        let failed =
            host.root("writing", "echo 'cat: write error: No space left on device' >&2; exit 1", &[]).await;
        assert!(matches!(failed, Err(MachineError::NoSpace { .. })));
    }

    #[tokio::test]
    async fn this_machine_tells_what_it_is() {
        let host =
            Host::reach("here", None, &Login::default(), &Sudo::default(), Arc::new(Nobody)).await.unwrap();
        assert!(host.facts.machine.is_some() && host.facts.memory_kb > Some(1000), "{:?}", host.facts);
        assert!(host.facts.time_s > Some(1_700_000_000), "{:?}", host.facts);
    }
}
