//! Sockets for a leaf whose own network namespace is empty.
//!
//! The leaf's `socket(2)` of an Internet family or netlink stops as a seccomp notification
//! (seccomp_unotify(2)). The socket is made here, in the network namespace of this process, which is
//! the pod's, and put into the leaf in answer. Only the numbers in the registers are looked at, so
//! there is nothing a tenant could change between check and use.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fchown;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use crate::channel::watch;
use crate::error::{Error, Result, errno};
use crate::patience::{PATIENCE, bounded};

/// Answers the notifications of one leaf until its last process has ended. Sockets belong to the
/// user `uid` and group `gid`, as the host numbers them.
///
/// # Errors
/// [`Error::System`] when the listener fails, or when somebody else receives from it too; the leaf then gets `ENOSYS` for
/// every further socket, unless they answer it.
pub async fn inject_sockets(listener: OwnedFd, uid: u32, gid: u32) -> Result<()> {
    let listener = watch(listener)?;
    let owner = Owner {
        uid: Uid::from_raw(uid),
        gid: Gid::from_raw(gid),
    };
    loop {
        // Readiness takes nothing of a task's budget: a leaf that never stops asking must not stop the others.
        tokio::task::coop::consume_budget().await;
        let mut ready = listener.readable().await.map_err(Error::Watch)?;
        match pending(listener.get_ref())? {
            Pending::Some => bounded(|| answer(listener.get_ref(), &owner))?,
            Pending::None => ready.clear_ready(),
            Pending::Ended => return Ok(()),
        }
    }
}

/// How long a leaf may take to get a socket that is handed to it.
const TAKEN_WITHIN: Duration = Duration::from_millis(200);

enum Pending {
    Some,
    None,
    Ended,
}

/// The runtime's readiness is that of the past, and receiving blocks when there is nothing.
fn pending(listener: &OwnedFd) -> Result<Pending> {
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut fds, Some(&now)) {
        Err(Errno::INTR) => Ok(Pending::Some),
        Err(errno) => Err(Error::System {
            step: "look for notifications (poll)",
            errno,
        }),
        Ok(_) if fds[0].revents().contains(PollFlags::IN) => Ok(Pending::Some),
        Ok(_) if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) => Ok(Pending::Ended),
        Ok(_) => Ok(Pending::None),
    }
}

struct Owner {
    uid: Uid,
    gid: Gid,
}

/// Packages run before the leaf is confined, so theirs can keep a duplicate of its listener, and take the notification that
/// `pending` has seen: to receive then waits for the next, whatever the flags of the descriptor.
fn answer(listener: &OwnedFd, owner: &Owner) -> Result<()> {
    let begin = Instant::now();
    // SAFETY: the structure is plain integers, for which zero is a value; the kernel demands zeroes.
    let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the request writes one `struct seccomp_notif` to the pointer it is given.
    if unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_RECV as _,
            &mut notification,
        )
    } != 0
    {
        return match last() {
            // The process was killed, or a signal came: nobody waits for an answer.
            Errno::INTR if begin.elapsed() >= PATIENCE / 2 => Err(Error::System {
                step: "receive a notification, which somebody else has (SECCOMP_IOCTL_NOTIF_RECV)",
                errno: Errno::INTR,
            }),
            Errno::NOENT | Errno::INTR | Errno::AGAIN => Ok(()),
            errno => Err(Error::System {
                step: "receive a notification (SECCOMP_IOCTL_NOTIF_RECV)",
                errno,
            }),
        };
    }
    let made = Wanted::read(&notification.data).and_then(|wanted| {
        let socket = wanted.make()?;
        fchown(&socket, Some(owner.uid), Some(owner.gid))?;
        Ok((socket, wanted.close_on_exec))
    });
    match made {
        Ok((socket, close_on_exec)) => hand_over(listener, notification.id, &socket, close_on_exec),
        Err(errno) => respond(listener, notification.id, Err(errno)),
    }
}

/// A socket that a leaf may have.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    family: i32,
    kind: i32,
    protocol: i32,
    close_on_exec: bool,
}

