"""The plan: which samples go into which pack of which step."""

from data_pipeline.plan.count import count_steps, same_window
from data_pipeline.plan.evaluation import EvaluationPlan
from data_pipeline.plan.pack_settings import PackSettings
from data_pipeline.plan.parts import LeftOut, PackPlan, StepPlan, WindowPlan, steps_of
from data_pipeline.plan.planner import PLAN_VERSION, Planner
from data_pipeline.plan.state import PlanState

__all__ = [
    "PLAN_VERSION",
    "EvaluationPlan",
    "LeftOut",
    "PackPlan",
    "PackSettings",
    "PlanState",
    "Planner",
    "StepPlan",
    "WindowPlan",
    "count_steps",
    "same_window",
    "steps_of",
]
