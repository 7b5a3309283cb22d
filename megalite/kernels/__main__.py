"""`python -m megalite.kernels`: which native kernels there are, and why others are missing."""

from megalite.kernels.native import report

if __name__ == "__main__":
    print("\n".join(report()))