impl Wanted {
    fn read(data: &libc::seccomp_data) -> Result<Wanted, Errno> {
        if i64::from(data.nr) != libc::SYS_socket {
            return Err(Errno::PERM);
        }
        // The kernel takes `int` arguments: the upper halves of the registers do not count.
        let int = |index: usize| {
            let [low @ .., _, _, _, _] = data.args[index].to_le_bytes();
            i32::from_le_bytes(low)
        };
        let (family, full, protocol) = (int(0), int(1), int(2));
        let kind = full & !(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
        match (family, kind, protocol) {
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, 0 | libc::IPPROTO_TCP)
            | (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, 0 | libc::IPPROTO_UDP)
            | (libc::AF_NETLINK, libc::SOCK_DGRAM | libc::SOCK_RAW, libc::NETLINK_ROUTE) => {}
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM | libc::SOCK_DGRAM, _)
            | (libc::AF_NETLINK, libc::SOCK_DGRAM | libc::SOCK_RAW, _) => {
                return Err(Errno::PROTONOSUPPORT);
            }
            (libc::AF_INET | libc::AF_INET6 | libc::AF_NETLINK, _, _) => return Err(Errno::PERM),
            _ => return Err(Errno::AFNOSUPPORT),
        }
        let kind = kind | (full & libc::SOCK_NONBLOCK) | libc::SOCK_CLOEXEC;
        Ok(Wanted {
            family,
            kind,
            protocol,
            close_on_exec: full & libc::SOCK_CLOEXEC != 0,
        })
    }

    fn make(&self) -> Result<OwnedFd, Errno> {
        // SAFETY: socket(2) takes three integers and yields a new descriptor or -1.
        let fd: RawFd = unsafe { libc::socket(self.family, self.kind, self.protocol) };
        if fd < 0 {
            return Err(last());
        }
        // SAFETY: the descriptor is new and belongs to nobody else.
        Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
    }
}

/// Adds, and then answers. The kernel can do both in one step (SECCOMP_ADDFD_FLAG_SEND), but when that is interrupted before the leaf has taken the
/// socket, the leaf is answered all the same: with 0, which it takes for its socket (`seccomp_notify_addfd`, kernel/seccomp.c).
fn hand_over(listener: &OwnedFd, id: u64, socket: &OwnedFd, close_on_exec: bool) -> Result<()> {
    let flags = if close_on_exec {
        libc::O_CLOEXEC.cast_unsigned()
    } else {
        0
    };
    let add = libc::seccomp_notif_addfd {
        id,
        flags: 0,
        srcfd: socket.as_raw_fd().cast_unsigned(),
        newfd: 0,
        newfd_flags: flags,
    };
    let begin = Instant::now();
    let added = loop {
        // SAFETY: the request reads one `struct seccomp_notif_addfd`.
        match unsafe {
            libc::ioctl(
                listener.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_ADDFD as _,
                &add,
            )
        } {
            // The leaf takes it when it runs, which it may not soon if it has used up its share of the processor.
            -1 if last() == Errno::INTR && begin.elapsed() < TAKEN_WITHIN => {}
            -1 => break Err(last()),
            fd => break Ok(fd),
        }
    };
    match added {
        Err(Errno::NOENT) => Ok(()),
        // If not: above all EMFILE, where the leaf has no room for another descriptor.
        other => respond(listener, id, other),
    }
}

fn respond(listener: &OwnedFd, id: u64, result: Result<i32, Errno>) -> Result<()> {
    let mut response = libc::seccomp_notif_resp {
        id,
        val: result.map_or(0, i64::from),
        error: result.err().map_or(0, |errno| -errno.raw_os_error()),
        flags: 0,
    };
    // SAFETY: the request reads one `struct seccomp_notif_resp`.
    if unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND as _,
            &mut response,
        )
    } == 0
    {
        return Ok(());
    }
    match last() {
        Errno::NOENT => Ok(()),
        errno => Err(Error::System {
            step: "answer a notification (SECCOMP_IOCTL_NOTIF_SEND)",
            errno,
        }),
    }
}

