"""Find and question whatever serves on this machine. Prints one JSON object.

Runs in the guest as root: ``python3 -I - QUESTION`` with QUESTION = {"prompt", "secret", "limit", "all", "kinds"}.
The secret goes into a file that the agent is asked to hash with its own tool. What serves here may be hostile:
it gets a share of the time and no more, and what it says is brought into the shape of an answer, so that no
server can keep another one's answer, or this one's absence, from being told. What it had no place or time to ask is
counted, so that an answer that is missing for that reason is not taken for one that does not exist.
"""

import concurrent.futures
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

question = json.loads(sys.argv[1])
SECRET = "/run/hotcell-probe"
NOT_ASKED = (22, 53)
LOOK_S = 12.0  # for a server to say what it is; all are asked side by side
OTHERS_S = 3.0  # for others to say what they are, once one has answered
ALL_S = question["all"]
MOST = 1 << 20
PORTS = 256
CANDIDATES = 4
began = time.monotonic()


def clean(value: object, limit: int) -> str:
    """Text that JSON can carry: half surrogate pairs become question marks."""
    return str(value).encode("utf-8", "replace").decode()[:limit]


def address(text: str) -> str:
    """Where to reach what listens at an address of /proc/net/tcp or tcp6."""
    words = [struct.pack("<I", int(text[i : i + 8], 16)) for i in range(0, len(text), 8)]
    name = socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)


def listeners() -> dict[int, tuple[str, int, int]]:
    """Listening TCP ports -> (address, pid, start time in clock ticks since boot)."""
    inodes: dict[str, int] = {}
    where: dict[int, str] = {}
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/net/{name}") as f:
                rows = f.read().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == "0A":
                host, _, number = fields[1].rpartition(":")
                inodes[fields[9]] = int(number, 16)
                where.setdefault(int(number, 16), address(host))
    found: dict[int, tuple[str, int, int]] = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            sockets = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            with open(f"/proc/{pid}/stat") as f:
                start = int(f.read().rpartition(")")[2].split()[19])
        except OSError:
            continue
        for inode, port in inodes.items():
            if f"socket:[{inode}]" in sockets and (port not in found or start < found[port][2]):
                found[port] = (where[port], int(pid), start)
    for port in inodes.values():
        found.setdefault(port, (where[port], 0, 0))
    return found


def ask(port: int, method: str, path: str, body: object, limit: float) -> tuple[int, Any]:
    """One request; status and parsed body."""
    connection = http.client.HTTPConnection(found[port][0], port, timeout=limit)
    try:
        data = json.dumps(body) if body is not None else None
        connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read(MOST))
    finally:
        connection.close()


def is_model(port: int) -> bool:
    status, value = ask(port, "GET", "/v1/models", None, LOOK_S)
    names[port] = value["data"][0]["id"] if status == 200 else None
    return isinstance(names[port], str)


def is_agent(port: int) -> bool:
    status, value = ask(port, "GET", "/health", None, LOOK_S)
    return status == 200 and value.get("agent") == "hotcell"


def logprobs_of(value: Any) -> list[float]:
    # Each row holds the prompt's own token, and may hold the likeliest one; ours never ranks above it.
    rows = value["choices"][0].get("prompt_logprobs") or []
    values = [max(row.values(), key=lambda x: x["rank"])["logprob"] for row in rows if row]
    if len(values) > 512 or not all(type(x) in (int, float) and -1e9 < x <= 0 for x in values):
        raise ValueError("log-probabilities that are none")
    return [float(x) for x in values]


