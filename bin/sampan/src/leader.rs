//! Which of several servers runs the controllers, and which the scheduler: leases of kube-system say it.
//!
//! Upstream counterpart: client-go tools/leaderelection, with its times and the Lease's fields. What stays true: who leads
//! renews every two seconds and knows after ten that it does not lead any more; others take a lease over when they saw it
//! unchanged for the fifteen that it lasts, by their own clock. From the moment that a server does not lead, nothing of
//! what it started reaches the API: its requests go through a [`Gate`] that is shut then. Deliberately different: who
//! loses a lease starts itself anew, so that it needs no service manager to become a candidate again, and gives up at
//! once when it sees another holder.
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::PostParams;
use kube::client::Body;
use kube::{Api, Client};
use sampan_apiserver::Status;
use sampan_client::in_process::{ResponseBody, Router};
use sampan_controllers::api_error::message;
use sampan_controllers::events::EventRecorder;
use sampan_world::{clock, random};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::util::BoxCloneSyncService;
use tower::{ServiceExt, service_fn};

const NAMESPACE: &str = "kube-system";
pub const CONTROLLERS: &str = "kube-controller-manager";
pub const SCHEDULER: &str = "kube-scheduler";
/// How long others leave an unchanged lease to its holder.
const LEASE_S: i32 = 15;
/// The holder gives up when it could not renew for so long.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RETRY_PERIOD: Duration = Duration::from_secs(2);
/// Candidates wait up to so much longer, each as chance has it.
const JITTER: f64 = 1.2;
/// One request for the lease, and its release.
const ATTEMPT: Duration = Duration::from_secs(5);

/// A lease that this server held and holds no more.
#[derive(Debug, thiserror::Error)]
#[error(
    "leaderelection lost: the lease {NAMESPACE}/{0} could not be renewed within {deadline} s, another server may lead",
    deadline = RENEW_DEADLINE.as_secs()
)]
pub struct Lost(pub String);

/// Lets requests through while its server leads.
#[derive(Clone, Default)]
pub struct Gate(Arc<AtomicBool>);

impl Gate {
    /// `router` for those who may act only while this server leads.
    pub fn guard(&self, router: Router) -> Router {
        let gate = self.clone();
        BoxCloneSyncService::new(service_fn(move |request: Request<Body>| {
            let (gate, router) = (gate.clone(), router.clone());
            async move {
                match gate.0.load(Ordering::Acquire) {
                    true => router.oneshot(request).await,
                    false => Ok::<_, Infallible>(refusal()),
                }
            }
        }))
    }

    fn open(&self) -> OpenGate<'_> {
        self.0.store(true, Ordering::Release);
        OpenGate(self)
    }
}

/// Shuts the gate, however its task ends.
struct OpenGate<'a>(&'a Gate);

impl Drop for OpenGate<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::Release);
    }
}

