//! The rules of the protocol, each with the defect that breaks it.

/// A rule that a run leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    MarkerAfterReading,
    EpochNotRaised,
    CounterNotLookedAtAgain,
    OwnGapNotCounted,
    SharesTakenAtOnce,
    OpenBeforeKeys,
    OpenBeforeAnswersRanOut,
    ContactDatedAtReply,
    PositionNotChecked,
    NewNumberAfterUnknown,
    ReplayWithoutLooking,
    IdsFromOwnClock,
    BlockedLaneOpened,
    HandOverWithoutDraining,
    HandOverGuessed,
    RowWithoutFence,
    LentBeforeCommit,
    ReturnedAfterCommit,
    UnknownLoanAssumed,
    SoldOutByPoolAlone,
    PoolLendsPastWants,
    FallWithoutRecall,
    KeylessRepeatedWithoutKey,
    RightsKeptAfterFailover,
    LowerEpochWins,
    PlaceKeptAfterFailover,
}

use Defect::*;

/// Each defect with the sentence of the protocol that it breaks, and a run that shows it: whether failovers lose commits
/// in it, and its seed.
pub const PLANTED: &[(Defect, &str, bool, u64)] = &[
    (
        MarkerAfterReading,
        "the marker stands in a dead node's log before the log is read",
        false,
        304,
    ),
    (
        EpochNotRaised,
        "a takeover raises the epoch, so that the dead node can commit nothing",
        false,
        0,
    ),
    (
        CounterNotLookedAtAgain,
        "the renewal counter is looked at again under the lock",
        false,
        0,
    ),
    (
        OwnGapNotCounted,
        "a lease is counted since the observer's own last gap in committed renewals",
        false,
        7,
    ),
    (
        SharesTakenAtOnce,
        "shares stay the dead node's until its log is replayed",
        false,
        28,
    ),
    (
        OpenBeforeKeys,
        "keys and limits are loaded before a lane opens",
        false,
        0,
    ),
    (
        OpenBeforeAnswersRanOut,
        "a successor opens no earlier than the answer lease after its marker is durable",
        false,
        1212,
    ),
    (
        ContactDatedAtReply,
        "a contact is as old as its request, not as its reply",
        false,
        321,
    ),
    (
        PositionNotChecked,
        "an append counts only if its position shows that no marker precedes it",
        false,
        58,
    ),
    (
        NewNumberAfterUnknown,
        "after an unknown append no newer number is used",
        false,
        0,
    ),
    (
        ReplayWithoutLooking,
        "replay writes only the ids that are not there already",
        false,
        13,
    ),
    (
        IdsFromOwnClock,
        "a new owner raises its id clock above the lane's high-water mark",
        false,
        3,
    ),
    (
        BlockedLaneOpened,
        "who inherits a blocked lane replays that log first",
        false,
        109,
    ),
    (
        HandOverWithoutDraining,
        "a lane with orders on their way does not move",
        false,
        0,
    ),
    (
        HandOverGuessed,
        "a hand-over of unknown outcome is looked up",
        false,
        40,
    ),
    (
        RowWithoutFence,
        "every transaction checks its node's epoch",
        false,
        240,
    ),
    (
        LentBeforeCommit,
        "lent units are sold after the loan is committed",
        false,
        1,
    ),
    (
        ReturnedAfterCommit,
        "units leave memory before the row gives them back",
        false,
        0,
    ),
    (
        UnknownLoanAssumed,
        "after an unknown COMMIT memory follows the row",
        false,
        1,
    ),
    (
        SoldOutByPoolAlone,
        "sold out is said only if pool and shares had nothing",
        false,
        1,
    ),
    (
        PoolLendsPastWants,
        "until a want is served the pool lends to nobody else",
        false,
        3,
    ),
    (
        FallWithoutRecall,
        "a total falls after free units were recalled",
        false,
        0,
    ),
    (
        KeylessRepeatedWithoutKey,
        "a keyless order that is passed on gets a key",
        false,
        3,
    ),
    (
        RightsKeptAfterFailover,
        "after a failover nobody lends, moves or takes over until all have re-asserted",
        false,
        78,
    ),
    (
        LowerEpochWins,
        "after a failover the higher lane epoch wins",
        true,
        10,
    ),
    (
        PlaceKeptAfterFailover,
        "after a failover the log is read from the database's place",
        false,
        0,
    ),
];
