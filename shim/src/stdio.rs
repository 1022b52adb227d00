//! Standard streams of containers.
//!
//! containerd gives FIFOs. A process gets them as they are, so nothing is copied and the shim is not in the way;
//! the shim keeps one other end of each open, so that a restart of containerd is a pause for the writer, not an end.
//! Only a terminal needs copying.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use oci_spec::runtime::{Process, Spec};
use sock_sandbox::Stdio;
use sock_sandbox::users::Users;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::time::Instant;

use crate::async_fd::watch;

/// Paths from containerd; empty: none.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    /// For reading.
    pub stdin: String,
    /// For writing.
    pub stdout: String,
    /// For writing.
    pub stderr: String,
    /// One pseudo terminal instead.
    pub terminal: bool,
}

/// Writes a line to the end of a pipe, if there is room for it: it is not waited for.
pub fn say(pipe: impl AsFd, line: &str) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let line = format!("sock: {line}\n");
    // A pipe that is writable takes this many bytes at once (pipe(7)).
    let room = line.len() <= libc::PIPE_BUF;
    let mut ready = [PollFd::new(&pipe, PollFlags::OUT)];
    if room && poll(&mut ready, Some(&Timespec::default())) == Ok(1) {
        let _ = rustix::io::write(&pipe, line.as_bytes());
    }
}

/// Ends that the shim keeps while the process lives.
#[derive(Debug, Default)]
pub struct Kept {
    stdin: Option<File>,
    _outputs: Vec<File>,
}

impl Kept {
    /// Lets the process see the end of its input once containerd has closed its side too.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }
}

/// containerd opens its side of a FIFO in the background. If it has not by then, no start waits for it any longer.
const READER_WITHIN: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Waits until containerd reads the output. What a process writes and closes before that is lost, and containerd, which
/// opens the FIFO after it, waits for a writer for ever.
///
/// To be kept until the process has its own ends: without a writer a reader sees an end.
pub async fn readers(paths: &Paths) -> Vec<File> {
    let until = Instant::now() + READER_WITHIN;
    let mut kept = Vec::new();
    for path in [&paths.stdout, &paths.stderr] {
        loop {
            let opened = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path);
            match opened {
                Ok(writer) => {
                    kept.push(writer);
                    break;
                }
                // Nobody reads.
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
                // There is none, or whoever opens it next tells.
                Err(_) => break,
            }
            if Instant::now() >= until {
                tracing::warn!(path, "nobody reads this output");
                break;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
    kept
}

fn output(path: &str, uid: u32, kept: &mut Kept) -> io::Result<Option<OwnedFd>> {
    if path.is_empty() {
        return Ok(None);
    }
    if let Some(file) = path.strip_prefix("file://") {
        if let Some(parent) = Path::new(file).parent() {
            std::fs::create_dir_all(parent)?;
        }
        return Ok(Some(
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(file)?
                .into(),
        ));
    }
    if path.contains("://") {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("{path}: only FIFOs and file:// are supported for output"),
        ));
    }
    if std::fs::metadata(path)?.file_type().is_fifo() {
        kept._outputs.push(
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)?,
        );
    }
    let file = OpenOptions::new().write(true).open(path)?;
    // So that a process that is not root can open /dev/stdout again.
    let _ = std::os::unix::fs::fchown(&file, Some(uid), None);
    Ok(Some(file.into()))
}

/// Who the user of a container's process is on the host: in a user namespace somebody else.
///
/// # Errors
/// The specification's mappings are none, or leave out a user or group of the process.
pub fn owner(spec: &Spec, process: &Process) -> Result<u32, sock_sandbox::Error> {
    let uid = process.user().uid();
    let Some(users) = Users::of(spec)? else {
        return Ok(uid);
    };
    users.check(process)?;
    Ok(users.uid(uid).unwrap_or(uid))
}

