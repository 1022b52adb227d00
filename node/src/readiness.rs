//! What the readiness probe asks for: a port that is open while the node is as it was asked for. A program that a probe runs
//! would cost every node a start by kubelet, containerd and runc every two seconds.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// As the manifest has it.
const PORT: u16 = 9117;

/// Closed at first.
pub struct Readiness {
    port: u16,
    open: Option<JoinHandle<()>>,
}

impl Default for Readiness {
    fn default() -> Self {
        Self {
            port: PORT,
            open: None,
        }
    }
}

impl Readiness {
    /// From here the node is ready.
    ///
    /// # Errors
    /// What bind(2) says.
    pub async fn open(&mut self) -> io::Result<()> {
        if self.open.as_ref().is_none_or(JoinHandle::is_finished) {
            let listener = self.listen().await?;
            self.open = Some(tokio::spawn(async move {
                // Who connects has learned all there is.
                loop {
                    if listener.accept().await.is_err() {
                        // Out of descriptors or memory, which others free.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }));
        }
        Ok(())
    }

    /// From here it is not.
    pub fn close(&mut self) {
        if let Some(task) = self.open.take() {
            task.abort();
        }
    }

    async fn listen(&self) -> io::Result<TcpListener> {
        // A machine may have no IPv6; where it has, this takes both.
        match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, self.port))).await {
            Ok(listener) => Ok(listener),
            Err(_) => TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, self.port))).await,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn the_port_is_open_while_the_node_is_ready() {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let mut readiness = Readiness { port, open: None };
        let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        connect().await.unwrap_err();
        for _ in 0..2 {
            readiness.open().await.unwrap();
            readiness.open().await.unwrap();
            for _ in 0..200 {
                connect().await.unwrap();
            }
            readiness.close();
            readiness.close();
            tokio::time::timeout(Duration::from_secs(10), async {
                while connect().await.is_ok() {
                    tokio::task::yield_now().await;
                }
            })
            .await
            .unwrap();
        }
    }
}
