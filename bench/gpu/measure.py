"""Measures the cases of one part, in a process that may be ended at any time.

    python -m bench.gpu.measure contrast --folder FOLDER --until SECONDS [--full]

Every provider's value and gradient are compared with float64 before it is timed. What has its row is not measured
again. Exits with OUT_OF_TIME when cases are left, and with DEVICE_LOST when a provider broke the device's context.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from bench import results
from bench.cases import DEVICE, MODES, Case
from bench.clock import between, mark
from bench.gpu.cases import PARTS
from bench.gpu.child import DEVICE_LOST
from bench.gpu.store import Store, about, fingerprint, key, stored
from bench.results import Row
from bench.tables import milliseconds
from bench.timing import Call, failure, time_rounds

OUT_OF_TIME = 75
RATES = "device rates"
TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 5e-2}  # ‖found − truth‖ / ‖truth‖
REPLAYED = 8  # calls in one graph, at least
REHEARSED = ("hsv", "eager")

Failures = dict[str, tuple[str, str]]


class DeviceLost(Exception):
    """A provider broke the context of the device: nothing runs in this process any more. Provider and reason."""


class Replays:
    """CUDA graphs of a call, forward and both directions, over all of its sets of inputs."""

    def __init__(self, call: Call) -> None:
        self.calls = len(call.sets) * -(-REPLAYED // len(call.sets))
        self.graphs = {f"{mode}, graph": self._capture(call, mode) for mode in ("forward", "both")}

    def _capture(self, call: Call, mode: str) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for inputs in call.sets:
                self._once(call, inputs, mode)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(self.calls):
                self._once(call, call.sets[i % len(call.sets)], mode)
        return graph

    @staticmethod
    def _once(call: Call, inputs: tuple[Tensor, ...], mode: str) -> None:
        with call.around(), torch.set_grad_enabled(mode == "both"):
            value = call.function(*inputs)
            if mode == "both":
                call.gradients(value, inputs, call.gradient_of(value))

    def __call__(self, kind: str) -> tuple[dict[str, float], None]:
        """Seconds of one call by mode."""
        seconds = {}
        for mode, graph in self.graphs.items():
            begin = mark()
            graph.replay()
            seconds[mode] = between(begin, mark()) / self.calls
        return seconds, None


def compare(case: Case, call: Call) -> dict[str, float]:
    """Relative errors of value and gradients of a first call; raises ValueError beyond the tolerance."""
    inputs = call.sets[0]
    with call.around():
        value = call.function(*inputs)
        upstream = call.gradient_of(value)
        found = [value.detach(), *call.gradients(value, inputs, upstream)]
    errors = [relative(x, t) for x, t in zip(found, case.truth(inputs, upstream), strict=True)]
    if not all(error <= TOLERANCE[case.products] for error in errors):
        raise ValueError(f"not the reference's value and gradients: relative errors {[f'{e:.1e}' for e in errors]}")
    return {"value_error": errors[0], "gradient_error": max(errors[1:])}


def relative(x: Tensor, truth: Tensor) -> float:
    """‖x − truth‖ / ‖truth‖; NaN is no number that a tolerance lets pass."""
    if x.shape != truth.shape:
        return float("inf")
    truth = truth.double()
    return ((x.double() - truth).norm() / truth.norm()).item()


def prepare(case: Case, names: list[str], failures: Failures) -> tuple[dict[str, Call], dict[str, Row]]:
    """Warm calls whose results are right, and what each row says of them; `failures` takes the others."""
    calls, facts = {}, {}
    for name in names:
        try:
            call = Call(case, case.providers[name])
            compared = case.truth and case.providers[name].compared
            facts[name] = compare(case, call) if compared else {}
            for kind in (kind for kind in case.kinds if kind != "graph"):
                call(kind)
                facts[name][kind] = extra_bytes(call, kind)
            calls[name] = call
        except Exception as error:
            failures[name] = failure(error)
        if name in failures:  # outside of the handler, which keeps what the failed call allocated
            recover(name, failures[name][1])
    return calls, facts


def extra_bytes(call: Call, kind: str) -> int | None:
    """How far a call's peak rises above what was there before it, gradients included."""
    if DEVICE == "cpu":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(kind)
    return torch.cuda.max_memory_allocated() - before


def recover(provider: str, reason: str) -> None:
    """Frees what a failed provider held; raises DeviceLost if the device answers no more."""
    if DEVICE == "cpu":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(provider, reason) from error


