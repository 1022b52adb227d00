"""What a zygote imports over and over before its first fork, as its leaves import their handlers."""

import json


def handler(event, context):
    return {"hello": event["query"].get("name", "world"), "asked": json.loads(event["body"])}
