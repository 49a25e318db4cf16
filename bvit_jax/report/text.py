"""Numbers and tables as text."""

from collections.abc import Sequence


def short(count: float) -> str:
    """Returns a count with its unit, such as ``3.8222 G``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4f} {unit}"
    return f"{count:g}"


def megabytes(size: float) -> str:
    """Returns bytes as megabytes, 10^6, such as ``8.020 MB``."""
    return f"{size / 1e6:,.3f} MB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Returns aligned columns, the first ``left`` of them to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join(line(cells) for cells in (head, *rows))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
