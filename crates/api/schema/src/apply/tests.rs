//! Cases after structured-merge-diff's merge tests and managedfields' own, on real types.

use serde_json::json;

use super::*;
use crate::types::by_gvk;

static NOTHING: Reset = Reset::Fields(FieldSet { nodes: Vec::new() });

fn ty(kind: &str) -> &'static Type {
    match kind {
        "Deployment" => by_gvk("apps", "v1", kind).unwrap(),
        _ => by_gvk("", "v1", kind).unwrap(),
    }
}

fn writer(manager: &str, second: i64) -> Writer<'_> {
    let now = Timestamp::from_second(second).unwrap();
    Writer { manager, subresource: "", api_version: "v1", now, reset: &NOTHING }
}

fn applied(live: Option<&Value>, config: &Value, manager: &str, second: i64) -> Result<Applied, ApplyError> {
    let kind = config["kind"].as_str().unwrap();
    apply(ty(kind), live, config, false, &writer(manager, second))
}

fn updated(live: &Value, mut new: Value, manager: &str, second: i64) -> Value {
    track_update(ty("Pod"), live, &mut new, &writer(manager, second)).unwrap();
    new
}

fn entry<'a>(object: &'a Value, manager: &str) -> Option<&'a Value> {
    object["metadata"]["managedFields"].as_array()?.iter().find(|entry| entry["manager"] == manager)
}

#[track_caller]
fn fields<'a>(object: &'a Value, manager: &str) -> &'a Value {
    &entry(object, manager).unwrap_or_else(|| panic!("no entry of {manager} in {object}"))["fieldsV1"]
}

fn pod(spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec})
}

fn map(data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": data})
}

