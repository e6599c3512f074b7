"""The CPU kernels for AArch64 on any machine: cross-compiled with a small program around them, and run under qemu-user.

A :class:`Processor` is a process that waits for calls, and a backend: its functions have the arguments and results
of those in :mod:`red_kernels.reference`. What is seen here is what the instructions do. It was never real hardware, and
how long anything takes says nothing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import torch
from build_tools import ROOT, build
from torch import Tensor

from red_kernels.backends import Backend
from red_kernels.backends.arguments import FromFlat
from red_kernels.backends.schemas import NAMES

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
PACKAGES = "g++-aarch64-linux-gnu qemu-user"
OBJECTS = ROOT / "build/csrc/aarch64"
# A processor of ARMv8.0, without bf16, and one with all that the emulator knows.
PROCESSORS = {"cortex-a72": "neon", "max": "neon_bf16"}

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ARRAYS = ("x", "residual", "scale", "bias", "weight", "norm_bias", "ids", "dy", "dz", "z", "mean", "rstd", "second")


def why_not() -> str | None:
    """Why the kernels cannot be compiled and run for AArch64 here, with the remedy, or None."""
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if not missing:
        return None
    return (
        f"{' and '.join(missing)} not found: the AArch64 kernels are NOT compiled and NOT tested; remedy: on Debian, "
        f"apt-get install {PACKAGES}"
    )


def build_program() -> Path:
    """The kernels of all instruction sets with the program around them; what has not changed is not compiled again."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with open(OBJECTS / "lock", "w") as lock:  # several processes of one test run want it
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = build.kernel_jobs(COMPILER, "aarch64", OBJECTS)
        harness = ROOT / "tests/backends/harness"
        jobs += [
            build.Job(harness / "conversions.cpp", OBJECTS / f"conversions_{job.built.name}", job.command)
            for job in list(jobs)
            if job.source.name == "isa.cpp"
        ]
        common = build.cpu_command(COMPILER, "aarch64")
        without_torch = [ROOT / f"csrc/cpu/{name}.cpp" for name in ("dispatch", "plan", "memory")]
        for source in (harness / "harness.cpp", *without_torch):
            jobs.append(build.Job(source, OBJECTS / f"{source.stem}.o", common))
        build._compile(jobs, OBJECTS, Path("no torch"))
        program = OBJECTS / "harness"
        newest = max(job.built.stat().st_mtime_ns for job in jobs)
        if not program.is_file() or program.stat().st_mtime_ns < newest:
            # Static: neither the emulator nor a test has to know where the libraries for AArch64 are.
            build._link([COMPILER, "-static"], program, jobs, [])
    return program


