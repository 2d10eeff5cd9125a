//! What the kernel gives the socket to hold packets in, and what it throws away for want of it.

use std::{fs, io, os::unix::fs::MetadataExt as _};

use socket2::Socket;

/// The sizes of a UDP socket's buffers, in bytes as `setsockopt` counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketBuffers {
    /// Asked for, each.
    pub asked_bytes: usize,
    /// Given for what arrived and was not read yet; never more than asked for.
    pub receive_bytes: usize,
    /// Given for what is to be sent; never more than asked for.
    pub send_bytes: usize,
}

impl SocketBuffers {
    pub(crate) fn of(socket: &Socket, asked_bytes: usize) -> io::Result<Self> {
        // The kernel books twice of what it gives, for its own use, and says that (socket(7)).
        let given = |booked: usize| (booked / 2).min(asked_bytes);
        Ok(Self {
            asked_bytes,
            receive_bytes: given(socket.recv_buffer_size()?),
            send_bytes: given(socket.send_buffer_size()?),
        })
    }

    /// The settings of the kernel to raise so that it gives what was asked for, as `sysctl -w` takes them; none
    /// when it does.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        let asked = self.asked_bytes;
        let settings =
            [("net.core.rmem_max", self.receive_bytes), ("net.core.wmem_max", self.send_bytes)];
        let short = settings.into_iter().filter(|(_, given)| *given < asked);
        let short: Vec<_> = short.map(|(setting, _)| format!("{setting}={asked}")).collect();
        (!short.is_empty()).then(|| short.join(" "))
    }
}

/// The kernel's count of datagrams that it dropped for one socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Drops {
    /// The socket's number in the kernel's tables.
    inode: u64,
    ipv6: bool,
}

impl Drops {
    pub(crate) fn of(socket: &Socket, ipv6: bool) -> io::Result<Self> {
        let file = fs::File::from(std::os::fd::OwnedFd::from(socket.try_clone()?));
        Ok(Self { inode: file.metadata()?.ino(), ipv6 })
    }

    /// How many so far. It reads a line for each UDP socket of the machine.
    pub(crate) fn count(self) -> io::Result<u64> {
        let table = if self.ipv6 { "/proc/net/udp6" } else { "/proc/net/udp" };
        let text = fs::read_to_string(table)?;
        dropped(&text, self.inode)
            .ok_or_else(|| io::Error::other(format!("{table} has no socket {}", self.inode)))
    }
}

/// The drops of the socket `inode` by the kernel's table: its inode is the tenth column, the drops are the last.
fn dropped(table: &str, inode: u64) -> Option<u64> {
    let inode = inode.to_string();
    let line = table.lines().find(|line| line.split_whitespace().nth(9) == Some(&inode))?;
    line.split_whitespace().nth(12)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_what_is_short_and_the_value_to_set() {
        let buffers = |receive_bytes, send_bytes| SocketBuffers {
            asked_bytes: 4 << 20,
            receive_bytes,
            send_bytes,
        };
        assert_eq!(buffers(4 << 20, 4 << 20).advice(), None);
        let both = "net.core.rmem_max=4194304 net.core.wmem_max=4194304";
        assert_eq!(buffers(212_992, 212_992).advice().as_deref(), Some(both));
        let send = "net.core.wmem_max=4194304";
        assert_eq!(buffers(4 << 20, 212_992).advice().as_deref(), Some(send));
    }

    #[test]
    fn drops_are_read_from_the_row_of_the_socket() {
        let table = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
            11: 0100007F:1CF2 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0000000000000000 0\n\
            12: 0100007F:1CF3 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 471 2 0000000000000000 25\n";
        assert_eq!(dropped(table, 4_711), Some(0));
        assert_eq!(dropped(table, 471), Some(25));
        assert_eq!(dropped(table, 47), None);
    }
}