#[test]
fn create_owns_what_it_states() {
    let mut new = pod(json!({"containers": [{"name": "a", "image": "i", "ports": [{"containerPort": 80}],
        "args": ["x"]}], "securityContext": {}}));
    new["metadata"]["labels"] = json!({"app": "x"});
    new["metadata"]["finalizers"] = json!(["f/g"]);
    let new = updated(&json!({}), new, "me", 5);
    let want = json!([{"apiVersion": "v1", "fieldsType": "FieldsV1", "manager": "me", "operation": "Update",
        "time": "1970-01-01T00:00:05Z", "fieldsV1": {
            "f:metadata": {"f:labels": {".": {}, "f:app": {}}, "f:finalizers": {".": {}, "v:\"f/g\"": {}}},
            // No "." for containers: Go writes the list even when there is none.
            "f:spec": {"f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:image": {}, "f:args": {},
                "f:ports": {".": {}, "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}},
                "f:securityContext": {}}}}]);
    assert_eq!(new["metadata"]["managedFields"], want);
}

fn stored(mut object: Value) -> Value {
    object["metadata"]["uid"] = json!("u");
    object
}

#[test]
fn update_takes_over_and_drops() {
    let live = stored(updated(
        &json!({}),
        pod(json!({"hostname": "h", "nodeName": "n", "schedulerName": "s"})),
        "one",
        1,
    ));
    let mut new = live.clone();
    new["spec"]["hostname"] = json!("other");
    new["spec"].as_object_mut().unwrap().remove("nodeName");
    let new = updated(&live, new, "two", 2);
    assert_eq!(fields(&new, "two"), &json!({"f:spec": {"f:hostname": {}}}));
    assert_eq!(entry(&new, "one").unwrap()["fieldsV1"], json!({"f:spec": {"f:schedulerName": {}}}));
    assert_eq!(entry(&new, "one").unwrap()["time"], "1970-01-01T00:00:01Z", "only the writer's time moves");

    let mut same = new.clone();
    same["metadata"]["resourceVersion"] = json!("99");
    let same = updated(&new, same, "three", 3);
    assert_eq!(same["metadata"]["managedFields"], new["metadata"]["managedFields"], "nothing changed");
}

#[test]
fn updates_without_tracking() {
    let live = stored(updated(&json!({}), pod(json!({"hostname": "h"})), "one", 1));
    for reset in [json!([]), json!([{}])] {
        let mut new = live.clone();
        new["metadata"]["managedFields"] = reset;
        assert_eq!(updated(&live, new, "two", 2)["metadata"].get("managedFields"), None);
    }
    let mut ignorant = live.clone();
    ignorant["metadata"].as_object_mut().unwrap().remove("managedFields");
    assert_eq!(updated(&live, ignorant.clone(), "two", 2), live, "kept for clients that don't know them");
    ignorant["spec"]["hostname"] = json!("x");
    let untracked = stored(pod(json!({"hostname": "h"})));
    assert_eq!(updated(&untracked, ignorant, "two", 2)["metadata"].get("managedFields"), None);
    let mut invalid = live.clone();
    invalid["metadata"]["managedFields"] = json!([{"operation": "Bad"}]);
    assert_eq!(updated(&live, invalid, "two", 2), live);
    // Through a subresource what the client sends doesn't count.
    let mut sneaky = live.clone();
    sneaky["metadata"]["managedFields"] = json!([]);
    let status = Writer { subresource: "status", ..writer("two", 2) };
    track_update(ty("Pod"), &live, &mut sneaky, &status).unwrap();
    assert_eq!(sneaky, live);
}

#[test]
fn subresources_and_reset_fields() {
    let live = stored(updated(&json!({}), pod(json!({"hostname": "h"})), "one", 1));
    let mut new = live.clone();
    new["status"] = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
    let mut own = new.clone();
    let status_reset = Reset::fields(["status"]);
    track_update(ty("Pod"), &live, &mut own, &Writer { reset: &status_reset, ..writer("x", 2) }).unwrap();
    assert_eq!(own["metadata"], live["metadata"], "status isn't the main resource's");
    let status = Writer { subresource: "status", ..writer("kubelet", 2) };
    track_update(ty("Pod"), &live, &mut new, &status).unwrap();
    assert_eq!(entry(&new, "kubelet").unwrap()["subresource"], "status");
    assert_eq!(
        fields(&new, "kubelet"),
        &json!({"f:status": {"f:phase": {},
            "f:conditions": {".": {}, "k:{\"type\":\"Ready\"}": {".": {}, "f:type": {}, "f:status": {}}}}})
    );
}

#[test]
fn apply_creates_updates_and_prunes() {
    let first = applied(None, &map(json!({"a": "1", "b": "2"})), "ctl", 1).unwrap();
    assert!(first.changed);
    assert_eq!(fields(&first.object, "ctl"), &json!({"f:data": {"f:a": {}, "f:b": {}}}));
    let live = stored(first.object);

    let again = applied(Some(&live), &map(json!({"a": "1", "b": "2"})), "ctl", 9).unwrap();
    assert_eq!(again, Applied { object: live.clone(), changed: false }, "no new time either");

    let less = applied(Some(&live), &map(json!({"a": "3"})), "ctl", 2).unwrap().object;
    assert_eq!(less["data"], json!({"a": "3"}));
    assert_eq!(entry(&less, "ctl").unwrap()["time"], "1970-01-01T00:00:02Z");

    // Both own b now: it stays when one lets go of it.
    let shared = applied(Some(&live), &map(json!({"b": "2"})), "other", 3).unwrap();
    assert!(shared.changed);
    assert_eq!(
        entry(&shared.object, "other").unwrap().get("time"),
        None,
        "as upstream: the object is the same"
    );
    let less = applied(Some(&shared.object), &map(json!({"a": "1"})), "ctl", 4).unwrap().object;
    assert_eq!(less["data"], json!({"a": "1", "b": "2"}));
}

#[test]
fn conflicts() {
    let live = stored(applied(None, &map(json!({"a": "1", "b": "2"})), "ctl", 1).unwrap().object);
    let theirs = map(json!({"a": "x", "c": "3"}));
    let error = applied(Some(&live), &theirs, "other", 2).unwrap_err();
    assert_eq!(error.to_string(), "Apply failed with 1 conflict: conflict with \"ctl\": .data.a");
    let ApplyError::Conflict(found) = error else { panic!() };
    assert_eq!((found[0].message(), found[0].field()), ("conflict with \"ctl\"".into(), ".data.a".into()));

    let forced = apply(ty("ConfigMap"), Some(&live), &theirs, true, &writer("other", 2)).unwrap().object;
    assert_eq!(fields(&forced, "ctl"), &json!({"f:data": {"f:b": {}}}));
    assert_eq!(fields(&forced, "other"), &json!({"f:data": {"f:a": {}, "f:c": {}}}));

    let live =
        stored(updated(&json!({}), pod(json!({"hostname": "h", "nodeName": "n"})), "kubectl-create", 1));
    let error =
        applied(Some(&live), &pod(json!({"hostname": "x", "nodeName": "y"})), "other", 2).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Apply failed with 2 conflicts: conflicts with \"kubectl-create\" using v1:\n- .spec.hostname\n- .spec.nodeName"
    );
}

