//! An allocator that counts, to see what a decoder asks for.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

struct Meter;

#[global_allocator]
static METER: Meter = Meter;

thread_local! {
    /// What this thread holds, and the most that it held, in bytes. A block freed by another thread than its
    /// owner makes it wrong: decoders have one.
    static HELD_AND_PEAK: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(change: isize) {
    // The last blocks of a thread are freed after its cell.
    let _ = HELD_AND_PEAK.try_with(|cell| {
        let (held, peak) = cell.get();
        cell.set((held + change, peak.max(held + change)));
    });
}

// SAFETY: every call goes to the system's allocator as it came; `realloc` and `alloc_zeroed` are the trait's, or
// go there too.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is ours.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise is ours.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Runs `job` and says how much more than before it held at most, in bytes.
pub(crate) fn peak_bytes<R>(job: impl FnOnce() -> R) -> (R, usize) {
    let (before, _) = HELD_AND_PEAK.get();
    HELD_AND_PEAK.set((before, before));
    let result = job();
    let (_, peak) = HELD_AND_PEAK.get();
    (result, (peak - before) as usize)
}
