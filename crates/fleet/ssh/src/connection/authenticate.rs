//! Being let in: the named key, the given password, the agent's keys, the usual key files, a password that is asked for.
use std::path::PathBuf;
use std::sync::Arc;

use russh::client::{AuthResult, Handle, KeyboardInteractiveAuthResponse};
use russh::keys::{HashAlg, PrivateKeyWithHashAlg, PublicKey};
use russh::{MethodKind, MethodSet};

use super::host_key::ssh_folder;
use super::{Address, Client, ConnectError, Login, MAX_KEYS};
use crate::keys::{Agent, DEFAULT_NAMES, KeyFile};
use crate::prompt::{Ask, Secret};

/// Questions of a server in one login by keyboard-interactive.
const MAX_ROUNDS: usize = 8;

struct Attempt<'a> {
    handle: &'a mut Handle<Client>,
    address: &'a Address,
    login: &'a Login,
    ask: &'a dyn Ask,
    /// What the server would still take.
    takes: MethodSet,
    tried: Vec<String>,
    offered: usize,
    rsa_hash: Option<Option<HashAlg>>,
}

/// Logs in; returns the password that did it, if one did.
pub async fn log_in(
    handle: &mut Handle<Client>,
    address: &Address,
    login: &Login,
    ask: &dyn Ask,
) -> Result<Option<Secret>, ConnectError> {
    let first = handle.authenticate_none(&address.user).await.map_err(|e| lost(address, e))?;
    let takes = match first {
        AuthResult::Success => return Ok(None),
        AuthResult::Failure { remaining_methods, .. } => remaining_methods,
    };
    let at_first = takes.clone();
    let mut attempt =
        Attempt { handle, address, login, ask, takes, tried: Vec::new(), offered: 0, rsa_hash: None };
    if attempt.named_key().await? {
        return Ok(None);
    }
    if let Some(password) = &login.password
        && attempt.password(password).await?
    {
        return Ok(Some(password.clone()));
    }
    if attempt.agent().await? || (login.key.is_none() && attempt.usual_keys().await?) {
        return Ok(None);
    }
    if login.password.is_none()
        && attempt.takes_passwords()
        && let Some(password) = ask.secret(&format!("Password of {address}"))
        && attempt.password(&password).await?
    {
        return Ok(Some(password));
    }
    let tried = match attempt.tried.as_slice() {
        [] => "no key and no password (there is none)".to_string(),
        tried => tried.join(", "),
    };
    let names: Vec<&str> = at_first.iter().map(<&str>::from).collect();
    let takes = if names.is_empty() { "nothing from us".to_string() } else { names.join(" and ") };
    Err(ConnectError::Refused { address: address.to_string(), tried, takes })
}

fn lost(address: &Address, error: impl std::fmt::Display) -> ConnectError {
    ConnectError::Lost { address: address.to_string(), message: error.to_string() }
}

