//! The holder: PID 1 of a PID namespace. It keeps the namespaces of a sandbox open and reaps what is
//! orphaned in them. No library, no heap, no thread: one page of code, so that a pod costs nothing.
//!
//! With an argument `last` it serves a zygote's PID namespace: after SIGTERM it ends as soon as the last of its
//! descendants has, not before (the end of a PID 1 kills all of its namespace). Without, SIGTERM ends it.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start:", "mov rdi, [rsp]", "and rsp, -16", "call {run}", "ud2", run = sym run);
#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start:", "ldr x0, [sp]", "bl {run}", "brk #0", run = sym run);

#[cfg(target_arch = "x86_64")]
mod number {
    pub const RT_SIGPROCMASK: usize = 14;
    pub const RT_SIGTIMEDWAIT: usize = 128;
    pub const WAIT4: usize = 61;
    pub const EXIT_GROUP: usize = 231;
    pub const PRCTL: usize = 157;
}
#[cfg(target_arch = "aarch64")]
mod number {
    pub const RT_SIGPROCMASK: usize = 135;
    pub const RT_SIGTIMEDWAIT: usize = 137;
    pub const WAIT4: usize = 260;
    pub const EXIT_GROUP: usize = 94;
    pub const PRCTL: usize = 167;
}

unsafe fn syscall(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the arguments are plain numbers or addresses of statics that outlive the call.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a as isize => result, in("x1") b, in("x2") c, in("x3") d, options(nostack));
    }
    result
}

const PR_SET_DUMPABLE: usize = 4;
const SIGTERM: isize = 15;
const SIGINT: isize = 2;
const ECHILD: isize = -10;
const WNOHANG: usize = 1;
static ALL: u64 = !0;

extern "C" fn run(arguments: usize) -> ! {
    let until_last = arguments > 1;
    let mut ending = false;
    // Where containers share its namespace they find it there, as a process of their own user: traced, it would be one
    // without their seccomp profile.
    // SAFETY: passes numbers.
    unsafe { syscall(number::PRCTL, PR_SET_DUMPABLE, 0, 0, 0) };
    // SAFETY: blocks every signal; a blocked signal is queued even for a PID 1 that has no handler.
    unsafe { syscall(number::RT_SIGPROCMASK, 0, &raw const ALL as usize, 0, 8) };
    loop {
        let mut reaped;
        loop {
            // SAFETY: no pointer but null is passed.
            reaped = unsafe { syscall(number::WAIT4, usize::MAX, 0, WNOHANG, 0) };
            if reaped <= 0 {
                break;
            }
        }
        if ending && (!until_last || reaped == ECHILD) {
            // SAFETY: ends the process.
            unsafe { syscall(number::EXIT_GROUP, 0, 0, 0, 0) };
        }
        // SAFETY: waits for any signal; neither information nor a timeout is asked for.
        let signal = unsafe { syscall(number::RT_SIGTIMEDWAIT, &raw const ALL as usize, 0, 0, 8) };
        if signal == SIGTERM || signal == SIGINT {
            ending = true;
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
