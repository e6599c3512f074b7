"""What the kernels of the compiled CUDA library are made of: registers, spills, and how wide they load and store.

Registers and spills are read from what the assembler says of each file (`csrc/build.py` keeps it), accesses to memory
from the machine code in the library. No GPU is needed, and neither Triton nor torch. Each of these readers raises
ValueError for a text that it does not understand: what is not seen must not pass for good.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """What the assembler says of a kernel for one architecture (such as 90), with the functions that it calls.

    ``stack``, ``spill_stores`` and ``spill_loads`` are bytes for each thread.
    """

    name: str
    arch: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Code:
    """The machine code of a kernel for one architecture: every address with its instruction, in order."""

    name: str
    arch: int
    instructions: dict[int, str] = field(repr=False)

    def accesses(self) -> Counter[Access]:
        """How many instructions there are of each kind of access to global memory."""
        looping = self.looping()
        found: Counter[Access] = Counter()
        for address, text in self.instructions.items():
            kind = access(text)
            if kind is not None:
                found[Access(*kind, address in looping)] += 1
        return found

    def looping(self) -> set[int]:
        """The addresses that can be reached from themselves."""
        return set().union(*_cycles(self._after()))

    def row_loop(self) -> int:
        """How many instructions the longest loop has, without those for a warp whose threads have come apart."""
        return max(map(len, _cycles(self._together())), default=0)

    def length(self) -> int:
        """How many instructions can be reached from the first one, without those for a warp that has come apart."""
        after = self._together()
        found: set[int] = set()
        left = list(after)[:1]
        while left:
            address = left.pop()
            if address not in found:
                found.add(address)
                left += after[address]
        return len(found)

    def _together(self) -> dict[int, list[int]]:
        """Where each instruction may go on while all threads of a warp are at the same one."""
        following = dict(itertools.pairwise(self.instructions))
        apart = [address for address, text in self.instructions.items() if _operation(text)[:2] == ["BRA", "DIV"]]
        return self._after() | {address: [following[address]] for address in apart}

    def _after(self) -> dict[int, list[int]]:
        """Where each instruction may go on. A call goes on behind it; what is called has addresses of its own."""
        addresses = list(self.instructions)
        following = dict(itertools.pairwise(addresses))
        meeting: dict[str, set[int]] = {}  # where the threads that were parted go on together
        for text in self.instructions.values():
            if match := re.search(r"\bBSSY(?:\.\w+)* (B\d+), (?:`\()?(0x[0-9a-f]+)", text):
                meeting.setdefault(match[1], set()).add(int(match[2], 16))
        found = {}
        tables = []  # a `switch` goes to an address out of a table, which is not in the text
        for address, text in self.instructions.items():
            operation = _operation(text)
            always = not text.startswith("@")
            to: list[int] = []
            if operation[0] in ("BRA", "JMP"):
                target = re.search(r"\b(0x[0-9a-f]+)\)?$", text)
                if target is None:
                    raise ValueError(f"a branch of {self.name} that is not understood: {text}")
                to = [int(target[1], 16)]
                always = always and not re.search(r"^(?:BRA|JMP)\S* !?U?P\w", text)  # as in `BRA.U !UP0, 0x5e0`
            elif operation[0] in ("BRX", "JMX", "BRXU", "JMXU"):
                tables.append(address)
            elif operation[0] == "BSYNC":
                barrier = re.search(r"\bB\d+", text)
                to = sorted(meeting.get(barrier[0] if barrier else "", ()))
                if following.get(address) in to:  # mostly the place is right behind
                    to = []
                always = bool(to)
            elif operation[0] not in ("EXIT", "RET", "KILL", "BPT"):
                always = False
            if not always and address in following:
                to = [*to, following[address]]
            unknown = [target for target in to if target not in self.instructions]
            if unknown:
                raise ValueError(f"a branch of {self.name} leaves it: {text}")
            found[address] = to
        if tables:  # to where nothing else goes
            called = {int(a, 16) for text in self.instructions.values() for a in re.findall(r"CALL\S* (0x\w+)", text)}
            cases = set(addresses[1:]).difference(called, *found.values())
            if not cases:
                raise ValueError(f"{self.name} branches to an unknown address")
            for address in tables:
                found[address] = sorted({*found[address], *cases})
        return found


@dataclass(frozen=True)
class Access:
    """A kind of access to global memory. ``kind`` is 'load', 'store', 'copy' (to shared memory) or 'atomic'."""

    kind: str
    bits: int
    in_loop: bool


def resources(report: str) -> list[Resources]:
    """Every kernel for every architecture in what ptxas said of one file."""
    found: list[Resources] = []
    entry: tuple[str, int] | None = None
    memory: list[tuple[int, ...]] = []
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)' for 'sm_(\d+)\w?'", line):
            if entry is not None:
                raise ValueError(f"ptxas reports no registers of {entry[0]}")
            entry, memory = (match[1], int(match[2])), []
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if entry is None:
                raise ValueError(f"ptxas reports no kernel: {line}")
            memory.append(tuple(map(int, match.groups())))
        elif match := re.search(r"Used (\d+) registers", line):
            if entry is None or not memory:
                raise ValueError(f"ptxas reports no kernel, or no memory of it: {line}")
            stack, stores, loads = (sum(numbers) for numbers in zip(*memory, strict=True))
            found.append(Resources(*entry, int(match[1]), stack, stores, loads))
            entry, memory = None, []
        elif re.search(r"\bspill|\bstack frame", line):
            raise ValueError(f"a line of ptxas that is not understood: {line}")
    if entry is not None or memory:
        raise ValueError("the output of ptxas ends in the middle of a kernel")
    return found


def code(lines: Iterable[str]) -> Iterator[Code]:
    """Every kernel for every architecture in what `cuobjdump --dump-sass` prints."""
    name, arch = None, None
    instructions: dict[int, str] = {}
    for line in lines:
        if match := _INSTRUCTION.match(line):
            if name is None or arch is None:
                raise ValueError(f"an instruction of no kernel: {line}")
            instructions[int(match[1], 16)] = match[2].strip()
        elif match := re.match(r"\s*(?:Function : (\S+)|code for sm_(\d+))", line):
            if name is not None and arch is not None:
                yield _complete(name, arch, instructions)
            name, instructions = match[1], {}
            arch = int(match[2]) if match[2] else arch
    if name is not None and arch is not None:
        yield _complete(name, arch, instructions)


def library_code(library: Path) -> Iterator[Code]:
    """Every kernel of a library. Raises FileNotFoundError if there is no cuobjdump (see :func:`find_cuobjdump`)."""
    tool = find_cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump was not found; remedy: install Triton, which has it, or the CUDA toolkit")
    process = subprocess.Popen([tool, "--dump-sass", str(library)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        yield from code(process.stdout)
    if process.returncode:
        raise ValueError(f"{tool} failed on {library} with exit status {process.returncode}")


def find_cuobjdump() -> str | None:
    """The one in Triton's package, which is not imported, or else on PATH or in /usr/local/cuda."""
    places: list[Path | str] = []
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        places.append(Path(folder) / "backends/nvidia/bin/cuobjdump")
    return next(
        filter(None, map(shutil.which, map(str, [*places, "cuobjdump", "/usr/local/cuda/bin/cuobjdump"]))), None
    )


