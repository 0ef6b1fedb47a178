//! Dockerfiles: text to instructions with their places, instructions to the stages that a target needs.
//!
//! Upstream counterparts: moby/buildkit `frontend/dockerfile/{parser,instructions,shell}` and the first half of
//! `dockerfile2llb/convert.go`. Nothing here does I/O, so every build of the same text, arguments and platforms gives
//! the same plan. How it goes:
//!
//! 1. [`Dockerfile::parse`]: text to [`Stage`]s of [`Instruction`]s, nothing expanded yet.
//! 2. [`Dockerfile::plan`]: build arguments, platforms and `--target` to a [`Plan`]: bases and `--from` resolved,
//!    [`Plan::order`] lists the needed stages, each after those that it needs.
//! 3. For each needed stage: a [`Scope`] from the base image's environment ([`Plan::scope`]) or the clone of the base
//!    stage's scope, then [`Scope::evaluate`] on each instruction in turn, which expands its words and applies ARG and
//!    ENV.
//!
//! What stays true: every error names file, line and column, and shows the source line. Everything is bounded
//! (`limits`). Deliberate differences: columns, which BuildKit does not know; RUN, CMD and ENTRYPOINT without any
//! argument are errors; `--from` takes a stage's number in mounts and FROM too.
mod error;
mod expand;
mod flags;
mod heredoc;
mod instruction;
mod line;
mod mount;
mod onbuild;
mod pattern;
mod plan;
mod ports;
mod scope;
mod words;

pub use error::{Error, Position, Warning};
pub use mount::{Mount, MountType, Sharing};
pub use plan::{Options, Plan, PlannedStage, Source};
pub use scope::Scope;

use std::sync::Arc;

/// What a Dockerfile may be at most; whatever exceeds one of these is an error that names it.
pub mod limits {
    pub const FILE_SIZE_BYTES: usize = 1 << 20;
    pub const LINE_SIZE_BYTES: usize = 128 << 10;
    pub const HEREDOC_SIZE_BYTES: usize = 512 << 10;
    pub const HEREDOCS_PER_LINE: usize = 64;
    pub const INSTRUCTIONS: usize = 10_000;
    pub const STAGES: usize = 1_000;
    pub const FLAGS: usize = 256;
    /// Variables that an instruction's words may nest, as in `${A:-${B:-c}}`.
    pub const NESTING: usize = 32;
    /// What one word may become by expansion.
    pub const EXPANDED_SIZE_BYTES: usize = 1 << 20;
    /// All values of a stage's environment together.
    pub const ENVIRONMENT_SIZE_BYTES: usize = 4 << 20;
    /// Steps that matching one `${VAR#pattern}` may take.
    pub const PATTERN_STEPS: usize = 5_000_000;
    /// Of one EXPOSE: every port there is, by every protocol.
    pub const PORTS: usize = 3 << 16;
    pub const WARNINGS: usize = 100;
}

/// A parsed Dockerfile.
#[derive(Clone, Debug)]
pub struct Dockerfile {
    /// The escape character: `\`, or a backtick by `# escape=`.
    pub escape: char,
    /// The value of `# syntax=`, which has no effect here.
    pub syntax: Option<String>,
    /// The value of `# check=`, which has no effect here.
    pub check: Option<String>,
    /// ARG instructions before the first FROM.
    pub global_args: Vec<Instruction>,
    pub stages: Vec<Stage>,
    pub warnings: Vec<Warning>,
    file: Arc<error::File>,
}

/// FROM and what follows it until the next, nothing expanded.
#[derive(Clone, Debug)]
pub struct Stage {
    /// As after AS, in lower case.
    pub name: Option<String>,
    /// What stands after FROM, unexpanded.
    pub base: String,
    /// `--platform`, unexpanded.
    pub platform: Option<String>,
    pub instructions: Vec<Instruction>,
    /// The whole FROM line, as in `FROM alpine AS build`.
    pub text: String,
    pub at: Position,
    line: line::Line,
}

