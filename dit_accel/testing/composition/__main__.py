"""Run the matrix, write its record and the table in the docs.

python -m dit_accel.testing.composition [--groups NAME ...] [--new]
"""

from __future__ import annotations

import argparse
import time

import torch

from dit_accel.testing.composition import matrix, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="*", choices=matrix.GROUPS, default=[], help="the other cells stay recorded")
    parser.add_argument("--new", action="store_true", help="the cells alone that are not recorded yet")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for cell in matrix.cells(*arguments.groups):
        if arguments.new and cell.name in table.read():
            continue
        started = time.perf_counter()
        try:
            outcome = matrix.run(cell)
        except Exception as error:
            wrong += 1
            print(f"WRONG {cell.name}: {type(error).__name__} {' '.join(str(error).split())[:300]}", flush=True)
            continue
        table.write(table.read() | {cell.name: outcome})
        print(f"{time.perf_counter() - started:6.1f} s  {outcome.kind:16}  {cell.name}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
