"""What a compiler made of the CPU kernels: the innermost loops of each function, and what is wrong in them.

`disassembled(path, "aarch64")` or `functions(text, "x86_64")` give every function; `function.loops()` its innermost
loops. Of each loop: ``vector_spills`` and ``general_spills`` (accesses to the stack), ``single_elements`` (one number
of a vector at a time: conversions, arithmetic, lanes, loads and stores), ``scalar_conversions`` (of those the
conversions), ``calls``, and whether it ``computes`` with vectors.

Objects, libraries and programs can be read; of an object objdump must show the relocations (`-r`), as here. A part of
a function that the compiler put elsewhere (`[clone .cold]`) is a function of its own. The readers raise ValueError for
what they do not understand: what is not seen must not pass for good.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """``operands`` are as objdump prints them; ``relocated``: the linker will write the place that it names."""

    address: int
    operation: str
    operands: str
    relocated: bool = False

    def __str__(self) -> str:
        return f"{self.address:x}: {self.operation} {self.operands}".rstrip()


@dataclass(frozen=True)
class Architecture:
    """How the machine code of an architecture reads. Patterns match an operation, or an operation and its operands."""

    name: str
    tools: tuple[str, ...]  # names of its objdump when this machine is another
    jump: re.Pattern[str]  # goes on at the address that is its last operand
    always: re.Pattern[str]  # of those, the ones without a condition
    indirect: re.Pattern[str]  # a jump to an address in a register
    end: re.Pattern[str]
    call: re.Pattern[str]
    no_access: re.Pattern[str]  # has a memory operand and does not access it
    pushes: re.Pattern[str]
    memory: re.Pattern[str]  # an operand in memory that is no constant
    stack: str  # an operand on the stack, by the stack pointer
    framed: re.Pattern[str]  # makes a frame pointer
    frame: str  # an operand on the stack, by the frame pointer
    vector: re.Pattern[str]  # operands with a vector register
    packed: re.Pattern[str]  # arithmetic on vectors of floats
    conversion: re.Pattern[str]  # of one number
    single: re.Pattern[str]  # anything else with one number


X86_64 = Architecture(
    name="x86_64",
    tools=("x86_64-linux-gnu-objdump",),
    jump=re.compile(r"(?:bnd )?(?:j(?!mpq?$|cxz)\w+|jmpq?|jr?cxz|jecxz|loop\w*)$"),
    always=re.compile(r"(?:bnd )?jmpq?$"),
    indirect=re.compile(r"(?:notrack )?(?:bnd )?jmpq? \*"),
    end=re.compile(r"(?:bnd |repz )?(?:retq?|hlt|ud2)$"),
    call=re.compile(r"(?:bnd )?callq? "),
    no_access=re.compile(r"(?:lea|nop|prefetch)"),
    pushes=re.compile(r"(?:push|pop)"),
    memory=re.compile(r"\((?!%rip)"),
    stack=r"\(%[re]sp\b",
    framed=re.compile(r"mov %rsp,%rbp$"),
    frame=r"\(%rbp\b",
    vector=re.compile(r"%[xyz]mm"),
    packed=re.compile(r"v?(?:add|sub|mul|div|fn?m(?:add|sub)\d+)ps "),
    conversion=re.compile(r"v?cvt(?:t?(?:ss|sd|sh|u?si)2|\w+2(?:ss|sd|sh|u?si))"),
    single=re.compile(
        r"v?(?:(?:add|sub|mul|div|sqrt|min|max|rcp|rsqrt|u?comi|cmp\w*?|fn?m(?:add|sub)\d+)s[sdh]"
        r"|p(?:extr|insr)[bwdq]|extractps|insertps|mov(?:ss|sd|sh|d|w)) "
        r"|(?:movzw|movsw)\w .*\(%|mov +%(?:[a-d]x|[sd]i|[sb]p|r\d+w),.*\(%"
    ),
)
AARCH64 = Architecture(
    name="aarch64",
    tools=("aarch64-linux-gnu-objdump",),
    jump=re.compile(r"(?:b|b\.\w+|cbn?z|tbn?z)$"),
    always=re.compile(r"b$"),
    indirect=re.compile(r"br\w* "),
    end=re.compile(r"(?:ret\w*|udf|brk)$"),
    call=re.compile(r"blr?\w* "),
    no_access=re.compile(r"prfu?m"),
    pushes=re.compile(r"(?!)"),
    memory=re.compile(r"\[[xs]"),
    stack=r"\[sp\b",
    framed=re.compile(r"(?:mov x29, sp|add x29, sp, .*)$"),
    frame=r"\[x29\b",
    vector=re.compile(r"(?<![\w#])[vqdshb]\d+\b"),
    packed=re.compile(r"f(?:add|sub|mul|div|ml[as]) v\d+\.4s"),
    conversion=re.compile(r"(?:b?fcvt\w*|[su]cvtf) [hsdwx]\d+, "),
    single=re.compile(
        r"f(?:n?m(?:add|sub|ul)|add|sub|div|sqrt|abs|neg|max\w*|min\w*|cmp\w*|ccmp\w*|csel|rint\w|recp\w|rsqrt\w)"
        r" [hsd]\d+,"
        r"|[us]mov |ins |mov (?:[wx]\d+, v\d+\.|v\d+\.\w\[\d+\], )|mov [hsd]\d+, v"
        r"|fmov (?:[hsd]\d+, [wx]|[wx]\d+, )"
        r"|(?:ldu?r|stu?r) [bhs]\d+, |(?:ldu?r|stu?r)s?[bh] |(?:ld|st)\d \{[^}]*\}\[\d+\]"
    ),
)
ARCHITECTURES = {known.name: known for known in (X86_64, AARCH64)}


@dataclass(frozen=True)
class Loop:
    """A loop that has no other inside; ``stack`` matches operands on the stack."""

    architecture: Architecture
    stack: re.Pattern[str]
    instructions: tuple[Instruction, ...] = field(repr=False)

    def vector_spills(self) -> list[str]:
        """Stores to the stack and loads from it, of vector registers."""
        return [str(i) for i in self._on_stack() if self.architecture.vector.search(i.operands)]

    def general_spills(self) -> list[str]:
        """The same of general registers: pointers and counters."""
        return [str(i) for i in self._on_stack() if not self.architecture.vector.search(i.operands)]

    def scalar_conversions(self) -> list[str]:
        """Conversions of one number."""
        return self._like(self.architecture.conversion)

    def single_elements(self) -> list[str]:
        """Whatever is done with one number at a time: conversions, arithmetic, lanes, loads and stores."""
        return sorted({*self.scalar_conversions(), *self._like(self.architecture.single)})

    def calls(self) -> list[str]:
        """Calls of functions."""
        return self._like(self.architecture.call)

    def computes(self) -> bool:
        """Whether it adds or multiplies vectors of floats, and reads or writes vectors elsewhere than on the stack.

        A loop over a small array of the function itself does not: its accesses to the stack are no spills.
        """
        return bool(self._like(self.architecture.packed)) and any(
            self.architecture.vector.search(i.operands) and not self.stack.search(i.operands)
            for i in self.instructions
            if self.architecture.memory.search(i.operands) and not self.architecture.no_access.match(i.operation)
        )

    def _like(self, pattern: re.Pattern[str]) -> list[str]:
        return [str(i) for i in self.instructions if pattern.match(f"{i.operation} {i.operands}")]

    def _on_stack(self) -> list[Instruction]:
        of = self.architecture
        return [
            i
            for i in self.instructions
            if of.pushes.match(i.operation)
            or (self.stack.search(i.operands) is not None and not of.no_access.match(i.operation))
        ]


@dataclass(frozen=True)
class Function:
    """A function's machine code, in order."""

    name: str
    architecture: Architecture
    instructions: tuple[Instruction, ...] = field(repr=False)

    def loops(self) -> list[Loop]:
        """The loops that have no other inside, by their first addresses."""
        return list(self._loops)

    @functools.cached_property
    def _loops(self) -> list[Loop]:
        own = self.architecture
        framed = any(own.framed.match(f"{i.operation} {i.operands}") for i in self.instructions)
        stack = re.compile(f"{own.stack}|{own.frame}" if framed else own.stack)
        return [
            Loop(own, stack, tuple(self.instructions[k] for k in sorted(nodes)))
            for nodes in sorted(_innermost(_reached(self._after())), key=min)
        ]

    def _after(self) -> dict[int, list[int]]:
        """Where each instruction, by its number, may go on inside of this function. A call goes on behind it."""
        at = {i.address: k for k, i in enumerate(self.instructions)}
        found: dict[int, list[int]] = {}
        indirect = None
        for k, i in enumerate(self.instructions):
            to: list[int] = []
            goes_on = not self.architecture.end.match(i.operation)
            if self.architecture.indirect.match(f"{i.operation} {i.operands}"):
                indirect, goes_on = i, False
            elif self.architecture.jump.match(i.operation):
                if self.architecture.always.match(i.operation):
                    goes_on = False
                target = re.search(r"(?:^|,\s*)(?:0x)?([0-9a-f]+)(?: <.*>)?\s*$", i.operands)
                if target is None:
                    raise ValueError(f"a jump of {self.name} that is not understood: {i}")
                inside = at.get(int(target[1], 16))  # another place is a call in the last line
                if inside is not None and not i.relocated:
                    to = [inside]
                elif self._spans(int(target[1], 16)) and not i.relocated:
                    raise ValueError(f"a jump of {self.name} into the middle of an instruction: {i}")
            if goes_on and k + 1 < len(self.instructions):
                to.append(k + 1)
            found[k] = to
        if indirect is not None and any(t <= k for k, targets in found.items() for t in targets):
            raise ValueError(f"{self.name} has loops, and a jump to an address that is not in its text: {indirect}")
        return found

    def _spans(self, address: int) -> bool:
        return self.instructions[0].address <= address <= self.instructions[-1].address