def access(instruction: str) -> tuple[str, int] | None:
    """Kind and bits of an access to global memory, None for other instructions; see :class:`Access`."""
    operation, *modifiers = _operation(instruction)
    if operation.startswith(("UBLK", "UTMA")):
        raise ValueError(f"a bulk copy whose instruction has no width: {instruction}")
    kind = _GLOBAL.get(operation)
    if kind is None:
        return None
    return kind, next((_BITS[word] for word in modifiers if word in _BITS), 32)


def kernel_name(mangled: str) -> str:
    """'norm_forward' for what a compiler made of `red::cuda::norm_forward<float, 4>(...)`."""
    rest = re.match(r"_ZN?K?", mangled)
    if rest is None:
        return mangled
    at, name = rest.end(), mangled
    while match := re.compile(r"\d+").match(mangled, at):
        at = match.end() + int(match[0])
        name = mangled[match.end() : at]
    return name


def template_numbers(mangled: str) -> tuple[int, ...]:
    """The integers and truth values among the template arguments of a kernel, in order."""
    return tuple(int(number) for number in re.findall(r"L[a-z](\d+)E", mangled))


def _operation(instruction: str) -> list[str]:
    """The operation and its modifiers: ['LDG', 'E', '128'] of `@P0 LDG.E.128 R4, [R2.64]`."""
    match = re.match(r"(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", instruction)
    if match is None:
        raise ValueError(f"an instruction that is not understood: {instruction}")
    return match[1].split(".")


def _complete(name: str, arch: int, instructions: dict[int, str]) -> Code:
    if not any(_operation(text)[0] == "EXIT" for text in instructions.values()):
        raise ValueError(f"the machine code of {name} has no end")
    return Code(name, arch, instructions)


def _cycles(after: dict[int, list[int]]) -> list[set[int]]:
    """The nodes of a graph that lie on cycles, those together that lie on the same (Tarjan's strongly connected
    components, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[set[int]] = []
    for start in after:
        if start in order:
            continue
        work = [(start, iter(after[start]))]
        order[start] = low[start] = len(order)
        stack.append(start)
        on_stack.add(start)
        while work:
            node, targets = work[-1]
            target = next(targets, None)
            if target is not None:
                if target not in order:
                    order[target] = low[target] = len(order)
                    stack.append(target)
                    on_stack.add(target)
                    work.append((target, iter(after[target])))
                elif target in on_stack:
                    low[node] = min(low[node], order[target])
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == order[node]:
                component: list[int] = []
                while not component or component[-1] != node:
                    component.append(stack.pop())
                on_stack.difference_update(component)
                if len(component) > 1 or node in after[node]:
                    found.append(set(component))
    return found


_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+([^/;]\S[^;]*);")
_GLOBAL = {"LDG": "load", "LD": "load", "STG": "store", "ST": "store", "LDGSTS": "copy", "RED": "atomic"}
_GLOBAL |= dict.fromkeys(("ATOM", "ATOMG", "REDG"), "atomic")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
