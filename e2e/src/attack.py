"""Tries to leave a sandbox, and says for each attempt with which error it failed, or what it got.

It runs as a Function's handler, as the warm-up of a zygote, and as the program of a pod. Each attempt has a
process of its own, so that what succeeds changes nothing for the next. x86_64 only. A warm-up has at most 8 KiB.
"""

import ctypes
import errno
import os
import select
import socket
import stat
import struct
import subprocess
import time

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
CLONE = {
    "user": 0x10000000,
    "mnt": 0x20000,
    "net": 0x40000000,
    "pid": 0x20000000,
    "cgroup": 0x2000000,
    "ipc": 0x8000000,
    "uts": 0x4000000,
    "time": 0x80,
}
BIND, REMOUNT, RDONLY = 4096, 32, 1


def call(number, *arguments):
    ctypes.set_errno(0)
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def mount(kind, target="/tmp", flags=0, source=b"none", data=None):
    # Where that is allowed, in a mount namespace of its own, so that nothing stays.
    if libc.syscall(272, CLONE["mnt"]) == 0:
        call(165, None, b"/", None, 0x44000, None)
    call(165, source, os.fsencode(target), kind, flags, data)


def lift(path):
    # mount_setattr that clears MOUNT_ATTR_RDONLY
    call(442, -100, os.fsencode(path), 0, struct.pack("4Q", 0, RDONLY, 0, 0), 32)


def write(path, text="0", flags=os.O_WRONLY):
    os.write(os.open(path, flags, 0o600), text.encode())


def read(path):
    # A masked file is empty.
    return os.read(os.open(path, os.O_RDONLY), 64) or "nothing"


def on_node(at="/"):
    return os.path.exists(os.path.join(at, "etc/kubernetes")) and "the node"


def out_of_chroot():
    inside = os.open("/", os.O_RDONLY)
    os.makedirs("/tmp/jail", exist_ok=True)
    os.chroot("/tmp/jail")
    os.fchdir(inside)
    for _ in range(32):
        os.chdir("..")
    os.chroot(".")
    return on_node() or "nothing"


def join(kind, whose):
    call(308, os.open(f"/proc/{whose}/ns/{kind}", os.O_RDONLY), CLONE[kind])


def trace(pid):
    # PTRACE_SEIZE, which does not stop it
    call(101, 0x4206, pid, 0, 0)