#[test]
fn keyed_lists_merge_item_by_item() {
    let one = pod(json!({"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]}));
    let live = stored(applied(None, &one, "one", 1).unwrap().object);
    let two = pod(json!({"containers": [{"name": "z", "image": "9"}, {"name": "a", "tty": true}]}));
    let both = applied(Some(&live), &two, "two", 2).unwrap().object;
    assert_eq!(
        both["spec"]["containers"],
        json!([{"name": "z", "image": "9"}, {"name": "a", "image": "1", "tty": true}, {"name": "b", "image": "1"}])
    );
    assert_eq!(
        fields(&both, "two"),
        &json!({"f:spec": {"f:containers": {"k:{\"name\":\"z\"}": {".": {}, "f:name": {}, "f:image": {}},
            "k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:tty": {}}}}})
    );
    let gone =
        applied(Some(&both), &pod(json!({"containers": [{"name": "z", "image": "9"}]})), "two", 3).unwrap();
    assert_eq!(
        gone.object["spec"]["containers"],
        json!([{"name": "z", "image": "9"}, {"name": "a", "image": "1"}, {"name": "b", "image": "1"}])
    );
    // What defaulting or others put into an item goes with the item.
    let mut live = gone.object;
    live["spec"]["containers"][2]["imagePullPolicy"] = json!("Always");
    let gone =
        applied(Some(&live), &pod(json!({"containers": [{"name": "a", "image": "1"}]})), "one", 4).unwrap();
    let names: Vec<_> =
        gone.object["spec"]["containers"].as_array().unwrap().iter().map(|c| &c["name"]).collect();
    assert_eq!(names, ["z", "a"]);
}

#[test]
fn atomic_values_are_owned_whole() {
    let live = stored(
        applied(None, &pod(json!({"nodeSelector": {"a": "1"}, "hostname": "h"})), "one", 1).unwrap().object,
    );
    assert_eq!(fields(&live, "one"), &json!({"f:spec": {"f:nodeSelector": {}, "f:hostname": {}}}));
    let error = applied(Some(&live), &pod(json!({"nodeSelector": {"b": "1"}})), "two", 2).unwrap_err();
    assert_eq!(error.to_string(), "Apply failed with 1 conflict: conflict with \"one\": .spec.nodeSelector");
}

#[test]
fn configurations_that_do_not_fit() {
    for (config, want) in [
        (
            pod(json!({"containers": [{"name": "a"}, {"name": "a"}]})),
            "failed to create typed patch object (/p; /v1, Kind=Pod): .spec.containers: duplicate entries for key [name=\"a\"]",
        ),
        (
            pod(
                json!({"containers": [{"name": "a", "ports": [{"containerPort": 1}, {"containerPort": 1, "protocol": "TCP"}]}]}),
            ),
            "failed to create typed patch object (/p; /v1, Kind=Pod): .spec.containers[name=\"a\"].ports: duplicate entries for key [containerPort=1,protocol=\"TCP\"]",
        ),
        (
            pod(json!({"nope": 1, "hostname": "x"})),
            "failed to create typed patch object (/p; /v1, Kind=Pod): .spec.nope: field not declared in schema",
        ),
        (
            pod(json!({"hostname": 1, "priority": "x"})),
            "failed to create typed patch object (/p; /v1, Kind=Pod): errors:\n  .spec.hostname: expected string, got &value.valueUnstructured{Value:1}\n  .spec.priority: expected numeric (int or float), got string",
        ),
        (
            pod(json!({"containers": {"name": "a"}})),
            "failed to create typed patch object (/p; /v1, Kind=Pod): .spec.containers: expected list, got &{map[name:a]}",
        ),
    ] {
        assert_eq!(applied(None, &config, "m", 1), Err(ApplyError::Internal(want.to_string())));
    }
    let mut config = map(json!({}));
    config["metadata"]["managedFields"] = json!([]);
    assert_eq!(
        applied(None, &config, "m", 1),
        Err(ApplyError::BadRequest("metadata.managedFields must be nil".into()))
    );
    let other = apply(ty("Deployment"), None, &map(json!({})), false, &writer("m", 1));
    assert_eq!(other, Err(ApplyError::BadRequest("invalid object type: /v1, Kind=ConfigMap".into())));
}

#[test]
fn apply_to_what_nobody_tracked() {
    let live = stored(map(json!({"a": "1"})));
    let error = applied(Some(&live), &map(json!({"a": "2"})), "m", 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Apply failed with 1 conflict: conflict with \"before-first-apply\" using v1: .data.a"
    );
    let fine = applied(Some(&live), &map(json!({"a": "1", "b": "2"})), "m", 1).unwrap().object;
    assert_eq!(fields(&fine, "before-first-apply"), &json!({"f:data": {".": {}, "f:a": {}}}));
}

#[test]
fn kubectl_takes_over_from_client_side_apply() {
    let mut live = map(json!({"a": "1", "b": "changed by hand"}));
    let last = map(json!({"a": "1", "b": "2"})).to_string();
    live["metadata"]["annotations"] = json!({LAST_APPLIED_ANNOTATION: last});
    let mut tracked = live.clone();
    track_update(ty("ConfigMap"), &json!({}), &mut tracked, &writer("kubectl-client-side-apply", 1)).unwrap();
    let live = stored(tracked);

    let config = map(json!({"a": "<new>"}));
    assert!(matches!(applied(Some(&live), &config, "someone", 2), Err(ApplyError::Conflict(_))));
    let taken = applied(Some(&live), &config, "kubectl", 2).unwrap().object;
    assert_eq!(taken["data"]["a"], "<new>");
    assert_eq!(
        taken["metadata"]["annotations"][LAST_APPLIED_ANNOTATION],
        "{\"apiVersion\":\"v1\",\"data\":{\"a\":\"\\u003cnew\\u003e\"},\"kind\":\"ConfigMap\",\"metadata\":{\"name\":\"c\"}}\n"
    );
    let error = applied(Some(&live), &map(json!({"a": "x", "b": "y"})), "kubectl", 2).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Apply failed with 1 conflict: conflict with \"kubectl-client-side-apply\" using v1: .data.b"
    );
}

#[test]
fn entries_of_other_versions_stay() {
    let mut live = stored(applied(None, &map(json!({"a": "1"})), "ctl", 1).unwrap().object);
    let foreign = json!({"apiVersion": "v0", "fieldsType": "FieldsV1", "fieldsV1": {"f:data": {"f:a": {}}},
        "manager": "old", "operation": "Update"});
    live["metadata"]["managedFields"].as_array_mut().unwrap().push(foreign.clone());
    let new = apply(ty("ConfigMap"), Some(&live), &map(json!({"a": "2"})), false, &writer("ctl", 2)).unwrap();
    assert_eq!(entry(&new.object, "old"), Some(&foreign));
}

#[test]
fn old_updates_are_folded() {
    let mut live = stored(updated(&json!({}), pod(json!({"hostname": "0"})), "m00", 0));
    for at in 1..14 {
        let mut new = live.clone();
        new["metadata"]["labels"][format!("l{at}")] = json!("x");
        live = updated(&live, new, &format!("m{at:02}"), at);
    }
    let entries = live["metadata"]["managedFields"].as_array().unwrap();
    assert_eq!(entries.len(), MAX_UPDATE_ENTRIES);
    let bucket = entry(&live, OLD_UPDATES_MANAGER).unwrap();
    assert_eq!(bucket["time"], "1970-01-01T00:00:04Z");
    assert_eq!(bucket["fieldsV1"]["f:metadata"]["f:labels"].as_object().unwrap().len(), 5);
    assert_eq!(entries[0]["manager"], OLD_UPDATES_MANAGER, "sorted by time");
}

#[test]
fn timestamps_alone_are_no_change() {
    let old = updated(&json!({}), pod(json!({"hostname": "h"})), "one", 1);
    let mut new = old.clone();
    new["metadata"]["managedFields"][0]["time"] = json!("1970-01-01T00:00:09Z");
    let mut changed = new.clone();
    revert_timestamps(&mut new, &old);
    assert_eq!(new, old);
    changed["spec"]["hostname"] = json!("x");
    let before = changed.clone();
    revert_timestamps(&mut changed, &old);
    assert_eq!(changed, before);
}

#[test]
fn duplicates_that_updates_leave() {
    let list = |values: &[&str]| {
        let env: Vec<_> = values.iter().map(|value| json!({"name": "X", "value": value})).collect();
        pod(json!({"containers": [{"name": "a", "env": env}]}))
    };
    let live = stored(updated(&json!({}), list(&["1", "2"]), "one", 1));
    let env = |object: &Value| fields_at(object, "one")["f:env"].clone();
    assert_eq!(env(&live), json!({".": {}, "k:{\"name\":\"X\"}": {}}));
    let mut new = list(&["1"]);
    new["metadata"] = live["metadata"].clone();
    assert_eq!(
        env(&updated(&live, new, "one", 2)),
        json!({".": {}, "k:{\"name\":\"X\"}": {".": {}, "f:name": {}, "f:value": {}}})
    );
}

fn fields_at(object: &Value, manager: &str) -> Value {
    fields(object, manager)["f:spec"]["f:containers"]["k:{\"name\":\"a\"}"].clone()
}

#[test]
fn names_of_managers() {
    assert_eq!(manager_name("given", "kubectl/v1"), "given");
    assert_eq!(manager_name("", "kubectl/v1.36 (linux)"), "kubectl");
    assert_eq!(manager_name("", "a\u{7}b\u{200b}c"), "abc");
    assert_eq!(manager_name("", &"é".repeat(100)).len(), MAX_MANAGER_LEN_BYTES);
}
