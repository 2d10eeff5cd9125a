//! Every decoder: the first byte chooses it, the rest is what it is given. What must hold stands in the list.
#![no_main]

#[path = "../../tests/decoders/list.rs"]
mod list;
#[path = "../../tests/decoders/meter.rs"]
mod meter;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((&which, bytes)) = data.split_first() {
        let (_, feed) = list::DECODERS[usize::from(which) % list::DECODERS.len()];
        feed(bytes);
    }
});