def functions(text: str, architecture: str) -> list[Function]:
    """Every function in what `objdump -dr -C --no-show-raw-insn` prints, AT&T's syntax on x86_64.

    ``architecture`` is a key of ``ARCHITECTURES``. Raises ValueError for a text without functions or lines that are
    not understood.
    """
    own = ARCHITECTURES[architecture]
    found: list[Function] = []
    name, instructions = "", list[Instruction]()
    for line in [*text.splitlines(), ""]:
        if match := _HEAD.match(line):
            if instructions:
                found.append(Function(name, own, tuple(instructions)))
            name, instructions = match[1], []
        elif match := _RELOCATION.match(line):
            if not instructions:
                raise ValueError(f"a relocation of no instruction: {line}")
            last = instructions[-1]
            instructions[-1] = Instruction(last.address, last.operation, last.operands, True)
        elif match := _INSTRUCTION.match(line):
            if not name:
                raise ValueError(f"an instruction of no function: {line}")
            instructions.append(Instruction(int(match[1], 16), match[2], _NOTE.sub("", match[3]).strip()))
        elif "(bad)" in line or ".inst" in line:
            raise ValueError(f"machine code that objdump does not know: {line}")
    if instructions:
        found.append(Function(name, own, tuple(instructions)))
    if not found:
        raise ValueError("no function is in the text, expected what objdump prints")
    return found