fn refusal() -> Response<ResponseBody> {
    let status = Status::unavailable("this server does not lead any more");
    let text = serde_json::to_vec(&status.body()).unwrap_or_default();
    let body = Full::new(bytes::Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// What a candidate knows of its lease.
struct Candidate {
    lease: &'static str,
    identity: String,
    /// The lease as last seen, and since when it has been so.
    seen: Option<(Lease, Instant)>,
}

/// What a candidate is to do next.
#[derive(Debug, PartialEq)]
enum Step {
    Create(Lease),
    Update(Lease),
    /// Somebody else leads.
    Wait,
}

impl Candidate {
    fn new(lease: &'static str, host: &str) -> Self {
        Self { lease, identity: format!("{host}_{}", random::uuid()), seen: None }
    }

    fn see(&mut self, found: Option<Lease>, now: Instant) {
        match (found, &self.seen) {
            (None, _) => self.seen = None,
            (Some(new), Some((old, since))) if new.spec == old.spec => {
                let since = *since;
                self.seen = Some((new, since));
            }
            (Some(new), _) => self.seen = Some((new, now)),
        }
    }

    fn holder(&self) -> &str {
        let spec = self.seen.as_ref().and_then(|(lease, _)| lease.spec.as_ref());
        spec.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
    }

    fn leads(&self) -> bool {
        self.holder() == self.identity
    }

    /// Whether its holder may still count on it.
    fn is_valid(&self, now: Instant) -> bool {
        let Some((lease, since)) = &self.seen else { return false };
        let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or(0);
        *since + Duration::from_secs(u64::try_from(seconds).unwrap_or(0)) > now
    }

    fn next(&self, now: Instant, wall: Timestamp) -> Step {
        let Some((seen, _)) = &self.seen else {
            let mut lease = Lease::default();
            lease.metadata.name = Some(self.lease.to_string());
            lease.metadata.namespace = Some(NAMESPACE.to_string());
            return Step::Create(self.held(lease, wall, Some(wall), 0));
        };
        let spec = seen.spec.clone().unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or(0);
        if self.leads() {
            let acquired = spec.acquire_time.map(|time| time.0);
            return Step::Update(self.held(seen.clone(), wall, acquired, transitions));
        }
        match self.holder().is_empty() || !self.is_valid(now) {
            true => Step::Update(self.held(seen.clone(), wall, Some(wall), transitions.saturating_add(1))),
            false => Step::Wait,
        }
    }

    fn held(
        &self,
        mut lease: Lease,
        wall: Timestamp,
        acquired: Option<Timestamp>,
        transitions: i32,
    ) -> Lease {
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(self.identity.clone());
        spec.lease_duration_seconds = Some(LEASE_S);
        spec.renew_time = Some(MicroTime(wall));
        spec.acquire_time = acquired.map(MicroTime);
        spec.lease_transitions = Some(transitions);
        lease
    }

    /// The lease given back; `None` when it is not ours.
    fn released(&self, wall: Timestamp) -> Option<Lease> {
        let (lease, _) = self.seen.as_ref().filter(|_| self.leads())?;
        let mut lease = lease.clone();
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = None;
        spec.lease_duration_seconds = Some(1);
        (spec.renew_time, spec.acquire_time) = (Some(MicroTime(wall)), Some(MicroTime(wall)));
        Some(lease)
    }

    /// Takes or renews the lease; false when somebody else has it.
    async fn attempt(&mut self, leases: &Api<Lease>) -> Result<bool, kube::Error> {
        let params = PostParams::default();
        let now = clock::monotonic();
        if self.leads()
            && self.is_valid(now)
            && let Step::Update(lease) = self.next(now, clock::now())
            && let Ok(written) = leases.replace(self.lease, &params, &lease).await
        {
            self.see(Some(written), clock::monotonic());
            return Ok(true);
        }
        let found = leases.get_opt(self.lease).await?;
        self.see(found, clock::monotonic());
        let written = match self.next(clock::monotonic(), clock::now()) {
            Step::Wait => return Ok(false),
            Step::Create(lease) => leases.create(&params, &lease).await,
            Step::Update(lease) => leases.replace(self.lease, &params, &lease).await,
        };
        match written {
            Ok(written) => {
                self.see(Some(written), clock::monotonic());
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits until this server leads.
    async fn acquire(&mut self, leases: &Api<Lease>) {
        loop {
            match tokio::time::timeout(ATTEMPT, self.attempt(leases)).await {
                Ok(Ok(true)) => return,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::debug!(lease = self.lease, %error, "the lease cannot be had"),
                Err(_) => tracing::debug!(lease = self.lease, "no answer about the lease"),
            }
            let more = random::below(1000) as f64 / 1000.0 * JITTER;
            tokio::time::sleep(RETRY_PERIOD.mul_f64(1.0 + more)).await;
        }
    }

    /// Renews for as long as that goes well.
    async fn hold(&mut self, leases: &Api<Lease>) {
        let mut renewed = clock::monotonic();
        loop {
            tokio::time::sleep(RETRY_PERIOD).await;
            let began = clock::monotonic();
            let limit = (began + ATTEMPT).min(renewed + RENEW_DEADLINE);
            match tokio::time::timeout_at(limit, self.attempt(leases)).await {
                // others count from when they see it
                Ok(Ok(true)) => renewed = began,
                Ok(Ok(false)) if !self.holder().is_empty() && !self.leads() => {
                    tracing::error!(lease = self.lease, holder = self.holder(), "another server leads");
                    return;
                }
                Ok(Ok(false)) => {}
                Ok(Err(error)) => {
                    tracing::warn!(lease = self.lease, "the lease was not renewed: {}", message(&error));
                }
                Err(_) => tracing::warn!(lease = self.lease, "the lease was not renewed: no answer"),
            }
            if renewed.elapsed() >= RENEW_DEADLINE {
                return;
            }
        }
    }

    async fn release(&mut self, leases: &Api<Lease>) {
        let Some(lease) = self.released(clock::now()) else { return };
        let writing = async { leases.replace(self.lease, &PostParams::default(), &lease).await };
        match tokio::time::timeout(ATTEMPT, writing).await {
            Ok(Ok(_)) => tracing::info!(lease = self.lease, "given back"),
            Ok(Err(error)) => {
                tracing::warn!(lease = self.lease, "the lease runs out by itself: {}", message(&error));
            }
            Err(_) => tracing::warn!(lease = self.lease, "the lease runs out by itself: no answer"),
        }
    }
}

/// The leases that this server is a candidate for.
pub struct Election {
    host: String,
    ending: watch::Sender<bool>,
    candidates: JoinSet<&'static str>,
}

impl Election {
    /// `host` names this server in leases.
    pub fn new(host: &str) -> Self {
        Self { host: host.to_string(), ending: watch::Sender::new(false), candidates: JoinSet::new() }
    }

    /// Is a candidate for `lease`, through `client`, from now on; calls `start` once this server leads.
    pub fn enter(&mut self, lease: &'static str, client: Client, start: impl FnOnce(&Gate) + Send + 'static) {
        let mut candidate = Candidate::new(lease, &self.host);
        let mut ending = self.ending.subscribe();
        self.candidates.spawn(async move {
            let events = EventRecorder::start(client.clone(), lease);
            let leases = Api::<Lease>::namespaced(client, NAMESPACE);
            tracing::debug!(lease, identity = candidate.identity, "attempting to acquire leader lease");
            tokio::select! {
                () = candidate.acquire(&leases) => {}
                _ = ending.wait_for(|ends| *ends) => return lease,
            }
            tracing::info!(lease, "this server leads");
            if let Some((found, _)) = &candidate.seen {
                events.normal(found, "LeaderElection", format!("{} became leader", candidate.identity));
            }
            let gate = Gate::default();
            let open = gate.open();
            start(&gate);
            let is_lost = tokio::select! {
                () = candidate.hold(&leases) => true,
                _ = ending.wait_for(|ends| *ends) => false,
            };
            drop(open);
            if !is_lost {
                candidate.release(&leases).await;
            }
            lease
        });
    }

    /// Waits until a lease is lost; for ever when there is none.
    pub async fn lost(&mut self) -> Lost {
        match self.candidates.join_next().await {
            Some(Ok(lease)) => Lost(lease.to_string()),
            Some(Err(error)) => Lost(format!("(a candidate's task {error})")),
            None => std::future::pending().await,
        }
    }

    /// Gives the leases back; what was started for them reaches nothing any more.
    pub async fn end(mut self) {
        self.ending.send_replace(true);
        while self.candidates.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str) -> Candidate {
        Candidate { lease: SCHEDULER, identity: name.to_string(), seen: None }
    }

    fn wall(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// Holder, duration, renewed, acquired, transitions.
    fn told(lease: &Lease) -> (String, i32, i64, i64, i32) {
        let spec = lease.spec.clone().unwrap();
        let seconds = |time: Option<MicroTime>| time.map_or(0, |time| time.0.as_second());
        let holder = spec.holder_identity.unwrap_or_default();
        let (duration, transitions) = (spec.lease_duration_seconds.unwrap(), spec.lease_transitions.unwrap());
        (holder, duration, seconds(spec.renew_time), seconds(spec.acquire_time), transitions)
    }

    fn of(
        name: &str,
        duration: i32,
        renewed: i64,
        acquired: i64,
        transitions: i32,
    ) -> (String, i32, i64, i64, i32) {
        (name.to_string(), duration, renewed, acquired, transitions)
    }

    #[tokio::test(start_paused = true)]
    async fn one_leads_until_it_is_silent_for_as_long_as_the_lease_lasts() {
        let (mut a, mut b) = (candidate("a"), candidate("b"));
        let start = clock::monotonic();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let Step::Create(lease) = a.next(at(0), wall(100)) else { panic!("nobody leads") };
        assert_eq!(told(&lease), of("a", 15, 100, 100, 0));
        assert_eq!(lease.metadata.name.as_deref(), Some(SCHEDULER));
        a.see(Some(lease.clone()), at(0));
        b.see(Some(lease), at(1));
        assert!(a.leads() && !b.leads());
        assert_eq!(b.next(at(1), wall(101)), Step::Wait);
        // a renewal: acquired then, renewed now
        let Step::Update(lease) = a.next(at(10), wall(110)) else { panic!("it leads") };
        assert_eq!(told(&lease), of("a", 15, 110, 100, 0));
        b.see(Some(lease.clone()), at(11));
        // seen again, but unchanged: b's patience counts from 11. Its wall clock does not matter
        b.see(Some(lease.clone()), at(20));
        assert_eq!(b.next(at(25), wall(100_000)), Step::Wait);
        let Step::Update(lease) = b.next(at(26), wall(50)) else { panic!("it was silent for 15 s") };
        assert_eq!(told(&lease), of("b", 15, 50, 50, 1));
        a.see(Some(lease.clone()), at(26));
        b.see(Some(lease), at(26));
        assert!(!a.leads() && b.leads() && a.released(wall(60)).is_none());
        // a clean end: whoever looks takes it at once
        let lease = b.released(wall(60)).unwrap();
        assert_eq!(told(&lease), of("", 1, 60, 60, 1));
        a.see(Some(lease), at(27));
        let Step::Update(lease) = a.next(at(27), wall(61)) else { panic!("it is free") };
        assert_eq!(told(&lease), of("a", 15, 61, 61, 2));
        // it was deleted
        a.see(None, at(30));
        assert!(!a.leads() && matches!(a.next(at(30), wall(70)), Step::Create(_)));
    }

    #[tokio::test]
    async fn the_gate_refuses_when_it_is_shut() {
        let router: Router = BoxCloneSyncService::new(service_fn(|_: Request<Body>| async {
            let body = Full::new(bytes::Bytes::from("x")).map_err(|never| match never {}).boxed_unsync();
            Ok::<_, Infallible>(Response::new(body))
        }));
        let gate = Gate::default();
        let guarded = gate.guard(router);
        let ask = async |router: Router| {
            let response = router.oneshot(Request::new(Body::empty())).await.unwrap();
            response.status().as_u16()
        };
        assert_eq!(ask(guarded.clone()).await, 503);
        let open = gate.open();
        assert_eq!(ask(guarded.clone()).await, 200);
        drop(open);
        assert_eq!(ask(guarded).await, 503);
    }
}
