//! What an applier stated last time and doesn't state any more goes, unless someone else owns it.
//!
//! Upstream: structured-merge-diff/v6/merge/update.go (prune, addBackOwnedItems, addBackDanglingItems).
//! Difference: entries of other API versions count as if their fields had the same names in this one, which
//! keeps rather too much than too little.

use serde_json::Value;

use super::extract::{fields_of, without};
use super::place::Place;
use super::set::FieldSet;

/// `merged` without the fields that only `last`, the applier's former set, accounts for. `owned` is everything
/// that somebody owns now, the applier's new set included.
pub(crate) fn prune(place: Place<'_>, merged: Value, last: &FieldSet, owned: &FieldSet) -> Value {
    let last = last.with_named_members(place);
    let owned = owned.with_named_members(place);
    let mut dropped = last.clone();
    dropped.subtract(&owned);
    if dropped.is_empty() {
        return merged;
    }
    let everything = fields_of(place, &merged).with_named_members(place);
    let rest = without(place, &merged, &last);

    // Back comes what is owned or wasn't touched.
    let mut unowned = everything.clone();
    unowned.subtract(&fields_of(place, &rest).with_named_members(place));
    unowned.subtract(&owned);
    let rest = without(place, &merged, &unowned);

    // Back comes also what nobody owned but happened to lie inside.
    let mut gone = everything;
    gone.subtract(&fields_of(place, &rest).with_named_members(place));
    without(place, &merged, &gone.intersection(&last))
}
