"""A client of Functions that runs in a pod: one command a line on standard input, one answer a line, both JSON."""

import collections
import http.client
import json
import socket
import sys
import threading

connections = {}
silent = []
loads = {}


def answer(response):
    body = response.read().decode("utf-8", "backslashreplace")
    return {"status": response.status, "headers": dict(response.headers.items()), "body": body}


def connect(host, port, timeout):
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    connection.connect()
    # Otherwise a connection that the server has closed would be made anew, and nobody would see it.
    connection.auto_open = 0
    return connection


def once(host, port, path, method="GET", body=None, headers=None, timeout=30):
    connection = connect(host, port, timeout)
    try:
        connection.request(method, path, body, headers or {})
        return answer(connection.getresponse())
    finally:
        connection.close()


def raw(host, port, text, timeout=30):
    """Sends text as it is, and reads one answer."""
    with socket.create_connection((host, port), timeout) as connection:
        connection.sendall(text.encode("latin-1"))
        response = http.client.HTTPResponse(connection)
        response.begin()
        return answer(response)


def open_(name, host, port, timeout=30):
    connections[name] = connect(host, port, timeout)
    return True


def request(name, path, method="GET", body=None, headers=None):
    connections[name].request(method, path, body, headers or {})
    return answer(connections[name].getresponse())


def send(name, path):
    """Sends a request and leaves its answer for `receive`."""
    connections[name].request("GET", path)
    return True


def receive(name):
    return answer(connections[name].getresponse())


def silence(host, port, count):
    """Opens connections on which nothing is sent."""
    silent.extend(socket.create_connection((host, port), 10) for _ in range(count))
    return len(silent)


def speak(path):
    """The first silent connection sends a request after all."""
    connection = http.client.HTTPConnection("silent")
    connection.sock = silent.pop(0)
    connection.request("GET", path)
    return answer(connection.getresponse())


def burst(host, port, path, count):
    """Requests at once, each on a connection of its own."""
    answers = [None] * count

    def run(index):
        try:
            answers[index] = once(host, port, path, timeout=60)
        except OSError as error:
            answers[index] = {"status": 0, "headers": {}, "body": repr(error)}

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def load(name, host, port, path):
    """One request after the other, each on a connection of its own, until `stop`."""
    end = threading.Event()
    counts = collections.Counter()

    def run():
        while not end.is_set():
            try:
                found = once(host, port, path)
                key = str(found["status"])
                if found["status"] != 200:
                    key += " " + found["body"]
            except (OSError, http.client.HTTPException) as error:
                key = repr(error)
            counts[key] += 1

    # A test that fails does not say `stop`: the load ends with the client.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    loads[name] = (end, thread, counts)
    return True


def soak(name, host, port, kept=False, size=0, fail_every=0, pause=0.2):
    """Like `load`, with bodies of a size, and with every answer checked; every so many requests ask for a failure."""
    end = threading.Event()
    counts = collections.Counter()
    body = bytes(index % 251 for index in range(size))

    def ask(connection, number, fails):
        query = f"/?n={number}" + ("&fail=1" if fails else "")
        connection.request("POST", query, body, {})
        response = connection.getresponse()
        text = response.read()
        if fails:
            right = response.status == 500 and json.loads(text)["type"] == "ValueError"
        else:
            right = response.status == 200 and json.loads(text) == {"n": number, "sum": sum(body), "size": size}
        return ("right" if right else f"{response.status} {text[:200]!r}"), response.will_close

    def run():
        number, connection = 0, None
        while not end.is_set():
            number += 1
            try:
                connection = connection or connect(host, port, 30)
                found, closes = ask(connection, number, fail_every and number % fail_every == 0)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                found, closes = repr(error), True
            if connection and (closes or not kept):
                connection.close()
                connection = None
            counts[found] += 1
            end.wait(pause)
        if connection:
            connection.close()

    # A test that fails does not say `stop`: the load ends with the client.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    loads[name] = (end, thread, counts)
    return True


def count(name):
    return dict(loads[name][2])


def stop(name):
    end, thread, counts = loads.pop(name)
    end.set()
    thread.join()
    return dict(counts)


known = (once, raw, open_, request, send, receive, silence, speak, burst, load, soak, count, stop)
commands = {function.__name__.rstrip("_"): function for function in known}
for line in sys.stdin:
    command, arguments = json.loads(line)
    try:
        result = {"ok": commands[command](**arguments)}
    except (OSError, http.client.HTTPException) as error:
        result = {"error": repr(error)}
    print(json.dumps(result), flush=True)
