//! Sets of completion indexes as `status.completedIndexes` writes them: `0-2,5`. Upstream counterpart:
//! pkg/controller/job/indexed_job_utils.go (orderedIntervals).
use std::collections::BTreeSet;

/// The most indexes that are read: a Job has at most 100,000 of these.
const MAX_INDEXES: i32 = 100_000;

/// Reads intervals; indexes of `completions` and over are left out, as are ill-formed parts.
pub fn parse(text: &str, completions: i32) -> BTreeSet<i32> {
    let mut indexes = BTreeSet::new();
    for part in text.split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<i32>(), last.parse::<i32>()) else { continue };
        indexes.extend(first.max(0)..=last.min(completions.min(MAX_INDEXES) - 1));
    }
    indexes
}

pub fn format(indexes: &BTreeSet<i32>) -> String {
    let mut parts: Vec<(i32, i32)> = Vec::new();
    for &index in indexes {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == index => *last = index,
            _ => parts.push((index, index)),
        }
    }
    let part = |(first, last): &(i32, i32)| match last - first {
        0 => first.to_string(),
        // two neighbours are listed, as upstream does
        1 => format!("{first},{last}"),
        _ => format!("{first}-{last}"),
    };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    #[test]
    fn intervals() {
        for (text, completions, expected) in
            [("0-2,5", 10, "0-2,5"), ("1,2,3", 10, "1-3"), ("0,1", 9, "0,1"), ("3-9", 5, "3,4"), ("", 3, "")]
        {
            assert_eq!(super::format(&super::parse(text, completions)), expected, "{text}");
        }
    }
}
