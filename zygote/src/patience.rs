//! A bound on how long the kernel may keep this thread where a tenant decides how long that is.
//!
//! A shim has one thread. Some calls have no form that does not wait: a notification is received while somebody else may
//! have taken it (seccomp_unotify(2)), and the close of a descriptor that a tenant has sent is that of a TCP
//! connection with `SO_LINGER` set to an hour (`sk_stream_wait_close`, net/core/stream.c). Both end at a signal.

use std::cell::OnceCell;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::time::Duration;

/// What such a call may take. It takes microseconds where nobody means harm.
pub(crate) const PATIENCE: Duration = Duration::from_millis(20);

thread_local! {
    static TIMER: OnceCell<Option<libc::timer_t>> = const { OnceCell::new() };
}

/// Once that is used up: a message can have hundreds of descriptors.
const IMPATIENCE: Duration = Duration::from_millis(1);

/// Runs `work` and has a signal (SIGALRM, which does nothing else) interrupt whatever it waits for in the kernel after
/// [`PATIENCE`], and what it waits for next after [`IMPATIENCE`] each.
pub(crate) fn bounded<T>(work: impl FnOnce() -> T) -> T {
    let timer = TIMER.with(|timer| *timer.get_or_init(make));
    set(timer, PATIENCE, IMPATIENCE);
    let result = work();
    set(timer, Duration::ZERO, Duration::ZERO);
    result
}

/// Runs `work` and interrupts whatever it waits for again and again, as where a tenant's process does not get to run.
#[cfg(test)]
pub(crate) fn pestered<T>(work: impl FnOnce() -> T) -> T {
    const AT_ONCE: Duration = Duration::from_micros(20);
    let timer = TIMER.with(|timer| *timer.get_or_init(make));
    set(timer, AT_ONCE, AT_ONCE);
    let result = work();
    set(timer, Duration::ZERO, Duration::ZERO);
    result
}

/// `None` if the kernel has no timer to give: then there is no bound.
fn make() -> Option<libc::timer_t> {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        extern "C" fn nothing(_: libc::c_int) {}
        // SAFETY: zero is a value of the structure: no flag, so that calls are not restarted, and an empty mask. The
        // handler touches nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as libc::sighandler_t;
            libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
        }
    });
    let mut timer = MaybeUninit::uninit();
    // SAFETY: zero is a value of the structure, and its members are set for SIGEV_THREAD_ID (timer_create(2)).
    let made = unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGALRM;
        event.sigev_notify_thread_id = libc::gettid();
        libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, timer.as_mut_ptr())
    };
    if made != 0 {
        tracing::warn!(error = %std::io::Error::last_os_error(), "no timer: a tenant may keep this process waiting");
        return None;
    }
    // SAFETY: written by the kernel.
    Some(unsafe { timer.assume_init() })
}

fn set(timer: Option<libc::timer_t>, first: Duration, then: Duration) {
    let Some(timer) = timer else { return };
    let time = |duration: Duration| libc::timespec {
        tv_sec: 0,
        tv_nsec: duration.subsec_nanos().into(),
    };
    let value = libc::itimerspec {
        it_interval: time(then),
        it_value: time(first),
    };
    // SAFETY: reads one structure. In a forked child, which has no timers, it fails and changes nothing.
    unsafe { libc::timer_settime(timer, 0, &raw const value, std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_call_that_would_wait_for_ever_ends() {
        let begin = Instant::now();
        // SAFETY: waits for a signal.
        bounded(|| unsafe { libc::pause() });
        assert!((PATIENCE..50 * PATIENCE).contains(&begin.elapsed()));
        let quiet = Instant::now();
        std::thread::sleep(5 * PATIENCE);
        assert!(quiet.elapsed() >= 5 * PATIENCE);
    }
}