def disassembled(path: Path, architecture: str) -> list[Function]:
    """Every function of an object, a library or a program. Raises FileNotFoundError without :func:`find_objdump`."""
    tool = find_objdump(architecture)
    if tool is None:
        raise FileNotFoundError(f"no objdump for {architecture} was found; remedy: install binutils for it")
    done = subprocess.run(
        [tool, "-dr", "-C", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    )
    return functions(done.stdout, architecture)


def find_objdump(architecture: str) -> str | None:
    """The program objdump for an architecture: this machine's own, or one with its name in front."""
    names = (*(("objdump",) if platform.machine() == architecture else ()), *ARCHITECTURES[architecture].tools)
    return next(filter(None, map(shutil.which, names)), None)


def faults(found: Iterable[Function], check: Callable[[Loop], Iterable[str]]) -> list[str]:
    """What ``check`` finds in the loops that compute, each with its function."""
    return [
        f"{function.name}: {fault}"
        for function in found
        for loop in function.loops()
        if loop.computes()
        for fault in check(loop)
    ]


def _reached(after: dict[int, list[int]]) -> dict[int, list[int]]:
    """The part of a graph that its first node leads to: what fills up to the next line is run by nobody."""
    found, left = {0}, [0]
    while left:
        fresh = [t for t in after[left.pop()] if t not in found]
        found.update(fresh)
        left += fresh
    return {node: after[node] for node in sorted(found)}


def _innermost(after: dict[int, list[int]]) -> list[set[int]]:
    """The cycles of a graph that have no other inside: of each strongly connected part without its entries, again."""
    found = []
    work = [set(after)]
    while work:
        nodes = work.pop()
        for part in _cycles(nodes, after):
            entries = {t for k, targets in after.items() if k not in part for t in targets if t in part}
            inner = part - (entries or {min(part)})
            if any(_cycles(inner, after)):
                work.append(inner)
            else:
                found.append(part)
    return found


def _cycles(nodes: set[int], after: dict[int, list[int]]) -> list[set[int]]:
    """The strongly connected parts of a graph, cut to ``nodes``, that have a cycle (Kosaraju, without recursion)."""
    before: dict[int, list[int]] = {node: [] for node in nodes}
    for node in nodes:
        for target in after[node]:
            if target in nodes:
                before[target].append(node)
    finished: list[int] = []
    seen: set[int] = set()
    for start in sorted(nodes):
        if start in seen:
            continue
        seen.add(start)
        work = [(start, iter(after[start]))]
        while work:
            node, targets = work[-1]
            following = next((t for t in targets if t in nodes and t not in seen), None)
            if following is None:
                finished.append(node)
                work.pop()
            else:
                seen.add(following)
                work.append((following, iter(after[following])))
    parts: list[set[int]] = []
    taken: set[int] = set()
    for start in reversed(finished):
        if start in taken:
            continue
        part, left = set(), [start]
        taken.add(start)
        while left:
            node = left.pop()
            part.add(node)
            fresh = [t for t in before[node] if t not in taken]
            taken.update(fresh)
            left.extend(fresh)
        if len(part) > 1 or start in after[start]:
            parts.append(part)
    return parts


_HEAD = re.compile(r"[0-9a-f]{8,} <(.*)>:$")
_RELOCATION = re.compile(r"\s+[0-9a-f]+: R_\w+")
_INSTRUCTION = re.compile(
    r"\s*([0-9a-f]+):\t((?:(?:bnd|notrack|lock|rep\w*|data16|cs|ds|es|addr32|xacquire|xrelease) )*[a-z][\w.]*)\s*(.*)$"
)
_NOTE = re.compile(r"\s+(?://|#) .*$")
