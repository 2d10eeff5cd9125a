//! The UDP socket: large kernel buffers, no more segments a call than the kernel takes, and packets that are marked to
//! yield while a flag says so.

use std::{
    fmt, io,
    net::{SocketAddr, UdpSocket},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use quinn::{
    AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    buffers::{Drops, SocketBuffers},
    config::EndpointConfig,
    mark,
};

/// The most bytes that one call may hand to the kernel for segmentation. Beyond it the kernel drops
/// all of them and says nothing.
const SEGMENTED_MAX_BYTES: usize = 65_507;

/// A bound socket, and what the kernel gave it.
pub(crate) struct Bound {
    pub(crate) socket: UdpSocket,
    pub(crate) buffers: SocketBuffers,
    pub(crate) drops: Drops,
}

/// Opens and binds the socket that `config` asks for.
pub(crate) fn bind(config: &EndpointConfig) -> io::Result<Bound> {
    let socket = Socket::new(Domain::for_address(config.listen), Type::DGRAM, Some(Protocol::UDP))?;
    if config.listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    let asked = config.socket_buffer_bytes;
    // The kernel cuts a size above its limit without an error, and says so only here.
    socket.set_recv_buffer_size(asked)?;
    socket.set_send_buffer_size(asked)?;
    let buffers = SocketBuffers::of(&socket, asked)?;
    if let Some(raise) = buffers.advice() {
        tracing::warn!(
            asked_bytes = asked,
            receive_bytes = buffers.receive_bytes,
            send_bytes = buffers.send_bytes,
            raise,
            "the kernel gives smaller UDP buffers than asked for, and packets are lost at high rates: raise its limits"
        );
    }
    socket.set_nonblocking(true)?;
    socket.bind(&config.listen.into())?;
    let drops = Drops::of(&socket, config.listen.is_ipv6())?;
    Ok(Bound { socket: socket.into(), buffers, drops })
}

/// Gives the socket to quinn, held to what the kernel takes in one call. Its packets are marked while `yields` is true.
pub(crate) fn wrap(
    socket: UdpSocket,
    yields: Arc<AtomicBool>,
) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let own = socket.try_clone()?;
    let inner = TokioRuntime.wrap_udp_socket(socket)?;
    let segments = AtomicUsize::new(inner.max_transmit_segments());
    let longest = AtomicUsize::new(1);
    Ok(Arc::new(HeldSocket { inner, own, yields, longest, segments }))
}

/// quinn's own socket, with fewer segments a call where they are long. quinn asks how many it may hand over before it
/// says how long they are, and paths differ: so the longest that any path had so far counts.
struct HeldSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// The same socket, for packets that are marked.
    own: UdpSocket,
    yields: Arc<AtomicBool>,
    /// The longest segment so far, in bytes.
    longest: AtomicUsize,
    /// How many segments a call quinn was last seen to use.
    segments: AtomicUsize,
}

impl HeldSocket {
    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.yields.load(Ordering::Relaxed) && mark::send(&self.own, transmit).is_ok() {
            return Ok(());
        }
        // Also where the kernel has no room or refuses a segment: quinn's way knows how to wait and what to do.
        self.inner.try_send(transmit)
    }

    /// Sends in several calls what is too long for one: the first segments of a path that was just found to take more.
    fn send_in_parts(&self, transmit: &Transmit<'_>, segment: usize) -> io::Result<()> {
        let whole = (SEGMENTED_MAX_BYTES / segment).max(1) * segment;
        let mut parts = transmit.contents.chunks(whole);
        let send = |contents| self.send(&Transmit { contents, ..*transmit });
        parts.next().map_or(Ok(()), send)?;
        // The first is on its way: what the kernel has no room for now is lost like any packet, and sent again.
        parts.for_each(|part| drop(send(part)));
        Ok(())
    }
}

impl fmt::Debug for HeldSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl AsyncUdpSocket for HeldSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(segment) = transmit.segment_size else { return self.send(transmit) };
        self.longest.fetch_max(segment, Ordering::Relaxed);
        if transmit.contents.len() > SEGMENTED_MAX_BYTES {
            return self.send_in_parts(transmit, segment);
        }
        self.send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let segments = self.inner.max_transmit_segments();
        if self.segments.load(Ordering::Relaxed) != segments
            && self.segments.swap(segments, Ordering::Relaxed) > segments
        {
            tracing::warn!(
                segments,
                "the kernel refused segments, as it does when a network device's MTU was lowered: sending costs more CPU until \
                 the next start"
            );
        }
        let fit = (SEGMENTED_MAX_BYTES / self.longest.load(Ordering::Relaxed)).max(1);
        segments.min(fit)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
