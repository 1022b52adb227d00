"""Says who answers: the pod, and the zygote that its process was forked from. Prints a line, and takes a moment."""

import sys
import time


def handler(event, context):
    request = event["query"]["request"]
    taken = []
    for _ in range(int(event["query"].get("megabytes", 0))):
        taken.append(b"x" * (1 << 20))
    print("request", request, flush=True)
    time.sleep(0.06)
    return {"request": request, "pod": context.pod, "zygote": getattr(sys, "zygote_of_benchmark", None)}
