"""The least a handler can do: it says which request it answers."""


def handler(event, context):
    return {"hello": event["query"]["request"]}
