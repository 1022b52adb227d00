//! What leaves print: each has pipes of its own, and whole lines of them go to the container's log.
//!
//! Leaves print at the same time. If they shared the container's stream, a line longer than `PIPE_BUF` would be torn
//! apart by another's (pipe(7)), and half a line of one that ends would stand before the next line of its neighbour.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::fchown;
use std::rc::Rc;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::io::ioctl_fionbio;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::async_fd::watch;

/// Bytes read at once, and held back at most for the end of a line.
const CHUNK: usize = 64 * 1024;
/// A longer line is written as it comes while others wait, up to this; then it is broken.
const LONGEST: usize = 4 << 20;
/// Others wait no longer than this for such a line to go on.
const STALLED: Duration = Duration::from_millis(50);
/// What an ended leaf has printed is written at once, unless nobody reads the log.
const DRAINED_WITHIN: Duration = Duration::from_secs(1);

/// The streams of a container, and what its leaves print into.
#[derive(Debug)]
pub struct Output {
    stdout: Rc<Sink>,
    stderr: Rc<Sink>,
    user: u32,
    /// The next leaf's, made ahead.
    ahead: RefCell<Option<(Streams, Copying)>>,
}

/// A leaf's ends: its standard output and standard error.
#[derive(Debug)]
pub struct Streams {
    /// For writing.
    pub stdout: OwnedFd,
    /// For writing.
    pub stderr: OwnedFd,
}

/// The copying of one leaf's streams, which goes on until nobody can write to them.
#[derive(Debug)]
pub struct Copying([JoinHandle<()>; 2]);

impl Output {
    /// Streams of a container whose leaves run as `user`.
    ///
    /// # Errors
    /// They cannot be watched.
    pub fn new(stdout: OwnedFd, stderr: OwnedFd, user: u32) -> io::Result<Output> {
        Ok(Output {
            stdout: Rc::new(Sink::new(stdout)?),
            stderr: Rc::new(Sink::new(stderr)?),
            user,
            ahead: RefCell::default(),
        })
    }

    /// Streams for a leaf. They are copied from now on.
    ///
    /// # Errors
    /// The kernel has no more pipes.
    pub fn open(&self) -> io::Result<(Streams, Copying)> {
        match self.ahead.take() {
            Some(streams) => Ok(streams),
            None => self.make(),
        }
    }

    /// Makes those of the next leaf ahead.
    pub fn prepare(&self) {
        if self.ahead.borrow().is_none() {
            self.ahead.replace(self.make().ok());
        }
    }

    fn make(&self) -> io::Result<(Streams, Copying)> {
        let (stdout, out) = self.pipe(&self.stdout)?;
        let (stderr, err) = self.pipe(&self.stderr)?;
        Ok((Streams { stdout, stderr }, Copying([out, err])))
    }

    fn pipe(&self, sink: &Rc<Sink>) -> io::Result<(OwnedFd, JoinHandle<()>)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // So that a process that is not root can open /dev/stdout again.
        fchown(&write, Some(self.user), None)?;
        ioctl_fionbio(&read, true)?;
        let from = watch(read, Interest::READABLE)?;
        let task = tokio::task::spawn_local(copy(from, Rc::clone(sink)));
        Ok((write, task))
    }

    /// Writes a line of the shim's own to the container's standard error.
    pub async fn say(&self, line: &str) {
        self.stderr.write(format!("{line}\n").as_bytes()).await;
    }
}

impl Copying {
    /// After the end of the leaf: waits until all that it printed is in the log. If nobody reads that, the copying goes on
    /// by itself.
    pub async fn finish(self) {
        let all = async {
            for task in self.0 {
                let _ = task.await;
            }
        };
        let _ = tokio::time::timeout(DRAINED_WITHIN, all).await;
    }
}

/// A stream of the container. Whoever writes has its turn until a line is whole.
#[derive(Debug)]
struct Sink {
    to: To,
    turn: Mutex<()>,
}

#[derive(Debug)]
enum To {
    /// A FIFO.
    Watched(AsyncFd<OwnedFd>),
    /// A file, which never makes its writer wait.
    File(OwnedFd),
}

impl Sink {
    fn new(fd: OwnedFd) -> io::Result<Sink> {
        let file = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        let to = if matches!(
            file,
            rustix::fs::FileType::Fifo | rustix::fs::FileType::Socket
        ) {
            ioctl_fionbio(&fd, true)?;
            To::Watched(watch(fd, Interest::WRITABLE)?)
        } else {
            To::File(fd)
        };
        Ok(Sink {
            to,
            turn: Mutex::new(()),
        })
    }

    async fn write(&self, bytes: &[u8]) {
        let _turn = self.turn.lock().await;
        self.write_in_turn(bytes).await;
    }

    /// What cannot be written is dropped: a leaf must not hang because its log is gone.
    async fn write_in_turn(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let written = match &self.to {
                To::Watched(fd) => {
                    fd.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?))
                        .await
                }
                To::File(fd) => rustix::io::write(fd, bytes).map_err(io::Error::from),
            };
            match written {
                Ok(n) if n > 0 => bytes = &bytes[n..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }
}

/// Reads what there is, at most [`CHUNK`], to the end of `pending`. `false` when no more comes.
async fn read(from: &AsyncFd<OwnedFd>, pending: &mut Vec<u8>) -> bool {
    let read = from.async_io(Interest::READABLE, |fd| {
        // Only now: a leaf that prints nothing costs no buffer.
        pending.reserve_exact(CHUNK);
        Ok(rustix::io::read(fd, spare_capacity(pending))?)
    });
    matches!(read.await, Ok(n) if n > 0)
}

