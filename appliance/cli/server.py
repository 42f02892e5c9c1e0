"""Find the running server, or start one for the length of a job."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from appliance.cli.client import Client, connect
from appliance.cli.common import HOST, LAB, USER, Options, Reporter
from appliance.config import (
    HostSettings,
    Library,
    find_settings_file,
    load_host_settings,
    load_library,
)
from appliance.errors import HostError, HotcellError, LabError, PrerequisiteError, UserError
from appliance.host import command
from appliance.host.paths import PROJECT, Paths
from appliance.host.prctl import PR_SET_PDEATHSIG, prctl
from appliance.service import HealthView, TrialRequest

# Opening the laboratory boots a micro guest to choose the accelerator; under load that takes a while.
START_S = 180.0
# The server stops its machines and removes what is its own before it ends.
STOP_S = 60.0
_BY_STATUS: dict[int, type[HotcellError]] = {USER: UserError, HOST: HostError, LAB: LabError}


def answers(options: Options) -> bool:
    """True if a server answers for these options."""
    try:
        with connect(options.paths, options.server, options.token_file) as client:
            client.get(HealthView, "health")
    except (HostError, UserError):
        return False
    return True


@contextmanager
def server(
    options: Options,
    report: Reporter,
    *,
    start: bool,
    keep: bool = False,
    wanted: TrialRequest | None = None,
) -> Iterator[Client]:
    """A client of the running server; with ``start`` one is started if there is none, and ended after.

    ``keep`` leaves a server that we started running. None is started for a ``wanted`` trial that it would refuse.

    Raises:
        PrerequisiteError: none runs and ``start`` is false, or it did not come up and did not say why.
        NotFoundError: there is no such subject, scenario or policy, or an image of theirs is not built.
        HotcellError: a settings or library file is wrong, or what a server that did not come up told.
    """
    child: command.Process[bytes] | None = None
    if start and options.server is None and not answers(options):
        child = _start(options, report, wanted, with_parent=not keep)
    try:
        with connect(options.paths, options.server, options.token_file) as client:
            yield client
    except BaseException:
        keep = False
        raise
    finally:
        if child is not None and not keep:
            report.now("stopping the server")
            command.end(child, grace=STOP_S)


def argv_of(options: Options, *, with_parent: bool) -> list[str | os.PathLike[str]]:
    """Command that serves these options; with ``with_parent`` it ends when this process does."""
    argv: list[str | os.PathLike[str]] = [sys.executable, "-m", "appliance.cli"]
    argv += ["--home", options.paths.home, "--cache", options.paths.cache]
    config = options.config or find_settings_file()  # named to it, since it gets none of our environment
    if config is not None:
        argv += ["--config", config.absolute()]
    argv += ["serve", "--port", "0"]
    return [*argv, "--parent", str(os.getpid())] if with_parent else argv


def require_known(request: TrialRequest, library: Library, settings: HostSettings, paths: Paths) -> None:
    """Look up all that a trial names, as a server would.

    Raises:
        NotFoundError: a subject, scenario, policy or image does not exist.
    """
    from appliance.pipeline.fleet import machines_for

    library.policy(request.policy)
    machines_for(library.subject(request.subject), library.scenario(request.scenario), settings, paths)


def _start(
    options: Options, report: Reporter, wanted: TrialRequest | None, *, with_parent: bool
) -> command.Process[bytes]:
    # Also read by the child; here first, since a slip in a file or a name is no reason to start anything.
    settings = load_host_settings(options.config)
    library = load_library(settings=settings)
    if wanted is not None:
        require_known(wanted, library, settings, options.paths)
    report.now("starting a server")
    options.paths.make()
    log = options.paths.server_log
    with fresh_log(log).open("wb") as f:
        child = command.spawn(
            argv_of(options, with_parent=with_parent),
            env={"PYTHONPATH": os.fspath(PROJECT)},
            stdout=f,
            stderr=f,
        )
    try:
        _wait(child, options, log)
    except BaseException:
        command.end(child, grace=STOP_S)
        raise
    return child


def fresh_log(log: Path) -> Path:
    """Put the log of the server before this one aside, as ``NAME.1``; returns ``log``, which is then free."""
    with suppress(FileNotFoundError):
        log.replace(log.with_name(f"{log.name}.1"))
    return log


def _wait(child: command.Process[bytes], options: Options, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise why_it_ended(child.returncode, _tail(log), log)
        if options.paths.server_file.exists() and answers(options):
            return
        time.sleep(0.1)
    raise PrerequisiteError(f"the server was not up after {START_S:.0f} s:\n{_tail(log)}", hint=f"see {log}")


def why_it_ended(status: int, said: str, log: Path) -> HotcellError:
    """The error that a server told before it ended; if it told none, the host is asked about. Pure."""
    _, told, error = f"\n{said}".rpartition("\nerror: ")
    kind = _BY_STATUS.get(status)
    if not told or kind is None:
        return PrerequisiteError(
            f"the server ended while starting, status {status}:\n{said}",
            hint=f"`hotcell doctor` tells what the host lacks; the whole log is {log}",
        )
    message, _, hint = error.partition("\nwhat to do: ")
    return kind(message.strip(), hint=hint.strip() or f"the server's whole log is {log}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:].strip()


def die_with_parent(parent: int) -> None:
    """Have the kernel send us SIGTERM when the process that started us ends, however it ends.

    Raises:
        HostError: the kernel refused.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise HostError("the process that started this server is gone")
