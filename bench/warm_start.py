"""A warm start of all three embedded servers, their programs set up already, until each has answered.

    python -m bench.warm_start [--rounds 5]

Ends with one JSON line. The goal is for processors that are free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from crossfade.embedded import EmbeddedServers

GOAL = 6.0


def warm_start() -> float:
    """Seconds until a set of servers of its own answers."""
    began = time.perf_counter()
    with EmbeddedServers(environ={}):
        return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    warm_start()  # the first one reads the programs from the disk, and sets them up where they are not
    seconds = [warm_start() for _ in range(rounds)]
    print("rounds: " + ", ".join(f"{each:.2f} s" for each in seconds), flush=True)
    median = statistics.median(seconds)
    print(
        json.dumps(
            {
                "figure": "warm start of all three servers",
                "value": round(median, 2),
                "unit": "s",
                "against": "a limit",
                "goal": f"< {GOAL}",
                "holds": median < GOAL,
            }
        )
    )
    return 0 if median < GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
