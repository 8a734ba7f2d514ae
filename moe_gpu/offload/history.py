"""What a cache of experts remembers about use: the evidence that eviction policies rank by.

An expert is a *key*: its id within a layer where each layer has slots of its own, and
``layer * E + expert`` where all layers share one pool. Time is counted in steps of the expert's
own layer, so that ages are comparable although the layers of a pool take turns.

Shape suffixes: L layers of the table (1 where each layer has its own), E experts per layer.
"""

from collections.abc import Iterable, Sequence


class History:
    """Use of every key of one slot table.

    Attributes:
        num_layers, num_experts: L and E of the table.
        affinity: Decayed activation history of each key after the last step of its layer, as the
            route kernel keeps it.

    Args:
        num_layers: L, ``>= 1``.
        num_experts: E, ``>= 1``.
    """

    def __init__(self, num_layers: int, num_experts: int):
        self.num_layers, self.num_experts = num_layers, num_experts
        keys = num_layers * num_experts
        self.affinity: list[float] = [0.0] * keys
        self._steps_L = [0] * num_layers
        self._last_step = [0] * keys  # of the key's layer, 0 never
        self._uses = [0] * keys
        self._layer = num_layers - 1  # the layer that runs now, or ran last

    def touch(self, layer: int, keys: Iterable[int]) -> None:
        """Note that a new step of a layer needs these keys, resident or not."""
        self._layer = layer
        self._steps_L[layer] += 1
        step = self._steps_L[layer]
        for key in keys:
            self._last_step[key] = step
            self._uses[key] += 1

    def learn(self, layer: int, affinity_E: Sequence[float]) -> None:
        """Take over the affinity of a layer's experts."""
        first = layer * self.num_experts
        self.affinity[first : first + self.num_experts] = affinity_E

    def recall(self, layer: int, ages_E: Sequence[int], uses_E: Sequence[int]) -> None:
        """Take over what :meth:`age` and :meth:`uses` said of a layer's experts in another run."""
        first = layer * self.num_experts
        used = [age for age, uses in zip(ages_E, uses_E, strict=True) if uses]
        self._steps_L[layer] = 1 + max(used, default=-1)
        for key, (age, uses) in enumerate(zip(ages_E, uses_E, strict=True), start=first):
            self._last_step[key] = self._steps_L[layer] - age if uses else 0
            self._uses[key] = uses

    def age(self, key: int) -> int:
        """Return how many steps of its layer ago a key was last needed: 0 is the newest step.

        A key that was never needed is older than any other.
        """
        age = self._steps_L[key // self.num_experts] - self._last_step[key]
        return age if self._uses[key] else age + 1 + max(self._steps_L)

    def uses(self, key: int) -> int:
        """Return how many steps have needed a key."""
        return self._uses[key]

    def wait(self, key: int) -> int:
        """Return how many other layers run before the key's layer runs again, in [0, L)."""
        return (key // self.num_experts - self._layer - 1) % self.num_layers
