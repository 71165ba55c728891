"""Studio, behind `make studio`: the page of `dit-accel demo` with the shipped pipelines; nothing is downloaded."""

from __future__ import annotations

import sys

from dit_accel.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
