"""What benchmarks leave behind: plain text on the terminal, and the same as JSON and PNG in a directory."""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Cell = str | float | int | None


class Report:
    """Text is printed as it comes and kept; `save` writes all of it with the command line and the machine."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        self.name = name
        self._began = time.monotonic()
        self._cpu_began = cpu_ticks()
        self._data: dict[str, Any] = {
            "benchmark": name,
            "command": " ".join(["python -m", f"bench.{name}", *argv]),
            "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": machine(),
            "text": [],
            "tables": {},
        }
        self.say(f"{self._data['command']}\n{_described(self._data['machine'])}")

    def say(self, text: str) -> None:
        """Print and keep a line."""
        print(text, flush=True)
        self._data["text"].append(text)

    def record(self, name: str, value: Any) -> None:
        """For the JSON only."""
        self._data[name] = value

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Print a table; in the JSON it is a list of mappings."""
        print(f"\n{title}\n{render(columns, rows)}\n", flush=True)
        self._data["tables"][title] = [dict(zip(columns, row, strict=True)) for row in rows]

    def save(self, directory: Path) -> Path:
        """Write DIRECTORY/name.json and return its path."""
        self._data["seconds"] = round(time.monotonic() - self._began, 1)
        self._data["machine"]["load_average_at_the_end"] = _load_average()
        steal = steal_share(self._cpu_began, cpu_ticks())
        self._data["machine"]["cpu_steal_share"] = steal
        if steal is not None:
            self.say(
                f"load average {_load_average()} at the end; {steal:.1%} of the machine's CPU time was stolen by others on its host"
            )
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps(_plain(self._data), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"written: {path}")
        return path


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean's 95 % confidence interval, by the normal approximation with Student's factor for few values."""
    if len(values) < 2:
        return -math.inf, math.inf
    factor = 1.96 + 2.4 / (len(values) - 1)  # within 3 % of Student's t from 4 values on
    margin = factor * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - margin, statistics.fmean(values) + margin


def render(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table in plain text: the first column to the left, the others to the right."""
    cells = [list(columns), *([_text(cell) for cell in row] for row in rows)]
    first, *others = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in cells]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def machine() -> dict[str, Any]:
    """What ran it: CPU, cores, load, versions, commit."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": _load_average(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "commit": _commit(),
    }


def _described(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['cpu']}, {facts['cores']} cores, load average {facts['load_average']}, Python {facts['python']}, "
        f"torch {facts['torch']}, commit {facts['commit'] or 'unknown'}"
    )


def cpu_model() -> str:
    """Its name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_ticks() -> tuple[int, int] | None:
    """Of all cores since the start: stolen by other guests of the host, and all there were; None where /proc/stat tells neither."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    except OSError:
        return None
    ticks = [
        int(field) for field in first[1:9]
    ]  # user, nice, system, idle, iowait, irq, softirq, steal; guests' are in user and nice
    return (ticks[7], sum(ticks)) if len(ticks) == 8 else None


def steal_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """Of the CPU time between two readings, 0 to 1; None where it isn't known."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*words: str) -> str:
        where = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        if not math.isfinite(cell):
            return str(cell)
        return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"
    return str(cell)


def _plain(value: Any) -> Any:
    """JSON has no infinity: such numbers are null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One curve: x, and its y with the range around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def draw_lines(
    path: Path, title: str, x_label: str, y_label: str, lines: Sequence[Line], levels: Mapping[str, float], top: float
) -> None:
    """Curves with shaded ranges, and named horizontal levels, up to `top`, as a PNG."""
    plot, figure, axes = _figure(title)
    for line in lines:
        (drawn,) = axes.plot(line.x, line.y, marker=".", label=line.name)
        axes.fill_between(line.x, line.low, line.high, alpha=0.2, color=drawn.get_color())
    for name, level in levels.items():
        axes.axhline(level, linewidth=0.8, linestyle="--", color="grey")
        axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="grey")
    axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, top))
    axes.set_xlim(left=0)
    axes.legend()
    _write(plot, figure, path)


def draw_spans(path: Path, title: str, x_label: str, y_label: str, spans: Sequence[tuple[int, float, float, int]]) -> None:
    """Rows of bars as a PNG: (row, start, length, number), coloured by number."""
    plot, figure, axes = _figure(title)
    colours = plot.get_cmap("tab10").colors
    for row in sorted({span[0] for span in spans}):
        own = [span for span in spans if span[0] == row]
        axes.broken_barh(
            [(start, length) for _, start, length, _ in own],
            (row - 0.4, 0.8),
            facecolors=[colours[number % len(colours)] for *_, number in own],
        )
    axes.set(xlabel=x_label, ylabel=y_label, yticks=sorted({span[0] for span in spans}))
    axes.invert_yaxis()
    _write(plot, figure, path)


def draw_bars(path: Path, title: str, panels: Mapping[str, Mapping[str, float]]) -> None:
    """One panel of horizontal bars for each measure, {measure: {name: value}}, as a PNG. The first one has all names."""
    plot, figure, axes = _figure(title, columns=len(panels))
    names = list(dict.fromkeys(name for values in panels.values() for name in values))[::-1]
    for number, (panel, (measure, values)) in enumerate(zip(axes if len(panels) > 1 else [axes], panels.items(), strict=True)):
        places = [place for place, name in enumerate(names) if name in values]
        bars = panel.barh(places, [values[names[place]] for place in places])
        panel.bar_label(bars, fmt="%.3g", fontsize=8)
        panel.margins(x=0.15)
        panel.set_title(measure, fontsize=9)
        panel.set_ylim(-0.6, len(names) - 0.4)
        panel.set_yticks(range(len(names)), labels=[""] * len(names) if number else names)
    _write(plot, figure, path)


def _figure(title: str, columns: int = 1) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(9 if columns == 1 else 4 + 3 * columns, 5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return pyplot, figure, axes


def _write(plot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plot.close(figure)
    print(f"written: {path}")


def command_line(argv: Sequence[str] | None) -> list[str]:
    """The words after the program's name."""
    return list(sys.argv[1:] if argv is None else argv)
