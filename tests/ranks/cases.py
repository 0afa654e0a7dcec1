"""Run on each rank: every case, or those that are named."""

from __future__ import annotations

import gradients
import sharing
from common import main

if __name__ == "__main__":
    main({**gradients.make(), **sharing.make()})
