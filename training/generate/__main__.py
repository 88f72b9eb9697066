"""Ask an exported model about images, at any token count.

python -m training.generate MODEL --image a.jpg --prompt "What is this?" --num-image-tokens 64
python -m training.generate MODEL --image a.jpg --prompt "..." --compare 64 144 256
python -m training.generate MODEL --image a.jpg --chat
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TextStreamer

from data_pipeline.cli import at_least, command_parser, run_cli
from data_pipeline.errors import InputError
from data_pipeline.paths import path_argument
from training.generate import (
    Answer,
    LoadedModel,
    add_model_arguments,
    generate_answer,
    load_asked,
)
from training.generate.answer import prepare_messages, stats_line
from training.generate.comparison import compare, comparison
from training.generate.conversation import Conversation, user_message

CHAT_HELP = """\
/image PATH  show an image with the next question    /tokens N  vision tokens per tile
/reset       begin again                             /quit      end"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; InputError for everything the user can set right."""
    options = _parse(arguments)
    for path in options.image:
        if not path.is_file():
            raise InputError(f"--image {path} is not a file")
    if not options.chat and options.prompt is None:
        raise InputError("give --prompt, or --chat for a conversation")
    if options.chat and options.compare:
        raise InputError("--compare answers one --prompt; leave out --chat")
    loaded = load_asked(options, options.device)
    count = options.num_image_tokens or int(loaded.processor.num_image_tokens)
    if options.compare:
        counts = loaded.check_counts(options.compare, "--compare")
        messages = [user_message(options.prompt, options.image)]
        print(comparison(dict(compare(loaded, messages, counts, options.max_new_tokens))))
        return
    loaded.check_counts([count])
    if options.chat:
        chat(loaded, options.image, count, options.max_new_tokens, options.prompt, options.stats)
        return
    message = user_message(options.prompt, options.image)
    _say(loaded, [message], count, options.max_new_tokens, options.stats)


def chat(
    loaded: LoadedModel,
    images: Sequence[Path],
    count: int,
    max_new_tokens: int,
    first: str | None = None,
    stats: bool = False,
) -> None:
    """Questions from standard input and answers to standard output, until /quit or its end."""
    talk = Conversation([], count)
    for image in images:
        talk.show(image)
    print(CHAT_HELP, file=sys.stderr)
    while (line := first if first is not None else _read_line()) is not None:
        first = None
        try:
            if line.startswith("/"):
                if not talk.command(line, loaded):
                    return
            elif line.strip():
                messages = talk.ask(line)
                answer = _say(loaded, messages, talk.num_image_tokens, max_new_tokens, stats)
                talk.answered(messages, answer.text)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def _say(
    loaded: LoadedModel, messages: Sequence[Any], count: int, max_new_tokens: int, stats: bool
) -> Answer:
    """Answer on standard output, word by word; what it cost on standard error."""
    inputs = prepare_messages(loaded, messages, count)
    streamer = TextStreamer(loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = generate_answer(loaded, inputs, max_new_tokens, streamer)
    if not answer.ended:
        limit = f"--max-new-tokens {max_new_tokens}"
        if answer.generated < max_new_tokens:
            limit = f"{answer.generated} tokens, where the context of {loaded.context} ends"
        print(f"(cut off after {limit})", file=sys.stderr)
    if stats:
        print(stats_line(answer), file=sys.stderr)
    return answer


def _read_line() -> str | None:
    """A line of standard input; None at its end."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("training.generate", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU if there is one)")
    parser.add_argument(
        "--image",
        type=path_argument,
        action="append",
        default=[],
        metavar="FILE",
        help="may be repeated",
    )
    parser.add_argument(
        "--prompt", help="<image> says where an image goes; without, images come first"
    )
    parser.add_argument(
        "--num-image-tokens", type=int, metavar="N", help="per tile, a square (default: MODEL's)"
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), default=512, metavar="N", help="(512)"
    )
    parser.add_argument("--chat", action="store_true", help="ask further; see /quit and the like")
    parser.add_argument(
        "--stats", action="store_true", help="print time to first token and tokens/s"
    )
    parser.add_argument(
        "--compare", nargs="+", type=int, metavar="N", help="answer at each of these counts"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_cli(main)
