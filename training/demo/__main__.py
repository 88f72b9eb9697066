"""A page to try an exported model: image, question, a slider over the token counts, a comparison.

    python -m training.demo MODEL                      # http://127.0.0.1:7860

Needs Gradio, an optional extra: pip install gradio. Every visitor can have the model compute, so
the page listens on this machine only, unless --host says otherwise.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_pipeline.cli import at_least, command_parser, run_cli
from data_pipeline.errors import InputError
from data_pipeline.paths import path_argument
from training.demo.example_pictures import draw_examples, examples_in
from training.demo.gradio_page import build_page
from training.generate import add_model_arguments, load_asked

_MAX_FILE = "20mb"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; InputError for everything the user can set right."""
    options = _parse(arguments)
    gradio = _import_gradio()
    with TemporaryDirectory() as folder:
        examples = (
            examples_in(options.examples) if options.examples else draw_examples(Path(folder))
        )
        loaded = load_asked(options, options.device)
        page = build_page(gradio, loaded, examples, options.max_new_tokens)  # copies the examples
    try:
        page.queue(max_size=16, default_concurrency_limit=1).launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            max_file_size=_MAX_FILE,
            allowed_paths=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise InputError(
            f"cannot listen on {options.host} port {options.port}: {error}; give another --port"
        ) from error
    print(f"{loaded.source}: http://{options.host}:{options.port}", flush=True)
    page.block_thread()


def _import_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise InputError(
            f"the page needs Gradio ({error}); install it with: pip install gradio (into an "
            "environment of its own where its Pillow is not the one of requirements.txt)"
        ) from error
    return gradio


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("training.demo", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU if there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=at_least(1), default=7860, metavar="N", help="(7860)")
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), default=256, metavar="N", help="(256)"
    )
    parser.add_argument(
        "--examples",
        type=path_argument,
        metavar="DIR",
        help="pictures to begin with, the question of each in a .txt file beside it",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_cli(main)
