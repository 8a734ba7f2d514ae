"""How the demo says no."""


class Refusal(Exception):
    """The user asked for something that cannot be done; the message is one sentence for them."""


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
