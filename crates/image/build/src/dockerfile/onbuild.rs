//! ONBUILD triggers of a base, read as instructions of the stage that is built on it.
//!
//! Upstream counterpart: `initOnBuildTriggers` in buildkit `dockerfile2llb/convert.go`. Places are those of the FROM
//! line that brings the trigger in.
use super::error::{Error, File};
use super::instruction::{self, Parsed};
use super::line::{Line, Reader};
use super::{Instruction, Position};

pub(super) fn trigger(file: &File, at: Position, escape: char, text: &str) -> Result<Instruction, Error> {
    let source = File { name: file.name.clone(), text: text.to_string() };
    let mut reader = Reader::new(&source);
    reader.escape = escape;
    let fail = |message: &str| {
        let shown: String = text.chars().take(200).collect();
        file.error(at, (at.line, at.line), format!("ONBUILD trigger {shown:?}: {message}"))
    };
    let refused = |error: Error| fail(error.bare_message());
    let Some(line) = reader.logical().map_err(refused)? else { return Err(fail("it is empty")) };
    let instruction = match instruction::parse(&mut reader, line).map_err(refused)? {
        Parsed::From(_) => return Err(fail("FROM isn't allowed as an ONBUILD trigger")),
        Parsed::Instruction(instruction) => instruction,
    };
    if reader.logical().map_err(refused)?.is_some() {
        return Err(fail("onbuild trigger should be a single expression"));
    }
    let line = Line::fixed(instruction.line.text.clone(), at);
    Ok(Instruction { at, end_line: at.line, onbuild: true, line, ..instruction })
}