fn last() -> Errno {
    errno(&std::io::Error::last_os_error())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::patience::pestered;

    fn read(family: i32, kind: i32, protocol: i32) -> Result<Wanted, Errno> {
        let nr = i32::try_from(libc::SYS_socket).unwrap();
        let arg = |value: i32| u64::from(value.cast_unsigned());
        Wanted::read(&libc::seccomp_data {
            nr,
            arch: 0,
            instruction_pointer: 0,
            args: [arg(family), arg(kind), arg(protocol), 0, 0, 0],
        })
    }

    /// A listener of a thread that asks for nothing and lives on.
    fn listener() -> OwnedFd {
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // "Allow": BPF_RET | BPF_K, SECCOMP_RET_ALLOW.
            let mut filter = libc::sock_filter {
                code: 6,
                jt: 0,
                jf: 0,
                k: 0x7fff_0000,
            };
            let program = libc::sock_fprog {
                len: 1,
                filter: &raw mut filter,
            };
            // SAFETY: loads the one instruction for this thread.
            let fd = unsafe {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                libc::syscall(
                    libc::SYS_seccomp,
                    libc::SECCOMP_SET_MODE_FILTER,
                    libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                    &raw const program,
                )
            };
            tell.send(fd).unwrap();
            loop {
                std::thread::park();
            }
        });
        let fd = i32::try_from(told.recv().unwrap()).unwrap();
        assert!(fd >= 0);
        // SAFETY: new, and nobody else's.
        unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
    }

    #[test]
    fn a_notification_that_somebody_else_has_taken_is_not_waited_for() {
        let listener = listener();
        let owner = Owner {
            uid: Uid::ROOT,
            gid: Gid::ROOT,
        };
        let begin = Instant::now();
        let outcome = bounded(|| answer(&listener, &owner));
        assert!(matches!(outcome, Err(Error::System { .. })), "{outcome:?}");
        assert!(begin.elapsed() < Duration::from_secs(2));
    }

    /// A process that asks for so many sockets, and ends with the number of the first that is none, or 0. Yields its number and its listener.
    fn asking(times: i32) -> (libc::pid_t, OwnedFd) {
        // Whatever asks for a socket is told to wait, all else is allowed (seccomp_unotify(2)).
        let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let number = u32::try_from(libc::SYS_socket).unwrap();
        let mut filter = [
            instruction(0x20, 0, 0, 0),
            instruction(0x15, 0, 1, number),
            instruction(0x06, 0, 0, 0x7fc0_0000),
            instruction(0x06, 0, 0, 0x7fff_0000),
        ];
        let program = libc::sock_fprog {
            len: 4,
            filter: filter.as_mut_ptr(),
        };
        let mut ends = [0; 2];
        // SAFETY: the child makes system calls and nothing else.
        unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
            let pid = libc::fork();
            assert!(pid >= 0);
            if pid == 0 {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                let listener = libc::syscall(
                    libc::SYS_seccomp,
                    libc::SECCOMP_SET_MODE_FILTER,
                    libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                    &raw const program,
                );
                libc::write(ends[1], (&raw const listener).cast(), 8);
                let (mut kind, mut size): (libc::c_int, libc::socklen_t) = (0, 4);
                for time in 1..=times {
                    let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
                    let (level, name) = (libc::SOL_SOCKET, libc::SO_TYPE);
                    let into = (&raw mut kind).cast();
                    if libc::getsockopt(socket, level, name, into, &raw mut size) != 0 {
                        libc::_exit(time);
                    }
                    libc::close(socket);
                }
                libc::_exit(0);
            }
            let mut listener: libc::c_long = -1;
            assert_eq!(libc::read(ends[0], (&raw mut listener).cast(), 8), 8);
            libc::close(ends[0]);
            libc::close(ends[1]);
            let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            let own = libc::syscall(libc::SYS_pidfd_getfd, pidfd, listener, 0);
            libc::close(i32::try_from(pidfd).unwrap());
            let own = i32::try_from(own).unwrap();
            assert!(own >= 0);
            (pid, std::os::fd::FromRawFd::from_raw_fd(own))
        }
    }

    #[test]
    fn a_socket_is_one_however_long_its_leaf_takes_to_run() {
        let (pid, listener) = asking(100);
        let owner = Owner {
            uid: Uid::ROOT,
            gid: Gid::ROOT,
        };
        loop {
            match pending(&listener).unwrap() {
                Pending::Some => pestered(|| answer(&listener, &owner)).unwrap(),
                Pending::None => std::thread::sleep(Duration::from_micros(10)),
                Pending::Ended => break,
            }
        }
        let mut status = 0;
        // SAFETY: a child of this process.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert!(libc::WIFEXITED(status), "{status:x}");
        assert_eq!(libc::WEXITSTATUS(status), 0, "that one was none");
    }

    #[test]
    fn flags_of_the_caller_are_kept() {
        let wanted = read(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).unwrap();
        assert_eq!(
            wanted.kind,
            libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC
        );
        assert!(!wanted.close_on_exec);
    }

    #[test]
    fn raw_packet_and_foreign_protocols_are_refused() {
        assert_eq!(
            read(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
            Err(Errno::PERM)
        );
        assert_eq!(
            read(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
            Err(Errno::PROTONOSUPPORT)
        );
        assert_eq!(
            read(libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_SCTP),
            Err(Errno::PROTONOSUPPORT)
        );
        assert_eq!(
            read(libc::AF_PACKET, libc::SOCK_RAW, 0),
            Err(Errno::AFNOSUPPORT)
        );
        assert_eq!(
            read(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER),
            Err(Errno::PROTONOSUPPORT)
        );
    }
}