def setuid_file():
    names = [f"/usr/bin/{n}" for n in ("su", "passwd", "mount", "chfn")]
    names = [n for n in names if os.path.exists(n) and os.stat(n).st_mode & stat.S_ISUID]
    child = subprocess.Popen([names[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for _ in range(100):
        with open(f"/proc/{child.pid}/status") as file:
            users = next(line for line in file if line.startswith("Uid")).split()
        if os.getuid() != int(users[2]) == 0:
            child.kill()
            child.wait()
            return f"root by {names[0]}"
        if child.poll() is not None:
            break
        time.sleep(0.01)
    child.kill()
    child.wait()
    return "root anyway" if os.getuid() == 0 else "nothing"


def own_setuid_file():
    with open("/tmp/own", "w") as file:
        file.write("#")
    os.chown("/tmp/own", 0, 0)
    os.chmod("/tmp/own", 0o4755)


def others():
    # Processes that are neither of this program nor its ancestors inside of the namespace.
    mine, one = {1}, os.getpid()
    while one > 1:
        mine.add(one)
        with open(f"/proc/{one}/stat") as file:
            one = int(file.read().rsplit(")", 1)[1].split()[1])
    return [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if p not in mine]


def reached():
    found = []
    files = ("environ", "mem", "exe", "root", "ns/user")
    ways = {name: lambda pid, name=name: os.open(f"/proc/{pid}/{name}", os.O_RDONLY) for name in files}
    for pid in others():
        for name, way in {**ways, "ptrace": trace}.items():
            try:
                way(pid)
                found.append(f"{name} of {pid}")
            except OSError:
                pass
    return found or "nothing"


def signalled():
    found = []
    for pid in range(2, 4096):
        if pid != os.getpid() and pid != os.getppid():
            try:
                os.kill(pid, 0)
                found.append(pid)
            except OSError:
                pass
    return found or "nothing"


def descriptors():
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            os.close(os.open("../" * 16 + "etc/kubernetes", os.O_RDONLY, dir_fd=number))
            found.append(number)
        except OSError:
            pass
        try:
            link = os.readlink(f"/proc/self/fd/{number}")
            if number > 3 and (
                "/" in link and not link.startswith(("/dev/", "/proc/")) or "mnt" in link or "seccomp" in link
            ):
                found.append(link)
        except OSError:
            pass
    return found or "nothing"


def cgroup_write():
    done = []
    for path, _, files in os.walk("/sys/fs/cgroup"):
        for name in (
            "cgroup.procs",
            "release_agent",
            "devices.allow",
            "memory.limit_in_bytes",
            "cgroup.subtree_control",
        ):
            if name in files and os.access(os.path.join(path, name), os.W_OK):
                try:
                    os.close(os.open(os.path.join(path, name), os.O_WRONLY))
                    done.append(os.path.join(path, name))
                except OSError:
                    pass
    return done[:3] or "nothing"


def mounted_cgroup():
    mount(b"cgroup2")
    done = []
    for name in ("cgroup.procs", "cgroup.subtree_control", "cgroup.freeze", "memory.max", "pids.max"):
        try:
            os.close(os.open("/tmp/" + name, os.O_WRONLY))
            done.append(name)
        except OSError:
            pass
    try:
        os.mkdir("/tmp/hostile")
        os.rmdir("/tmp/hostile")
        done.append("mkdir")
    except OSError:
        pass
    return done or "nothing"


def forged():
    # The credentials of root, and of process 1.
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    b.setsockopt(socket.SOL_SOCKET, 16, 1)
    a.sendmsg([b"x"], [(socket.SOL_SOCKET, 2, struct.pack("3i", 1, 0, 0))])


def route():
    # RTM_NEWLINK: takes interface 1 down
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    s.send(struct.pack("IHHII", 32, 16, 5, 1, 0) + struct.pack("BxHiII", 0, 0, 1, 0, 1))
    code = struct.unpack_from("i", s.recv(4096), 16)[0]
    if code:
        raise OSError(-code, "")


def abstract():
    s = socket.socket(socket.AF_UNIX)
    s.connect("\0sock-hostile")


def uring():
    call(425, 4, ctypes.create_string_buffer(256))


def another_listener():
    # A seccomp filter of one instruction, "allow", with a listener.
    call(157, 38, 1, 0, 0, 0)
    filters = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
    call(317, 1, 8, struct.pack("HxxxxxxP", 1, ctypes.addressof(filters)))


def address():
    try:
        with open("/proc/1/maps") as file:
            return int(file.read().split("-")[0], 16)
    except OSError:
        return 0x400000


def memory():
    local = ctypes.create_string_buffer(8)
    call(310, 1, struct.pack("PN", ctypes.addressof(local), 8), 1, struct.pack("PN", address(), 8), 1, 0)


ATTEMPTS = {
    "chroot": lambda: os.chroot("/tmp"),
    "out of chroot": out_of_chroot,
    "pivot_root": lambda: call(155, b"/tmp", b"/tmp"),
    "mount tmpfs": lambda: mount(b"tmpfs"),
    "mount proc": lambda: mount(b"proc"),
    "mount sysfs": lambda: mount(b"sysfs"),
    "mount cgroup": lambda: mount(b"cgroup", data=b"none,name=hostile"),
    "mount cgroup2": lambda: mount(b"cgroup2"),
    "mount a device": lambda: mount(b"ext4", source=b"/dev/sda"),
    "remount /opt/sock": lambda: mount(None, "/opt/sock", BIND | REMOUNT),
    "remount packages": lambda: mount(None, "/opt/sock/site-packages", BIND | REMOUNT),
    "lift packages": lambda: lift("/opt/sock/site-packages"),
    "lift /proc/sys": lambda: lift("/proc/sys"),
    "unmask": lambda: call(166, b"/proc/timer_list", 2),
    "open_tree": lambda: call(428, -100, b"/", 1),
    "fsopen": lambda: call(430, b"tmpfs", 0),
    "write packages": lambda: write("/opt/sock/site-packages/owned.py", flags=os.O_WRONLY | os.O_CREAT),
    "write payload": lambda: write("/opt/sock/python/zygote.py", ""),
    **{f"unshare {kind}": lambda flag=flag: call(272, flag) for kind, flag in CLONE.items()},
    "clone user": lambda: call(56, CLONE["user"] | 17, 0, 0, 0, 0) or os._exit(0),
    "clone3 user": lambda: call(435, struct.pack("8Q", CLONE["user"], 0, 0, 0, 17, 0, 0, 0), 64) or os._exit(0),
    **{f"join {kind}": lambda kind=kind: join(kind, 1) for kind in ("mnt", "user", "net", "cgroup")},
    **{f"join own {kind}": lambda kind=kind: join(kind, "self") for kind in CLONE},
    "ptrace 1": lambda: trace(1),
    "memory of 1": memory,
    "open memory of 1": lambda: os.pread(os.open("/proc/1/mem", os.O_RDWR), 1, address()) and "memory",
    "environment of 1": lambda: read("/proc/1/environ"),
    "program of 1": lambda: os.open("/proc/1/exe", os.O_RDONLY),
    "write program of 1": lambda: os.open("/proc/1/exe", os.O_WRONLY),
    "root of 1": lambda: on_node("/proc/1/root") or (os.listdir("/proc/1/root"), "nothing")[1],
    "descriptor of 1": lambda: call(438, call(434, 1, 0), 0, 0),
    "other processes": lambda: others() or "nothing",
    "reach others": reached,
    "signal others": signalled,
    "descriptors": descriptors,
    "raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "ping socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1),
    "packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3),
    "netfilter": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12),
    "audit": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9),
    "vsock": lambda: socket.socket(40, socket.SOCK_STREAM),
    "link down": route,
    "x32 socket": lambda: call(0x40000000 | 41, 2, 1, 0),
    "abstract socket": abstract,
    "containerd": lambda: socket.socket(socket.AF_UNIX).connect("/run/containerd/containerd.sock"),
    "broker": lambda: os.listdir("/run/sock"),
    "forged credentials": forged,
    "setuid file": setuid_file,
    "own setuid file": own_setuid_file,
    "setresuid": lambda: os.setresuid(0, 0, 0),
    "setgroups": lambda: os.setgroups([0]),
    "capset": lambda: call(126, struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 1 << 21, 1 << 21, 0, 0, 0, 0)),
    "file capability": lambda: (
        write("/tmp/cap", flags=os.O_WRONLY | os.O_CREAT),
        os.setxattr("/tmp/cap", "security.capability", struct.pack("5I", 0x2000001, 1 << 21, 0, 0, 0)),
    ),
    "mknod": lambda: os.mknod("/tmp/sda", 0o600 | stat.S_IFBLK, os.makedev(8, 0)),
    "cgroup files": cgroup_write,
    "mounted cgroup files": mounted_cgroup,
    "sysctl": lambda: write("/proc/sys/kernel/core_pattern", "|/tmp/x"),
    "sysrq": lambda: os.open("/proc/sysrq-trigger", os.O_WRONLY),
    "kcore": lambda: read("/proc/kcore"),
    "keys": lambda: read("/proc/keys"),
    "timers": lambda: read("/proc/timer_list"),
    "kernel log": lambda: call(103, 3, ctypes.create_string_buffer(64), 64),
    "oom score": lambda: write("/proc/self/oom_score_adj", "-1000"),
    "/dev/mem": lambda: os.open("/dev/mem", os.O_RDWR),
    "/dev/kmsg": lambda: os.open("/dev/kmsg", os.O_RDWR),
    "/dev/fuse": lambda: os.open("/dev/fuse", os.O_RDWR),
    "firmware": lambda: os.listdir("/sys/firmware") or "nothing",
    "debugfs": lambda: os.listdir("/sys/kernel/debug") or "nothing",
    "bpf": lambda: call(321, 0, struct.pack("4I", 2, 4, 4, 1) + bytes(112), 128),
    "perf": lambda: call(298, struct.pack("IIQ", 1, 128, 0) + bytes(112), 0, -1, -1, 0),
    "userfaultfd": lambda: call(323, 0),
    "add_key": lambda: call(248, b"user", b"hostile", b"x", 1, -3),
    "keyctl": lambda: call(250, 0, -3, 0, 0, 0),
    "io_uring": uring,
    "module": lambda: call(313, -1, b"", 0),
    "kexec": lambda: call(320, -1, -1, 0, b"", 0),
    "open_by_handle": lambda: call(304, -100, bytes(16), 0),
    "fanotify": lambda: call(300, 0, 0),
    "reboot": lambda: call(169, 0xFEE1DEAD, 672274793, 0x0, 0),
    "clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
    "host name": lambda: socket.sethostname(socket.gethostname()),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -20),
    "real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "another listener": another_listener,
}


def attempt(work):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            got = work()
            text = "nothing" if got == "nothing" else f"got {got if isinstance(got, (str, list)) else ''}".strip()
        except OSError as error:
            text = errno.errorcode.get(error.errno, str(error))
        except BaseException as error:
            text = f"cannot be tried: {error!r}"
        os.write(theirs, text.encode())
        os._exit(0)
    os.close(theirs)
    ready = select.select([ours], [], [], 20)[0]
    text = os.read(ours, 4096).decode() if ready else "hangs"
    os.close(ours)
    os.kill(child, 9)
    try:
        os.waitpid(child, 0)
    except OSError:
        pass
    return text or "dies"


def attack():
    return {name: attempt(work) for name, work in ATTEMPTS.items()}
