//! What to create, update and delete so that slices hold the desired endpoints.
//! Upstream counterpart: staging/src/k8s.io/endpointslice/reconciler.go.
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use crate::controller_ref::name;
use crate::label_selector::Labels;

/// Endpoints with the same ports.
pub struct Desired {
    pub ports: Vec<EndpointPort>,
    pub endpoints: Vec<Endpoint>,
}

/// What all slices of a service and family have.
pub struct Template {
    pub namespace: String,
    pub generate_name: String,
    pub address_type: String,
    pub labels: Labels,
    pub annotations: Option<BTreeMap<String, String>>,
    pub owner: OwnerReference,
    pub max_endpoints: usize,
    /// Keeps an empty slice where there are no endpoints.
    pub keep_one: bool,
}

#[derive(Default)]
pub struct Plan {
    pub create: Vec<EndpointSlice>,
    pub update: Vec<EndpointSlice>,
    /// Names.
    pub delete: Vec<String>,
}

impl Plan {
    pub fn add(&mut self, other: Plan) {
        self.create.extend(other.create);
        self.update.extend(other.update);
        self.delete.extend(other.delete);
    }
}

impl Template {
    fn slice(&self, ports: Vec<EndpointPort>, endpoints: Vec<Endpoint>) -> EndpointSlice {
        EndpointSlice {
            metadata: ObjectMeta {
                namespace: Some(self.namespace.clone()),
                generate_name: Some(self.generate_name.clone()),
                labels: Some(self.labels.clone()),
                annotations: self.annotations.clone(),
                owner_references: Some(vec![self.owner.clone()]),
                ..ObjectMeta::default()
            },
            address_type: self.address_type.clone(),
            endpoints: Some(endpoints),
            ports: Some(ports),
        }
    }

    /// Gives a slice the labels, annotations and owner that it should have.
    fn stamp(&self, slice: &mut EndpointSlice) {
        slice.metadata.labels = Some(self.labels.clone());
        if let Some(annotations) = &self.annotations {
            slice.metadata.annotations = Some(annotations.clone());
        }
        let owners = slice.metadata.owner_references.get_or_insert_with(Vec::new);
        if !owners.iter().any(|o| o.uid == self.owner.uid) {
            *owners = vec![self.owner.clone()];
        }
    }
}

fn ports_id(ports: &[EndpointPort]) -> String {
    let mut each: Vec<String> = ports.iter().map(|p| serde_json::to_string(p).unwrap_or_default()).collect();
    each.sort();
    each.join(",")
}

/// What makes two endpoints the same one.
fn endpoint_id(endpoint: &Endpoint) -> (Vec<String>, Option<String>) {
    (endpoint.addresses.clone(), endpoint.target_ref.as_ref().and_then(|r| r.uid.clone()))
}

/// Brings `existing` to hold `desired`.
pub fn plan(template: &Template, desired: Vec<Desired>, existing: Vec<Arc<EndpointSlice>>) -> Plan {
    let mut plan = Plan::default();
    let mut by_ports: BTreeMap<String, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in existing {
        by_ports.entry(ports_id(slice.ports.as_deref().unwrap_or_default())).or_default().push(slice);
    }
    let mut kept = 0;
    for group in desired {
        let own = by_ports.remove(&ports_id(&group.ports)).unwrap_or_default();
        kept += own.len();
        let group_plan = plan_group(template, group, own);
        kept = kept + group_plan.create.len() - group_plan.delete.len();
        plan.add(group_plan);
    }
    let leftover: Vec<Arc<EndpointSlice>> = by_ports.into_values().flatten().collect();
    if kept > 0 || !template.keep_one {
        plan.delete.extend(leftover.iter().map(|s| name(&**s).to_string()));
        return plan;
    }
    // nothing to hold: one empty slice without ports shows that the service was looked at
    let is_placeholder =
        |s: &EndpointSlice| endpoints_of(s).is_empty() && s.ports.as_ref().is_none_or(Vec::is_empty);
    let placeholder = leftover.iter().position(|s| is_placeholder(s));
    for (i, slice) in leftover.iter().enumerate() {
        if Some(i) != placeholder {
            plan.delete.push(name(&**slice).to_string());
            continue;
        }
        let mut stamped = (**slice).clone();
        template.stamp(&mut stamped);
        if stamped != **slice {
            plan.update.push(stamped);
        }
    }
    if placeholder.is_none() {
        plan.create.push(template.slice(Vec::new(), Vec::new()));
    }
    plan
}

