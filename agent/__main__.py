"""``python3 -m agent serve``: the HTTP endpoint, and the run of a task beside it if one is given.

After its run the agent stays alive in state ``finished``. Exit status: 0 after SIGTERM or SIGINT, 2 for wrong
arguments, a wrong task file or a port in use.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from agent import __version__
from agent.brains import make_brain
from agent.errors import AgentError
from agent.events import DEFAULT_PORT, Events
from agent.http_api import Server, Service
from agent.llm import TIMEOUT_S, ModelClient
from agent.loop import Run
from agent.memory import Memory
from agent.prompting import load_prompt, task_text
from agent.task import Task, load_task
from agent.terminals import Terminals
from agent.tools import COMMAND_S, RECEIVE_S, Toolbox


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and serve."""
    parser = argparse.ArgumentParser(prog="agent", description="The agent of an AI system.")
    parser.add_argument("--version", action="version", version=__version__)
    serve = parser.add_subparsers(dest="verb", required=True).add_parser(
        "serve", help="serve, and run a task"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8100, help="port to listen on (default 8100)")
    serve.add_argument("--model-url", default="http://127.0.0.1:8000/v1", help="the model server's API")
    serve.add_argument("--model-timeout", type=float, default=TIMEOUT_S, help="seconds for one answer")
    serve.add_argument("--task", type=Path, help="task file (JSON); without one the agent is idle")
    serve.add_argument("--events", type=Path, default=DEFAULT_PORT, help=f"event port ({DEFAULT_PORT})")
    args = parser.parse_args(argv)
    try:
        return _serve(args)
    except (AgentError, OSError) as error:
        print(f"agent: {error}", file=sys.stderr)
        return 2


def _serve(args: argparse.Namespace) -> int:
    events = Events(args.events)
    client = ModelClient(args.model_url, args.model_timeout)
    system = Path.cwd()
    probe_tools = Toolbox(Terminals(system))
    run_tools = Toolbox(Terminals(system))
    try:
        service = Service(client, probe_tools)
        with Server(args.host, args.port, service) as server:
            if args.task is not None:
                task = load_task(args.task)
                run_tools = _toolbox(task, system)
                timeout_s = task.number("model_timeout_s", args.model_timeout)
                run = _prepare(task, ModelClient(args.model_url, timeout_s), run_tools, events, system)
                service.state = "working"
                threading.Thread(target=_work, args=(run, service), daemon=True).start()
            _until_signalled(server)
    except AgentError as error:
        events.emit("error", text=str(error))
        events.emit("end", text="error", data={"reason": "error", "steps": 0, "format_errors": 0})
        raise
    finally:
        run_tools.close()
        probe_tools.close()
        events.close()
    return 0


def _toolbox(task: Task, system: Path) -> Toolbox:
    command_s = task.number("command_s", COMMAND_S)
    return Toolbox(Terminals(system), command_s, task.number("receive_s", RECEIVE_S))


def _prepare(task: Task, client: ModelClient, tools: Toolbox, events: Events, system: Path) -> Run:
    """Everything a run needs, checked before it starts."""
    task = replace(task, task=task_text(task.task, task.targets))
    memory = Memory(load_prompt(task.prompt), task.task)
    return Run(task, make_brain(task, client, system), tools, memory, events)


def _work(run: Run, service: Service) -> None:
    run.run()
    service.state = "finished"


def _until_signalled(server: Server) -> None:
    """Serve until SIGTERM or SIGINT."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    asked.wait()
    server.shutdown()
    thread.join()


if __name__ == "__main__":
    sys.exit(main())
