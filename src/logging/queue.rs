//! The queue to the log's thread: bounded in lines and bytes, and it never blocks.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Most lines in the queue.
const LINES_MAX: usize = 4_096;
/// Most bytes in the queue.
const BYTES_MAX: usize = 1 << 20;
/// Most bytes of one line; the rest is cut off.
const LINE_BYTES_MAX: usize = 64 << 10;

/// The queue of log lines.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Signals the thread that there is a line.
    came: Condvar,
    /// Signals waiters of [`Queue::flush`] that a line has been handled.
    went: Condvar,
    full: AtomicU64,
    refused: AtomicU64,
}

#[derive(Default)]
struct State {
    lines: VecDeque<Box<[u8]>>,
    /// While holding: lines that the thread does not get before the release.
    held: Option<VecDeque<Box<[u8]>>>,
    /// Bytes of both.
    bytes: usize,
    /// The thread is still handling a line.
    writing: bool,
}

impl Queue {
    /// Adds a line, or drops and counts it if there is no room. Never waits for the sink.
    pub(super) fn push(&self, line: &[u8]) {
        self.take(line, false);
    }

    /// Same as [`Queue::push`], for a line that may be held.
    pub(super) fn push_or_hold(&self, line: &[u8]) {
        self.take(line, true);
    }

