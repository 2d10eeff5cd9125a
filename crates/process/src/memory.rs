//! How the C library's allocator is set up.

/// Free memory that stays at the end of a heap, in bytes. glibc's own 128 KiB are less than what one system call receives, so
/// packets' memory would go back to the kernel and be fetched, page by page, again: with four leechers and 256 MiB that was 300,000 page
/// faults, and is 175,000 with 4 MiB; 16 MiB save 8,000 more.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: i32 = 4 << 20;

/// What is allocated in one piece from this size on, in bytes, has pages of its own, which go back at once: large buffers are
/// kept by their owners. Setting the above keeps glibc from finding this by itself.
#[cfg(target_env = "gnu")]
const OWN_PAGES_BYTES: i32 = 1 << 20;

/// Lets the allocator keep a little of what is given free. It is a tenth of the CPU that a byte costs from machine to machine; call it before
/// there are threads. With another C library than glibc it does nothing.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "two numbers that the allocator takes at any time")]
    // SAFETY: mallopt reads and writes nothing but the allocator's own settings, under its lock. A value that it does not
    // know it refuses, which costs only what is said above.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES_BYTES);
    }
}