#[derive(Clone, Debug)]
pub struct Instruction {
    pub kind: Kind,
    /// The instruction with its continuation lines joined, without heredocs' contents, as a history entry shows it.
    pub text: String,
    pub at: Position,
    /// The last line, heredocs included.
    pub end_line: usize,
    /// Set when a base's ONBUILD brought this instruction into the stage.
    pub onbuild: bool,
    line: line::Line,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Add(Add),
    Arg(Vec<ArgDefinition>),
    Cmd(CommandLine),
    Copy(Copy),
    Entrypoint(CommandLine),
    Env(Vec<KeyValue>),
    /// As written; after evaluation one `80/tcp` for each port of a range.
    Expose(Vec<String>),
    Healthcheck(Healthcheck),
    Label(Vec<KeyValue>),
    Maintainer(String),
    /// The trigger's own text, as an image's config holds it.
    Onbuild(String),
    Run(Run),
    Shell(Vec<String>),
    StopSignal(String),
    User(String),
    Volume(Vec<String>),
    /// As written; the executor joins relative ones to the directory before.
    Workdir(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    pub key: String,
    pub value: String,
}

/// One variable of an ARG. After evaluation `value` is what the variable has, `None` if nothing gives it one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArgDefinition {
    pub key: String,
    pub value: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandLine {
    /// To be given to the shell (`SHELL`, or `/bin/sh -c`) as one argument.
    Shell(String),
    /// To be executed as it is.
    Exec(Vec<String>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub command: CommandLine,
    pub heredocs: Vec<Heredoc>,
    /// Filled by evaluation; before, only those without variables.
    pub mounts: Vec<Mount>,
    pub network: Network,
    pub security: Security,
    /// `--mount` values as written.
    pub mount_flags: Vec<String>,
}

/// What RUN executes, heredocs taken into account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Script {
    Exec(Vec<String>),
    /// One argument for the shell.
    Shell(String),
    /// A heredoc that opens with `#!`: to be executed as a file of mode 0755 named `name`.
    File {
        name: String,
        contents: String,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    #[default]
    Default,
    None,
    Host,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Security {
    #[default]
    Sandbox,
    Insecure,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heredoc {
    pub name: String,
    /// False when the name was quoted.
    pub expand: bool,
    /// `<<-`: leading tabs do not count.
    pub chomp: bool,
    /// As in the file, leading tabs included.
    pub contents: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// Paths and, in ADD, URLs.
    pub paths: Vec<String>,
    /// Files whose contents stand in the Dockerfile.
    pub inline: Vec<InlineFile>,
    pub destination: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InlineFile {
    pub name: String,
    pub contents: String,
    pub expand: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copy {
    pub sources: Sources,
    /// As written; [`Plan::source`] says what it is.
    pub from: Option<String>,
    pub chown: Option<String>,
    pub chmod: Option<String>,
    pub link: bool,
    pub parents: bool,
    pub exclude: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Add {
    pub sources: Sources,
    pub chown: Option<String>,
    pub chmod: Option<String>,
    /// `sha256:…` for a URL, a commit for a git repository.
    pub checksum: Option<String>,
    pub link: bool,
    pub keep_git_dir: bool,
    /// None: local archives are unpacked, those from URLs are not.
    pub unpack: Option<bool>,
    pub exclude: Vec<String>,
}

/// As an image's config holds it; 0 takes the runtime's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Healthcheck {
    /// `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", …]`
    pub test: Vec<String>,
    pub interval_ns: i64,
    pub timeout_ns: i64,
    pub start_period_ns: i64,
    pub start_interval_ns: i64,
    pub retries: u32,
}

impl Dockerfile {
    /// Reads a Dockerfile; `name` is for messages.
    pub fn parse(name: &str, text: impl AsRef<[u8]>) -> Result<Dockerfile, Error> {
        let text = text.as_ref();
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let file = Arc::new(error::File { name: name.to_string(), text: readable(name, text)? });
        let mut reader = line::Reader::new(&file);
        let mut global_args = Vec::new();
        let mut stages: Vec<Stage> = Vec::new();
        let mut instructions = 0;
        while let Some(line) = reader.logical()? {
            let at = line.find("");
            let fail = |message: String| file.error(at, (at.line, at.line), message).while_parsing();
            instructions += 1;
            if instructions > limits::INSTRUCTIONS {
                return Err(fail(format!("more than {} instructions", limits::INSTRUCTIONS)));
            }
            match instruction::parse(&mut reader, line)? {
                instruction::Parsed::From(_) if stages.len() == limits::STAGES => {
                    return Err(fail(format!("more than {} stages", limits::STAGES)));
                }
                instruction::Parsed::From(stage) => stages.push(stage),
                instruction::Parsed::Instruction(instruction) => {
                    match (stages.last_mut(), &instruction.kind) {
                        (Some(stage), _) => stage.instructions.push(instruction),
                        (None, Kind::Arg(_)) => global_args.push(instruction),
                        (None, _) => {
                            return Err(fail("no build stage in current context".into())
                                .expecting("FROM ahead of it"));
                        }
                    }
                }
            }
        }
        if instructions == 0 {
            return Err(file.error_of_all("file with no instructions").expecting("FROM"));
        }
        if stages.is_empty() {
            return Err(file.error_of_all("dockerfile contains no stages to build").expecting("FROM"));
        }
        let line::Reader { escape, syntax, check, warnings, .. } = reader;
        Ok(Dockerfile { escape, syntax, check, global_args, stages, warnings, file })
    }
}

/// The text, if it is one and not too long.
fn readable(name: &str, text: &[u8]) -> Result<String, Error> {
    let file = |text: String| error::File { name: name.to_string(), text };
    if text.is_empty() {
        return Err(file(String::new()).error_of_all("the Dockerfile cannot be empty"));
    }
    if text.len() > limits::FILE_SIZE_BYTES {
        let message = format!("longer than {} bytes", limits::FILE_SIZE_BYTES);
        return Err(file(String::new()).error_of_all(message));
    }
    match std::str::from_utf8(text) {
        Ok(text) => Ok(text.to_string()),
        Err(invalid) => {
            let before = String::from_utf8_lossy(&text[..invalid.valid_up_to()]);
            let last = before.rsplit('\n').next().unwrap_or_default();
            let at = Position { line: before.matches('\n').count() + 1, column: last.chars().count() + 1 };
            let file = file(String::from_utf8_lossy(text).into_owned());
            Err(file.error(at, (at.line, at.line), "not UTF-8").while_parsing())
        }
    }
}

#[cfg(test)]
mod tests;
