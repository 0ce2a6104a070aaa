//! The journal as an order log: its spans are the segments.

use std::io;
use std::sync::Arc;

use super::recovery::read_segments;
use super::sector::sectors_of;
use super::segment::file_name;
use super::segments::Segments;
use super::writer::Writer;
use crate::queue::Durability;
use crate::queue::log::record::{GROUP_HEAD, Record};
use crate::queue::log::{AppendError, GroupAt, LogWriter, NewGroup, OrderLog, Permit};

/// The writing end of a running journal.
#[derive(Debug)]
pub(super) struct FileWriter {
    pub(super) writer: Writer,
    pub(super) segments: Arc<Segments>,
}

impl LogWriter for FileWriter {
    fn room(&mut self, at_least: usize) -> Option<usize> {
        if self.writer.room() < at_least {
            let next = self.segments.next(self.writer.sectors_left())?;
            self.writer.rotate(next);
            // Every order of the previous segment may be settled already.
            self.segments.look();
        }
        Some(self.writer.room())
    }

    fn span(&self) -> u64 {
        self.writer.segment().number
    }

    fn append(&mut self, group: &NewGroup<'_>, reserved: u32) -> Result<GroupAt, AppendError> {
        let at = self.writer.commit(group).map_err(|error| {
            let segment = file_name(self.writer.segment().number);
            AppendError::Final(format!("{segment}: {error}"))
        })?;
        let unused = i64::from(reserved) - i64::from(at.length);
        self.segments.space.give(unused);
        Ok(at)
    }
}

impl OrderLog for Segments {
    fn durability(&self) -> Durability {
        Durability::Machine
    }

    fn title(&self) -> String {
        "the journal".to_owned()
    }

    fn reserve(&self, record_bytes: usize) -> Option<Permit> {
        self.space
            .take(sectors_of(GROUP_HEAD + record_bytes) as u32)
    }

    fn is_full(&self) -> bool {
        Segments::is_full(self)
    }

    fn settled(&self, by_span: &[(u64, u64)]) {
        Segments::settled(self, by_span);
    }

    fn read(&self, at: &GroupAt) -> io::Result<Vec<Record>> {
        let segment = self.find(at.span).ok_or_else(|| {
            let what = format!("{} is deleted", file_name(at.span));
            io::Error::new(io::ErrorKind::NotFound, what)
        })?;
        Ok(segment.read(at)?.records)
    }

    fn read_all(&self, each: &mut dyn FnMut(u64, u64, Vec<Record>)) -> io::Result<()> {
        read_segments(&self.segments(), each).map_err(io::Error::other)
    }

    fn outstanding(&self) -> u64 {
        let segments = self.segments();
        segments.iter().map(|segment| segment.outstanding()).sum()
    }

    fn settled_up_to(&self) -> u64 {
        let segments = self.segments();
        let settled = segments.iter().take_while(|segment| segment.is_done());
        settled.last().map_or(0, |segment| segment.number)
    }

    fn confirm(&self, span: u64) {
        Segments::confirm(self, span);
    }

    fn bytes(&self) -> u64 {
        Segments::bytes(self)
    }

    fn look(&self) {
        Segments::look(self);
    }

    fn maintain(&self) {
        self.run();
    }

    fn stop(&self) {
        Segments::stop(self);
    }

    fn erase(&self) -> io::Result<()> {
        Segments::erase(self)
    }
}