def measure_case(case: Case, store: Store, rates: dict[str, float], kinds: list[str], names: list[str]) -> None:
    """Measures what lacks rows and appends them, one kind after the other."""
    torch.compiler.reset()
    torch.set_float32_matmul_precision("high" if case.products == "tf32" else "highest")
    kinds = [kind for kind in kinds if any(store.lacks(case, kind, name) for name in names)]
    names = [name for name in names if any(store.lacks(case, kind, name) for kind in kinds)]
    failures: Failures = {}
    try:
        calls, facts = prepare(case, names, failures)
        for kind in kinds:
            failed, callers = dict(failures), dict(calls)
            if kind == "graph":
                callers = captured(calls, failed)
            measured = time_rounds(case, kind, callers, lambda: rates, failed)
            if culprit := next((name for name in failed if name not in failures), None):
                recover(culprit, failed[culprit][1])
            for mode in MODES[kind]:
                for name in names:
                    extra = {"extra_bytes": facts.get(name, {}).get(kind), "extra_predicted": False}
                    errors = {k: v for k, v in facts.get(name, {}).items() if k.endswith("_error")}
                    store.append(results.timing_row(case, mode, name, measured) | extra | errors)
                    say(store.rows[key(about(case, mode, name))], case)
    except DeviceLost as lost:
        provider, reason = lost.args
        append_failure(store, case, provider, f"{reason} (the device answered no more)")
        raise


def captured(calls: dict[str, Call], failures: Failures) -> dict[str, Replays]:
    """Graphs of the calls; `failures` takes those that cannot be captured."""
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = Replays(call)
        except Exception as error:
            status, reason = failure(error)
            failures[name] = status, f"not captured in a CUDA graph: {reason}"
        if name in failures:
            recover(name, failures[name][1])
    return graphs


def append_failure(store: Store, case: Case, provider: str | None, reason: str) -> None:
    """A row for each mode that a provider, or every one, has none of."""
    for name in [provider] if provider else list(case.providers):
        for kind in case.kinds:
            for mode in MODES[kind]:
                if store.lacks(case, kind, name):
                    row = about(case, mode, name) | {"note": case.providers[name].note}
                    store.append(row | {"status": "failed", "reason": reason, "extra_bytes": None})


def say(row: Row, case: Case) -> None:
    if row["status"] != "ok":
        what = f"{row['status']}: {row['reason']}"
    elif DEVICE == "cpu":
        errors = [f"{row[name]:.1e}" for name in ("value_error", "gradient_error") if name in row]
        what = f"ran; relative errors {' and '.join(errors)}" if errors else "ran"
    else:
        share = f", {row['fraction']:.0%} of the limit" if row.get("fraction") else ""
        what = f"{milliseconds(row['median_s'])} ms{share}"
    print(f"{case.title}, {row['mode']}: {row['provider']} {what}", flush=True)


def rates_of(store: Store) -> dict[str, float]:
    """The device's rates: measured by this code before, or now."""
    if DEVICE == "cpu":
        return {}
    if not store.find(RATES):
        from bench.gpu.rates import device_rates

        row = {"operation": RATES, "shape": {}, "products": "", "mode": "", "provider": "device", "note": ""}
        store.append(row | {"status": "ok", "reason": "", "rates": device_rates()})
    return store.find(RATES)[0]["rates"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, required=True, help="takes rows.jsonl; what is there is not measured")
    parser.add_argument("--until", type=float, required=True, help="begin no case after this time, seconds since 1970")
    parser.add_argument("--full", action="store_true", help="every dimension, and float32")
    options = parser.parse_args()
    store = stored(options.folder, results.origin() | {"code": fingerprint()})
    rates = rates_of(store)
    rehearsal = DEVICE == "cpu"
    begun = options.folder / "begun.json"
    for case in PARTS[options.part](options.full):
        names = [name for name in case.providers if not rehearsal or name in REHEARSED]
        kinds = [kind for kind in case.kinds if not rehearsal or kind != "graph"]
        if not any(store.lacks(case, kind, name) for kind in kinds for name in names):
            continue
        if time.time() > options.until:
            return OUT_OF_TIME
        begun.write_text(json.dumps({"title": case.title, "time": time.time()}))
        try:
            measure_case(case, store, rates, kinds, names)
        except DeviceLost:
            return DEVICE_LOST
        finally:
            begun.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
