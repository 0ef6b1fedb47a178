//! Files that are pods, and files that are not.
use super::*;

const POD: &str =
    "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  containers: [{name: c, image: i}]\n";

#[test]
fn a_file_becomes_a_pod_of_this_node() {
    let pod = parse(POD.as_bytes(), "/m/web.yaml", "n1").unwrap();
    let spec = pod.spec.clone().unwrap();
    assert_eq!((pod.name_any().as_str(), pod.namespace().as_deref()), ("web-n1", Some("default")));
    assert_eq!(spec.node_name.as_deref(), Some("n1"));
    assert_eq!(spec.restart_policy.as_deref(), Some("Always"), "defaults are there");
    assert_eq!(spec.tolerations.unwrap()[0].effect.as_deref(), Some("NoExecute"));
    assert!(is_static(&pod) && !is_mirror(&pod));
    let uid = pod.uid().unwrap();
    assert_eq!(pod.annotations()[HASH], uid);
    assert_eq!(uid.len(), 32);
    let uid_of =
        |text: &str, path: &str, node: &str| parse(text.as_bytes(), path, node).unwrap().uid().unwrap();
    assert_eq!(uid_of(POD, "/m/web.yaml", "n1"), uid, "the same after a restart");
    assert_eq!(uid_of(&format!("# a comment\n{POD}"), "/m/web.yaml", "n1"), uid);
    assert_ne!(uid_of(&POD.replace("image: i", "image: j"), "/m/web.yaml", "n1"), uid);
    assert_ne!(uid_of(POD, "/m/other.yaml", "n1"), uid);
    assert_ne!(uid_of(POD, "/m/web.yaml", "n2"), uid);
}

#[test]
fn the_hash_is_fnv_1a() {
    assert_eq!(fnv(&[]), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
    assert_eq!(fnv(&[b"foo", b"bar"]), 0x343e_1662_793c_64bf_6f0d_3597_ba44_6f18);
}

#[test]
fn what_is_wrong_is_told_with_the_files_name() {
    let with = |spec: &str| POD.replace("spec:\n", &format!("spec:\n  {spec}\n"));
    let cases = [
        ("{".to_string(), "/m/f: "),
        (POD.replace("Pod", "Service"), "/m/f: expected a v1 Pod, found v1 Service"),
        (POD.replace("name: web", "labels: {}"), "/m/f: invalid pod: name is needed for the pod"),
        (POD.replace("name: c", "name: C"), "/m/f: invalid pod: spec.containers[0].name: Invalid value"),
        (POD.replace("[{name: c, image: i}]", "7"), "/m/f: invalid pod: "),
        (with("serviceAccountName: a"), "/m/f: static pods may not reference serviceaccounts"),
        (with("imagePullSecrets: [{name: a}]"), "/m/f: static pods may not reference secrets"),
        (
            with("volumes: [{name: v, configMap: {name: a}}]"),
            "/m/f: static pods may not reference configmaps (via configmap volumes)",
        ),
        (
            with("volumes: [{name: v, projected: {sources: [{configMap: {name: a}}]}}]"),
            "/m/f: static pods may not reference configmaps (via projected volumes)",
        ),
    ];
    for (text, want) in cases {
        let error = parse(text.as_bytes(), "/m/f", "n").unwrap_err().to_string();
        assert!(error.starts_with(want), "{error}\nwanted: {want}");
    }
}

#[test]
fn one_bad_file_leaves_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("a.yaml", POD);
    write("b.yaml", POD);
    write(
        "c.json",
        r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"j"},"spec":{"containers":[{"name":"c","image":"i"}]}}"#,
    );
    write(".hidden", "{");
    write("bad", "{");
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    let found = read_folder(dir.path(), "n");
    let names: Vec<&str> = found.pods.keys().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["j-n", "web-n"]);
    let errors: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
    for (file, error) in ["b.yaml", "bad", "folder"].iter().zip(&errors) {
        assert!(error.starts_with(&dir.path().join(file).display().to_string()), "{error}");
    }
    assert_eq!(errors.len(), 3);
}

#[tokio::test]
async fn changes_of_the_folder_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("made/by/us");
    let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(follow(folder.clone(), move || sender.send(()).unwrap_or_default()));
    let mut wait = async |what: &str| {
        assert!(tokio::time::timeout(Duration::from_secs(5), told.recv()).await.is_ok(), "{what}");
    };
    wait("the start").await;
    std::fs::write(folder.join("a"), "x").unwrap();
    wait("a new file").await;
    std::fs::remove_file(folder.join("a")).unwrap();
    wait("a file that went").await;
    std::fs::remove_dir(&folder).unwrap();
    wait("the folder went").await;
    wait("the folder is there again").await;
    std::fs::write(folder.join("b"), "x").unwrap();
    wait("a file in the new folder").await;
}
