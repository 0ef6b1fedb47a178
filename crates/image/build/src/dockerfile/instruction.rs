//! One logical line to FROM or an instruction, checked.
//!
//! Upstream counterpart: buildkit `instructions/parse.go`, with its messages. Deliberate differences: RUN, CMD and
//! ENTRYPOINT without any argument are errors, and what ONBUILD holds is checked where it stands rather than in the
//! build that it triggers.
use super::error::{Error, Position, Warning, similar};
use super::flags::{self, Flags, Takes};
use super::heredoc::{opening, openings};
use super::line::{Line, Reader};
use super::words::{self, Command, Json, Word};
use super::*;

pub(super) const NAMES: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

#[derive(Debug)]
pub(super) enum Parsed {
    From(Stage),
    Instruction(Instruction),
}

/// Reads one line, and from `reader` the heredocs that it opens.
pub(super) fn parse(reader: &mut Reader, line: Line) -> Result<Parsed, Error> {
    let at = line.find("");
    let mut parser = Parser { reader, line: &line, heredocs: Vec::new() };
    let command = words::command(&line.text, 0, parser.reader.escape);
    let text = line.text.trim().to_string();
    if command.name.eq_ignore_ascii_case("FROM") {
        let (base, name, platform) = parser.from(&command)?;
        return Ok(Parsed::From(Stage { name, base, platform, instructions: Vec::new(), text, at, line }));
    }
    let kind = parser.kind(&command)?;
    let end_line = parser.reader.number;
    Ok(Parsed::Instruction(Instruction { kind, text, at, end_line, onbuild: false, line }))
}

impl Instruction {
    /// As in `RUN`.
    pub fn name(&self) -> &'static str {
        match &self.kind {
            Kind::Add(_) => "ADD",
            Kind::Arg(_) => "ARG",
            Kind::Cmd(_) => "CMD",
            Kind::Copy(_) => "COPY",
            Kind::Entrypoint(_) => "ENTRYPOINT",
            Kind::Env(_) => "ENV",
            Kind::Expose(_) => "EXPOSE",
            Kind::Healthcheck(_) => "HEALTHCHECK",
            Kind::Label(_) => "LABEL",
            Kind::Maintainer(_) => "MAINTAINER",
            Kind::Onbuild(_) => "ONBUILD",
            Kind::Run(_) => "RUN",
            Kind::Shell(_) => "SHELL",
            Kind::StopSignal(_) => "STOPSIGNAL",
            Kind::User(_) => "USER",
            Kind::Volume(_) => "VOLUME",
            Kind::Workdir(_) => "WORKDIR",
        }
    }
}

struct Parser<'p, 'f> {
    reader: &'p mut Reader<'f>,
    line: &'p Line,
    /// What the line's heredocs were, for ONBUILD.
    heredocs: Vec<Heredoc>,
}

impl Parser<'_, '_> {
    fn fail(&self, offset: usize, message: impl std::fmt::Display) -> Error {
        let start = self.line.find("").line;
        self.reader
            .file
            .error(self.line.position(offset), (start, self.reader.number), message)
            .while_parsing()
    }

