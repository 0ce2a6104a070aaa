//! The one place that configures the coroutine runtime.

use std::sync::Once;

/// The stack of a coroutine, in bytes. The runtime's default of 32 KiB overflows under a deep
/// `Debug` or a large array, and an overflow there hangs instead of crashing. Stacks are mapped
/// lazily, so what a coroutine does not touch costs address space only.
pub const STACK_BYTES: usize = 256 * 1024;

/// Idle coroutines that the runtime keeps for reuse, stacks included.
const POOL_COROUTINES: usize = 1024;

/// Configures the coroutine runtime for this process; the first call wins, the rest do nothing.
///
/// `workers` is the number of OS threads that run coroutines; 0 means one for each core. Must be
/// called before the first coroutine starts: the runtime reads its configuration once.
pub fn configure(workers: usize) {
    static CONFIGURED: Once = Once::new();
    CONFIGURED.call_once(|| {
        let workers = if workers == 0 {
            std::thread::available_parallelism().map_or(1, usize::from)
        } else {
            workers
        };
        let config = may::config();
        config
            .set_workers(workers)
            .set_pool_capacity(POOL_COROUTINES)
            // The runtime counts stacks in machine words.
            .set_stack_size(STACK_BYTES / size_of::<usize>());
        // Pinned workers would fight the database and the tokio threads for the same first cores.
        config.set_worker_pin(false);
    });
}

/// Lets every other ready coroutine and pending socket event of this process go first.
///
/// The runtime's own `yield_now` is not fair to I/O: a worker empties its queue of runnable
/// coroutines before it polls its sockets again, and a yielding coroutine goes straight back into
/// that queue (with the runtime's `work_steal` feature it even looks for more of them first, which
/// is one reason why that feature is off). So the wake-up takes the long way, through a helper coroutine that the worker only
/// finds by polling. It costs about two microseconds: call it once in many requests.
pub fn yield_to_io() {
    let me = may::coroutine::current();
    may::go!(move || me.unpark());
    // A stale token may end this early; then the yield was shorter, nothing else.
    may::coroutine::park();
}
