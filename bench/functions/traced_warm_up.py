"""Gives the zygote a name, which its leaves keep. Runs many times, in leaves that are forked ahead too."""

import secrets
import sys

if not hasattr(sys, "zygote_of_benchmark"):
    sys.zygote_of_benchmark = secrets.token_hex(8)
