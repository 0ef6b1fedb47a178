//! The core group, whose name in the API is "".
pub mod v1;
