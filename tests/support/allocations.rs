//! An allocator that counts, for tests that are alone in their process.
//!
//! A test installs it with `#[global_allocator]` and leaves its own threads out, so that what is
//! counted is the server's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, counting. A `realloc` that grows counts as one.
pub struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    // Const and without a destructor: reading it allocates nothing, whenever it is read.
    static COUNTED: Cell<bool> = const { Cell::new(true) };
}

/// Leaves out what the present thread allocates from now on.
pub fn leave_out_this_thread() {
    COUNTED.set(false);
}

/// Allocations so far, by every thread that is not left out.
pub fn so_far() -> usize {
    ALLOCATIONS.load(Ordering::Relaxed)
}

// SAFETY: every call goes to the system's allocator as it came. `realloc` and `alloc_zeroed` are
// the trait's own, which call these two.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}
