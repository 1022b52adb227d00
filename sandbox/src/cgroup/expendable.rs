//! Processes that the kernel takes before all others when memory is short, as long as nobody needs them.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};

use super::Cgroup;
use crate::Result;
use crate::error::Step;

/// As readily as it can be (`OOM_SCORE_ADJ_MAX`, include/uapi/linux/oom.h).
const FIRST: i32 = 1000;

/// Each costs an open file meanwhile.
const MOST: usize = 16;

/// Processes of a cgroup that are killed first for want of memory: of the cgroup's own, of one above it, or of the machine.
#[derive(Debug, Default)]
pub struct Expendable(Vec<(File, i32)>);

impl Expendable {
    /// Those that are in the cgroup now, the first few of many; none may be running, or what it starts meanwhile is left out.
    /// Lowering the score again needs `CAP_SYS_RESOURCE` (proc_pid_oom_score_adj(5)).
    ///
    /// # Errors
    /// They cannot be listed, or the kernel refuses.
    pub fn make(cgroup: &Cgroup) -> Result<Expendable> {
        let opened: Vec<(i32, String, File)> = cgroup
            .processes()?
            .into_iter()
            .take(MOST)
            .filter_map(|pid| {
                let path = format!("/proc/{pid}/oom_score_adj");
                let file = OpenOptions::new().read(true).write(true).open(&path);
                // It has ended.
                Some((pid, path, file.ok()?))
            })
            .collect();
        // An open file stays that of the process, whoever has the number then: that it was the one meant is known if the number
        // is still listed.
        let listed = cgroup.processes()?;
        let mut expendable = Expendable::default();
        for (pid, path, mut file) in opened {
            let mut score = String::new();
            if !listed.contains(&pid) || file.read_to_string(&mut score).is_err() {
                continue;
            }
            let Some(score) = score.trim().parse().ok().filter(|score| *score < FIRST) else {
                continue;
            };
            match write(&file, FIRST) {
                Ok(()) => expendable.0.push((file, score)),
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => {
                    expendable.end()?;
                    return Err(error).at("write", path);
                }
            }
        }
        Ok(expendable)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// They are no more so than before. One that has ended is passed over.
    ///
    /// # Errors
    /// The kernel refuses, for one of them at least.
    pub fn end(self) -> Result<()> {
        let mut ended = Ok(());
        for (file, score) in self.0 {
            match write(&file, score) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                written => ended = ended.and(written.step("write", "oom_score_adj")),
            }
        }
        ended
    }
}

fn write(mut file: &File, score: i32) -> std::io::Result<()> {
    // In one call, whatever was read before: the file has no position (`oom_score_adj_write`, fs/proc/base.c).
    file.write_all(score.to_string().as_bytes())
}
