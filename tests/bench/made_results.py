"""Files of results as the suite writes them, with times made up by a rule, for tests of what is made from them."""

from __future__ import annotations

import random

from red_kernels.support.files import json_by_line

PEERS = {"eager": 4.0, "eager-fused": 2.5, "compile": 1.4, "compile-max-autotune": 1.35, "liger": 1.2}
SIZES = [(512, 576), (2048, 576), (512, 2048), (2048, 2048), (8192, 2048), (8192, 4096), (8192, 8192)]
SPEED = {False: 2.4e10, True: 4.2e12}
STEPS = {
    "frozen-fused": (1.0, 0),
    "frozen": (1.04, 0),
    "frozen-compile": (0.95, 0),
    "red": (1.006, 34_560),
    "red-compile": (0.97, 34_560),
    "naive": (1.13, 34_560),
    "naive-compile": (1.02, 34_560),
    "lora-qv": (1.16, 460_800),
    "lora-all": (1.42, 2_442_240),
    "ia3": (1.12, 64_512),
    "bitfit": (1.09, 34_560),
    "full": (1.9, 134_515_008),
}


def timing(median, spread=0.02):
    return {"median": median, "low": median * (1 - spread), "high": median * (1 + spread)}


def frame(job, cases, gpu=False, **more):
    environment = {
        "device": "cuda" if gpu else "Some Processor, 16 cores",
        "processor": "Some Processor, 16 cores",
        "threads": 2,
        "gpu": {"name": "Some GPU", "driver": "580.1"} if gpu else None,
        "python": "3.12.3",
        "torch": "2.11.0",
        "versions": {"triton": "3.6.0", "liger": None},
        "commit": "0123456789abcdef",
    }
    return {
        "schema": 1,
        "job": job,
        "quick": False,
        "environment": environment,
        "settings": {},
        "missing": {"quack": "not installed"},
        "complete": True,
        "planned": len(cases),
        "failed": [],
        "cases": cases,
        **more,
    }


def operation_case(operation, dtype, rows, width, gpu=False, variant="", inputs="fresh", peers=PEERS):
    draw = random.Random(f"{operation} {dtype} {rows} {width}")
    one = rows * width * (2 if dtype == "bf16" else 4)
    moved = {"forward": 4 * one, "backward": 6 * one, "both": 10 * one}
    seconds = {}
    for which, count in moved.items():
        copy = count / SPEED[gpu] + (4e-6 if gpu else 1.5e-5)
        ours = copy * draw.uniform(1.0, 1.3)
        seconds[which] = {"copy": timing(copy)}
        for number, name in enumerate(("cuda", "triton") if gpu else ("cpu",)):
            seconds[which][name] = timing(ours * (1 + 0.1 * number))
        for name, times in peers.items():
            seconds[which][name] = timing(ours * times * draw.uniform(0.85, 1.3))
    peak = {name: 7 * one if name in ("cpu", "cuda", "triton") else 9 * one for name in seconds["both"]}
    return {
        "operation": operation,
        "variant": variant,
        "dtype": dtype,
        "width": width,
        "rows": rows,
        "inputs": inputs,
        "seconds": seconds,
        "bytes": moved,
        "peak_bytes": peak,
        "left_out": {"apex": "has no RMSNorm"},
    }


def operations(gpu=False, sizes=SIZES, names=("edit", "edit_add_rms_norm", "edit_add_layer_norm")):
    cases = [
        operation_case(name, dtype, rows, width, gpu)
        for name in names
        for dtype in ("bf16", "fp32")
        for rows, width in sizes
    ]
    host = {
        "operation": "edit",
        "rows": 512,
        "width": 768,
        "dtype": "bf16",
        "seconds": {"forward": {"cuda" if gpu else "cpu": timing(1.2e-5), "eager": timing(1.5e-5)}},
    }
    return frame("ops", cases, gpu, host=[host])


