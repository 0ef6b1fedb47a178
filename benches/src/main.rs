//! The budgets of ARCHITECTURE.md, measured: `sampan-bench budgets` in a lab of its own, `sampan-bench api` against any
//! Kubernetes, so that another one can be measured on the same machine in the same run.
//!
//! Nothing is tuned for the measurement: the release binary, the lab's defaults, real pods. Times and counts are bounded.
mod api;
mod budgets;
mod memory;
mod pods;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Measures Sampan's budgets")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// All budgets, in labs of their own
    Budgets(budgets::Args),
    /// Create, list and watch against a cluster that runs already
    Api {
        /// The cluster's kubeconfig
        #[arg(long)]
        kubeconfig: PathBuf,
        #[command(flatten)]
        load: api::Load,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Budgets(args) => budgets::run(&args),
        Command::Api { kubeconfig, load } => api::run(&kubeconfig, &load),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sampan-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
