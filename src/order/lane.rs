//! Lanes: the 64 parts into which buyers are divided.

use sha2::{Digest, Sha256};

use super::{OrderId, UserId};

/// A part of the buyers. A buyer is in one lane for good, and a lane belongs to one node at a time, so keys, limits
/// and records of a buyer stay in one process. A single node has all lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lane(u8);

impl Lane {
    /// Lane 0.
    pub const FIRST: Lane = Lane(0);

    /// Number of lanes. It is in every order id, so it must never change.
    pub const COUNT: usize = 64;

    /// The lane with this number; `None` unless it is 0 to 63.
    pub fn new(number: u8) -> Option<Self> {
        (usize::from(number) < Self::COUNT).then_some(Lane(number))
    }

    /// The lane of a buyer: the first 6 bits of the SHA-256 of the user id. The hash is cryptographic because user
    /// ids may be chosen by buyers, who could otherwise crowd one lane.
    pub fn of(user: &UserId) -> Self {
        Lane(Sha256::digest(user.as_str().as_bytes())[0] >> 2)
    }

    /// Every lane, ascending.
    pub fn all() -> impl Iterator<Item = Lane> {
        (0..Self::COUNT as u8).map(Lane)
    }

    /// Its number, 0 to 63.
    pub fn get(self) -> u8 {
        self.0
    }

    pub(super) fn from_bits(bits: u64) -> Self {
        Lane((bits & (Self::COUNT as u64 - 1)) as u8)
    }
}

/// Some of the lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneSet(u64);

impl LaneSet {
    /// Every lane.
    pub const ALL: LaneSet = LaneSet(u64::MAX);

    /// The set with these lanes, a bit each.
    pub fn from_bits(bits: u64) -> Self {
        LaneSet(bits)
    }

    /// Its lanes, a bit each.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether it has this lane.
    pub fn has(self, lane: Lane) -> bool {
        self.0 >> lane.0 & 1 == 1
    }

    /// Adds a lane.
    pub fn insert(&mut self, lane: Lane) {
        self.0 |= 1 << lane.0;
    }

    /// Its lanes, ascending.
    pub fn iter(self) -> impl Iterator<Item = Lane> {
        Lane::all().filter(move |lane| self.has(*lane))
    }

    /// Number of its lanes.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl Extend<Lane> for LaneSet {
    fn extend<I: IntoIterator<Item = Lane>>(&mut self, lanes: I) {
        lanes.into_iter().for_each(|lane| self.insert(lane));
    }
}

impl FromIterator<Lane> for LaneSet {
    fn from_iter<I: IntoIterator<Item = Lane>>(lanes: I) -> Self {
        let mut set = LaneSet::default();
        set.extend(lanes);
        set
    }
}

/// The first id that names its lane. Releases before lanes wrote the number of a node in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cutover(pub OrderId);

impl Cutover {
    /// The lane of the order `id`. `None`: the id is older than lanes, and the lane is that of the `user_id` in the
    /// order's row.
    pub fn lane_of(self, id: OrderId) -> Option<Lane> {
        (id >= self.0).then(|| id.lane_bits())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(text: &str) -> UserId {
        UserId::new(text).unwrap()
    }

    #[test]
    fn the_lane_of_a_buyer_never_changes() {
        // The first 6 bits of `printf %s u-42 | sha256sum`, which is 16ec…
        for (text, lane) in LANES {
            assert_eq!(Lane::of(&user(text)).get(), lane, "{text}");
        }
    }

    /// Computed by another program.
    const LANES: [(&str, u8); 3] = [("u-42", 5), ("a", 50), ("buyer-1", 11)];

    #[test]
    fn buyers_are_spread_over_all_lanes() {
        let mut buyers = [0_u32; Lane::COUNT];
        for n in 0..64_000 {
            buyers[usize::from(Lane::of(&user(&format!("u-{n}"))).get())] += 1;
        }
        // 1,000 each on average, with a standard deviation of 31.
        assert!(
            buyers.iter().all(|count| (800..1_200).contains(count)),
            "{buyers:?}"
        );
    }

    #[test]
    fn a_lane_is_0_to_63() {
        assert_eq!(Lane::new(63).map(Lane::get), Some(63));
        assert_eq!(Lane::new(64), None);
        assert_eq!(Lane::all().count(), Lane::COUNT);
    }

    #[test]
    fn a_set_has_what_was_put_into_it() {
        let lane = |number| Lane::new(number).unwrap();
        let set: LaneSet = [63, 0, 5].map(lane).into_iter().collect();
        assert_eq!(set.iter().map(Lane::get).collect::<Vec<_>>(), [0, 5, 63]);
        assert!(set.has(lane(63)) && !set.has(lane(1)));
        assert_eq!((set.len(), LaneSet::ALL.len()), (3, Lane::COUNT));
        assert!(LaneSet::default().is_empty() && !set.is_empty());
    }

    #[test]
    fn ids_below_the_cutover_name_no_lane() {
        let id = |value| OrderId::new(value).unwrap();
        let cutover = Cutover(id(100 << 22));
        assert_eq!(cutover.lane_of(id((99 << 22) | (5 << 16))), None);
        assert_eq!(cutover.lane_of(id(100 << 22)), Lane::new(0));
        assert_eq!(
            cutover.lane_of(id((100 << 22) | (5 << 16) | 7)),
            Lane::new(5)
        );
        assert_eq!(cutover.lane_of(OrderId::MAX), Lane::new(63));
    }
}
