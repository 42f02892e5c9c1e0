"""The command line called in this process, as a user calls it: exit status and what was printed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from appliance.cli import main
from appliance.host.paths import Paths


class Ran(NamedTuple):
    """What a call gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output, decoded."""
        return json.loads(self.out)


Cli = Callable[..., Ran]


def calling(paths: Paths, capsys: pytest.CaptureFixture[str]) -> Cli:
    """A caller on one home."""

    def call(*argv: str | Path) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(
                [
                    "--home",
                    os.fspath(paths.home),
                    "--cache",
                    os.fspath(paths.cache),
                    *(os.fspath(a) for a in argv),
                ]
            )
        return Ran(int(end.value.code or 0), *capsys.readouterr())

    return call
