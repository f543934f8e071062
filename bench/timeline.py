"""When each pipeline stage computed which plan: a file of it drawn, and the bubble, the share of time in which stages stood idle.

    python -m bench.timeline FILE [--from SECONDS] [--to SECONDS] [--out DIR]

FILE is what `rayline serve --timeline FILE` wrote: JSON lines {engine, epoch, stage, step, start, end, tokens}, unix times.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import options
from bench.report import Report, command_line, draw_spans

DRAWN = 400
"""Plans in a picture, at most."""


@dataclass(frozen=True)
class Span:
    """One plan in one stage, unix times in seconds."""

    stage: int
    step: int
    start: float
    end: float
    tokens: int


def bubble(spans: Iterable[Span], num_stages: int, start: float, end: float) -> float:
    """The share, 0 to 1, of the stages' time between `start` and `end` in which no plan was computed."""
    busy = sum(max(0.0, min(span.end, end) - max(span.start, start)) for span in spans)
    return 1.0 - busy / (num_stages * (end - start))


def read(path: Path) -> dict[tuple[str, int], list[Span]]:
    """Spans by (engine, epoch). Raises ValueError naming the line that is none."""
    found: dict[tuple[str, int], list[Span]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            span = Span(*(entry[name] for name in ("stage", "step", "start", "end", "tokens")))
            found.setdefault((entry["engine"], entry["epoch"]), []).append(span)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from None
    return found


def draw(path: Path, title: str, spans: Sequence[Span], start: float) -> None:
    """A row for each stage, a bar for each plan, coloured by plan, as a PNG; times count from `start`."""
    first = min(span.step for span in spans)
    shown = [span for span in spans if span.step < first + DRAWN]
    bars = [(span.stage, span.start - start, span.end - span.start, span.step) for span in shown]
    draw_spans(path, title, "seconds", "stage", bars)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--from", type=float, default=0.0, dest="start", help="seconds after the first plan (default: %(default)s)")
    parser.add_argument("--to", type=float, dest="end", help="seconds after the first plan (default: the end)")
    arguments = parser.parse_args(argv)
    try:
        lives = read(arguments.file)
    except (OSError, ValueError) as error:
        print(f"bench.timeline: {error}", file=sys.stderr)
        return 2
    report = Report("timeline", command_line(argv))
    rows = []
    for (engine, epoch), spans in sorted(lives.items()):
        zero = min(span.start for span in spans)
        start = zero + arguments.start
        end = max(span.end for span in spans) if arguments.end is None else zero + arguments.end
        stages = 1 + max(span.stage for span in spans)
        within = [span for span in spans if span.end > start and span.start < end]
        if not within or end <= start:
            continue
        plans = len({span.step for span in within})
        rows.append([f"{engine}, epoch {epoch}", stages, plans, end - start, bubble(within, stages, start, end)])
        draw(arguments.out / f"timeline-{engine}-{epoch}.png", f"{engine}, epoch {epoch}", within, start)
    report.table("stages", ["", "stages", "plans", "seconds", "bubble"], rows)
    report.save(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
