//! `sampan exec`: a command on one machine or on all of a list. Its exit code is the command's, as with ssh.
use std::io::Write;

use anyhow::Result;
use futures::StreamExt;

use super::access::{Machines, Way, ask};
use super::exit_code;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    machines: Machines,
    /// As root
    #[arg(long)]
    as_root: bool,
    /// Machines at a time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: u8,
    /// The command, for the shell there
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub async fn run(args: &Args) -> u8 {
    let ways = match args.machines.ways() {
        Ok(ways) => ways,
        Err(error) => {
            eprintln!("sampan: {error:#}");
            return exit_code(&error);
        }
    };
    let several = ways.len() > 1;
    let works = ways.iter().map(|way| on(way, args, several));
    let codes: Vec<u8> = futures::stream::iter(works).buffered(usize::from(args.parallel)).collect().await;
    codes.into_iter().find(|code| *code != 0).unwrap_or(0)
}

async fn on(way: &Way, args: &Args, several: bool) -> u8 {
    match try_on(way, args, several).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sampan: {error:#}");
            exit_code(&error)
        }
    }
}

async fn try_on(way: &Way, args: &Args, several: bool) -> Result<u8> {
    let ask = ask();
    let reached = sampan_fleet::Host::reach(&way.name, way.address.as_ref(), &way.login, &way.sudo, ask);
    let host = reached.await?;
    let command = args.command.join(" ");
    let mut lines = Lines { name: several.then(|| way.name.clone()), open: [Vec::new(), Vec::new()] };
    let tell = Box::new(|is_error: bool, bytes: &[u8]| lines.put(is_error, bytes));
    let output = host.exec(&command, args.as_root, tell).await?;
    lines.end();
    Ok(u8::try_from(output.code).unwrap_or(255))
}

/// Passes output on; with several machines in whole lines, each with the machine's name.
struct Lines {
    name: Option<String>,
    open: [Vec<u8>; 2],
}

impl Lines {
    fn put(&mut self, is_error: bool, bytes: &[u8]) {
        let Some(name) = &self.name else { return write(is_error, bytes) };
        let open = &mut self.open[usize::from(is_error)];
        open.extend_from_slice(bytes);
        while let Some(end) = open.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = open.drain(..=end).collect();
            write(is_error, &[format!("{name}: ").as_bytes(), &line].concat());
        }
    }

    fn end(&mut self) {
        for is_error in [false, true] {
            if !self.open[usize::from(is_error)].is_empty() {
                self.put(is_error, b"\n");
            }
        }
    }
}

fn write(is_error: bool, bytes: &[u8]) {
    // a reader that went away is no failure of the machine's command
    let _ = match is_error {
        true => std::io::stderr().write_all(bytes),
        false => std::io::stdout().write_all(bytes),
    };
}