impl Attempt<'_> {
    fn takes_passwords(&self) -> bool {
        self.takes.contains(&MethodKind::Password) || self.takes.contains(&MethodKind::KeyboardInteractive)
    }

    fn takes_keys(&self) -> bool {
        self.takes.contains(&MethodKind::PublicKey) && self.offered < MAX_KEYS
    }

    fn is_in(&mut self, result: AuthResult) -> bool {
        match result {
            AuthResult::Success => true,
            AuthResult::Failure { remaining_methods, partial_success } => {
                if partial_success {
                    self.tried.push("(which was right, but not enough)".to_string());
                }
                self.takes = remaining_methods;
                false
            }
        }
    }

    /// Old servers know rsa-sha2 only by its name, without saying so.
    async fn hash_for(&mut self, key: &PublicKey) -> Result<Option<HashAlg>, ConnectError> {
        if !key.algorithm().is_rsa() {
            return Ok(None);
        }
        if self.rsa_hash.is_none() {
            let best = self.handle.best_supported_rsa_hash().await.map_err(|e| lost(self.address, e))?;
            self.rsa_hash = Some(best.unwrap_or(Some(HashAlg::Sha256)));
        }
        Ok(self.rsa_hash.flatten())
    }

    async fn named_key(&mut self) -> Result<bool, ConnectError> {
        let Some(path) = self.login.key.clone() else { return Ok(false) };
        let file = KeyFile::read(&path)?;
        if !self.takes_keys() {
            return Ok(false);
        }
        self.key(&file).await
    }

    async fn usual_keys(&mut self) -> Result<bool, ConnectError> {
        let Some(folder) = ssh_folder() else { return Ok(false) };
        let paths: Vec<PathBuf> = DEFAULT_NAMES.iter().map(|name| folder.join(name)).collect();
        for path in paths.iter().filter(|p| p.exists()) {
            // a file that cannot be read is no reason not to try the next
            let Ok(file) = KeyFile::read(path) else { continue };
            if !self.takes_keys() {
                break;
            }
            match self.key(&file).await {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(ConnectError::Key(error)) => self.tried.push(format!("{error}")),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    async fn key(&mut self, file: &KeyFile) -> Result<bool, ConnectError> {
        let shown = format!("the key {}", file.path.display());
        if file.locked
            && self.login.passphrase.is_none()
            && let Some(public) = &file.public
            && let Some(mut agent) = Agent::open().await
            && agent.holds(public)
        {
            self.tried.push(format!("{shown} (held by the agent)"));
            return self.sign_by(&mut agent, public.clone()).await;
        }
        let key = file.unlock(self.login.passphrase.as_ref(), self.ask)?;
        self.offered += 1;
        self.tried.push(shown);
        let hash = self.hash_for(key.public_key()).await?;
        let key = PrivateKeyWithHashAlg::new(Arc::clone(&key), hash);
        let result = self.handle.authenticate_publickey(&self.address.user, key).await;
        let result = result.map_err(|e| lost(self.address, e))?;
        Ok(self.is_in(result))
    }

    async fn agent(&mut self) -> Result<bool, ConnectError> {
        let Some(mut agent) = Agent::open().await else { return Ok(false) };
        let keys = agent.keys.clone();
        let mut count = 0;
        for key in keys {
            if !self.takes_keys() {
                break;
            }
            count += 1;
            if self.sign_by(&mut agent, key).await? {
                return Ok(true);
            }
        }
        if count > 0 {
            self.tried.push(format!("{count} of the agent's {} keys", agent.keys.len()));
        }
        Ok(false)
    }

    async fn sign_by(&mut self, agent: &mut Agent, key: PublicKey) -> Result<bool, ConnectError> {
        self.offered += 1;
        let hash = self.hash_for(&key).await?;
        let user = &self.address.user;
        match self.handle.authenticate_publickey_with(user, key, hash, &mut agent.client).await {
            Ok(result) => Ok(self.is_in(result)),
            // an agent that will not sign with a key is like one that has not got it
            Err(russh::AgentAuthError::Key(_)) => Ok(false),
            Err(error) => Err(lost(self.address, error)),
        }
    }

    async fn password(&mut self, password: &Secret) -> Result<bool, ConnectError> {
        let user = &self.address.user;
        if self.takes.contains(&MethodKind::Password) {
            let result = self.handle.authenticate_password(user, password.reveal()).await;
            let result = result.map_err(|e| lost(self.address, e))?;
            self.tried.push("the password".to_string());
            return Ok(self.is_in(result));
        }
        if !self.takes.contains(&MethodKind::KeyboardInteractive) {
            return Ok(false);
        }
        self.tried.push("the password".to_string());
        let started = self.handle.authenticate_keyboard_interactive_start(user, None).await;
        let mut answer = started.map_err(|e| lost(self.address, e))?;
        for _ in 0..MAX_ROUNDS {
            match answer {
                KeyboardInteractiveAuthResponse::Success => return Ok(true),
                KeyboardInteractiveAuthResponse::Failure { remaining_methods, .. } => {
                    self.takes = remaining_methods;
                    return Ok(false);
                }
                KeyboardInteractiveAuthResponse::InfoRequest { prompts, .. } => {
                    // what is not to be seen is the password; anything else we cannot know
                    let reply = |echo: bool| if echo { String::new() } else { password.reveal().to_string() };
                    let replies = prompts.iter().map(|p| reply(p.echo)).collect();
                    let sent = self.handle.authenticate_keyboard_interactive_respond(replies).await;
                    answer = sent.map_err(|e| lost(self.address, e))?;
                }
            }
        }
        Ok(false)
    }
}