/// Opens the streams of a process of this user of the host.
///
/// # Errors
/// A path that cannot be opened, named.
pub fn open(paths: &Paths, uid: u32) -> io::Result<(Stdio, Kept)> {
    let named = |path: &str, r: io::Result<Option<OwnedFd>>| {
        r.map_err(|e| io::Error::new(e.kind(), format!("open {path}: {e}")))
    };
    let mut kept = Kept::default();
    let mut stdio = Stdio::default();
    if paths.terminal {
        return Ok((stdio, kept));
    }
    if !paths.stdin.is_empty() {
        let opened = (|| {
            // Both directions: with no writer yet the process would read an end that is none.
            kept.stdin = Some(
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(&paths.stdin)?,
            );
            Ok(Some(OwnedFd::from(
                OpenOptions::new().read(true).open(&paths.stdin)?,
            )))
        })();
        stdio.stdin = named(&paths.stdin, opened)?;
    }
    stdio.stdout = named(&paths.stdout, output(&paths.stdout, uid, &mut kept))?;
    stdio.stderr = named(&paths.stderr, output(&paths.stderr, uid, &mut kept))?;
    Ok((stdio, kept))
}

/// The master side of a process's terminal, copied to and from containerd's FIFOs.
#[derive(Debug)]
pub struct Console {
    master: Rc<AsyncFd<OwnedFd>>,
}

impl Console {
    /// Starts copying.
    ///
    /// # Errors
    /// A FIFO cannot be opened.
    pub fn attach(master: OwnedFd, paths: &Paths) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&master, true)?;
        let master = Rc::new(watch(master, Interest::READABLE | Interest::WRITABLE)?);
        if !paths.stdin.is_empty() {
            let from = pipe::OpenOptions::new()
                .read_write(true)
                .open_receiver(&paths.stdin)?;
            let master = Rc::downgrade(&master);
            tokio::task::spawn_local(async move {
                let mut buffer = vec![0; 16 * 1024];
                while from.readable().await.is_ok() {
                    match from.try_read(&mut buffer) {
                        Ok(0) => break,
                        Ok(n) => {
                            let Some(master) = master.upgrade() else {
                                break;
                            };
                            if write_all(&master, &buffer[..n]).await.is_err() {
                                break;
                            }
                        }
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                        Err(_) => break,
                    }
                }
            });
        }
        if !paths.stdout.is_empty() {
            let keep = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&paths.stdout)?;
            let to = pipe::OpenOptions::new().open_sender(&paths.stdout)?;
            let master = master.clone();
            tokio::task::spawn_local(async move {
                let mut buffer = vec![0; 16 * 1024];
                // The read fails with EIO when the last process has closed the terminal.
                while let Ok(n) = master
                    .async_io(Interest::READABLE, |fd| {
                        rustix::io::read(fd, &mut buffer).map_err(io::Error::from)
                    })
                    .await
                {
                    let mut rest = &buffer[..n];
                    if n == 0 {
                        break;
                    }
                    while !rest.is_empty() {
                        if to.writable().await.is_err() {
                            return;
                        }
                        match to.try_write(rest) {
                            Ok(n) => rest = &rest[n..],
                            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                            Err(_) => return,
                        }
                    }
                }
                drop(keep);
            });
        }
        Ok(Self { master })
    }

    /// Sets its size in characters.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(self.master.as_fd(), size)?)
    }
}

async fn write_all(to: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = to
            .async_io(Interest::WRITABLE, |fd| {
                rustix::io::write(fd, bytes).map_err(io::Error::from)
            })
            .await?;
        bytes = &bytes[n..];
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    /// As containerd does it, only later than usual.
    #[test]
    fn output_of_a_process_that_ends_before_anybody_reads_is_not_lost() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stdout");
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: makes a FIFO of that name.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let paths = Paths {
            stdout: path.to_str().unwrap().to_owned(),
            ..Paths::default()
        };
        let (read, all) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            let mut text = String::new();
            File::open(path).unwrap().read_to_string(&mut text).unwrap();
            read.send(text).unwrap();
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let readers = runtime.block_on(readers(&paths));
        let (streams, kept) = open(&paths, 0).unwrap();
        drop(readers);
        let mut process = File::from(streams.stdout.unwrap());
        process.write_all(b"said quickly").unwrap();
        drop((process, kept));
        let text = all.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(text, "said quickly");
    }
}
