//! etcd members that servers run: asked with the servers' own certificates.
use anyhow::{Context, Result};
use serde_json::Value;

/// A script that prints a server's etcd members as JSON.
pub const LIST: &str = "cd /var/lib/sampan/server/tls/etcd && python3 -c \"
import ssl, urllib.request as u
c = ssl.create_default_context(cafile='server-ca.crt')
c.load_cert_chain('member.crt', 'member.key')
r = u.Request('https://127.0.0.1:2379/v3/cluster/member/list', data=b'{}')
print(u.urlopen(r, timeout=5, context=c).read().decode())\"";

/// Of that answer: the names of those with a vote, sorted, with how many have none.
pub fn voters(text: &str) -> Result<(Vec<String>, usize)> {
    let answer: Value = serde_json::from_str(text).with_context(|| text.to_string())?;
    let members = answer["members"].as_array().context("members")?;
    let is_learner = |member: &&Value| member["isLearner"] == true;
    let learners = members.iter().filter(is_learner).count();
    let voters = members.iter().filter(|member| !is_learner(member));
    let mut names: Vec<String> =
        voters.map(|member| member["name"].as_str().unwrap_or_default().to_string()).collect();
    names.sort();
    Ok((names, learners))
}
