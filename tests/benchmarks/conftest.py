"""The benchmarks are no installed package: the repository's root is searched last, so installed packages still win."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
