"""What is printed of a measurement: a table per case, and the targets."""

from collections import Counter
from collections.abc import Sequence

from kernels.aligned_text import aligned
from kernels.profile.bench import CaseResult, Measured
from kernels.profile.providers import PROVIDERS
from kernels.profile.results import speedup, worst
from kernels.profile.roofline import floor_s, model_flops
from kernels.profile.targets import Target
from kernels.profile.timing import Timing

LABELS = {"forward": "forward", "backward": "backward", "both": "fwd+bwd"}


def format_case(result: CaseResult) -> str:
    """Times with their 20 % and 80 % quantiles, ratios of one mode, memory, error."""
    case = result.case
    modes = [m for m in LABELS if any(m in found.timings for found in result.measured.values())]
    lines = [
        f"{case.name}: {case.rows} tokens, {model_flops(case, 'forward') / 1e9:.0f} GFLOP forward"
        + (", x without gradient" if result.frozen else "")
    ]
    if modes:
        main = modes[-1]
        header = [
            "",
            *(f"{LABELS[mode]} ms (y20 .. y80)" for mode in modes),
            *(f"{LABELS[main]}: vs loop", "vs eager", "vs compile", "TFLOP/s", "roofline"),
            *("host ms", "saved MB", "peak MB", "error", "gradients'"),
        ]
        rows = [
            _case_row(result, name, found, modes, main)
            for name, found in result.measured.items()
            if main in found.timings
        ]
        lines.append(aligned([header, *rows]))
    if result.noise:
        ratios = ", ".join(f"{LABELS[mode]} {ratio:.3f}" for mode, ratio in result.noise.items())
        lines.append(f"A/A, {result.repeated} timed again after all others: {ratios}")
    if result.pool_norm:
        lines.append(f"pool + norm kernel alone: {_timing(result.pool_norm)} ms")
    lines += [f"{name} FAILED: {why}" for name, why in result.failed.items()]
    return "\n".join(lines)


def _case_row(
    result: CaseResult, name: str, found: Measured, modes: Sequence[str], main: str
) -> list[str]:
    seconds, memory = found.timings[main].median_ms / 1e3, found.memory
    floor = floor_s(result.case, "fused", main, result.peaks, result.frozen)
    return [
        name,
        *(_timing(found.timings[mode]) for mode in modes),
        *(
            _ratio(speedup(result, other, name, main))
            for other in ("eager_loop", "eager_grouped", "compile")
        ),
        f"{model_flops(result.case, main) / seconds / 1e12:.0f}",
        f"{floor / seconds:.0%}",
        f"{found.timings[main].host_ms:.3f}",
        f"{(memory.saved + memory.saved_x) / 1e6:.0f}",
        "-" if memory.peak is None else f"{memory.peak / 1e6:.0f}",
        f"{found.errors['out']:.1e}",
        f"{worst(error for of, error in found.errors.items() if of != 'out'):.1e}",
    ]


def _timing(timing: Timing) -> str:
    return f"{timing.median_ms:.3f} ({timing.y20_ms:.3f} .. {timing.y80_ms:.3f})"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


EXPLANATION = """\
vs: how many times faster, side by side in this run; eager is eager_grouped. roofline: time of
perfect fusion at the measured ceilings over time taken. host ms: what issuing one call costs the
host; where it is above the time, the host is the limit. saved: what autograd keeps for backward, x
included where it is kept. error: of the result against float64, gradients': of the worst gradient.
A ratio closer to 1 than A/A is noise."""


def format_targets(targets: Sequence[Target]) -> str:
    """Every target with what was measured."""
    verdicts = {True: "met", False: "NOT MET", None: "not measured"}
    rows = [
        [
            target.case,
            target.what,
            f"{'>=' if target.at_least else '<='} {target.limit:g}",
            "-" if target.measured is None else f"{target.measured:.3g}",
            verdicts[target.met],
        ]
        for target in targets
    ]
    count = Counter(target.met for target in targets)
    return (
        aligned([["targets", "", "limit", "measured", ""], *rows])
        + f"\n{count[True]} met, {count[False]} not met, {count[None]} not measured"
    )


def format_providers() -> str:
    """Name and meaning of every provider."""
    return "\n".join(f"  {p.name:<14} {p.says}" for p in PROVIDERS.values())
