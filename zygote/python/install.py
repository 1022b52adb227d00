"""Installs a PackageSet's requirements into the staging directory that becomes the node cache.

Runs in the pool's init container. Its last line on standard error is what `kubectl describe` shows.
"""

import compileall
import errno
import os
import py_compile
import re
import shutil
import subprocess
import sys

UV = "/opt/sock/bin/uv"
REQUIREMENTS = "/etc/sock/requirements.txt"
STAGING = "/opt/sock/install"
TARGET = f"{STAGING}/site-packages"
CACHE = f"{STAGING}/.cache"
FULL = "no space is left on the disk of the node, which keeps packages below /var/lib/sock: make room there"


def main():
    try:
        run()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        fail(FULL)


def run():
    if sys.version_info < (3, 10):
        fail(f"sock needs Python 3.10 or newer; this image has {sys.version.split()[0]}")
    if os.environ.get("SOCK_CACHED") == "1":
        return
    if altered := os.environ.get("SOCK_ALTERED"):
        print(f"the node's cache is not what was installed ({altered}): installing anew", file=sys.stderr)
    lines = read_requirements()
    shutil.rmtree(TARGET, ignore_errors=True)
    os.makedirs(TARGET)
    if lines:
        install()
        # What is installed does not change: nothing is compared with its source, and equal sources give equal files.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        if not compileall.compile_dir(TARGET, quiet=2, workers=0, invalidation_mode=mode):
            # A file for another version of Python, as some packages carry, is compiled by nobody.
            print("some files of the packages do not compile", file=sys.stderr)
            # On a full disk none does, and what is installed now is never compiled again.
            probe()
    # uv's lock file is no package.
    try:
        os.unlink(os.path.join(TARGET, ".lock"))
    except FileNotFoundError:
        pass


def probe():
    path = os.path.join(TARGET, ".probe")
    with open(path, "wb") as file:
        file.write(bytes(1 << 16))
    os.unlink(path)


def read_requirements():
    try:
        with open(REQUIREMENTS, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        fail(f"{REQUIREMENTS} is missing: mount the PackageSet's requirements there")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{REQUIREMENTS}: {error}")
    return [line for line in lines if line and not line.startswith("#")]


def install():
    index = os.environ.get("SOCK_INDEX_URL")
    command = [
        UV, "pip", "install",
        "--require-hashes", "--only-binary", ":all:",
        "--python", sys.executable, "--target", TARGET,
        "--no-config", "--no-progress", "--color", "never", "--cache-dir", CACHE,
        # The cache is on the same file system: nothing is copied twice.
        "--link-mode", "hardlink",
        "-r", REQUIREMENTS,
    ]  # fmt: skip
    if index:
        command += ["--default-index", f"sock={index}"]
    # Settings of the image could name another index or turn off the check of hashes.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_", "VIRTUAL_ENV", "CONDA_"))}
    os.makedirs(CACHE, exist_ok=True)
    # Credentials never stand in an argument, which messages and /proc show.
    for name in ("USERNAME", "PASSWORD"):
        if secret := env.pop(f"SOCK_INDEX_{name}", ""):
            env[f"UV_INDEX_SOCK_{name}"] = secret
    env |= {"HOME": CACHE, "XDG_CACHE_HOME": CACHE, "TMPDIR": CACHE, "UV_PYTHON_DOWNLOADS": "never"}
    try:
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        fail(f"{UV}: {error}")
    shutil.rmtree(CACHE, ignore_errors=True)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        fail(reason(done.stderr, index))


def reason(text, index):
    """The one line that says what to mend, from what uv said over many."""
    flat = " ".join(re.sub(r"^[\s│├╰─▶×╭·]+", "", line) for line in text.splitlines() if line.strip())
    flat = re.sub(r"\s+", " ", flat)
    mismatch = re.search(r"Hash mismatch for `([^`]+)` Expected: (.*?) Computed: (.*?)(?: |$)(?!sha)", flat)
    if mismatch:
        name, expected, got = mismatch.groups()
        return f"requirement {name}: hash is {got.strip()}, expected {expected.strip()}"
    if os.strerror(errno.ENOSPC) in flat:
        return FULL
    source = index or "the default index"
    if re.search(r"hint: An index.*?(401 Unauthorized|lack of valid authentication)", flat):
        remedy = "name a Secret with username and password in spec.index.secretRef"
        return f"{source} wants credentials (401 Unauthorized): {remedy}"
    refused = re.search(r"hint: An index.*?returned an? (40[0-9] \w+)", flat)
    if refused:
        remedy = "check spec.index.url and the Secret of spec.index.secretRef"
        return f"{source} refuses access ({refused.group(1)}): {remedy}"
    unreachable = re.search(r"error: Request failed after .*?cause: Failed to fetch: (.*)", flat)
    if unreachable:
        why = unreachable.group(1).rpartition("cause: ")[2]
        return f"{source} cannot be reached: {why}"
    missing = re.search(
        r"(?:Because|because) (\S+?) was not found in the (?:package registry|provided package locations)", flat
    )
    if missing:
        return f"requirement {missing.group(1)}: not found in {source}"
    version = re.search(r"(?:Because|because) there is no version of (\S+)", flat)
    if version:
        return f"requirement {version.group(1)}: no such version in {source}"
    wheels = re.search(r"(?:Because|because) (\S+) has no (?:usable )?wheels", flat)
    if wheels:
        name = wheels.group(1)
        return f"requirement {name}: {source} has no wheel for this Python and platform, and sources are not built"
    unhashed = re.search(
        r"(?:all requirements must have a hash|all requirements must have their versions pinned).*?: (\S+)", flat
    )
    if unhashed:
        return f"requirement {unhashed.group(1)}: must be pinned with == and carry a --hash"
    return flat[flat.find("error: ") :].removeprefix("error: ") or "uv failed and said nothing"


def fail(message):
    print(f"sock install: {message}", file=sys.stderr)
    sys.exit(1)


# The processes that compile import this file too (Python 3.13 starts them by a fork server).
if __name__ == "__main__":
    main()
