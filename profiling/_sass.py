"""What a kernel costs as far as its machine code tells: instructions, and cycles of one warp.

NVIDIA's machine code says, instruction by instruction, how long the scheduler waits after it and
which outstanding results (scoreboards) it waits for before. With latencies assumed for those that
vary, the issue times of a lone warp follow. They leave out contention, caches and everything between
warps: they order versions of a kernel, and are no times.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# cycles until a result is there, by the first pattern that matches the opcode; Hopper, second-level
# cache missed. Measured by others for memory and shuffles, guessed to the nearest five for the rest
LATENCIES = [
    (r"LDG|ATOMG|ATOM\b", 550), (r"MEMBAR|ERRBAR|CCTL|FENCE", 400), (r"LDC", 35), (r"RED", 30),
    (r"LDS", 30), (r"S2R|S2UR", 25), (r"SHFL|MUFU|BAR", 25), (r"F2|I2F|POPC|FLO|STG|STS", 20),
]  # fmt: skip
_REDUX = 22
_OTHER = 12
_RELEASED = 20  # cycles until the registers that a store reads may be overwritten
_MOST_PATHS = 20_000
_LOOP = 20  # instructions: a shorter backward branch is no loop over rows


@dataclass(frozen=True)
class Instruction:
    """One instruction with its control fields."""

    text: str
    control: int  # bits 105 to 125 of the encoding

    @property
    def opcode(self) -> str:
        """Opcode with its modifiers."""
        words = self.text.split()
        return words[1] if words[0].startswith("@") else words[0]

    @property
    def may_be_skipped(self) -> bool:
        """Whether a predicate decides."""
        return self.text.startswith("@") or (
            self.opcode.startswith("BRA") and re.search(r"\bU?P\d", self.text) is not None
        )

    @property
    def stall(self) -> int:
        """Cycles until the next may issue."""
        return max(1, self.control & 15)

    @property
    def sets(self) -> list[tuple[int, int]]:
        """Scoreboards that this one holds, each with the cycles until it lets go."""
        written, read = (self.control >> 5) & 7, (self.control >> 8) & 7
        held = [(written, self.latency)] if written != 7 else []
        return held + ([(read, min(self.latency, _RELEASED))] if read != 7 else [])

    @property
    def waits(self) -> list[int]:
        """Scoreboards that it waits for."""
        return [board for board in range(6) if (self.control >> 11) >> board & 1]

    @property
    def latency(self) -> int:
        """Cycles assumed until its result is there."""
        if self.opcode.startswith("REDUX"):
            return _REDUX
        return next((c for pattern, c in LATENCIES if re.match(pattern, self.opcode)), _OTHER)


class Code:
    """The instructions of one kernel.

    Args:
        listing: What ``nvdisasm -hex -c`` prints.
    """

    def __init__(self, listing: str):
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        text = None
        for line in listing.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                self._labels[label[1]] = len(self.instructions)
            elif first := re.match(
                r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/", line
            ):
                text = first[1].strip()
            elif text and (second := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
                # the upper half of the encoding: bit 105 is its bit 41
                control = (int(second[1], 16) >> 41) & 0x1FFFFF
                self.instructions.append(Instruction(text, control))
                text = None

    @classmethod
    def of(cls, cubin: bytes) -> "Code":
        """Disassemble a kernel."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [TOOLS / "nvdisasm", "-hex", "-c", file.name]
            return cls(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def target(self, at: int) -> int | None:
        """Where the branch at an index leads; None: it is no branch."""
        instruction = self.instructions[at]
        label = re.search(r"`\((\.L_x_\d+)\)", instruction.text)
        if not instruction.opcode.startswith("BRA") or label is None:
            return None
        return self._labels[label[1]]

    def paths(self) -> list[tuple[int, int]]:
        """Return ``(cycles, instructions)`` of ways through, fewest cycles first; loops run once."""
        done = []
        open_ = [(0, 0, {}, 0)]  # where, cycle, scoreboards, instructions
        while open_:
            at, cycle, boards, count = open_.pop()
            while at < len(self.instructions):
                instruction, target = self.instructions[at], self.target(at)
                cycle = max([cycle, *(boards.get(board, 0) for board in instruction.waits)])
                count += 1
                for board, held in instruction.sets:
                    boards = boards | {board: max(boards.get(board, 0), cycle + held)}
                cycle += instruction.stall
                if not instruction.may_be_skipped and (
                    instruction.opcode.startswith("EXIT") or (target is not None and target <= at)
                ):
                    break
                at += 1
                if target is not None and target >= at:
                    if not instruction.may_be_skipped:
                        at = target
                    elif len(done) + len(open_) < _MOST_PATHS:
                        open_.append((target, cycle, boards, count))
            done.append((cycle, count))
        return sorted(done)

    def loop(self) -> int | None:
        """Return the instructions of the longest loop; None without one."""
        lengths = [
            at + 1 - target
            for at in range(len(self.instructions))
            if (target := self.target(at)) is not None and target <= at - _LOOP
        ]
        return max(lengths, default=None)

    def opcodes(self) -> Counter:
        """Count opcodes, without their modifiers."""
        return Counter(i.opcode.partition(".")[0] for i in self.instructions)
