"""The code of megalite/ stays readable: its figures are within the limits of
tests/code_density.py."""

from pathlib import Path

from tests.code_density import LIMITS, Figures, beyond_limits, measure

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = '''
"""A module."""
# A comment.
a, b = 1, 2
first, second = divmod(7, 2)
c = [x for x in range(3)] if a else sum(y for y in (1, 2))
print(1, 2, 3, 4, 5, 6)


class Public:
    """Documented."""

    def method(self):
        return 1

    def _private(self):
        return 2
'''


def test_the_package_is_within_the_limits():
    assert not beyond_limits(measure([ROOT / "megalite"]))


def test_each_figure_is_counted(tmp_path):
    (tmp_path / "sample.py").write_text(SAMPLE + "# " + "x" * 100 + "\n")
    lines = SAMPLE.count("\n") + 1
    per_thousand = 1000 / lines
    assert measure([tmp_path]) == Figures(
        lines=lines,
        statements=11,
        comprehensions=2 * per_thousand,
        conditional_expressions=per_thousand,
        tuple_assignments=per_thousand,
        long_calls=1000 / 4,
        wide_lines=per_thousand / 10,
        comment_lines=2 * (per_thousand / 10),
        longest_function=2,
        longest_file=lines,
        undocumented=1,
    )


def test_what_is_beyond_a_limit_is_named():
    figures = Figures(comment_lines=5, longest_file=501)
    assert beyond_limits(figures) == ["longest_file 501.0, the limit is 500"]
    assert beyond_limits(Figures()) == [
        f"comment_lines 0.0, the limit is {LIMITS['comment_lines']:g}"
    ]
