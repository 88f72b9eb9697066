"""Where a step's time and memory go: named phases, a trace of chosen steps, what to do when out of
memory."""

from training.profiling.out_of_memory import explain_out_of_memory
from training.profiling.step_phases import phase
from training.profiling.step_profiler import StepProfiler

__all__ = ["StepProfiler", "explain_out_of_memory", "phase"]
