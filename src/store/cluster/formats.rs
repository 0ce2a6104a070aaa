//! Releases side by side: which of them may be nodes of one cluster, as far as their order logs go.
//!
//! A node's log is read by whoever takes the node over. So a release that knows several formats of a group writes the newest
//! one that every member can read when it joins, and the rule of [`Formats::fit`] keeps that true of later ones: the least
//! `reads_format` of the members is at least as new as every log. Today there is one format.

use crate::store::StoreError;

/// The formats of a group in an order log that a release knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Formats {
    /// The newest one; it reads all earlier ones.
    pub reads: i16,
    /// The oldest one that it can write.
    pub writes_from: i16,
}

impl Formats {
    /// Whether a process of this release may be a node beside `members`, each with its number and the newest format that it
    /// can read; its own row is one of them as long as its log is not read.
    ///
    /// # Errors
    /// [`StoreError::OtherRelease`] if it could not read a log of theirs, or one of them not that of this process.
    pub fn fit(self, members: impl IntoIterator<Item = (i16, i16)>) -> Result<(), StoreError> {
        let members = members.into_iter();
        let Some((node, reads)) = members.min_by_key(|(_, reads)| *reads) else {
            return Ok(());
        };
        let why = if reads > self.reads {
            format!(
                "their logs may be in format {reads}, and this release reads none newer than {}; start the release of the other \
                 nodes",
                self.reads
            )
        } else if reads < self.writes_from {
            format!(
                "node {node} reads no log newer than format {reads}, and this release writes none older than {}, so that node \
                 could not take this one over; upgrade by way of a release in between, or stop all nodes first",
                self.writes_from
            )
        } else {
            return Ok(());
        };
        Err(StoreError::OtherRelease(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_joins_others_if_each_can_read_the_logs_of_all() {
        let two = Formats {
            reads: 2,
            writes_from: 1,
        };
        let fits = |formats: Formats, members: &[(i16, i16)]| formats.fit(members.to_vec()).is_ok();
        assert!(fits(two, &[]));
        assert!(fits(two, &[(0, 1), (1, 2), (2, 3)]));
        assert!(fits(two, &[(0, 2), (1, 3)]));
        assert!(!fits(two, &[(0, 3), (1, 4)]), "a log may be in format 3");
        assert!(!fits(two, &[(0, 0), (1, 2)]), "node 0 cannot read 1");
        let refused = two.fit([(4, 0), (1, 2)]).unwrap_err().to_string();
        assert!(refused.contains("node 4 reads no log newer"), "{refused}");
    }
}
