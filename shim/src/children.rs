//! Ends of processes, and children that somebody waits for, so that reaping orphans leaves them alone.

use std::cell::RefCell;
use std::collections::HashSet;

thread_local! {
    static EXPECTED: RefCell<HashSet<i32>> = RefCell::default();
}

/// Whether somebody waits for this child.
#[must_use]
pub fn expected(pid: i32) -> bool {
    EXPECTED.with_borrow(|e| e.contains(&pid))
}

/// Whether a process is gone, or a zombie, whose children have another parent already (`exit_notify`, kernel/exit.c).
#[must_use]
pub fn has_ended(pid: i32) -> bool {
    // A process names itself as it likes, also in bytes that are no text.
    let Ok(stat) = std::fs::read(format!("/proc/{pid}/stat")) else {
        return true;
    };
    let name = stat.iter().rposition(|b| *b == b')');
    name.and_then(|end| stat.get(end + 2))
        .is_some_and(|state| b"ZX".contains(state))
}

/// A claim on a child, until dropped.
#[derive(Debug)]
pub struct Claim(i32);

impl Claim {
    /// Claims it.
    #[must_use]
    pub fn new(pid: i32) -> Self {
        EXPECTED.with_borrow_mut(|e| e.insert(pid));
        Self(pid)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        EXPECTED.with_borrow_mut(|e| e.remove(&self.0));
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::has_ended;

    #[test]
    fn a_zombie_has_ended_and_a_process_that_sleeps_has_not_whatever_its_name() {
        let rename = "import time; open('/proc/self/comm', 'wb').write(bytes([255]) + b') Z '); print(flush=True); time.sleep(1000)";
        for (program, arguments) in [("sleep", ["1000", "0"]), ("python3", ["-c", rename])] {
            let mut child = Command::new(program)
                .args(arguments)
                .stdout(std::process::Stdio::piped())
                .spawn()
                .expect(program);
            let pid = i32::try_from(child.id()).expect("a number");
            if program == "python3" {
                let mut line = [0u8; 1];
                let stdout = child.stdout.as_mut().expect("its output");
                std::io::Read::read_exact(stdout, &mut line).expect("its word");
            }
            assert!(!has_ended(pid), "{program}");
            child.kill().expect("a signal");
            while !has_ended(pid) {
                std::thread::yield_now();
            }
            child.wait().expect("its end");
            assert!(has_ended(pid), "{program}");
        }
    }
}