    fn take(&self, line: &[u8], can_be_held: bool) {
        let line: Box<[u8]> = match line.get(..LINE_BYTES_MAX) {
            Some(start) => [start, b"...\n"].concat().into(),
            None => line.into(),
        };
        let mut state = self.state.lock();
        let lines = state.lines.len() + state.held.as_ref().map_or(0, VecDeque::len);
        if lines >= LINES_MAX || state.bytes + line.len() > BYTES_MAX {
            self.full.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.bytes += line.len();
        match &mut state.held {
            Some(held) if can_be_held => return held.push_back(line),
            _ => state.lines.push_back(line),
        }
        drop(state);
        self.came.notify_one();
    }

    /// Holds lines back from the thread from now on, if they may be held.
    pub(super) fn hold(&self) {
        self.state.lock().held.get_or_insert_default();
    }

    /// Passes the held lines to the thread.
    pub(super) fn release(&self) {
        let mut state = self.state.lock();
        let held = state.held.take().unwrap_or_default();
        state.lines.extend(held);
        drop(state);
        self.came.notify_one();
    }

    /// The next line for the thread, which calls [`Queue::done`] afterwards; `None` if there is
    /// none by the deadline.
    pub(super) fn next(&self, deadline: Instant) -> Option<Box<[u8]>> {
        let mut state = self.state.lock();
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= line.len();
                state.writing = true;
                return Some(line);
            }
            if self.came.wait_until(&mut state, deadline).timed_out() {
                return None;
            }
        }
    }

    /// Marks the thread's line as handled: written, or lost because the sink refused it.
    pub(super) fn done(&self, written: bool) {
        if !written {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        self.state.lock().writing = false;
        self.went.notify_all();
    }

    /// Waits until the queue is empty, at most `patience`. Held lines are not waited for.
    pub(super) fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.state.lock();
        while state.writing || !state.lines.is_empty() {
            if self.went.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    /// Lines dropped because there was no room, and because the sink refused them.
    pub(super) fn dropped(&self) -> (u64, u64) {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (of(&self.full), of(&self.refused))
    }
}

/// The output of the log.
pub(super) struct Sink<W> {
    out: W,
    /// It refused the rest of a line.
    torn: bool,
}

impl<W: Write + AsFd> Sink<W> {
    pub(super) fn new(out: W) -> Self {
        Sink { out, torn: false }
    }

    /// Writes a whole line, and waits for a sink that is not ready. False: the line is lost.
    pub(super) fn write(&mut self, line: &[u8]) -> bool {
        if self.torn && self.write_some(b"\n") == 0 {
            return false;
        }
        let written = self.write_some(line);
        self.torn = written > 0 && written < line.len();
        written == line.len()
    }

    /// Writes as much as the sink accepts, and returns that number of bytes.
    fn write_some(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while let Some(left) = bytes.get(written..).filter(|left| !left.is_empty()) {
            match self.out.write(left) {
                Ok(count @ 1..) => written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another process that shares the terminal or pipe has made it non-blocking.
                Err(error)
                    if error.kind() == ErrorKind::WouldBlock
                        && wait_for_room(&self.out).is_ok() => {}
                Ok(0) | Err(_) => break,
            }
        }
        written
    }
}

fn wait_for_room(sink: &impl AsFd) -> io::Result<()> {
    let time = Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    match poll(&mut [PollFd::new(sink, PollFlags::OUT)], Some(&time)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(queue: &Queue) -> Option<Vec<u8>> {
        queue.next(Instant::now()).map(Vec::from)
    }

    #[test]
    fn a_full_queue_drops_the_newest_and_counts_them() {
        let queue = Queue::default();
        for number in 0..LINES_MAX + 3 {
            queue.push(format!("{number}\n").as_bytes());
        }
        assert_eq!(queue.dropped(), (3, 0));
        assert_eq!(take(&queue).unwrap(), b"0\n");
        queue.push(b"there is room again\n");
        assert_eq!(queue.dropped(), (3, 0));
    }

    #[test]
    fn its_bytes_are_bounded_too_and_so_is_a_line() {
        let queue = Queue::default();
        let line = vec![b'x'; 10 * LINE_BYTES_MAX];
        for _ in 0..100 {
            queue.push(&line);
        }
        let (full, _) = queue.dropped();
        let mut bytes = 0;
        let mut lines = 0;
        while let Some(line) = take(&queue) {
            assert!(line.ends_with(b"x...\n"));
            bytes += line.len();
            lines += 1;
        }
        assert!(
            bytes <= BYTES_MAX && lines >= 15,
            "{lines} of {bytes} bytes"
        );
        assert_eq!(full + lines, 100);
    }

    #[test]
    fn what_is_held_is_written_after_the_release() {
        let queue = Queue::default();
        queue.hold();
        queue.push_or_hold(b"a\n");
        assert_eq!(take(&queue), None);
        queue.flush(Duration::from_secs(60));
        queue.push(b"b\n");
        assert_eq!(take(&queue).unwrap(), b"b\n");
        queue.release();
        assert_eq!(take(&queue).unwrap(), b"a\n");
        queue.push_or_hold(b"c\n");
        assert_eq!(take(&queue).unwrap(), b"c\n");
    }

    #[test]
    fn a_flush_waits_for_the_line_in_hand_and_gives_up_in_time() {
        let queue = Queue::default();
        queue.flush(Duration::from_secs(60));
        queue.push(b"a\n");
        assert!(take(&queue).is_some());
        // The sink refuses it.
        queue.flush(Duration::from_millis(10));
        std::thread::scope(|scope| {
            scope.spawn(|| queue.flush(Duration::from_secs(60)));
            queue.done(false);
        });
        assert_eq!(queue.dropped(), (0, 1));
    }

    #[test]
    fn a_sink_that_would_block_gets_the_rest_later() {
        let (mut reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let line = vec![b'x'; 1 << 20];
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            io::Read::read_to_end(&mut reader, &mut all).unwrap();
            all.len()
        });
        let mut sink = Sink::new(writer);
        assert!(sink.write(&line));
        drop(sink);
        assert_eq!(read.join().unwrap(), line.len());
    }

    /// Accepts so many bytes in all, and no more until it has room again.
    struct Disk {
        file: std::fs::File,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            let count = bytes.len().min(self.room);
            self.room -= count;
            self.file.write_all(&bytes[..count])?;
            Ok(count)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl AsFd for Disk {
        fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
            self.file.as_fd()
        }
    }

    #[test]
    fn after_a_line_that_was_torn_the_next_begins_on_its_own() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let room = 6;
        let disk = Disk {
            file: file.reopen().unwrap(),
            room,
        };
        let mut sink = Sink::new(disk);
        assert!(sink.write(b"one\n"));
        assert!(!sink.write(b"two\n"));
        assert!(!sink.write(b"three\n"));
        sink.out.room = 100;
        assert!(sink.write(b"four\n"));
        let written = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(written, "one\ntw\nfour\n");
    }
}
