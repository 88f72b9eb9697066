"""lmms-eval's benchmarks on an exported model.

    python -m training.lmms_eval_adapter --model tokenflex --batch_size 8 \\
        --model_args pretrained=exported/mine,num_image_tokens=144 --output_path runs/benchmarks \\
        --tasks mmstar,ocrbench,ai2d,hallusion_bench_image,mmbench_en_dev,mmvet,mmmu_val

is lmms-eval's own command line with this model registered. From other folders, and in scripts that
call `lmms-eval`, the plugin variable does it:

    PYTHONPATH=path/of/this/checkout LMMS_EVAL_PLUGINS=training.lmms_eval_adapter lmms-eval ...

lmms-eval has many requirements of its own: give it an environment of its own, with filelock < 4 for
lmms-eval 0.7.3. `make extras` makes .venv-lmms with what the evaluator itself imports, enough for
tasks whose code asks for nothing more.

A question that cannot be asked (a prompt longer than the context, a picture that does not open)
gets an empty answer, is named, and counted at the end; more than max_failed_fraction of them end
the run. Whatever ends it gives an exit code that is not 0.
"""

import sys
from typing import Any

from data_pipeline.cli import run_cli
from data_pipeline.errors import InputError
from training.lmms_eval_adapter.adapter import manifest


def main() -> None:
    """lmms-eval's command line; it ends with exit code 0 after an exception, and this does not."""
    try:
        from lmms_eval import __main__ as command
        from lmms_eval.models import MODEL_REGISTRY_V2
    except ImportError as error:
        raise InputError(
            f"this needs lmms-eval ({error}); install it with: pip install lmms-eval (into an "
            "environment of its own: it asks for many packages)"
        ) from error
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    run, failures = command.cli_evaluate_single, []

    def watched(options: Any) -> Any:
        try:
            if not options.tasks:
                raise InputError("there are no --tasks; --tasks list names those that there are")
            return run(options)
        except Exception as error:
            failures.append(error)
            raise

    command.cli_evaluate_single = watched
    try:
        command.cli_evaluate()
    finally:
        command.cli_evaluate_single = run
    for failure in failures:
        if isinstance(failure, InputError):
            raise failure
        print(f"error: the evaluation failed: {failure!r}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
