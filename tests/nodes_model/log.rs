//! The order log of a node on a broker.

use crate::db::{Order, Place};

#[derive(Clone, Debug)]
pub struct Group {
    pub place: Place,
    pub orders: Vec<Order>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The server refuses a place that is not above all stored ones (Redis).
    Refuses,
    /// The server stores everything and says where (Kafka, RocketMQ).
    Positions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    At(usize),
    Fenced,
}

#[derive(Clone, Debug)]
pub struct Log {
    pub kind: Kind,
    pub groups: Vec<Group>,
}

impl Log {
    pub fn append(&mut self, group: Group) -> Appended {
        if self.kind == Kind::Refuses
            && self
                .groups
                .last()
                .is_some_and(|last| group.place <= last.place)
        {
            let there = self.groups.iter().position(|one| one.place == group.place);
            return there.map_or(Appended::Fenced, Appended::At);
        }
        self.groups.push(group);
        Appended::At(self.groups.len() - 1)
    }

    /// The groups that count: none of an older epoch behind a marker, none twice.
    ///
    /// # Errors
    /// A number is missing.
    pub fn valid(&self) -> Result<Vec<&Group>, String> {
        let mut last = (0, 0);
        let mut valid = Vec::new();
        for group in &self.groups {
            let (epoch, number) = group.place;
            if epoch < last.0 || (epoch == last.0 && number <= last.1) {
                continue;
            }
            let next = if epoch == last.0 { last.1 + 1 } else { 0 };
            if number != next {
                return Err(format!(
                    "a hole in the log: {:?} follows {last:?}",
                    group.place
                ));
            }
            last = group.place;
            valid.push(group);
        }
        Ok(valid)
    }
}
