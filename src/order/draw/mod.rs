//! A draw: a lottery for units that anyone can check afterwards, from one published file.
//!
//! ```text
//!   PUT of the SKU       the seed is made and stored, the commitment is shown
//!        │               each entry is told its entry token
//!   draw_at              the entries are fixed: their number and hash are published
//!        │               the beacon, if the draw has one, becomes known and is supplied
//!   draw                 the seed is published; the entries are ranked; units go out by rank
//! ```
//!
//! The byte formats, of which every one can be recomputed with `sha256sum` and `openssl`:
//!
//! | value | is |
//! |---|---|
//! | seed | 32 bytes of the system's randomness |
//! | [`Commitment`] | SHA-256 of the seed's 32 bytes |
//! | [`Rank`] | HMAC-SHA256 under the seed of the text of the beacon, if there is one, and right after it the user id |
//! | [`EntryToken`] | 32 hexadecimal digits: the start of HMAC-SHA256 of the user id under the [`Salt`], which stays secret |
//! | [`EntryHash`] | SHA-256 of the entry token's 32 digits and right after them the user id |
//! | [`EntriesHash`] | SHA-256 of the lines `entry hash, space, quantity, line feed` of all entries, sorted |
//!
//! Lower ranks come first. All values are written in lower-case hexadecimal digits.
//!
//! # Why an entry is published as a hash, and its rank shortened
//!
//! Once the seed is out, a rank is a function of the user id that anyone can compute. A file with whole ranks would
//! tell anyone with a list of user ids who entered, and the salt of the entry hashes would protect nobody. So a row
//! has its rank only to as many digits as tell it from its neighbours ([`rows`]). These digits prove the order as well
//! as the whole rank does: of two ranks that differ in their first digits, the rest decides nothing. And an entry's
//! own digits still have to be the first ones of the rank of its user id. But a user id that never entered has a fair
//! chance (one in four to one in two) to fit some row too, so a fit tells little.
//!
//! # What a row proves to whom
//!
//! *Anyone* sees from the file alone that the seed is the promised one, that the entries are those whose hash was published
//! before, that they stand in the order of the printed ranks, and who won. *A buyer*, who knows a user id and its entry
//! token, also sees that the row is there and has the rank that the seed gives this user id. Only *an auditor* who is
//! given the user ids and tokens of all winners can see that no winner's rank is made up. [`verify`] does all three.
//! `docs/DRAW.md` says what an insider can still do.

mod digest;
mod document;
mod ranking;
pub mod verify;

pub use digest::{Commitment, EntriesHash, EntryHash, NoRandomness, Rank, Salt, Seed};
pub use document::{Header, RankDigits, Row, State, VERSION, rows, write_line};
pub use ranking::{Beacon, Entry, EntryToken, EntryTokens, Ranked, Ranking, entries_hash};
