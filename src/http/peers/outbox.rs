//! Frames that wait to be written to a connection.
//!
//! Whoever has a frame appends it under a lock that is held for a copy of it; one task takes all that is there and
//! writes it. So frames that come while a write is under way share the next one. Frames of coroutines share one in any
//! case: the *gatherer*, a coroutine, is called first, and has its turn after those that were ready before it.
//!
//! ```text
//!   first frame ─┬─ of a coroutine ─► gatherer ─┐
//!                └─ of a thread ────────────────┴─► writer
//! ```
//!
//! The outbox numbers the bytes that ever passed through it. Once the connection is lost, the number of those that the
//! writer has taken tells which frames may have left and which cannot have.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::task::Waker;

use bytes::BytesMut;
use may::coroutine::{self, Coroutine};
use parking_lot::Mutex;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use super::QUEUED_BYTES_MAX;
use crate::http::server::runtime;

/// A buffer larger than this is given back after its write.
const KEPT_BYTES: usize = 256 * 1024;

/// Reason why a frame was not appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// As many bytes wait as may.
    Full,
    /// The connection is gone.
    Closed,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: BytesMut,
    /// Bytes that the writer has taken so far.
    taken: u64,
    /// Whether the writer is still writing what it took last.
    writing: bool,
    closed: bool,
    /// Those who wait for room.
    for_room: Vec<Waker>,
}

/// Frames that wait to be written to one connection.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: Mutex<Waiting>,
    ready: Notify,
    gatherer: OnceLock<Coroutine>,
}

impl Outbox {
    /// Starts its gatherer, which ends once the outbox is closed. Without one the writer is woken by each who finds the
    /// outbox empty.
    pub fn start_gatherer(self: &Arc<Self>) {
        runtime::configure(0);
        let outbox = Arc::clone(self);
        // Without memory for a stack the runtime panics.
        let started = catch_unwind(AssertUnwindSafe(|| {
            may::go!(move || {
                outbox.gather();
                // See the acceptor of the server: a coroutine must not end inside of a wake-up.
                coroutine::yield_now();
            })
        }));
        if let Ok(started) = started {
            let _ = self.gatherer.set(started.coroutine().clone());
        }
    }

    fn gather(&self) {
        while !self.waiting.lock().closed {
            // A call that comes before is not lost, and one without a frame wakes the writer in vain.
            coroutine::park();
            self.ready.notify_one();
        }
    }

    /// Has the writer woken, now or once the coroutines that are ready have run.
    fn call_writer(&self) {
        match self.gatherer.get() {
            Some(gatherer) if coroutine::is_coroutine() => gatherer.unpark(),
            _ => self.ready.notify_one(),
        }
    }

    /// Appends a frame of about `bytes` bytes. `put` is told the number of its first byte.
    ///
    /// # Errors
    /// [`Refused`]; `put` is not called.
    pub fn push(&self, bytes: usize, put: impl FnOnce(u64, &mut BytesMut)) -> Result<(), Refused> {
        self.append(bytes, None, put)
    }

    /// The same for a frame that may wait: if there is no room, `waker` is woken once there is, or never will be.
    ///
    /// # Errors
    /// As [`Outbox::push`].
    pub fn push_or_wait(
        &self,
        bytes: usize,
        waker: &Waker,
        put: impl FnOnce(&mut BytesMut),
    ) -> Result<(), Refused> {
        self.append(bytes, Some(waker), |_, out| put(out))
    }

    /// The same for a few bytes that the other side waits for, which need no room: there are no more of them than
    /// calls.
    pub fn push_short(&self, put: impl FnOnce(&mut BytesMut)) {
        // Closed: nobody is there to read it.
        let _ = self.append(0, None, |_, out| put(out));
    }

