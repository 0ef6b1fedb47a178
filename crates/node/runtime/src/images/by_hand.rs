//! What a node's owner does with its images by hand: gives them names, throws them away, takes them out.
//!
//! Upstream counterpart: `ctr images`. Nothing of it is part of the CRI.
use std::path::PathBuf;

use super::*;

/// Where the parts of an image lie on this node.
pub struct ImageFiles {
    pub names: Vec<String>,
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    /// Unpacked, lowest first.
    pub layers: Vec<PathBuf>,
}

impl Images {
    /// Gives an image another name, which no other image has then.
    pub async fn tag(&self, image: &str, name: &str) -> Result<(), RuntimeError> {
        let wrong = |source: ImageError| RuntimeError::Image { image: name.to_string(), source };
        let reference = Reference::parse(name).map_err(wrong)?;
        if reference.digest.is_some() {
            return Err(wrong(ImageError::InvalidName("a digest can't be given as a name".into())));
        }
        let _one = self.pulling.lock().await;
        let found =
            self.find(image).ok_or_else(|| RuntimeError::NotFound { what: format!("image {image}") })?;
        let text = reference.to_string();
        let mut table = self.table.lock();
        table.foreign.retain(|f| f.name != text);
        table.keep_as(&found, &reference);
        for record in &mut table.images {
            record.tags.retain(|t| *t != text);
            if record.id == found.id {
                record.tags.push(text.clone());
            }
        }
        self.save(&table)
    }

    /// Removes what none of `used` (ids) is: images without a name, or `all`. What the archives on this
    /// node hold stays. What was removed is returned.
    pub async fn prune(
        &self,
        all: bool,
        used: &[String],
        used_layers: &[String],
    ) -> Result<Vec<ImageRecord>, RuntimeError> {
        let _one = self.pulling.lock().await;
        let gone = {
            let kept = [used, self.pinned.lock().as_slice()].concat();
            let mut table = self.table.lock();
            let goes = |i: &ImageRecord| (all || i.tags.is_empty()) && !kept.contains(&i.id);
            let (gone, kept): (Vec<_>, Vec<_>) =
                std::mem::take(&mut table.images).into_iter().partition(goes);
            table.images = kept;
            self.save(&table)?;
            gone
        };
        self.collect(used_layers);
        Ok(gone)
    }

    pub fn files(&self, image: &str) -> Option<ImageFiles> {
        let record = self.find(image)?;
        Some(ImageFiles {
            manifest: self.content.read(&record.manifest)?,
            config: self.content.read(&record.id)?,
            layers: record.layers.iter().map(|l| self.content.layers_folder().join(l)).collect(),
            names: record.tags,
        })
    }
}
