"""What the user watches while it runs: bars, and text as it is written."""

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import TextStreamer

from . import interrupt

out = Console(highlight=False)
bars = Console(stderr=True)


def progress(unit: str = "tokens", console: Console = bars) -> Progress:
    """Return bars that count in ``unit``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=console,
    )


class Stream(TextStreamer):
    """Shows a prompt and its continuation while it is generated, above a progress bar.

    Where the output is not a terminal the text is written as it comes, without the bar.
    """

    def __init__(self, tokenizer, title: str, prompt: str, new_tokens: int):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.written = ""
        self._shown = Text(prompt, style="dim")
        self._bar = progress(console=out)
        self._task = self._bar.add_task("generate", total=new_tokens)
        self._live = Live(Group(self._shown, self._bar), console=out, refresh_per_second=15)
        self._title, self._prompt = title, prompt

    def __enter__(self):
        out.rule(self._title, align="left", style="dim")
        if out.is_terminal:
            self._live.start()
        else:
            out.file.write(self._prompt)
        return self

    def __exit__(self, *_):
        if out.is_terminal:
            self._live.stop()
        out.file.write("\n")
        out.file.flush()

    def put(self, value):
        """Take the next ids from ``generate``; its first call carries the prompt."""
        interrupt.check()
        if not self.next_tokens_are_prompt:
            self._bar.advance(self._task)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        """Show a piece of text that no later token can change."""
        self.written += text
        if out.is_terminal:
            self._shown.append(text, style="not dim")
        else:
            out.file.write(text)
            out.file.flush()
