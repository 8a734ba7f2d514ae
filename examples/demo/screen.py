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
        self._bar = progress(console=out)
        self._task = self._bar.add_task("generate", total=new_tokens)
        self._title, self._prompt = title, prompt
        self._live = Live(
            console=out, get_renderable=self._frame, transient=True, refresh_per_second=15
        )

    def __enter__(self):
        out.rule(self._title, align="left", style="dim")
        if out.is_terminal:
            self._live.start()
        else:
            out.file.write(self._prompt)
        return self

    def __exit__(self, *_):
        if out.is_terminal:
            self._live.stop()  # takes the frame away; the whole text stays instead
            out.print(self._text())
        else:
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
        if not out.is_terminal:
            out.file.write(text)
            out.file.flush()

    def _text(self) -> Text:
        return Text.assemble((self._prompt, "dim"), self.written)

    def _frame(self) -> Group:
        """The end of the text, as much as the screen holds above the bar."""
        lines = self._text().wrap(out, out.width)
        return Group(*lines[-max(1, out.height - 4) :], self._bar)
