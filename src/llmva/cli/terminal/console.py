"""What a person sees: while a command works a live display or plain lines on stderr, then its results on stdout."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from llmva import progress
from llmva.cli.terminal.interrupt import was_interrupted
from llmva.cli.terminal.streams import PLAIN, Shown, discard, unicode
from llmva.errors import LlmvaError
from llmva.report.values import score, share

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmva.cli.options import Output

WHOLE = 400  # columns in a pipe, where lines may be long


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "prompts")
        return Text(f"{task.speed:.1f} {unit}/s" if task.speed and unit == "prompts" else "", style="dim")


class Display(progress.Progress):
    """Iteration, what it is doing, prompts a second, time left, and validation metrics so far."""

    def __init__(self, quiet: bool = False) -> None:
        stream: Any = Shown(sys.stderr)
        self.console = Console(stderr=True, file=stream, highlight=False)
        self.quiet = quiet
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and not quiet
        self.bars: Progress | None = None
        self.task: Any = None
        self.started, self.spent = time.monotonic(), 0.0
        self.stage_began: tuple[str, float, int] | None = None

    def __enter__(self) -> Display:
        if self.live:
            self.bars = Progress(
                SpinnerColumn("dots" if unicode(sys.stderr) else "line"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                _Count(),
                _Rate(),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
            )
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def stage(self, text: str, total: int = 0, unit: str = "prompts") -> Callable[[int], None]:
        if was_interrupted():  # and a library has swallowed it
            raise KeyboardInterrupt
        if self.bars is not None:
            if self.task is not None:
                self.bars.remove_task(self.task)
            task = self.task = self.bars.add_task(text, total=total or None, unit=unit)
            bars = self.bars
            return lambda n: bars.advance(task, n)
        if self.quiet or not total:
            return lambda n: None
        return self._lines(text, total, unit)

    def _lines(self, text: str, total: int, unit: str) -> Callable[[int], None]:
        """A line when the stage begins and every 30 seconds, for logs and notebooks."""
        began = said = time.monotonic()
        done = 0
        self.line(f"{text}, {total} {unit}" if unit == "prompts" else f"{text}, at most {total} {unit}")

        def on_progress(n: int) -> None:
            nonlocal done, said
            done += n
            now = time.monotonic()
            if now - said >= 30 and done < total:
                said = now
                rate = done / (now - began)
                left = duration((total - done) / rate)
                speed = f", {rate:.1f} {unit}/s, {left} left" if unit == "prompts" else ""
                self.line(f"  {done}/{total}{speed}")

        return on_progress

    def iteration(self, record: Mapping[str, Any], best: int, limit: int) -> None:
        if self.quiet:
            return
        t = record["iteration"]
        spent = time.monotonic() - self.started
        took, self.spent = spent - self.spent, spent
        mark = " *" if best == t else ""
        # how many iterations follow nobody knows: a run ends when nothing helps any more, long before its limit
        words = ", ".join(iteration_words(record))
        line = f"iteration {t}: validation {words}{mark}  ({duration(took)}, {duration(spent)} in all)"
        self.line(line)

    def line(self, text: str) -> None:
        """As it is: no markup, and in a log no line breaks that are not in the text."""
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def note(self, text: str) -> None:
        if not self.quiet:
            self.line(text)


def iteration_words(entry: Mapping[str, Any]) -> list[str]:
    """What an iteration's entry of run.json says, with the digits and units of the tables."""
    words = [f"F1 {score(entry['f1'])}", f"ASR {share(entry['asr'])}", f"ORR {share(entry['orr'])}"]
    if entry.get("kept") is not None:
        words.append(f"harmless text kept {share(entry['kept'])}")
    if entry.get("perplexity") is not None:
        words.append(f"perplexity ×{entry['perplexity']:.3f}")
    if entry.get("mean_angle") is not None:
        words.append(f"angle {entry['mean_angle']:.0f}°")
    return words


def show(output: Output, *items: RenderableType) -> None:
    """What a command found, for people: on stdout, on stderr where --json takes that, nowhere with --quiet.

    A table is as wide as the terminal, and whole in a pipe; a sentence is one line in a pipe.
    """
    if output.quiet:
        return
    stream: Any = sys.stderr if output.json else sys.stdout
    console = Console(file=io.StringIO(), force_terminal=stream.isatty(), highlight=False, width=_width(stream))
    for item in items:
        console.print(item, markup=False, soft_wrap=isinstance(item, str) and not stream.isatty())
    text = console.file.getvalue().removesuffix("\n")  # type: ignore[attr-defined]
    if not output.json:
        say(text if unicode(stream) else text.translate(PLAIN))
    else:
        Shown(stream).write(f"{text}\n")


def _width(stream: Any) -> int:
    """Columns of a terminal; more than any table needs where there is none."""
    if "COLUMNS" in os.environ or stream.isatty():
        return shutil.get_terminal_size().columns
    return WHOLE


def emit(result: Mapping[str, Any]) -> None:
    """The result of a command as one JSON object, alone on stdout."""
    say(json.dumps(result, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """Write a line to stdout, as `write`."""
    write(f"{text}\n")


def write(text: str) -> None:
    """Write to stdout at once, in UTF-8 whatever the locale says. Raises LlmvaError if it cannot be written there."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        if isinstance(error, BrokenPipeError):  # the reader wants no more, as `head` does
            sys.exit(1)
        raise LlmvaError(f"Standard output cannot be written ({error.strerror}): send it elsewhere.") from error


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