    fn flags(&self, command: &Command, known: &[(&'static str, Takes)]) -> Result<Flags, Error> {
        if command.flags.len() > limits::FLAGS {
            return Err(self.fail(command.name_offset, format!("more than {} flags", limits::FLAGS)));
        }
        flags::parse(&command.flags, known).map_err(|bad| {
            let error = self.fail(bad.offset, bad.message);
            match bad.expected {
                Some(expected) => error.expecting(expected),
                None => error,
            }
        })
    }

    /// No argument where there should be some.
    fn missing(&self, command: &Command, how_many: &str, usage: &str) -> Error {
        let name = command.name.to_ascii_uppercase();
        self.fail(self.line.text.trim_end().len(), format!("{name} requires {how_many}")).expecting(usage)
    }

    /// FROM's base, stage name and platform.
    fn from(&self, command: &Command) -> Result<(String, Option<String>, Option<String>), Error> {
        const USAGE: &str = "FROM [--platform=PLATFORM] IMAGE [AS NAME]";
        let flags = self.flags(command, &[("platform", Takes::One)])?;
        let words = words::split(command.rest, command.rest_offset);
        let name = match &words[..] {
            [] => return Err(self.missing(command, "either one or three arguments", USAGE)),
            [_] => None,
            [_, keyword, name] if keyword.text.eq_ignore_ascii_case("as") => {
                let lower = name.text.to_lowercase();
                let usual = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
                if !lower.starts_with(|c: char| c.is_ascii_lowercase()) || !lower.chars().all(usual) {
                    let message = format!(
                        "invalid name for build stage: {:?}, name can't start with a number or contain symbols",
                        name.text
                    );
                    return Err(self
                        .fail(name.offset, message)
                        .expecting("letters, digits, '-', '_' and '.'"));
                }
                Some(lower)
            }
            [_, other, ..] => {
                let message = "FROM requires either one or three arguments";
                return Err(self.fail(other.offset, message).expecting(USAGE));
            }
        };
        Ok((words[0].text.clone(), name, flags.one("platform")))
    }

    fn kind(&mut self, command: &Command) -> Result<Kind, Error> {
        match command.name.to_ascii_uppercase().as_str() {
            "ADD" => self.add(command),
            "ARG" => self.arg(command),
            "CMD" => self.default_command(command).map(Kind::Cmd),
            "COPY" => self.copy(command),
            "ENTRYPOINT" => self.default_command(command).map(Kind::Entrypoint),
            "ENV" => self.key_values(command).map(Kind::Env),
            "EXPOSE" => self.expose(command),
            "HEALTHCHECK" => self.healthcheck(command),
            "LABEL" => self.key_values(command).map(Kind::Label),
            "MAINTAINER" => {
                let text = self.string(command)?;
                self.warn(command, "Maintainer instruction is deprecated in favor of using label");
                Ok(Kind::Maintainer(text))
            }
            "ONBUILD" => self.onbuild(command),
            "RUN" => self.run(command),
            "SHELL" => self.shell(command),
            "STOPSIGNAL" => self.string(command).map(Kind::StopSignal),
            "USER" => self.string(command).map(Kind::User),
            "VOLUME" => self.volume(command),
            "WORKDIR" => self.string(command).map(Kind::Workdir),
            upper => Err(self.unknown(command, upper)),
        }
    }

    fn unknown(&self, command: &Command, upper: &str) -> Error {
        let suggestion = similar(upper, NAMES).map(|name| match command.name == upper {
            true => format!(" (did you mean {name}?)"),
            false => format!(" (did you mean {}?)", name.to_ascii_lowercase()),
        });
        let message = format!("unknown instruction: {}{}", command.name, suggestion.unwrap_or_default());
        self.fail(command.name_offset, message).expecting(NAMES.join(", "))
    }

    fn warn(&mut self, command: &Command, message: impl Into<String>) {
        if self.reader.warnings.len() < limits::WARNINGS {
            let at = Some(self.line.position(command.name_offset));
            self.reader.warnings.push(Warning { at, message: message.into() });
        }
    }

    /// The whole rest of the line as one argument.
    fn string(&self, command: &Command) -> Result<String, Error> {
        self.flags(command, &[])?;
        let usage = format!("{} VALUE", command.name.to_ascii_uppercase());
        match command.rest {
            "" => Err(self.missing(command, "exactly one argument", &usage)),
            rest => Ok(rest.to_string()),
        }
    }

    /// A JSON array or words; whether it was the former.
    fn list(&self, command: &Command) -> Result<(Vec<Word>, bool), Error> {
        let offset = command.rest_offset;
        match words::json(command.rest) {
            Json::Words(words) => Ok((words.into_iter().map(|text| Word { text, offset }).collect(), true)),
            Json::NotStrings => Err(self.not_strings(offset)),
            Json::Not => Ok((words::split(command.rest, offset), false)),
        }
    }

    fn not_strings(&self, offset: usize) -> Error {
        let message = "when using JSON array syntax, arrays must be comprised of strings only";
        self.fail(offset, message).expecting("[\"word\", \"word\"]")
    }

    fn command_line(&self, text: &str, offset: usize) -> Result<CommandLine, Error> {
        match words::json(text) {
            Json::Words(words) => Ok(CommandLine::Exec(words)),
            Json::NotStrings => Err(self.not_strings(offset)),
            Json::Not => Ok(CommandLine::Shell(text.to_string())),
        }
    }

    /// CMD and ENTRYPOINT.
    fn default_command(&self, command: &Command) -> Result<CommandLine, Error> {
        self.flags(command, &[])?;
        if command.rest.is_empty() {
            let usage = format!("{} [\"program\", \"argument\"]", command.name.to_ascii_uppercase());
            return Err(self.missing(command, "at least one argument", &usage));
        }
        self.command_line(command.rest, command.rest_offset)
    }

    fn arg(&self, command: &Command) -> Result<Kind, Error> {
        self.flags(command, &[])?;
        let words = words::quoted(command.rest, command.rest_offset, self.reader.escape);
        if words.is_empty() {
            return Err(self.missing(command, "at least one argument", "ARG NAME[=DEFAULT] …"));
        }
        let one = |word: &Word| match word.text.split_once('=') {
            Some(("", _)) => {
                Err(self.fail(word.offset, "ARG names can not be blank").expecting("NAME=DEFAULT"))
            }
            Some((key, value)) => Ok(ArgDefinition { key: key.to_string(), value: Some(value.to_string()) }),
            None => Ok(ArgDefinition { key: word.text.clone(), value: None }),
        };
        words.iter().map(one).collect::<Result<_, _>>().map(Kind::Arg)
    }

    /// ENV and LABEL: `name=value …`, or `name value` as it once was.
    fn key_values(&mut self, command: &Command) -> Result<Vec<KeyValue>, Error> {
        self.flags(command, &[])?;
        let name = command.name.to_ascii_uppercase();
        let usage = format!("{name} NAME=VALUE …");
        let words = words::quoted(command.rest, command.rest_offset, self.reader.escape);
        let Some(first) = words.first() else {
            return Err(self.missing(command, "at least one argument", &usage));
        };
        if !first.text.contains('=') {
            let Some((key, value)) = command.rest.split_once([' ', '\t', '\r', '\u{b}', '\u{c}']) else {
                let message = format!("{name} must have two arguments");
                return Err(self.fail(command.rest_offset, message).expecting(usage));
            };
            let message =
                format!("\"{name} key=value\" should be used instead of legacy \"{name} key value\" format");
            self.warn(command, message);
            return Ok(vec![KeyValue { key: key.to_string(), value: value.trim_start().to_string() }]);
        }
        let one = |word: &Word| match word.text.split_once('=') {
            None => {
                let message = format!(
                    "Syntax error - can't find = in {:?}. Must be of the form: name=value",
                    word.text
                );
                Err(self
                    .fail(word.offset, message)
                    .expecting("name=value, with quotes around a value with spaces"))
            }
            Some(("", _)) => {
                Err(self.fail(word.offset, format!("{name} names can not be blank")).expecting(&*usage))
            }
            Some((key, value)) => Ok(KeyValue { key: key.to_string(), value: value.to_string() }),
        };
        words.iter().map(one).collect()
    }

    fn expose(&self, command: &Command) -> Result<Kind, Error> {
        self.flags(command, &[])?;
        let words = words::split(command.rest, command.rest_offset);
        if words.is_empty() {
            return Err(self.missing(command, "at least one argument", "EXPOSE PORT[/PROTOCOL] …"));
        }
        let mut ports: Vec<String> = words.into_iter().map(|word| word.text).collect();
        ports.sort();
        Ok(Kind::Expose(ports))
    }

    fn volume(&self, command: &Command) -> Result<Kind, Error> {
        self.flags(command, &[])?;
        let (words, _) = self.list(command)?;
        if words.is_empty() {
            return Err(self.missing(command, "at least one argument", "VOLUME PATH …"));
        }
        if words.iter().any(|word| word.text.trim().is_empty()) {
            return Err(self.fail(command.rest_offset, "VOLUME specified can not be an empty string"));
        }
        Ok(Kind::Volume(words.iter().map(|word| word.text.trim().to_string()).collect()))
    }

    fn shell(&self, command: &Command) -> Result<Kind, Error> {
        const USAGE: &str = "SHELL [\"program\", \"argument\"]";
        self.flags(command, &[])?;
        match words::json(command.rest) {
            Json::Words(words) if words.is_empty() => {
                Err(self.missing(command, "at least one argument", USAGE))
            }
            Json::Words(words) => Ok(Kind::Shell(words)),
            Json::NotStrings => Err(self.not_strings(command.rest_offset)),
            Json::Not if command.rest.is_empty() => {
                Err(self.missing(command, "at least one argument", USAGE))
            }
            Json::Not => {
                let message = "SHELL requires the arguments to be in JSON form";
                Err(self.fail(command.rest_offset, message).expecting(USAGE))
            }
        }
    }

    fn healthcheck(&self, command: &Command) -> Result<Kind, Error> {
        const USAGE: &str = "HEALTHCHECK [--interval=DURATION …] CMD COMMAND, or HEALTHCHECK NONE";
        let names = ["interval", "timeout", "start-period", "start-interval", "retries"];
        let flags = self.flags(command, &names.map(|name| (name, Takes::One)))?;
        let offset = command.rest_offset;
        let (kind, rest) = command.rest.split_once(char::is_whitespace).unwrap_or((command.rest, ""));
        let rest = rest.trim_start();
        let test = match kind.to_ascii_uppercase().as_str() {
            "" => return Err(self.missing(command, "at least one argument", USAGE)),
            "NONE" if !rest.is_empty() => {
                return Err(self.fail(offset, "HEALTHCHECK NONE takes no arguments"));
            }
            "NONE" => {
                return Ok(Kind::Healthcheck(Healthcheck {
                    test: vec!["NONE".into()],
                    ..Default::default()
                }));
            }
            "CMD" => match self.command_line(rest, offset)? {
                CommandLine::Exec(words) if !words.is_empty() => {
                    std::iter::once("CMD".into()).chain(words).collect()
                }
                CommandLine::Shell(line) if !line.is_empty() => vec!["CMD-SHELL".into(), line],
                _ => return Err(self.fail(offset, "Missing command after HEALTHCHECK CMD").expecting(USAGE)),
            },
            other => {
                let message = format!("Unknown type {other:?} in HEALTHCHECK (try CMD)");
                return Err(self.fail(offset, message).expecting("CMD or NONE"));
            }
        };
        let retries = match flags.one("retries") {
            None => 0,
            Some(text) => text
                .parse::<i32>()
                .map_err(|_| format!("invalid number of retries: {text:?}"))
                .and_then(|n| u32::try_from(n).map_err(|_| format!("--retries cannot be negative ({n})")))
                .map_err(|message| {
                    self.fail(flags.at("retries").unwrap_or(offset), message).expecting("a whole number")
                })?,
        };
        Ok(Kind::Healthcheck(Healthcheck {
            test,
            interval_ns: self.interval_ns(&flags, "interval")?,
            timeout_ns: self.interval_ns(&flags, "timeout")?,
            start_period_ns: self.interval_ns(&flags, "start-period")?,
            start_interval_ns: self.interval_ns(&flags, "start-interval")?,
            retries,
        }))
    }

    fn interval_ns(&self, flags: &Flags, name: &str) -> Result<i64, Error> {
        let Some(text) = flags.one(name) else { return Ok(0) };
        let outcome = match ports::duration_ns(&text) {
            Ok(ns) if ns == 0 || ns >= 1_000_000 => return Ok(ns),
            Ok(_) => format!("Interval {name:?} cannot be less than 1ms"),
            Err(message) => message,
        };
        Err(self.fail(flags.at(name).unwrap_or(0), outcome).expecting("a duration such as 30s or 1m30s"))
    }

    /// The heredocs that the line opens, now that it is known to be no JSON.
    fn read_heredocs(&mut self) -> Result<Vec<Heredoc>, Error> {
        let openings = openings(&self.line.text);
        if openings.len() > limits::HEREDOCS_PER_LINE {
            let message = format!("more than {} heredocs on a line", limits::HEREDOCS_PER_LINE);
            return Err(self.fail(0, message));
        }
        let at: Position = self.line.find("<<");
        self.heredocs = self.reader.heredocs(openings, at)?;
        Ok(self.heredocs.clone())
    }

    fn run(&mut self, command: &Command) -> Result<Kind, Error> {
        let known = [("mount", Takes::Many), ("network", Takes::One), ("security", Takes::One)];
        let flags = self.flags(command, &known)?;
        if command.rest.is_empty() {
            return Err(self.missing(command, "at least one argument", "RUN COMMAND"));
        }
        let network = match flags.one("network").as_deref() {
            None | Some("default") => Network::Default,
            Some("none") => Network::None,
            Some("host") => Network::Host,
            Some(other) => {
                let at = flags.at("network").unwrap_or(0);
                return Err(self
                    .fail(at, format!("invalid network mode {other:?}"))
                    .expecting("default, none or host"));
            }
        };
        let security = match flags.one("security").as_deref() {
            None | Some("sandbox") => Security::Sandbox,
            Some("insecure") => Security::Insecure,
            Some(other) => {
                let at = flags.at("security").unwrap_or(0);
                return Err(self
                    .fail(at, format!("security {other:?} is not valid"))
                    .expecting("sandbox or insecure"));
            }
        };
        let mut mounts = Vec::new();
        for flag in flags.many("mount") {
            // What has variables can only be read where they have values.
            let read = match flag.text.contains('$') {
                true => mount::from(&flag.text).map(|_| None),
                false => {
                    mount::parse(&flag.text, &mut |value| expand_without_variables(value, self.reader.escape))
                        .map(Some)
                }
            };
            mounts.extend(read.map_err(|bad| self.bad_mount(flag.offset, bad))?);
        }
        let line = self.command_line(command.rest, command.rest_offset)?;
        let heredocs = match &line {
            CommandLine::Exec(words) if words.is_empty() => {
                return Err(self.missing(
                    command,
                    "at least one argument",
                    "RUN [\"program\", \"argument\"]",
                ));
            }
            CommandLine::Exec(_) => Vec::new(),
            CommandLine::Shell(_) => self.read_heredocs()?,
        };
        let mount_flags = flags.many("mount").into_iter().map(|flag| flag.text).collect();
        Ok(Kind::Run(Run { command: line, heredocs, mounts, network, security, mount_flags }))
    }

    fn bad_mount(&self, offset: usize, bad: mount::BadMount) -> Error {
        let error = self.fail(offset, bad.message);
        match bad.expected {
            Some(expected) => error.expecting(expected),
            None => error,
        }
    }

    fn sources(&mut self, command: &Command) -> Result<Sources, Error> {
        let name = command.name.to_ascii_uppercase();
        let (mut words, is_json) = self.list(command)?;
        let destination = words.pop().filter(|_| !words.is_empty()).ok_or_else(|| {
            let how_many =
                "at least two arguments, but only one was provided. Destination could not be determined";
            self.missing(command, how_many, &format!("{name} SOURCE… DESTINATION"))
        })?;
        if is_json {
            let paths = words.into_iter().map(|word| word.text).collect();
            return Ok(Sources { paths, inline: Vec::new(), destination: destination.text });
        }
        if opening(&destination.text).is_some() {
            let message = format!("{name} cannot accept a heredoc as a destination");
            return Err(self.fail(destination.offset, message));
        }
        let heredocs = self.read_heredocs()?;
        let mut sources = Sources { destination: destination.text, ..Default::default() };
        for word in words {
            let Some(opening) = opening(&word.text) else {
                sources.paths.push(word.text);
                continue;
            };
            let contents =
                heredocs.iter().rev().find(|heredoc| heredoc.name == opening.name).map(Heredoc::text);
            let contents = contents.unwrap_or_default();
            sources.inline.push(InlineFile { name: opening.name, contents, expand: opening.expand });
        }
        Ok(sources)
    }

    fn copy(&mut self, command: &Command) -> Result<Kind, Error> {
        let flags = self.flags(
            command,
            &[
                ("from", Takes::One),
                ("chown", Takes::One),
                ("chmod", Takes::One),
                ("link", Takes::Bool),
                ("parents", Takes::Bool),
                ("exclude", Takes::Many),
            ],
        )?;
        Ok(Kind::Copy(Copy {
            sources: self.sources(command)?,
            from: flags.one("from"),
            chown: flags.one("chown"),
            chmod: flags.one("chmod"),
            link: flags.is_set("link").unwrap_or(false),
            parents: flags.is_set("parents").unwrap_or(false),
            exclude: flags.many("exclude").into_iter().map(|word| word.text).collect(),
        }))
    }

    fn add(&mut self, command: &Command) -> Result<Kind, Error> {
        let flags = self.flags(
            command,
            &[
                ("chown", Takes::One),
                ("chmod", Takes::One),
                ("checksum", Takes::One),
                ("link", Takes::Bool),
                ("keep-git-dir", Takes::Bool),
                ("unpack", Takes::Bool),
                ("exclude", Takes::Many),
            ],
        )?;
        Ok(Kind::Add(Add {
            sources: self.sources(command)?,
            chown: flags.one("chown"),
            chmod: flags.one("chmod"),
            checksum: flags.one("checksum"),
            link: flags.is_set("link").unwrap_or(false),
            keep_git_dir: flags.is_set("keep-git-dir").unwrap_or(false),
            unpack: flags.is_set("unpack"),
            exclude: flags.many("exclude").into_iter().map(|word| word.text).collect(),
        }))
    }

    fn onbuild(&mut self, command: &Command) -> Result<Kind, Error> {
        self.flags(command, &[])?;
        if command.rest.is_empty() {
            return Err(self.missing(command, "at least one argument", "ONBUILD INSTRUCTION"));
        }
        let line = self.line;
        let inner = words::command(&line.text, command.rest_offset, self.reader.escape);
        match inner.name.to_ascii_uppercase().as_str() {
            "ONBUILD" => {
                return Err(
                    self.fail(inner.name_offset, "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")
                );
            }
            name @ ("MAINTAINER" | "FROM") => {
                let message = format!("{name} isn't allowed as an ONBUILD trigger");
                return Err(self.fail(inner.name_offset, message));
            }
            _ => {}
        }
        self.kind(&inner)?;
        let mut trigger = command.rest.to_string();
        for heredoc in &self.heredocs {
            trigger.push('\n');
            trigger.push_str(&heredoc.contents);
            trigger.push_str(&heredoc.name);
        }
        Ok(Kind::Onbuild(trigger))
    }
}

/// Quotes and escapes only.
fn expand_without_variables(value: &str, escape: char) -> Result<String, String> {
    expand::Lexer::new(escape, &|_| None).expand(value).map(|expanded| expanded.text)
}
