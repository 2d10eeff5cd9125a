//! A way of UDP packets that can go dead without a word, as through a firewall that forgets what passed it.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
};

use tokio::{net::UdpSocket, task::JoinSet};

/// More than any UDP payload.
const PACKET_MAX_BYTES: usize = 1 << 16;

/// The ways that were opened, and those that are open by who sends.
#[derive(Default)]
struct Flows {
    open: HashMap<SocketAddr, Arc<UdpSocket>>,
    /// Those that were forgotten: their ports stay taken, so that nobody says that nobody listens there.
    forgotten: Vec<Arc<UdpSocket>>,
    opened: usize,
}

/// A running relay; it ends when it is dropped.
pub struct Relay {
    pub addr: SocketAddr,
    flows: Arc<Mutex<Flows>>,
    _tasks: JoinSet<()>,
}

/// Whether a packet can begin a QUIC connection: one with a long header, of the type Initial (RFC 9000, 17.2).
fn is_initial(packet: &[u8]) -> bool {
    packet.first().is_some_and(|first| first & 0xf0 == 0xc0)
}

impl Relay {
    /// Starts one that opens a way to `target` for each who begins a QUIC connection, and lets pass what belongs to a way.
    pub async fn to(target: SocketAddr) -> Self {
        let near = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        let addr = near.local_addr().unwrap();
        let flows = Arc::new(Mutex::new(Flows::default()));
        let mut tasks = JoinSet::new();
        tasks.spawn(forward(near, target, flows.clone()));
        Self { addr, flows, _tasks: tasks }
    }

    /// Forgets the open ways: from now on nothing of what is open passes, neither way.
    pub fn forget(&self) {
        let mut flows = self.flows.lock().unwrap();
        let open: Vec<_> = flows.open.drain().map(|(_, flow)| flow).collect();
        flows.forgotten.extend(open);
    }

    /// How many ways were opened so far.
    pub fn opened(&self) -> usize {
        self.flows.lock().unwrap().opened
    }
}

async fn forward(near: Arc<UdpSocket>, target: SocketAddr, flows: Arc<Mutex<Flows>>) {
    // Aborted, it ends all that it carries.
    let mut backward = JoinSet::new();
    let mut packet = vec![0; PACKET_MAX_BYTES];
    loop {
        let (len, from) = near.recv_from(&mut packet).await.unwrap();
        let packet = &packet[..len];
        let open = flows.lock().unwrap().open.get(&from).cloned();
        let flow = match open {
            Some(flow) => flow,
            None if is_initial(packet) => {
                let far = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
                far.connect(target).await.unwrap();
                let mut flows_now = flows.lock().unwrap();
                flows_now.opened += 1;
                flows_now.open.insert(from, far.clone());
                backward.spawn(back(far.clone(), near.clone(), from, flows.clone()));
                far
            }
            None => continue,
        };
        // An error is that of an earlier packet, which nobody took: such are lost.
        let _ = flow.send(packet).await;
    }
}

/// Brings back what comes on a way, while that is open.
async fn back(far: Arc<UdpSocket>, near: Arc<UdpSocket>, to: SocketAddr, flows: Arc<Mutex<Flows>>) {
    let mut packet = vec![0; PACKET_MAX_BYTES];
    loop {
        let Ok(len) = far.recv(&mut packet).await else { continue };
        let is_open =
            flows.lock().unwrap().open.get(&to).is_some_and(|open| Arc::ptr_eq(open, &far));
        if is_open {
            let _ = near.send_to(&packet[..len], to).await;
        }
    }
}