def step_case(model, length, base, gpu=False):
    return {
        "model": model,
        "dtype": "bf16",
        "batch": 4,
        "length": length,
        "seconds": {method: timing(base * over) for method, (over, _) in STEPS.items()},
        "peak_bytes": {method: int(3e9 * over**2) for method, (over, _) in STEPS.items()},
        "trainable": {method: count for method, (_, count) in STEPS.items()},
        "parameters": 134_515_008,
        "tokens": 4 * length,
        "left_out": {},
    }


def steps(gpu=False):
    cases = [step_case("SmolLM2-135M", 256, 1.6), step_case("all-MiniLM-L6-v2", 128, 0.11)]
    if gpu:
        cases = [step_case("Llama-2-7B", 1024, 1.1), step_case("RoBERTa-base", 512, 0.05), *cases]
    return frame("step", cases, gpu)


def growth(gpu=False):
    fixed = {"layers": 6, "width": 576, "batch": 4, "length": 128, "edits": 1}
    axes = {"layers": (2, 4, 8, 16), "width": (256, 512, 1024), "tokens": (128, 512, 2048, 8192), "edits": (1, 16, 256)}
    methods = {"frozen-fused": 1.0, "red": 1.01, "naive": 1.2, "lora-all": 1.4}
    cases = []
    for axis, values in axes.items():
        for value in values:
            own = {**fixed, "edits": value} if axis == "edits" else {**fixed}
            if axis == "tokens":
                own["batch"] = value // 128
            elif axis in own:
                own[axis] = value
            time = 0.01 * value ** (0.1 if axis == "edits" else 1)
            seconds = {method: timing(time * over) for method, over in methods.items()}
            case = {"axis": axis, "value": value, **own, "seconds": seconds, "left_out": {}}
            if axis == "edits" and value > 16:
                del seconds["lora-all"]
                case["left_out"] = {"lora-all": "PEFT trains one adapter at a time"}
            case["peak_bytes"] = {method: int(5e7 * value ** (0.2 if axis == "edits" else 0.8)) for method in seconds}
            cases.append(case)
    return frame("growth", cases, gpu)


def quality_case(task, method, mean, spread, metric):
    return {
        "task": task,
        "method": method,
        "learning_rates": {"0.001": 0.5, "0.01": 0.4},
        "chosen": 0.01,
        "runs": [{"seed": seed, "score": mean, "loss": 0.4, "validation": course(seed)} for seed in range(5)],
        "mean": mean,
        "spread": spread,
        "metric": metric,
        "trainable": 4608,
        "steps": 400,
        "search_steps": 100,
        "products": "fp32",
        "batch": 16,
        "length": 64,
        "train_items": 700,
        "validation_items": 70,
        "test_items": 200,
        "peak_bytes": 2**20 * 55,
    }


def course(seed):
    """Of a training: its loss on the validation part falls, and comes to rest."""
    return [
        {"step": step, "seconds": step / 10, "score": 70.0, "loss": 0.5 - 0.001 * min(step, 300) + 0.01 * seed}
        for step in (100, 200, 300, 400)
    ]


def quality():
    scores = {
        "base": 50.0,
        "red": 78.2,
        "naive": 78.1,
        "lora-all": 78.9,
        "ia3": 76.3,
        "linear-probe": 74.0,
        "full": 80.1,
    }
    losses = {"base": 15.0, "red": 11.4, "naive": 11.4, "lora-all": 11.25, "ia3": 12.0, "full": 11.0}
    return frame(
        "quality",
        [quality_case("sentiment", name, mean, 0.4, "accuracy") for name, mean in scores.items()]
        + [quality_case("language-modelling", name, mean, 0.1, "perplexity") for name, mean in losses.items()],
    )


def everything(gpu=False):
    return {"ops": operations(gpu), "step": steps(gpu), "growth": growth(gpu), "quality": quality()}


def write(folder, contents):
    """Write files of results into a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for job, content in contents.items():
        (folder / f"{job}.json").write_text(json_by_line(content))
    return folder
