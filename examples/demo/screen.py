"""What the user watches while it runs: bars, and text as it is written."""

from abc import ABC, abstractmethod

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import TextStreamer

from . import interrupt

out = Console(highlight=False)
bars = Console(stderr=True)

# a model can write what a terminal would obey; shown as its picture, as in ␛
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


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


class Writing(TextStreamer, ABC):
    """Shows text while ``generate`` writes it, above something that says how it goes.

    Where the output is not a terminal the text is written as it comes, and nothing else.

    Attributes:
        written: The text so far.
        tokens: How many that were.
    """

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.written, self.tokens = "", 0
        self._live: Live | None = None

    @abstractmethod
    def footer(self) -> RenderableType:
        """Return what stands below the text while it is written."""

    def text(self) -> Text:
        """Return the text as the terminal shows it."""
        return Text(self.written.translate(CONTROLS))

    def __enter__(self):
        if out.is_terminal:
            self._live = Live(
                console=out, get_renderable=self._frame, transient=True, refresh_per_second=15
            )
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live is not None:
            self._live.stop()  # takes the frame away; the whole text stays instead
            out.print(self.text())
        else:
            out.file.write("\n")
        out.file.flush()

    def put(self, value):
        """Take the next ids from ``generate``; its first call carries the prompt."""
        self.tokens += not self.next_tokens_are_prompt
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        """Show a piece of text that no later token can change."""
        self.written += text
        if not out.is_terminal:
            out.file.write(text)
            out.file.flush()

    def _frame(self) -> Group:
        """The end of the text, as much as the screen holds above the footer."""
        lines = self.text().wrap(out, out.width)
        return Group(*lines[-max(1, out.height - 4) :], self.footer())


class Stream(Writing):
    """A prompt and its continuation, above a progress bar; Ctrl-C ends it."""

    def __init__(self, tokenizer, title: str, prompt: str, new_tokens: int):
        super().__init__(tokenizer)
        self._bar = progress(console=out)
        self._task = self._bar.add_task("generate", total=new_tokens)
        self._title, self._prompt = title, prompt

    def __enter__(self):
        out.rule(self._title, align="left", style="dim")
        if not out.is_terminal:
            out.file.write(self._prompt)
        return super().__enter__()

    def put(self, value):
        """Take the next ids, unless Ctrl-C was pressed."""
        interrupt.check()
        super().put(value)
        self._bar.update(self._task, completed=self.tokens)

    def footer(self) -> RenderableType:
        """Return the bar."""
        return self._bar

    def text(self) -> Text:
        """Return the prompt and what follows it."""
        return Text.assemble((self._prompt, "dim"), super().text())
