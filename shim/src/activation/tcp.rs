//! How far a TCP connection has been written and read, whoever did it.
//!
//! The leaf and the shim hold the same connection. Whether the shim may still answer in the leaf's
//! place, or give the connection to another leaf, only the kernel can say: the leaf that knew is gone
//! or not to be believed.

use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::{Errno, ioctl_fionread};

/// The first members of `struct tcp_info` (include/uapi/linux/tcp.h), as far as they are used here.
/// The counters of bytes sent exist since Linux 4.19.
#[repr(C)]
struct TcpInfo {
    state: u8,
    _options: [u8; 7],
    _timers_to_total_retrans: [u32; 24],
    _pacing: [u64; 2],
    _bytes_acked: u64,
    bytes_received: u64,
    _segments: [u32; 2],
    notsent_bytes: u32,
    _min_rtt_to_data_segments: [u32; 3],
    _rates: [u64; 4],
    _delivered: [u32; 2],
    bytes_sent: u64,
    bytes_retrans: u64,
}

/// Values of `tcp_info.state` in which this side has not ended its half (include/net/tcp_states.h).
const ESTABLISHED: u8 = 1;
const CLOSE_WAIT: u8 = 8;

/// A point in the life of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Bytes that were written to the socket, whether sent already or not.
    written: u64,
    /// Bytes that were read from it, or fewer: what arrives while this is found out counts as read.
    read: u64,
    /// Whether more can be written.
    writable: bool,
}

impl Position {
    /// Where the connection is now.
    ///
    /// # Errors
    /// `ENOPROTOOPT` or `EOPNOTSUPP` when the socket is not TCP's, `EINVAL` on a kernel that does
    /// not count bytes.
    pub fn of(socket: impl AsFd) -> Result<Position, Errno> {
        let unread = ioctl_fionread(&socket)?;
        let info = tcp_info(&socket)?;
        Ok(Position {
            // Sent for the first time, and still to be sent. Both come from one moment: the kernel
            // fills the structure under the socket's lock.
            written: (info.bytes_sent - info.bytes_retrans.min(info.bytes_sent))
                + u64::from(info.notsent_bytes),
            read: info.bytes_received.saturating_sub(unread),
            writable: matches!(info.state, ESTABLISHED | CLOSE_WAIT),
        })
    }

    /// Whether anything was written between `earlier` and this, or this side has been shut: then an
    /// answer would come too late, or in the middle of another one.
    #[must_use]
    pub fn answered_since(&self, earlier: &Position) -> bool {
        self.written != earlier.written || !self.writable
    }

    /// Whether nobody has read or written since `earlier`. May say no when bytes came at that moment.
    #[must_use]
    pub fn untouched_since(&self, earlier: &Position) -> bool {
        self.written == earlier.written && self.writable && self.read <= earlier.read
    }
}

fn tcp_info(socket: impl AsFd) -> Result<TcpInfo, Errno> {
    let mut info = MaybeUninit::<TcpInfo>::zeroed();
    let size = size_of::<TcpInfo>();
    let mut len = libc::socklen_t::try_from(size).map_err(|_| Errno::INVAL)?;
    // SAFETY: the pointer and the length describe `info`, which outlives the call.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if rc != 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    if usize::try_from(len).map_err(|_| Errno::INVAL)? < size {
        return Err(Errno::INVAL);
    }
    // SAFETY: integers only, zeroed at first and then written by the kernel to the full length.
    Ok(unsafe { info.assume_init() })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        (client, listener.accept().expect("accept").0)
    }

    fn settle(socket: &TcpStream, until: impl Fn(&Position) -> bool) -> Position {
        for _ in 0..200 {
            let position = Position::of(socket).expect("position");
            if until(&position) {
                return position;
            }
            sleep(Duration::from_millis(5));
        }
        panic!("{:?}", Position::of(socket));
    }

    #[test]
    fn a_byte_written_by_whomever_is_seen() {
        let (mut client, mut server) = pair();
        let mark = Position::of(&server).expect("position");
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("write");
        server.read_exact(&mut [0; 4]).expect("read");
        assert!(
            !Position::of(&server)
                .expect("position")
                .answered_since(&mark)
        );
        let mut other_holder = server.try_clone().expect("dup");
        other_holder.write_all(b"H").expect("write");
        assert!(
            Position::of(&server)
                .expect("position")
                .answered_since(&mark)
        );
    }

    #[test]
    fn what_waits_in_a_full_buffer_counts_as_written() {
        let (_client, mut server) = pair();
        server.set_nonblocking(true).expect("nonblocking");
        while server.write(&[0; 65536]).is_ok() {}
        let mark = Position::of(&server).expect("position");
        assert!(
            !Position::of(&server)
                .expect("position")
                .answered_since(&mark),
            "nothing moves"
        );
        drop(_client);
    }

    #[test]
    fn an_answer_that_was_read_by_the_client_stays_counted() {
        let (mut client, mut server) = pair();
        let start = Position::of(&server).expect("position");
        server.write_all(&[7; 100_000]).expect("write");
        client.read_exact(&mut [0; 100_000]).expect("read");
        let mark = settle(&server, |p| p.written == start.written + 100_000);
        assert!(!settle(&server, |p| p.written == mark.written).answered_since(&mark));
    }

    #[test]
    fn a_connection_that_was_shut_cannot_be_answered() {
        let (_client, server) = pair();
        let mark = Position::of(&server).expect("position");
        server.shutdown(Shutdown::Write).expect("shutdown");
        assert!(
            Position::of(&server)
                .expect("position")
                .answered_since(&mark)
        );
    }

    #[test]
    fn a_client_that_ended_its_half_can_still_be_answered() {
        let (client, server) = pair();
        let mark = Position::of(&server).expect("position");
        client.shutdown(Shutdown::Write).expect("shutdown");
        sleep(Duration::from_millis(20));
        assert!(
            !Position::of(&server)
                .expect("position")
                .answered_since(&mark)
        );
    }

    #[test]
    fn reading_is_seen_and_peeking_is_not() {
        let (mut client, mut server) = pair();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("write");
        server.peek(&mut [0; 4]).expect("peek");
        let mark = Position::of(&server).expect("position");
        assert!(
            Position::of(&server)
                .expect("position")
                .untouched_since(&mark)
        );
        server.read_exact(&mut [0; 1]).expect("read");
        assert!(
            !Position::of(&server)
                .expect("position")
                .untouched_since(&mark)
        );
    }
}