def model(port: int) -> dict[str, object]:
    body = {
        "model": names[port],
        "prompt": question["prompt"],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    logprobs: list[float] = []
    try:
        status, value = ask(port, "POST", "/v1/completions", body, question["limit"])
        if status == 200:
            logprobs = logprobs_of(value)
        else:
            problems.append(f"{port} model: completions: status {status}: {str(value)[:300]}")
    except Exception as e:
        problems.append(f"{port} model: completions: {type(e).__name__}: {e}"[:300])
    _, pid, start = found[port]
    return {
        "port": port,
        "model": clean(names[port], 100),
        "logprobs": logprobs,
        "pid": pid,
        "process_start": start,
    }


def agent(port: int) -> dict[str, object]:
    with open(SECRET, "w") as f:
        f.write(question["secret"])
    os.chmod(SECRET, 0o644)
    body = {"tool": "EXECUTE_CMD", "command": f"sha256sum {SECRET}"}
    said = {"reply": "", "stdout": ""}
    for path, request, key in (
        ("/chat", {"message": question["prompt"]}, "reply"),
        ("/step", body, "stdout"),
    ):
        try:
            status, value = ask(port, "POST", path, request, question["limit"])
            said[key] = clean(value.get(key, ""), 2000) if status == 200 else ""
        except Exception as e:
            problems.append(f"{port} agent: {path}: {type(e).__name__}: {e}"[:300])
    _, pid, start = found[port]
    return {
        "port": port, "pid": pid, "process_start": start,
        "reply": said["reply"], "tool_result": said["stdout"][:200],
    }  # fmt: skip


def result(job: concurrent.futures.Future[Any], label: str, until: float) -> Any:
    """What a job came to by ``until``; None, and a problem noted, if to nothing."""
    try:
        return job.result(max(0.1, until - time.monotonic()))
    except Exception as e:
        problems.append(f"{label}: {type(e).__name__}: {e}"[:200])
        return None


def full(answer: dict[str, object]) -> bool:
    """Whether an answer holds what a probe is for; of an agent, the digest that only its tool could tell."""
    digest = hashlib.sha256(question["secret"].encode()).hexdigest()
    return bool(answer.get("logprobs")) or str(answer.get("tool_result")).startswith(digest)


def candidates(looks: dict[int, concurrent.futures.Future[bool]]) -> Iterator[int]:
    """Ports that turn out to be of a kind, as they turn out: most others never answer at all."""
    end = time.monotonic() + LOOK_S
    while looks:
        late = time.monotonic() >= end
        for port in [p for p, job in looks.items() if job.done()]:
            job = looks.pop(port)
            if job.exception() is None and job.result():
                yield port
        if late:  # what was found out while a candidate was questioned has been told, too
            return
        time.sleep(0.02)


def best(kind: str, ask_it: Callable[[int], dict[str, object]]) -> dict[str, object] | None:
    """The first full answer of a few candidates, else the answer of the lowest port."""
    look = is_model if kind == "model" else is_agent
    looks = {p: pool.submit(look, p) for p in asked}
    start = time.monotonic()
    answers: list[dict[str, object]] = []
    heard = set()
    for port in itertools.islice(candidates(dict(looks)), CANDIDATES):
        now = time.monotonic()
        until = min(began + ALL_S, now + 2.2 * question["limit"])
        answer = result(pool.submit(ask_it, port), f"{port} {kind}", until)
        if answer is not None or until - now >= question["limit"]:
            heard.add(port)
        if answer is not None:
            answers.append(answer)
            if full(answer):
                break
    done = bool(answers) and full(answers[-1])
    rest = {p: job for p, job in looks.items() if p not in heard}
    concurrent.futures.wait(
        rest.values(), max(0.0, start + (OTHERS_S if done else LOOK_S) - time.monotonic())
    )
    unasked[f"{kind}s"] = sum(j.done() and j.exception() is None and j.result() for j in rest.values())
    return answers[-1] if done else min(answers, key=lambda a: asked.index(int(str(a["port"]))), default=None)


found = listeners()
names: dict[int, Any] = {}  # port -> what a model server calls its model
problems: list[str] = []
ports = [p for p in sorted(found) if p not in NOT_ASKED]
asked = ports[:PORTS]
unasked = {"ports": len(ports) - len(asked), "models": 0, "agents": 0}
pool = concurrent.futures.ThreadPoolExecutor(2 * len(asked) + 2 * CANDIDATES)
ASK = {"model": model, "agent": agent}
replies = {kind: best(kind, ask_it) if kind in question["kinds"] else None for kind, ask_it in ASK.items()}
with contextlib.suppress(OSError):
    os.unlink(SECRET)
text = clean("; ".join(problems), 1000)
print(
    json.dumps({**replies, "listeners": sorted(found)[:200], "unasked": unasked, "problem": text}), flush=True
)
os._exit(0)  # a server that drips its answer keeps its thread, and must not keep us
