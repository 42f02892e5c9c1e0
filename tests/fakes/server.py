"""A real server process with the fake laboratory: ``python server.py HOME CACHE [STEP_S] [void]``."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]

from api.server import serve
from appliance.host.paths import Paths
from tests.fakes.service import FakeLab


def main(argv: list[str]) -> None:
    """Serve until a signal comes; the order of what happened goes to ``HOME/order``."""
    paths = Paths(Path(argv[0]), Path(argv[1]))
    step_s = float(argv[2]) if len(argv) > 2 else 0.0
    order = paths.home / "order"

    def seal() -> None:
        bound = paths.api_socket.exists()
        order.write_text(f"sealed bound={bound} announced={paths.server_file.exists()}\n")

    def factory() -> FakeLab:
        lab = FakeLab(paths.bundles, step_s=step_s, void="void" in argv)
        end = lab.close

        def close() -> None:
            end()
            with order.open("a") as f:
                f.write(f"closed announced={paths.server_file.exists()}\n")

        lab.close = close  # type: ignore[method-assign]
        with order.open("a") as f:
            f.write("opened\n")
        return lab

    serve(factory, paths, port=0, seal=seal)


if __name__ == "__main__":
    main(sys.argv[1:])
