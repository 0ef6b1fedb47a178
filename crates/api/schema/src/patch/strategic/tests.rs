//! Cases after upstream's patch_test.go, on real types.

use serde_json::json;

use super::*;
use crate::types::by_gvk;

fn pod(doc: Value, patch: Value) -> Result<Value, PatchError> {
    strategic(by_gvk("", "v1", "Pod").unwrap(), doc, patch)
}

#[track_caller]
fn check(doc: Value, patch: Value, want: Value) {
    assert_eq!(pod(doc.clone(), patch.clone()).unwrap(), want, "{doc} {patch}");
}

fn names(object: &Value) -> Vec<&str> {
    object["spec"]["containers"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect()
}

#[test]
fn objects() {
    check(
        json!({"metadata": {"labels": {"a": "1", "b": "2"}}}),
        json!({"metadata": {"labels": {"a": null, "c": "3"}}}),
        json!({"metadata": {"labels": {"b": "2", "c": "3"}}}),
    );
    check(
        json!({"metadata": {"labels": {"a": "1"}}}),
        json!({"metadata": {"labels": {"$patch": "replace", "c": "3"}}}),
        json!({"metadata": {"labels": {"c": "3"}}}),
    );
    check(
        json!({"metadata": {"labels": {"a": "1"}}}),
        json!({"metadata": {"labels": {"$patch": "delete"}}}),
        json!({"metadata": {"labels": {}}}),
    );
    check(
        json!({"spec": {}}),
        json!({"spec": {"affinity": {"nodeAffinity": null, "podAffinity": {}}, "securityContext": {"$patch": "delete"}}}),
        json!({"spec": {"affinity": {"podAffinity": {}}}}),
    );
}

#[test]
fn lists_by_key() {
    let live = json!({"spec": {"containers": [
        {"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b", "image": "1"}]}});
    check(
        live.clone(),
        json!({"spec": {"containers": [{"name": "a", "image": "2", "env": [{"name": "Y", "value": "2"}]}]}}),
        json!({"spec": {"containers": [
            {"name": "a", "image": "2", "env": [{"name": "Y", "value": "2"}, {"name": "X", "value": "1"}]},
            {"name": "b", "image": "1"}]}}),
    );
    check(
        live.clone(),
        json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}]}}),
        json!({"spec": {"containers": [{"name": "b", "image": "1"}]}}),
    );
    check(
        live.clone(),
        json!({"spec": {"containers": [{"name": "z"}, {"$patch": "replace"}]}}),
        json!({"spec": {"containers": [{"name": "z"}]}}),
    );
    let ordered = |order: Value| {
        let order: Vec<_> = order.as_array().unwrap().iter().map(|name| json!({"name": name})).collect();
        let patch = json!({"spec": {"$setElementOrder/containers": order, "containers": [{"name": "n"}]}});
        let patched = pod(live.clone(), patch).unwrap();
        names(&patched).into_iter().map(String::from).collect::<Vec<_>>()
    };
    assert_eq!(ordered(json!(["b", "n", "a"])), ["b", "n", "a"]);
    assert_eq!(ordered(json!(["n", "b"])), ["n", "a", "b"], "a stays before b, as on the server");
}

#[test]
fn lists_of_scalars_and_atomic_lists() {
    let live = json!({"metadata": {"finalizers": ["a", "b"]}, "spec": {"containers": [{"name": "c", "args": ["1", "2"]}]}});
    let patched = pod(
        live,
        json!({
        "metadata": {"finalizers": ["c", "a"], "$deleteFromPrimitiveList/finalizers": ["b"],
            "$setElementOrder/finalizers": ["c", "a"]},
        "spec": {"containers": [{"name": "c", "args": ["3"]}]}}),
    );
    let patched = patched.unwrap();
    assert_eq!(patched["metadata"], json!({"finalizers": ["c", "a"]}));
    assert_eq!(patched["spec"]["containers"][0]["args"], json!(["3"]), "no merge strategy: replaced");
}

#[test]
fn retained_keys() {
    let live = json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}});
    check(
        live.clone(),
        json!({"spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}]}}),
        json!({"spec": {"volumes": [{"name": "v", "hostPath": {"path": "/x"}}]}}),
    );
    let patch =
        json!({"spec": {"volumes": [{"name": "v", "$retainKeys": ["name"], "hostPath": {"path": "/x"}}]}});
    assert_eq!(pod(live, patch), Err(PatchError::Malformed(BAD_RETAIN_KEYS.into())));
}

#[test]
fn errors() {
    let live = json!({"metadata": {"finalizers": ["a"]}, "spec": {"x": {}, "containers": [{"name": "a"}]}});
    for (patch, want) in [
        (json!({"spec": {"x": {}}}), "unable to find api field in struct PodSpec for the json field \"x\""),
        (
            json!({"spec": {"containers": [{"image": "x"}]}}),
            "map: map[image:x] does not contain declared merge key: name",
        ),
        (json!({"spec": {"containers": ["x"]}}), "list element types are not identical: [[map[name:a]] [x]]"),
        (json!({"spec": {"$patch": "bad"}}), "unknown patch type: bad in map: map[$patch:bad]"),
        (
            json!({"spec": {"$setElementOrder/containers": "x"}}),
            "expected a []interface {}, but received a string",
        ),
        (
            json!({"spec": {"$setElementOrder/containers": [{"name": "a"}], "containers": [{"name": "b"}]}}),
            "The order in patch list:\n[map[name:b]]\n doesn't match $setElementOrder list:\n[map[name:a]]\n",
        ),
    ] {
        assert_eq!(pod(live.clone(), patch).unwrap_err().to_string(), want);
    }
    assert!(matches!(pod(live.clone(), json!([])), Err(PatchError::Malformed(_))));
    let nested = json!({"metadata": {"finalizers": [["a"]]}});
    assert!(pod(live, nested).is_err());
}

#[test]
fn replace_strategy() {
    let ty = by_gvk("policy", "v1", "PodDisruptionBudget").unwrap();
    let live = json!({"spec": {"selector": {"matchLabels": {"a": "1"}}}});
    let patch = json!({"spec": {"selector": {"matchLabels": {"b": "2"}}}});
    assert_eq!(strategic(ty, live, patch.clone()).unwrap(), patch);
}
