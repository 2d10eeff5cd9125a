//! Sending packets that say that others go first: DSCP LE (RFC 8622).
//!
//! quinn-udp writes the whole byte that DSCP shares with ECN into each packet, with DSCP 0, and that overrules the
//! socket's own setting. So packets that are to be marked are sent here.

use std::{
    io::{self, IoSlice},
    net::{IpAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use nix::{
    libc,
    sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg},
};
use quinn::udp::Transmit;

/// Lower effort: what is to be dropped or delayed before all else. It stands in the upper six bits.
pub(crate) const LOWER_EFFORT: u8 = 0b00_0001 << 2;

/// Sends as quinn-udp does, with the mark. `segment` is for [`Transmit::contents`] of several packets.
///
/// # Errors
/// What the kernel says; then nothing was sent.
pub(crate) fn send(socket: &UdpSocket, transmit: &Transmit<'_>) -> io::Result<()> {
    let byte = LOWER_EFFORT | transmit.ecn.map_or(0, |ecn| ecn as u8);
    let class = i32::from(byte);
    let is_v4 = match transmit.destination.ip() {
        IpAddr::V4(_) => true,
        IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some(),
    };
    let mut messages = Vec::with_capacity(3);
    messages.push(if is_v4 {
        ControlMessage::Ipv4Tos(&byte)
    } else {
        ControlMessage::Ipv6TClass(&class)
    });
    let segment = transmit.segment_size.filter(|segment| *segment < transmit.contents.len());
    let segment = segment.and_then(|segment| u16::try_from(segment).ok());
    if let Some(segment) = &segment {
        messages.push(ControlMessage::UdpGsoSegments(segment));
    }
    let (from_v4, from_v6);
    match transmit.src_ip {
        Some(IpAddr::V4(ip)) => {
            from_v4 = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            messages.push(ControlMessage::Ipv4PacketInfo(&from_v4));
        }
        Some(IpAddr::V6(ip)) => {
            from_v6 = libc::in6_pktinfo {
                ipi6_ifindex: 0,
                ipi6_addr: libc::in6_addr { s6_addr: ip.octets() },
            };
            messages.push(ControlMessage::Ipv6PacketInfo(&from_v6));
        }
        None => {}
    }
    let to = SockaddrStorage::from(transmit.destination);
    let contents = [IoSlice::new(transmit.contents)];
    sendmsg(socket.as_raw_fd(), &contents, &messages, MsgFlags::empty(), Some(&to))?;
    Ok(())
}
