#!/usr/bin/env python
"""Starts megalite/programs/draw_schedule.py, of this checkout."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from megalite.programs.start import start

if __name__ == "__main__":
    start("draw_schedule")
