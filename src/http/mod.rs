//! Wire types and the two planes: data (for the shop's backend) and control (for operators).

pub mod control_plane;
pub mod data_plane;
pub mod problem;
pub mod tokens;
pub mod wire;