class Processor:
    """An emulated processor that waits for calls. ``stream`` has the kernels store past the cache, where they can."""

    def __init__(self, program: Path, cpu: str, **environment: str) -> None:
        self.stream = False
        self._process = subprocess.Popen(
            [EMULATOR, "-cpu", cpu, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**{k: v for k, v in os.environ.items() if not k.startswith("RED_KERNELS")}, **environment},
        )

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def use(self, name: str | None = None) -> str:
        """Use an instruction set; returns its name and those that the processor can run, or the error message."""
        (answer,) = self.call("use", 1, [0] * 13, {} if name is None else {"x": name.encode()})
        assert answer is not None
        return answer.decode()

    def pool(self, size: int) -> int:
        """Bytes that the pool of memory kept of a block of ``size``, before it gave them back."""
        (answer,) = self.call("pool", 1, [0, 0, 0, size, *[0] * 9], {})
        assert answer is not None
        return int(answer)

    def widen(self, halves: Tensor, by_eights: bool) -> Tensor:
        """Halves as fp32; their number is a multiple of 8."""
        values = [_TYPES[halves.dtype], 0, 0, len(halves), by_eights, *[0] * 8]
        return _tensor(self.call("widen", 1, values, {"x": halves})[0], torch.float32, halves.shape)

    def narrow(self, values: Tensor, dtype: torch.dtype, by_eights: bool) -> Tensor:
        """fp32 as halves; their number is a multiple of 8."""
        words = [_TYPES[dtype], 0, 0, len(values), by_eights, *[0] * 8]
        return _tensor(self.call("narrow", 1, words, {"x": values})[0], dtype, values.shape)

    @property
    def backend(self) -> Backend:
        """The record that has the operations run here."""
        functions = {name: getattr(self, name) for name in NAMES}
        return Backend("cpu", FromFlat(functions, tuple), lambda: None, lambda x: None, "cpu")

    def edit_forward(
        self, x: Tensor, residual: Any, scale: Any, bias: Any, edit_ids: Any, seed: Any, dropout_p: float
    ) -> Tensor:
        vectors = _vectors(x, scale, bias)
        given = {"x": x, "residual": residual, "ids": edit_ids, **vectors}
        (z,) = self._run("edit_forward", 1, x, given, scale, bias, seed=seed, p=dropout_p)
        return _tensor(z, x.dtype, x.shape)

    def edit_backward(
        self,
        dz: Tensor,
        x: Any,
        scale: Any,
        edit_ids: Any,
        seed: Any,
        dropout_p: float,
        n_edits: int,
        needs: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        given = {"dz": dz, "x": x, "ids": edit_ids, **_vectors(dz, scale, None)}
        found = self._run("edit_backward", 6, dz, given, edits=n_edits, needs=needs, seed=seed, p=dropout_p)
        return _like(found[5], dz), *_sums(found[:2], dz, edit_ids, n_edits)

    def edit_norm_forward(
        self,
        x: Tensor,
        residual: Any,
        scale: Any,
        bias: Any,
        weight: Any,
        norm_bias: Any,
        edit_ids: Any,
        seed: Any,
        dropout_p: float,
        eps: float,
        weight_offset: float,
        centered: bool,
        keep_z: bool,
    ) -> tuple[Any, ...]:
        vectors = _vectors(x, scale, bias) | _norms(x, weight, norm_bias, weight_offset)
        given = {"x": x, "residual": residual, "ids": edit_ids, **vectors}
        options: dict[str, Any] = {"seed": seed, "p": dropout_p, "eps": eps, "centered": centered, "needs": (keep_z,)}
        y, z, mean, rstd = self._run("edit_norm_forward", 4, x, given, scale, bias, **options)
        return _like(y, x), _like(z, x), _statistic(mean, x), _statistic(rstd, x)

    def edit_norm_backward(
        self,
        dy: Tensor,
        dz: Any,
        z: Any,
        x: Any,
        residual: Any,
        scale: Any,
        bias: Any,
        weight: Any,
        edit_ids: Any,
        seed: Any,
        mean: Any,
        rstd: Tensor,
        dropout_p: float,
        weight_offset: float,
        n_edits: int,
        needs: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        vectors = _vectors(dy, scale, bias) | _norms(dy, weight, None, weight_offset)
        saved = {"z": z, "x": x, "residual": residual, "mean": mean, "rstd": rstd, "ids": edit_ids}
        options: dict[str, Any] = {"seed": seed, "p": dropout_p, "centered": mean is not None, "needs": needs}
        given = {"dy": dy, "dz": dz, **saved, **vectors}
        found = self._run("edit_norm_backward", 7, dy, given, edits=n_edits, **options)
        gradients = _like(found[5], dy), _like(found[6], dy), *_sums(found[:2], dy, edit_ids, n_edits)
        return *gradients, *_sums(found[2:4], dy, None, 1)

    def norm_edit_forward(
        self,
        x: Tensor,
        weight: Any,
        norm_bias: Any,
        scale: Any,
        bias: Any,
        edit_ids: Any,
        eps: float,
        weight_offset: float,
        centered: bool,
    ) -> tuple[Any, ...]:
        vectors = _vectors(x, scale, bias) | _norms(x, weight, norm_bias, weight_offset)
        given = {"x": x, "ids": edit_ids, **vectors}
        y, mean, rstd = self._run("norm_edit_forward", 3, x, given, scale, bias, eps=eps, centered=centered)
        return _like(y, x), _statistic(mean, x), _statistic(rstd, x)

    def norm_edit_backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Any,
        norm_bias: Any,
        scale: Any,
        edit_ids: Any,
        mean: Any,
        rstd: Tensor,
        weight_offset: float,
        n_edits: int,
        needs: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        vectors = _vectors(dy, scale, None) | _norms(dy, weight, norm_bias, weight_offset)
        given = {"dy": dy, "x": x, "mean": mean, "rstd": rstd, "ids": edit_ids, **vectors}
        centered = mean is not None
        found = self._run("norm_edit_backward", 6, dy, given, edits=n_edits, centered=centered, needs=needs)
        vectors_of_norm = _sums(found[2:4], dy, None, 1)
        return _like(found[5], dy), *vectors_of_norm, *_sums(found[:2], dy, edit_ids, n_edits)

    def mix_forward(
        self,
        x: Tensor,
        residual: Any,
        first: Tensor,
        second: Any,
        bias: Any,
        edit_ids: Any,
        seed: Any,
        dropout_p: float,
        blocks: int,
    ) -> Tensor:
        given = {"x": x, "residual": residual, "ids": edit_ids, **_mixing(x, first, second, bias)}
        (z,) = self._run("mix_forward", 1, x, given, first, seed=seed, p=dropout_p, blocks=blocks)
        return _tensor(z, x.dtype, x.shape)

    def mix_backward(
        self,
        dz: Tensor,
        x: Any,
        first: Tensor,
        second: Any,
        edit_ids: Any,
        seed: Any,
        dropout_p: float,
        blocks: int,
        n_edits: int,
        needs: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        given = {"dz": dz, "x": x, "ids": edit_ids, **_mixing(dz, first, second, None)}
        options: dict[str, Any] = {"seed": seed, "p": dropout_p, "blocks": blocks}
        found = self._run("mix_backward", 6, dz, given, edits=n_edits, needs=needs, **options)
        return _like(found[5], dz), *_sums([found[k] for k in (0, 4, 1)], dz, edit_ids, n_edits)

    def mix_norm_forward(
        self,
        x: Tensor,
        residual: Any,
        first: Tensor,
        second: Any,
        bias: Any,
        weight: Any,
        norm_bias: Any,
        edit_ids: Any,
        seed: Any,
        dropout_p: float,
        eps: float,
        weight_offset: float,
        centered: bool,
        blocks: int,
    ) -> tuple[Any, ...]:
        vectors = _mixing(x, first, second, bias) | _norms(x, weight, norm_bias, weight_offset)
        given = {"x": x, "residual": residual, "ids": edit_ids, **vectors}
        options: dict[str, Any] = {"seed": seed, "p": dropout_p, "eps": eps, "centered": centered, "blocks": blocks}
        y, z, mean, rstd = self._run("mix_norm_forward", 4, x, given, first, **options)
        return _like(y, x), _like(z, x), _statistic(mean, x), _statistic(rstd, x)

    def mix_norm_backward(
        self,
        dy: Tensor,
        dz: Any,
        z: Tensor,
        x: Any,
        first: Tensor,
        second: Any,
        weight: Any,
        edit_ids: Any,
        seed: Any,
        mean: Any,
        rstd: Tensor,
        dropout_p: float,
        weight_offset: float,
        blocks: int,
        n_edits: int,
        needs: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        vectors = _mixing(dy, first, second, None) | _norms(dy, weight, None, weight_offset)
        given = {"dy": dy, "dz": dz, "z": z, "x": x, "mean": mean, "rstd": rstd, "ids": edit_ids, **vectors}
        options: dict[str, Any] = {"seed": seed, "p": dropout_p, "centered": mean is not None, "blocks": blocks}
        found = self._run("mix_norm_backward", 7, dy, given, edits=n_edits, needs=needs, **options)
        gradients = _like(found[5], dy), _like(found[6], dy)
        return *gradients, *_sums([found[k] for k in (0, 4, 1)], dy, edit_ids, n_edits), *_sums(found[2:4], dy, None, 1)

    def _run(
        self,
        name: str,
        results: int,
        like: Tensor,
        given: dict[str, Any],
        *of_edits: Any,
        edits: int | None = None,
        needs: tuple[bool, ...] = (),
        seed: Tensor | None = None,
        p: float = 0.0,
        eps: float = 0.0,
        centered: bool = False,
        blocks: int = 0,
    ) -> list[bytes | None]:
        d = like.shape[-1]
        if edits is None:
            edits = next((len(t) for t in of_edits if t is not None and t.dim() == 2), 1)
        for key in ("x", "residual", "dy", "dz", "z"):
            assert given.get(key) is None or given[key].dtype == like.dtype, key
        values = [
            _TYPES[like.dtype],
            int(centered),
            like.numel() // d,
            d,
            int(self.stream),
            edits,
            _bits(needs),
            int(seed is not None),
            0 if seed is None else int(seed),
            min(round(p * 2**32), 2**32 - 1),
            _float_bits(1.0 / (1.0 - p) if p < 1.0 else 0.0),
            _float_bits(eps),
            blocks,
        ]
        return self.call(name, results, values, given)

    def call(self, name: str, results: int, values: list[int], given: dict[str, Any]) -> list[bytes | None]:
        """One call of the program: arrays by their names in, as many arrays as it has results out."""
        assert self._process.stdin is not None
        assert set(given) <= set(_ARRAYS)
        parts = [struct.pack("24s13q", name.encode(), *values)]
        for key in _ARRAYS:
            value = given.get(key)
            if isinstance(value, Tensor):
                value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            parts.append(struct.pack("q", -1 if value is None else len(value)) + (value or b""))
        try:
            self._process.stdin.write(b"".join(parts))
            self._process.stdin.flush()
            return [self._read_array() for _ in range(results)]
        except (EOFError, BrokenPipeError) as error:
            said = self._process.communicate()[1].decode()
            raise AssertionError(f"{name}: the program ended with {self._process.returncode}: {said}") from error

    def _read_array(self) -> bytes | None:
        (size,) = struct.unpack("q", self._read(8))
        return None if size < 0 else self._read(size)

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        found = self._process.stdout.read(size)
        if len(found) < size:
            raise EOFError
        return found


def _bits(needs: tuple[bool, ...]) -> int:
    """A bit for each flag, the first the lowest."""
    return sum(1 << k for k, need in enumerate(needs) if need)


def _float_bits(value: float) -> int:
    return int.from_bytes(struct.pack("f", value), "little")


def _vectors(like: Tensor, scale: Any, bias: Any) -> dict[str, Tensor]:
    """As fp32; what is absent is filled with what changes nothing (-0, as adding +0 loses the sign of a zero)."""
    return {
        key: torch.full((like.shape[-1],), neutral) if vector is None else vector.float()
        for key, vector, neutral in (("scale", scale, 1.0), ("bias", bias, -0.0))
    } | _several(scale, bias, like)


def _several(scale: Any, bias: Any, like: Tensor) -> dict[str, Tensor]:
    """An absent vector, once for each edit of the other."""
    edits = next((len(t) for t in (scale, bias) if t is not None and t.dim() == 2), None)
    if edits is None:
        return {}
    found = {}
    for key, vector, neutral in (("scale", scale, 1.0), ("bias", bias, -0.0)):
        if vector is None:
            found[key] = torch.full((edits, like.shape[-1]), neutral)
    return found


def _mixing(like: Tensor, first: Tensor, second: Any, bias: Any) -> dict[str, Tensor]:
    """The first vector is in the place of the scale."""
    found = {"second": second.float()} if second is not None else {}
    return {**_vectors(like, first, bias), **found}


def _norms(like: Tensor, weight: Any, norm_bias: Any, offset: float) -> dict[str, Tensor]:
    d = like.shape[-1]
    return {
        "weight": torch.ones(d) if weight is None else weight.float() + offset,
        "norm_bias": torch.full((d,), -0.0) if norm_bias is None else norm_bias.float(),
    }


def _tensor(found: bytes | None, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size) -> Any:
    if found is None:
        return None
    if not found:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(found), dtype=dtype).reshape(shape)


def _like(found: bytes | None, x: Tensor) -> Any:
    return _tensor(found, x.dtype, x.shape)


def _statistic(found: bytes | None, x: Tensor) -> Any:
    return _tensor(found, torch.float32, x.shape[:-1])


def _sums(found: list[bytes | None], like: Tensor, edit_ids: Any, edits: int) -> list[Any]:
    d = like.shape[-1]
    return [_tensor(one, torch.float32, (d,) if edit_ids is None else (edits, d)) for one in found]
