//! The JSON of lanes.

use serde::Serialize;

/// Every lane.
#[derive(Debug, Serialize)]
pub struct LanesView {
    /// By number.
    pub lanes: Vec<LaneView>,
}

/// A lane of buyers.
#[derive(Debug, Serialize)]
pub struct LaneView {
    /// Its number: the first 6 bits of the SHA-256 of the `user_id`s in it.
    pub lane: u8,
    /// The node that owns it; null while it is open nowhere.
    pub node: Option<u8>,
    /// The address of that node's data plane; null while it cannot be reached from here.
    pub data_plane: Option<String>,
}
