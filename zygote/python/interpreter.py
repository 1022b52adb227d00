"""Entry point of a Function's container when there is no zygote: becomes a leaf without a fork."""

import os
import sys

sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]


def main():
    if sys.version_info < (3, 10):
        sys.exit(f"sock needs Python 3.10 or newer; this image has {sys.version.split()[0]}")
    if sys.implementation.name != "cpython":
        sys.exit(f"sock needs CPython; this image has {sys.implementation.name}")
    try:
        libc = "glibc" if os.confstr("CS_GNU_LIBC_VERSION") else "musl"
    except (ValueError, OSError):
        # Only glibc knows its own version.
        libc = "musl"
    sys.path.insert(0, f"/opt/sock/lib/{libc}")
    try:
        import sock_zygote
    except ImportError as error:
        sys.exit(f"sock's extension for {libc} does not load in this image: {error}")
    del sys.path[0]
    sock_zygote.run_leaf(int(os.environ.pop("SOCK_CONTROL_FD", "3")))


main()
