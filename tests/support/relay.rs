//! A relay of TCP connections that cuts them at a chosen byte, stops passing anything on, and keeps what it passed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A direction through the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the side that connects.
    Forth,
    /// From the side that is connected to.
    Back,
}

#[derive(Default)]
struct Plan {
    /// Connections are cut once this many bytes have passed this way.
    cut: Option<(Way, usize)>,
    /// New connections are closed at once.
    is_shut: bool,
    /// What the present connection has carried forth.
    forth: Vec<u8>,
    /// Connections so far.
    connections: usize,
}

struct Shared {
    target: SocketAddr,
    plan: Mutex<Plan>,
    frozen: watch::Sender<bool>,
    severed: watch::Sender<()>,
}

/// A running relay; dropping it closes its door.
pub struct Relay {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    door: JoinHandle<()>,
}

impl Relay {
    /// A relay to `target`.
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            target,
            plan: Mutex::default(),
            frozen: watch::Sender::new(false),
            severed: watch::Sender::new(()),
        });
        let door = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                while let Ok((near, _)) = listener.accept().await {
                    let shared = Arc::clone(&shared);
                    let mut severed = shared.severed.subscribe();
                    tokio::spawn(async move {
                        tokio::select! {
                            () = relay(near, &shared) => {}
                            _ = severed.changed() => {}
                        }
                    });
                }
            }
        });
        Relay {
            address,
            shared,
            door,
        }
    }

    /// Cuts each connection from here on after `bytes` this way; `None`: cuts none.
    pub fn cut(&self, cut: Option<(Way, usize)>) {
        self.shared.plan.lock().unwrap().cut = cut;
    }

    /// Ends every connection.
    pub fn sever(&self) {
        self.shared.severed.send_replace(());
    }

    /// Lets nobody in, or everybody again.
    pub fn shut(&self, is_shut: bool) {
        self.shared.plan.lock().unwrap().is_shut = is_shut;
    }

    /// Stops passing anything on while connections stay open, or goes on.
    pub fn freeze(&self, is_frozen: bool) {
        self.shared.frozen.send_replace(is_frozen);
    }

    /// What the latest connection has carried forth.
    pub fn forth(&self) -> Vec<u8> {
        self.shared.plan.lock().unwrap().forth.clone()
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.shared.plan.lock().unwrap().connections
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.door.abort();
        self.sever();
    }
}

async fn relay(mut near: TcpStream, shared: &Shared) {
    {
        let mut plan = shared.plan.lock().unwrap();
        if plan.is_shut {
            return;
        }
        plan.connections += 1;
        plan.forth.clear();
    }
    let Ok(mut far) = TcpStream::connect(shared.target).await else {
        return;
    };
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    let mut frozen = shared.frozen.subscribe();
    let (mut from_near, mut from_far) = (vec![0; 16 * 1024], vec![0; 16 * 1024]);
    let (mut forth, mut back) = (0, 0);
    loop {
        if frozen.wait_for(|frozen| !frozen).await.is_err() {
            return;
        }
        let (way, read) = tokio::select! {
            _ = frozen.changed() => continue,
            read = near.read(&mut from_near) => (Way::Forth, read),
            read = far.read(&mut from_far) => (Way::Back, read),
        };
        let Ok(read @ 1..) = read else {
            return;
        };
        if frozen.wait_for(|frozen| !frozen).await.is_err() {
            return;
        }
        let (bytes, passed, out) = match way {
            Way::Forth => (&from_near[..read], &mut forth, &mut far),
            Way::Back => (&from_far[..read], &mut back, &mut near),
        };
        let cut = match shared.plan.lock().unwrap().cut {
            Some((cut, at)) if cut == way => at.saturating_sub(*passed),
            _ => usize::MAX,
        };
        let bytes = &bytes[..read.min(cut)];
        *passed += bytes.len();
        if way == Way::Forth {
            shared.plan.lock().unwrap().forth.extend_from_slice(bytes);
        }
        if out.write_all(bytes).await.is_err() || cut < read {
            return;
        }
    }
}
