//! Which lanes should move, so that every active node has about as many.
//!
//! One node decides, the active one with the lowest number; the giver carries a move out. Nothing moves while the counts
//! differ by at most one, so a balanced cluster is at rest, and after a node has come or gone each lane moves at most
//! once.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::order::Lane;

/// A lane that should move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The lane.
    pub lane: Lane,
    /// Its owner.
    pub from: i16,
    /// The node that should get it.
    pub to: i16,
}

/// The moves that balance the lanes `movable`, given with their owners, over the `active` nodes. Lanes that may not move
/// count, and are left out of `movable`: `fixed` has their owners. A node that leaves is not in `active`: all of its lanes
/// move.
pub fn moves(active: &[i16], movable: &[(Lane, i16)], fixed: &[i16]) -> Vec<Move> {
    let mut lanes: BTreeMap<i16, usize> = active.iter().map(|node| (*node, 0)).collect();
    if lanes.is_empty() {
        return Vec::new();
    }
    for owner in movable.iter().map(|(_, owner)| owner).chain(fixed) {
        if let Some(count) = lanes.get_mut(owner) {
            *count += 1;
        }
    }
    let mut moves = Vec::new();
    let least = |lanes: &BTreeMap<i16, usize>| {
        let by_count = lanes.iter().min_by_key(|(node, count)| (**count, **node));
        by_count.map(|(node, count)| (*node, *count))
    };
    let mut to_give: BTreeMap<i16, Vec<Lane>> = BTreeMap::new();
    for &(lane, from) in movable.iter().rev() {
        if lanes.contains_key(&from) {
            to_give.entry(from).or_default().push(lane);
        }
    }
    // Those of nodes that leave first, because they have to move.
    let leave = movable.iter().filter(|(_, from)| !lanes.contains_key(from));
    for &(lane, from) in &leave.copied().collect::<Vec<_>>() {
        let Some((to, fewest)) = least(&lanes) else {
            break;
        };
        lanes.insert(to, fewest + 1);
        moves.push(Move { lane, from, to });
    }
    // Then from the node with the most to the one with the fewest.
    while let Some((to, fewest)) = least(&lanes) {
        let givers = lanes
            .iter()
            .filter(|(node, _)| to_give.get(node).is_some_and(|lanes| !lanes.is_empty()));
        let most = givers.max_by_key(|(node, count)| (**count, Reverse(**node)));
        let Some((from, count)) = most.map(|(node, count)| (*node, *count)) else {
            break;
        };
        if count <= fewest + 1 {
            break;
        }
        let Some(lane) = to_give.get_mut(&from).and_then(Vec::pop) else {
            break;
        };
        lanes.insert(from, count - 1);
        lanes.insert(to, fewest + 1);
        moves.push(Move { lane, from, to });
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(owners: impl Fn(u8) -> i16) -> Vec<(Lane, i16)> {
        Lane::all().map(|lane| (lane, owners(lane.get()))).collect()
    }

    fn after(mut lanes: Vec<(Lane, i16)>, moves: &[Move]) -> Vec<(Lane, i16)> {
        for step in moves {
            let lane = &mut lanes[usize::from(step.lane.get())];
            assert_eq!(lane.1, step.from);
            lane.1 = step.to;
        }
        lanes
    }

    fn counts(lanes: &[(Lane, i16)]) -> Vec<usize> {
        let mut counts = BTreeMap::new();
        for (_, owner) in lanes {
            *counts.entry(*owner).or_insert(0) += 1;
        }
        let mut counts: Vec<usize> = counts.into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }

    #[test]
    fn a_node_that_joins_gets_its_part_and_then_nothing_moves() {
        let alone = owned(|_| 0);
        let moves_1 = moves(&[0, 1], &alone, &[]);
        let two = after(alone, &moves_1);
        assert_eq!(counts(&two), [32, 32]);
        assert_eq!(moves(&[0, 1], &two, &[]), []);
        let moves_2 = moves(&[0, 1, 4], &two, &[]);
        assert!(moves_2.iter().all(|step| step.to == 4), "{moves_2:?}");
        let three = after(two, &moves_2);
        assert_eq!(counts(&three), [22, 21, 21]);
        assert_eq!(moves(&[0, 1, 4], &three, &[]), []);
    }

    #[test]
    fn every_lane_of_a_node_that_leaves_moves_and_no_other() {
        let three = owned(|lane| i16::from(lane % 3));
        let plan = moves(&[0, 2], &three, &[]);
        assert!(plan.iter().all(|step| step.from == 1), "{plan:?}");
        assert_eq!(counts(&after(three, &plan)), [32, 32]);
    }

    #[test]
    fn a_difference_of_one_is_left_alone() {
        let uneven = owned(|lane| i16::from(lane % 2 == 0 && lane > 0));
        assert_eq!(counts(&uneven), [33, 31]);
        let plan = moves(&[0, 1], &uneven, &[]);
        assert_eq!(plan.len(), 1, "33 and 31 differ by two");
        assert_eq!(moves(&[0, 1], &after(uneven, &plan), &[]), []);
        let third = owned(|lane| i16::from(lane % 3));
        assert_eq!(moves(&[0, 1, 2], &third, &[]), []);
    }

    #[test]
    fn lanes_that_may_not_move_count_where_they_are() {
        let movable: Vec<_> = owned(|_| 0).into_iter().take(4).collect();
        let plan = moves(&[0, 1], &movable, &[1; 60]);
        assert_eq!(plan, [], "node 1 has its part already");
        assert_eq!(moves(&[], &movable, &[]), []);
    }
}
