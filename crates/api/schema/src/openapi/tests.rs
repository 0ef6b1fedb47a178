//! What kubectl looks for in the documents.

use super::*;

fn references(value: &Value, out: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get("$ref") {
                out.insert(reference.clone());
            }
            map.values().for_each(|value| references(value, out));
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, out)),
        _ => {}
    }
}

#[test]
fn version_three() {
    let document: Value = serde_json::from_slice(&v3("apps/v1", crate::resources()).unwrap()).unwrap();
    let schemas = &document["components"]["schemas"];
    let deployment = &schemas["io.k8s.api.apps.v1.Deployment"];
    let gvk = json!([{"group": "apps", "version": "v1", "kind": "Deployment"}]);
    assert_eq!(deployment["x-kubernetes-group-version-kind"], gvk);
    let containers = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
    assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
    assert_eq!(containers["x-kubernetes-patch-strategy"], "merge");
    assert_eq!(
        schemas["io.k8s.api.apps.v1.DeploymentSpec"]["properties"]["strategy"]["allOf"],
        json!([{"$ref": "#/components/schemas/io.k8s.api.apps.v1.DeploymentStrategy"}])
    );
    let patch = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
    assert_eq!(patch["x-kubernetes-action"], "patch");
    assert_eq!(patch["operationId"], "patchAppsV1NamespacedDeployment");
    assert!(patch["parameters"].as_array().unwrap().iter().any(|one| one["name"] == "fieldValidation"));
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    for reference in found {
        let name = reference.strip_prefix("#/components/schemas/").unwrap();
        assert!(schemas.get(name).is_some(), "{name}");
    }
    assert_eq!(v3("nothing/v1", crate::resources()), None);
}

#[test]
fn every_version_has_a_document() {
    let index: Value = serde_json::from_slice(&v3_index(crate::resources())).unwrap();
    let url = index["paths"]["apis/apps/v1"]["serverRelativeURL"].as_str().unwrap();
    assert!(url.starts_with("/openapi/v3/apis/apps/v1?hash="), "{url}");
    for path in index["paths"].as_object().unwrap().keys() {
        let version = path.strip_prefix("apis/").or_else(|| path.strip_prefix("api/")).unwrap();
        let document: Value = serde_json::from_slice(&v3(version, crate::resources()).unwrap()).unwrap();
        assert!(document["paths"].as_object().unwrap().len() > 1, "{version}");
    }
}

#[test]
fn version_two() {
    let bytes = v2(crate::resources());
    let document: Value = serde_json::from_slice(&bytes).unwrap();
    let pod = &document["definitions"]["io.k8s.api.core.v1.Pod"];
    assert_eq!(pod["properties"]["spec"]["$ref"], "#/definitions/io.k8s.api.core.v1.PodSpec");
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    for reference in found {
        let name = reference.strip_prefix("#/definitions/").unwrap();
        assert!(document["definitions"].get(name).is_some(), "{name}");
    }
    let proto = v2_protobuf(crate::resources());
    assert!(proto.starts_with(b"\x0a\x032.0\x12"));
    let needle = b"io.k8s.api.core.v1.Pod\x12";
    assert!(proto.windows(needle.len()).any(|window| window == needle));
}
