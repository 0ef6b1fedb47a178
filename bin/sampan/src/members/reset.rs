//! `sampan server --cluster-reset`: a member's data made the whole of a new cluster of one.
//!
//! Upstream counterpart: K3s' pkg/etcd (`Reset`), by etcd's `--force-new-cluster`. What stays true: nothing but the
//! membership changes; the server ends afterwards and is started without the flag. Other members that come back do not
//! find their way to this one: they have to join again with empty folders.
use anyhow::{Context, Result, anyhow, bail};

use super::certificate::{Files, MemberCertificate};
use super::program::{self, Initial, Program};
use super::record::{LOCAL, Record};
use super::{FALSE_STARTS, MemberArgs, Own, RETRY, join};

pub async fn run(args: &MemberArgs, own: &Own<'_>) -> Result<()> {
    let before = Record::read(own.folder)?.context("what this server's member was is not known")?;
    let path = program::find(args.etcd.as_deref())?;
    // a machine may have another address by now
    let record = Record { name: before.name.clone(), address: own.address, others: Vec::new() };
    let lifetime = own.certificate_lifetime_seconds;
    let files = Files::of(own.folder);
    let certificate = MemberCertificate::open(files, &own.name, own.address, false, lifetime)?;
    certificate.renewed()?;
    let program = Program::new(path, own.folder, &record, &Initial::Alone, own.is_debugged);
    let running = program.keep();
    let done = tokio::select! {
        done = alone(own, &record) => done,
        state = running.ended(FALSE_STARTS) => Err(anyhow!("etcd does not run: {}", state.words)),
    };
    running.end().await;
    done?;
    record.write(own.folder)?;
    println!(
        "This server's etcd is the only member of the cluster now: start it again without --cluster-reset. On all other \
         servers, stop sampan, remove {} and start with --server.",
        own.folder.join("db").display()
    );
    Ok(())
}

/// Waits until the member leads itself, and has it be found at its present address.
async fn alone(own: &Own<'_>, record: &Record) -> Result<()> {
    let members = join::members_at(own.folder, &[LOCAL.to_string()])?;
    let mut waiting = join::Waiting::new();
    let all = loop {
        match members.list().await {
            Ok(all) => break all,
            Err(error) => waiting.again(&error.into()).await?,
        }
        tokio::time::sleep(RETRY).await;
    };
    let [member] = all.as_slice() else {
        bail!("there are {} members still: etcd did not forget them", all.len());
    };
    if !member.peer_urls.contains(&record.peer_url()) {
        members.relocate(member.id, &record.peer_url()).await.context("telling etcd of the new address")?;
    }
    Ok(())
}
