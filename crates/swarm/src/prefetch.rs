//! Reading ahead: memory that will be needed soon comes into the cache, and nothing waits for it.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Begins to read the cache line in which something starts. On other processors than x86-64 it does nothing, and all is as
/// true without it.
#[inline]
pub fn prefetch<T: ?Sized>(what: &T) {
    begin(core::ptr::from_ref(what).cast());
}

/// Begins to read every cache line of something, but for what it points to.
#[inline]
pub fn prefetch_all<T>(what: &T) {
    let start = core::ptr::from_ref(what).cast::<u8>();
    for at in (0..size_of::<T>()).step_by(LINE) {
        begin(start.wrapping_add(at));
    }
    // What does not start with a line ends in one more.
    begin(start.wrapping_add(size_of::<T>().saturating_sub(1)));
}

#[inline]
fn begin(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "the one way to tell the processor what comes next")]
    // SAFETY: it is a hint. The processor neither faults on any address nor changes anything but its cache.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
