#!/usr/bin/env python
"""Starts megalite/programs/convert_checkpoint.py, of this checkout."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from megalite.programs.start import start

if __name__ == "__main__":
    start("convert_checkpoint")