async fn copy(from: AsyncFd<OwnedFd>, sink: Rc<Sink>) {
    let mut pending = Vec::new();
    while read(&from, &mut pending).await {
        if let Some(end) = pending.iter().rposition(|&byte| byte == b'\n') {
            sink.write(&pending[..=end]).await;
            pending.drain(..=end);
        }
        if pending.len() >= CHUNK && !long_line(&from, &sink, &mut pending).await {
            break;
        }
        if pending.is_empty() {
            pending = Vec::new();
        } else {
            pending.shrink_to_fit();
        }
        // A leaf that prints without end must not stop the shim's other tasks.
        tokio::task::coop::consume_budget().await;
    }
    if !pending.is_empty() {
        pending.push(b'\n');
        sink.write(&pending).await;
    }
}

/// Writes a line that does not end, in one turn. What follows it stays in `pending`. `false` when no more comes.
async fn long_line(from: &AsyncFd<OwnedFd>, sink: &Sink, pending: &mut Vec<u8>) -> bool {
    let _turn = sink.turn.lock().await;
    let mut length = 0;
    loop {
        let end = pending.iter().position(|&byte| byte == b'\n');
        let part = end.map_or(pending.len(), |end| end + 1);
        sink.write_in_turn(&pending[..part]).await;
        pending.drain(..part);
        length += part;
        if end.is_some() {
            return true;
        }
        let more = match length < LONGEST {
            true => tokio::time::timeout(STALLED, read(from, pending))
                .await
                .ok(),
            false => None,
        };
        match more {
            Some(true) => {}
            ended => {
                sink.write_in_turn(b"\n").await;
                return ended.is_none();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read as _, Write as _};

    /// Runs `test` with an output whose both streams are one pipe, and yields what came out of it.
    fn printed<F: Future<Output = ()>>(test: impl FnOnce(Rc<Output>) -> F) -> String {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let reader = std::thread::spawn(move || {
            let mut text = Vec::new();
            File::from(read).read_to_end(&mut text).expect("read");
            String::from_utf8(text).expect("text")
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, async {
            let again = write.try_clone().expect("dup");
            let output = Output::new(write, again, rustix::process::getuid().as_raw());
            test(Rc::new(output.expect("an output"))).await;
        });
        drop(local);
        reader.join().expect("the reader")
    }

    /// Prints from a thread of its own, as a leaf would from a process.
    fn print(streams: Streams, text: Vec<u8>, piece: usize) -> std::thread::JoinHandle<()> {
        std::thread::spawn(move || {
            let mut stdout = File::from(streams.stdout);
            for part in text.chunks(piece) {
                stdout.write_all(part).expect("write");
            }
        })
    }

    async fn leaf(output: &Output, text: impl Into<Vec<u8>>, piece: usize) {
        let (streams, copying) = output.open().expect("streams");
        let thread = print(streams, text.into(), piece);
        for task in copying.0 {
            task.await.expect("copied");
        }
        thread.join().expect("printed");
    }

    #[test]
    fn half_a_line_of_one_that_ends_is_a_line() {
        let text = printed(|output| async move {
            leaf(&output, "half", 10).await;
            leaf(&output, "whole\n", 10).await;
            output.say("sock: said").await;
        });
        assert_eq!(text, "half\nwhole\nsock: said\n");
    }

    #[test]
    fn lines_of_many_leaves_stay_whole_however_long() {
        let text = printed(|output| async move {
            let long = |name: char| format!("{}\n", String::from(name).repeat(1 << 20)).repeat(2);
            let short: String = (0..2000).map(|n| format!("line {n}\n")).collect();
            tokio::join!(
                leaf(&output, long('a'), 4096),
                leaf(&output, long('b'), 50_000),
                leaf(&output, short, 3),
            );
        });
        let mut lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2004);
        lines.retain(|line| !line.starts_with("line "));
        assert_eq!(lines.len(), 4);
        for line in lines {
            let first = &line[..1];
            assert!(line.len() == 1 << 20 && line.matches(first).count() == 1 << 20);
        }
        let short: Vec<&str> = text.lines().filter(|l| l.starts_with("line ")).collect();
        assert!(
            short
                .iter()
                .enumerate()
                .all(|(n, line)| *line == format!("line {n}")),
            "in their order"
        );
    }

    #[test]
    fn a_long_line_that_stalls_is_broken_and_others_go_on() {
        let text = printed(|output| async move {
            let (streams, copying) = output.open().expect("streams");
            let stalled = streams.stdout.try_clone().expect("dup");
            let thread = print(streams, vec![b'x'; CHUNK], CHUNK);
            leaf(&output, "neighbour\n", 10).await;
            leaf(&output, "neighbour\n", 10).await;
            thread.join().expect("printed");
            drop(stalled);
            copying.finish().await;
        });
        let neighbours = text.lines().filter(|line| *line == "neighbour").count();
        assert_eq!(neighbours, 2, "{}", text.len());
        assert_eq!(text.matches('x').count(), CHUNK);
    }

    #[test]
    fn a_line_without_end_is_broken_at_its_longest() {
        let text = printed(|output| async move {
            leaf(&output, vec![b'y'; LONGEST + CHUNK], CHUNK).await;
        });
        assert_eq!(text.matches('y').count(), LONGEST + CHUNK);
        assert!(text.lines().all(|line| line.len() <= LONGEST + CHUNK));
        assert!(text.lines().count() >= 2);
    }

    #[test]
    fn what_is_no_text_passes_as_it_is() {
        let text = printed(|output| async move {
            leaf(&output, b"\x00\x01\x7f\n".to_vec(), 2).await;
        });
        assert_eq!(text.as_bytes(), b"\x00\x01\x7f\n");
    }
}
