//! What the kinds and fields of the API mean, for OpenAPI and `kubectl explain`.
//!
//! The texts are k8s-openapi's doc comments, compressed by build.rs. They are inflated when a document is asked
//! for and dropped with it: no process carries them along.

use std::collections::HashMap;
use std::io::Read as _;
use std::ops::Range;

static COMPRESSED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptions.z"));

pub struct Descriptions {
    text: String,
    /// By type: where its lines stand.
    types: HashMap<String, Range<usize>>,
}

impl Descriptions {
    pub fn load() -> Descriptions {
        let mut text = String::new();
        // The input is our own; if it were broken, documents would go without descriptions.
        if flate2::read::DeflateDecoder::new(COMPRESSED).read_to_string(&mut text).is_err() {
            text.clear();
        }
        let mut types = HashMap::new();
        let mut current: Option<(&str, usize)> = None;
        let mut at = 0;
        for line in text.split_inclusive('\n') {
            if !line.starts_with(' ') && line.len() > 1 {
                if let Some((name, from)) = current {
                    types.insert(name.to_owned(), from..at);
                }
                current = Some((line.trim_end(), at + line.len()));
            }
            at += line.len();
        }
        if let Some((name, from)) = current {
            types.insert(name.to_owned(), from..at);
        }
        Descriptions { text, types }
    }

    /// Of a field, or of the type itself where `field` is empty.
    pub fn get(&self, ty: &str, field: &str) -> Option<String> {
        let lines = &self.text[self.types.get(ty)?.clone()];
        let line = lines.lines().find_map(|line| {
            let (name, text) = line.strip_prefix(' ')?.split_once('\t')?;
            (name == field).then_some(text)
        })?;
        Some(line.replace("\\n", "\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_there() {
        let texts = Descriptions::load();
        let text = |ty: &str, field: &str| texts.get(ty, field).unwrap_or_default();
        assert!(text("io.k8s.api.core.v1.PodSpec", "").contains("PodSpec is a description of a pod"));
        assert!(text("io.k8s.api.core.v1.PodSpec", "dnsPolicy").contains("ClusterFirst"));
        assert!(text("io.k8s.api.core.v1.ContainerPort", "hostIP").contains("host IP"));
        assert_eq!(texts.get("io.k8s.api.core.v1.PodSpec", "nothing"), None);
    }
}
