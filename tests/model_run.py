"""``nox -s model -- --minutes 60``: the models against the real thing, for as long as that, with new games each time.

Every round plays each machine of ``test_model_faults`` with a seed of its own, which is printed; ``--seed`` begins with
that one. A game that fails is shrunk and printed, and ends the run.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import time
from collections import Counter

from tests import test_model_faults
from tests.servers import valkey_server

_STEPS = 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="nox -s model --", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=None, help="that of a round that failed")
    parser.add_argument("--games", type=int, default=50, help="of each machine in a round")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    until = time.monotonic() + 60 * given.minutes
    played: Counter[str] = Counter()
    with valkey_server() as server:
        test_model_faults.OverRedis.server_process = server
        machines = [*(machine for machine, _ in test_model_faults.GAMES), test_model_faults.OverRedis]
        first = random.randrange(1 << 30) if given.seed is None else given.seed
        for round_ in range(1 << 30):
            for machine in machines:
                os.environ["MODEL_SEED"] = str(first + round_)
                test_model_faults.play(machine, games=given.games, steps=_STEPS)
                played[machine.__name__] += given.games
                if time.monotonic() > until:
                    games = ", ".join(f"{number} of {name}" for name, number in played.items())
                    print(f"no game failed: {games}, {_STEPS} steps each at most")
                    return 0
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main())