    fn append(
        &self,
        bytes: usize,
        waker: Option<&Waker>,
        put: impl FnOnce(u64, &mut BytesMut),
    ) -> Result<(), Refused> {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return Err(Refused::Closed);
        }
        // A frame alone always fits, so that the longest one can be sent.
        let is_full = !waiting.bytes.is_empty() && waiting.bytes.len() + bytes > QUEUED_BYTES_MAX;
        if is_full && bytes > 0 {
            waiting.for_room.extend(waker.cloned());
            return Err(Refused::Full);
        }
        let first = waiting.bytes.is_empty();
        let start = waiting.taken + waiting.bytes.len() as u64;
        put(start, &mut waiting.bytes);
        drop(waiting);
        // If others wait already, the writer looks at them after its present write.
        if first {
            self.call_writer();
        }
        Ok(())
    }

    /// Writes frames as they come, until the connection fails.
    pub async fn write_to(&self, connection: &mut (impl AsyncWrite + Unpin)) -> io::Error {
        let mut batch = BytesMut::new();
        loop {
            if self.take(&mut batch) {
                let written = async {
                    connection.write_all(&batch).await?;
                    connection.flush().await
                };
                if let Err(error) = written.await {
                    return error;
                }
                batch.clear();
                if batch.capacity() > KEPT_BYTES {
                    batch = BytesMut::new();
                }
            } else {
                self.ready.notified().await;
            }
        }
    }

    /// Moves all that waits to `batch`, which is empty. False: nothing waits.
    fn take(&self, batch: &mut BytesMut) -> bool {
        let mut waiting = self.waiting.lock();
        waiting.writing = !waiting.bytes.is_empty();
        if waiting.bytes.is_empty() {
            return false;
        }
        // From here on these bytes may reach the other side.
        waiting.taken += waiting.bytes.len() as u64;
        std::mem::swap(&mut waiting.bytes, batch);
        let woken = std::mem::take(&mut waiting.for_room);
        drop(waiting);
        woken.into_iter().for_each(Waker::wake);
        true
    }

    /// Whether everything was written, or nothing will be.
    pub fn is_idle(&self) -> bool {
        let waiting = self.waiting.lock();
        waiting.closed || waiting.bytes.is_empty() && !waiting.writing
    }

    /// Takes no more frames. Returns the number of the first byte that cannot have left.
    pub fn close(&self) -> u64 {
        let mut waiting = self.waiting.lock();
        waiting.closed = true;
        waiting.bytes = BytesMut::new();
        let (taken, woken) = (waiting.taken, std::mem::take(&mut waiting.for_room));
        drop(waiting);
        woken.into_iter().for_each(Waker::wake);
        if let Some(gatherer) = self.gatherer.get() {
            gatherer.unpark();
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use tokio::io::AsyncReadExt;

    use super::*;

    fn push(outbox: &Outbox, text: &[u8]) -> Result<u64, Refused> {
        let mut start = None;
        outbox.push(text.len(), |at, out| {
            start = Some(at);
            out.extend_from_slice(text);
        })?;
        Ok(start.expect("put was called"))
    }

    #[tokio::test]
    async fn frames_are_written_in_order_and_their_bytes_are_numbered() {
        let outbox = Outbox::default();
        assert_eq!(push(&outbox, b"ab"), Ok(0));
        assert_eq!(push(&outbox, b"cde"), Ok(2));
        let (mut near, mut far) = tokio::io::duplex(64);
        let reading = async {
            let mut all = [0; 6];
            far.read_exact(&mut all[..5]).await.unwrap();
            assert_eq!(push(&outbox, b"f"), Ok(5));
            far.read_exact(&mut all[5..]).await.unwrap();
            all
        };
        tokio::select! {
            error = outbox.write_to(&mut near) => panic!("{error}"),
            all = reading => assert_eq!(&all, b"abcdef"),
        }
        assert_eq!(outbox.close(), 6);
        assert_eq!(push(&outbox, b"g"), Err(Refused::Closed));
    }

    #[tokio::test]
    async fn frames_of_coroutines_are_written_and_the_gatherer_ends_with_the_outbox() {
        const FRAMES: usize = 8;
        let outbox = Arc::<Outbox>::default();
        outbox.start_gatherer();
        let pushing = Arc::clone(&outbox);
        may::go!(move || {
            for _ in 0..FRAMES {
                let outbox = Arc::clone(&pushing);
                may::go!(move || {
                    push(&outbox, b"frame").unwrap();
                    coroutine::yield_now();
                });
            }
            coroutine::yield_now();
        });
        let (mut near, mut far) = tokio::io::duplex(1024);
        let reading = async {
            let mut all = [0; 5 * FRAMES];
            far.read_exact(&mut all).await.unwrap();
            all
        };
        tokio::select! {
            error = outbox.write_to(&mut near) => panic!("{error}"),
            all = reading => assert_eq!(all[..], b"frame".repeat(FRAMES)),
        }
        // Its gatherer ends.
        outbox.close();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while Arc::strong_count(&outbox) > 1 {
            assert!(std::time::Instant::now() < deadline, "it still gathers");
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn what_the_writer_has_not_taken_cannot_have_left() {
        let outbox = Outbox::default();
        assert_eq!(push(&outbox, b"first"), Ok(0));
        let (mut near, _far) = tokio::io::duplex(2);
        // Takes the first frame, and waits for the other side to read.
        let blocked = tokio::time::timeout(std::time::Duration::from_millis(20), async {
            outbox.write_to(&mut near).await
        });
        assert!(blocked.await.is_err());
        assert_eq!(push(&outbox, b"second"), Ok(5));
        assert_eq!(outbox.close(), 5);
    }

    /// Counts.
    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_full_outbox_refuses_and_one_long_frame_fits() {
        let outbox = Outbox::default();
        assert_eq!(push(&outbox, &vec![0; QUEUED_BYTES_MAX + 1]), Ok(0));
        assert_eq!(push(&outbox, b"x"), Err(Refused::Full));
        outbox.push_short(|out| out.extend_from_slice(b"pong"));
        let woken = Arc::<Woken>::default();
        let waker = Waker::from(Arc::clone(&woken));
        let wait = || outbox.push_or_wait(1, &waker, |out| out.extend_from_slice(b"x"));
        assert_eq!(
            (wait(), woken.0.load(Ordering::SeqCst)),
            (Err(Refused::Full), 0)
        );
        let mut batch = BytesMut::new();
        assert!(outbox.take(&mut batch) && batch.ends_with(b"pong"));
        assert_eq!((wait(), woken.0.load(Ordering::SeqCst)), (Ok(()), 1));
        // Whoever waits when the connection ends is woken too.
        assert_eq!(push(&outbox, &vec![0; QUEUED_BYTES_MAX - 1]).err(), None);
        assert_eq!(wait(), Err(Refused::Full));
        outbox.close();
        assert_eq!(
            (wait(), woken.0.load(Ordering::SeqCst)),
            (Err(Refused::Closed), 2)
        );
    }
}