fn plan_group(template: &Template, group: Desired, existing: Vec<Arc<EndpointSlice>>) -> Plan {
    let mut plan = Plan::default();
    let mut wanted: BTreeMap<_, Endpoint> =
        group.endpoints.into_iter().map(|e| (endpoint_id(&e), e)).collect();
    let mut slices: Vec<(EndpointSlice, Vec<Endpoint>, bool)> = Vec::new();
    for slice in &existing {
        let mut new = (**slice).clone();
        let keep = |e: &Endpoint| {
            let wanted = wanted.remove(&endpoint_id(e))?;
            Some(Endpoint { hints: e.hints.clone(), ..wanted })
        };
        let kept: Vec<Endpoint> = endpoints_of(slice).iter().filter_map(keep).collect();
        template.stamp(&mut new);
        let changed = new != **slice || kept != endpoints_of(slice);
        slices.push((new, kept, changed));
    }
    let mut rest: Vec<Endpoint> = wanted.into_values().collect();
    // first slices that are written anyway, the fullest first, then the others, then new ones
    slices.sort_by_key(|(_, kept, changed)| (!changed, std::cmp::Reverse(kept.len())));
    for (_, kept, changed) in &mut slices {
        let full = kept.len() >= template.max_endpoints;
        if rest.is_empty() || full || (!*changed && kept.len() + rest.len() > template.max_endpoints) {
            continue;
        }
        let room = (template.max_endpoints - kept.len()).min(rest.len());
        kept.extend(rest.drain(..room));
        *changed = true;
    }
    while !rest.is_empty() {
        let endpoints = rest.drain(..rest.len().min(template.max_endpoints)).collect();
        plan.create.push(template.slice(group.ports.clone(), endpoints));
    }
    for (mut slice, kept, changed) in slices {
        if kept.is_empty() {
            plan.delete.push(name(&slice).to_string());
        } else if changed {
            slice.endpoints = Some(kept);
            plan.update.push(slice);
        }
    }
    plan
}

fn endpoints_of(slice: &EndpointSlice) -> &[Endpoint] {
    slice.endpoints.as_deref().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(max: usize) -> Template {
        Template {
            namespace: "ns".into(),
            generate_name: "s-".into(),
            address_type: "IPv4".into(),
            labels: Labels::new(),
            annotations: None,
            owner: OwnerReference { uid: "s".into(), ..OwnerReference::default() },
            max_endpoints: max,
            keep_one: true,
        }
    }

    fn endpoint(ip: &str) -> Endpoint {
        Endpoint { addresses: vec![ip.into()], ..Endpoint::default() }
    }

    fn desired(ips: &[&str]) -> Vec<Desired> {
        let ports = vec![EndpointPort { port: Some(80), ..EndpointPort::default() }];
        if ips.is_empty() {
            return Vec::new();
        }
        vec![Desired { ports, endpoints: ips.iter().map(|ip| endpoint(ip)).collect() }]
    }

    fn stored(mut slice: EndpointSlice, name: &str) -> Arc<EndpointSlice> {
        slice.metadata.name = Some(name.into());
        Arc::new(slice)
    }

    #[test]
    fn slices_fill_stay_and_go() {
        let t = template(2);
        let first = plan(&t, desired(&["1", "2", "3"]), Vec::new());
        assert_eq!(first.create.iter().map(|s| endpoints_of(s).len()).collect::<Vec<_>>(), [2, 1]);
        let existing: Vec<_> =
            first.create.into_iter().enumerate().map(|(i, s)| stored(s, &format!("s{i}"))).collect();
        let same = plan(&t, desired(&["1", "2", "3"]), existing.clone());
        assert!(same.create.is_empty() && same.update.is_empty() && same.delete.is_empty());
        let more = plan(&t, desired(&["1", "2", "3", "4"]), existing.clone());
        assert_eq!((more.create.len(), more.update.len(), more.delete.len()), (0, 1, 0));
        let fewer = plan(&t, desired(&["1", "2"]), existing.clone());
        assert_eq!((fewer.create.len(), fewer.update.len(), fewer.delete.len()), (0, 0, 1));
        let none = plan(&t, desired(&[]), existing);
        assert_eq!((none.create.len(), none.delete.len()), (1, 2), "a placeholder stays");
        let placeholder = none.create.into_iter().map(|s| stored(s, "p")).collect::<Vec<_>>();
        let still = plan(&t, desired(&[]), placeholder.clone());
        assert!(still.create.is_empty() && still.delete.is_empty() && still.update.is_empty());
        let back = plan(&t, desired(&["1"]), placeholder);
        assert_eq!((back.create.len(), back.delete.len()), (1, 1));
    }
}
