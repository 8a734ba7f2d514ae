"""What was said so far, as the ids that the model reads, and the keys and values of them."""

from typing import NamedTuple

from transformers import DynamicCache, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from .errors import Refusal, one_line


class Turn(NamedTuple):
    """One exchange."""

    question: str
    answer: str
    ids: list[int]  # of both; with a chat template, of all that was said up to here


class History:
    """The conversation, within the model's context.

    With a chat template the ids are made from the messages, otherwise the text simply goes on.

    Args:
        tokenizer: With or without a chat template.
        config: Of the model.
        limit: Tokens that a prompt and its answer may have together.
    """

    def __init__(self, tokenizer: Tokenizer, config: PretrainedConfig, limit: int):
        self.has_template = tokenizer.chat_template is not None
        self.limit = limit
        self.turns: list[Turn] = []
        self._tokenizer, self._config = tokenizer, config
        self._cached: list[int] = []  # ids whose keys and values the cache has
        self._cache: DynamicCache | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.turns, self._cached, self._cache = [], [], None

    def prompt(self, question: str, new_tokens: int) -> tuple[list[int], int]:
        """Return the ids to continue, and how many of the oldest turns were dropped for room.

        More than needed is dropped, down to half the limit: the next turns then find their keys
        and values in the cache again.

        Raises:
            Refusal: The question alone has no room, or cannot be encoded; nothing changed.
        """
        room, turns = self.limit - new_tokens, self.turns
        ids = self._encode(turns, question)
        if len(ids) > room:
            while turns and len(ids) > room // 2:
                turns = turns[1:]
                ids = self._encode(turns, question)
        if len(ids) > room:
            raise Refusal(
                f"that has {len(ids):,} tokens, and with {new_tokens} for the answer the limit is "
                f"{self.limit:,}"
            )
        dropped = len(self.turns) - len(turns)
        self.turns = turns
        return ids, dropped

    def take_cache(self, ids: list[int]) -> DynamicCache:
        """Hand out keys and values of the longest known beginning of ``ids``.

        Causal attention makes them independent of what follows. Until :meth:`add` gives it back
        the history has no cache: what an error leaves in it is not trusted.
        """
        cache, cached = self._cache, self._cached
        self._cache, self._cached = None, []
        same = next((i for i, (a, b) in enumerate(zip(cached, ids, strict=False)) if a != b), None)
        shared = min(len(cached), len(ids)) if same is None else same
        shared = min(shared, len(ids) - 1)  # the model must be given one id at least
        if cache is not None and shared > 0:
            try:
                if shared < len(cached):
                    cache.crop(shared - len(cached))  # negative: so many less
                return cache
            except (RuntimeError, ValueError):
                pass  # a sliding window has let go of what would be needed
        return DynamicCache(config=self._config)

    def add(self, question: str, prompt: list[int], ids: list[int], cache: DynamicCache) -> None:
        """Note what the model wrote.

        Args:
            question: What the user said.
            prompt: What :meth:`prompt` returned for it.
            ids: Prompt and answer.
            cache: What :meth:`take_cache` returned, after ``generate``.
        """
        answer = self._tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        before = 0 if self.has_template else len(self._plain_ids(self.turns))
        self.turns.append(Turn(question, answer, ids[before:]))
        self._cache, self._cached = cache, ids[: cache.get_seq_length()]

    def _encode(self, turns: list[Turn], question: str) -> list[int]:
        """Return the ids of turns and question, for the model to continue."""
        if self.has_template:
            return self._template_ids(turns, question)
        ended = turns and (
            turns[-1].answer.endswith("\n") or turns[-1].ids[-1] == self._tokenizer.eos_token_id
        )
        line = question if ended or not turns else "\n" + question
        ids = self._tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise Refusal("the tokenizer makes no token of it")
        return self._plain_ids(turns) + ids

    def _plain_ids(self, turns: list[Turn]) -> list[int]:
        return sum((turn.ids for turn in turns), list(self._tokenizer("")["input_ids"]))

    def _template_ids(self, turns: list[Turn], question: str) -> list[int]:
        messages = []
        for turn in turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": question})
        try:
            encoding = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # a template is a program and raises what it likes
            raise Refusal(f"the chat template failed: {one_line(error)}") from None
        return list(encoding["input_ids"])
