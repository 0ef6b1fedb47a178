//! The fleet: clusters on machines that are reached over SSH, k3sup's job in the same binary.
//!
//! Upstream counterpart: alexellis/k3sup (commands, flags) and K3s' install.sh (service, uninstall and killall scripts).
//! A machine is reached by [`connection`] (our own SSH, no `ssh` program), asked what it is ([`facts`]), judged
//! ([`preflight`]), and given the binary, a configuration and a service ([`install`], [`service`]); [`ready`] waits.
//! What stays true: every step looks before it writes, so a half-done install is run again; a machine's host key is
//! checked before anything is said to it; a secret never stands on a command line. Deliberate differences: the binary is
//! sent from here, so the machine needs no internet; host keys are checked; sudo may ask for a password.
pub mod binary;
pub mod boot;
pub mod connection;
pub mod facts;
pub mod install;
pub mod keys;
pub mod known_hosts;
pub mod kubeconfig;
pub mod machine;
pub mod plan;
pub mod preflight;
pub mod prompt;
pub mod ready;
pub mod service;
pub mod words;

pub use connection::{Address, ConnectError, Connection, Login};
pub use facts::Facts;
pub use install::{InstallError, Installation};
pub use machine::{Host, Input, Machine, MachineError, Output, Root};
pub use plan::{HostEntry, Plan};
pub use preflight::{Finding, Findings};
pub use prompt::{Ask, Nobody, Secret, Terminal};
