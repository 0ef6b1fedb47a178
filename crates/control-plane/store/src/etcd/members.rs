//! The members of an etcd, as its owner sees them: listed, added, promoted and removed.
//!
//! Upstream counterpart: the `Cluster` and `Maintenance` services of etcd's `client/v3`. What stays true: a change is sent
//! once; when its outcome is unknown the error says so, and the list tells what came of it.
use prost::Message;

use super::Etcd;
use super::endpoints::Endpoints;
use super::grpc::CallError;
use crate::error::StoreError;

const LIST: &str = "/etcdserverpb.Cluster/MemberList";
const ADD: &str = "/etcdserverpb.Cluster/MemberAdd";
const REMOVE: &str = "/etcdserverpb.Cluster/MemberRemove";
const UPDATE: &str = "/etcdserverpb.Cluster/MemberUpdate";
const PROMOTE: &str = "/etcdserverpb.Cluster/MemberPromote";
const STATUS: &str = "/etcdserverpb.Maintenance/Status";

/// One member, as all of them know it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Member {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Empty until it has begun.
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, repeated, tag = "3")]
    pub peer_urls: Vec<String>,
    #[prost(string, repeated, tag = "4")]
    pub client_urls: Vec<String>,
    /// It has no vote yet.
    #[prost(bool, tag = "5")]
    pub is_learner: bool,
}

/// What one member says of itself.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MemberStatus {
    #[prost(string, tag = "2")]
    pub version: String,
    #[prost(int64, tag = "3")]
    pub db_size_bytes: i64,
    #[prost(uint64, tag = "4")]
    pub leader: u64,
    #[prost(bool, tag = "10")]
    pub is_learner: bool,
}

/// What went wrong with a question, or with a change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembersError {
    /// Nobody has seen it.
    #[error("etcd at {endpoints} cannot be reached: {detail}")]
    Unreachable { endpoints: String, detail: String },
    /// A change may have been made.
    #[error("etcd at {endpoints} did not answer: {detail}")]
    Unanswered { endpoints: String, detail: String },
    /// etcd's own words.
    #[error("etcd at {endpoints}: {detail}")]
    Refused { endpoints: String, detail: String },
}

impl MembersError {
    /// Whether etcd itself said this.
    pub fn says(&self, words: &str) -> bool {
        matches!(self, Self::Refused { detail, .. } if detail.contains(words))
    }
}

/// Asks whichever of those endpoints answers.
pub struct Members {
    endpoints: Endpoints,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListRequest {
    /// Since 3.5; who does not know it answers from what it has.
    #[prost(bool, tag = "1")]
    linearizable: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AddRequest {
    #[prost(string, repeated, tag = "1")]
    peer_urls: Vec<String>,
    #[prost(bool, tag = "2")]
    is_learner: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UpdateRequest {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, repeated, tag = "2")]
    peer_urls: Vec<String>,
}

/// Of a removal and a promotion.
#[derive(Clone, PartialEq, prost::Message)]
struct OneRequest {
    #[prost(uint64, tag = "1")]
    id: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusRequest {}

/// Of a list, an update, a removal and a promotion.
#[derive(Clone, PartialEq, prost::Message)]
struct ListAnswer {
    #[prost(message, repeated, tag = "2")]
    members: Vec<Member>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AddAnswer {
    #[prost(message, optional, tag = "2")]
    member: Option<Member>,
    #[prost(message, repeated, tag = "3")]
    members: Vec<Member>,
}

impl Members {
    /// Connects with the first question.
    pub fn new(etcd: &Etcd) -> Result<Self, StoreError> {
        Ok(Self { endpoints: Endpoints::new(etcd)? })
    }

    fn failed(&self, error: CallError) -> MembersError {
        let endpoints = self.endpoints.names();
        match error {
            CallError::Unsent(detail) => MembersError::Unreachable { endpoints, detail },
            CallError::Unanswered(detail) => MembersError::Unanswered { endpoints, detail },
            CallError::Status { code, message } => {
                let detail = if message.is_empty() { format!("gRPC status {code}") } else { message };
                MembersError::Refused { endpoints, detail }
            }
        }
    }

    async fn change<A: Message + Default + Clone>(
        &self,
        path: &str,
        request: &impl Message,
    ) -> Result<A, MembersError> {
        self.endpoints.write(path, request).await.map_err(|e| self.failed(e))
    }

    pub async fn list(&self) -> Result<Vec<Member>, MembersError> {
        let answer = self.endpoints.read(LIST, &ListRequest { linearizable: true }).await;
        answer.map(|answer: ListAnswer| answer.members).map_err(|e| self.failed(e))
    }

    /// Adds one without a vote; what it is, and all that there are then.
    pub async fn add_learner(&self, peer_url: &str) -> Result<(Member, Vec<Member>), MembersError> {
        let request = AddRequest { peer_urls: vec![peer_url.to_owned()], is_learner: true };
        let answer: AddAnswer = self.change(ADD, &request).await?;
        Ok((answer.member.unwrap_or_default(), answer.members))
    }

    /// Gives a learner its vote.
    pub async fn promote(&self, id: u64) -> Result<(), MembersError> {
        self.change::<ListAnswer>(PROMOTE, &OneRequest { id }).await.map(drop)
    }

    pub async fn remove(&self, id: u64) -> Result<(), MembersError> {
        self.change::<ListAnswer>(REMOVE, &OneRequest { id }).await.map(drop)
    }

    /// Has the others find a member elsewhere.
    pub async fn relocate(&self, id: u64, peer_url: &str) -> Result<(), MembersError> {
        let request = UpdateRequest { id, peer_urls: vec![peer_url.to_owned()] };
        self.change::<ListAnswer>(UPDATE, &request).await.map(drop)
    }

    /// What the member that answers says of itself; it says nothing while it knows no leader.
    pub async fn status(&self) -> Result<MemberStatus, MembersError> {
        self.endpoints.read(STATUS, &StatusRequest {}).await.map_err(|e| self.failed(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of etcd's own messages (`protoc --encode` over rpc.proto).
    #[test]
    fn the_wire_is_etcds() {
        let add = AddRequest { peer_urls: vec!["https://b:2380".to_owned()], is_learner: true };
        let mut want = vec![0x0a, 14];
        want.extend_from_slice(b"https://b:2380");
        want.extend_from_slice(&[0x10, 1]);
        assert_eq!(add.encode_to_vec(), want);
        let answer: &[u8] = &[
            0x0a, 2, 0x08, 5, 0x12, 4, 0x08, 7, 0x28, 1, 0x1a, 5, 0x08, 6, 0x12, 1, b'a', 0x1a, 4, 0x08, 7,
            0x28, 1,
        ];
        let answer = AddAnswer::decode(answer).unwrap();
        let learner = Member { id: 7, is_learner: true, ..Member::default() };
        assert_eq!(answer.member, Some(learner.clone()));
        assert_eq!(answer.members, [Member { id: 6, name: "a".to_owned(), ..Member::default() }, learner]);
        let status: &[u8] = &[0x12, 1, b'3', 0x18, 9, 0x20, 6, 0x28, 1, 0x48, 3, 0x50, 1];
        let status = MemberStatus::decode(status).unwrap();
        assert_eq!((status.leader, status.db_size_bytes, status.is_learner), (6, 9, true));
    }
}
