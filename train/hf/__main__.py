"""`stratum hf import|export|check`: convert models to and from Hugging Face's format, and check that both agree."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from data.system.imports import collector_paused
from recipes.schema.errors import USER_ERRORS
from recipes.schema.messages import complain
from recipes.schema.options import CommandParser, run_or_path

TEXT = "package:shakespeare"
"""Real text that comes with this project."""

_EXAMPLES = """
stratum hf export runs/smoke --out exports/smoke       a run's newest checkpoint -> a directory for transformers
stratum hf import exports/smoke --out imports/smoke    a directory -> a checkpoint, and a recipe that starts from it
stratum hf check runs/smoke exports/smoke              both models on real text, block by block
"""
_NOTES = """
Exit status: 0 done, and the two models agree; 1 they disagree; 2 something cannot be read, converted or written.
"""

_ERRORS: tuple[type[Exception], ...] = (*USER_ERRORS, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `stratum hf`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    parsed = _parser().parse_args(arguments)
    try:
        with collector_paused():
            from train.hf import command  # importing torch takes seconds; --help and usage errors do not need it
            from train.megatron import choose_device, use_device

        use_device(choose_device(parsed.device))
        match parsed.command:
            case "export":
                return command.export_model(parsed)
            case "import":
                return command.import_model(parsed)
            case _:
                return command.check_models(parsed)
    except _ERRORS as error:
        return complain(error)
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; all temporary files were removed.\n")
        return 130


def _parser() -> CommandParser:
    parser = CommandParser(
        "hf",
        about="Convert models to and from Hugging Face's format, and check that both agree.",
        examples=_EXAMPLES,
        notes=_NOTES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|check")

    check_options = CommandParser(add_help=False)
    group = check_options.add_argument_group("the comparison")
    group.add_argument("--text", default=TEXT, help=f"text to run on: a file, folder or glob (default: {TEXT})")
    group.add_argument("--rows", type=_positive, default=2, help="rows of text (default: 2)")
    group.add_argument(
        "--tokens", type=_positive, help="tokens of a row (default: 257, or two chunks of the scan plus one token)"
    )
    group.add_argument(
        "--check-dtype", choices=("fp32", "bf16"), default="fp32", help="format both models compute in (default: fp32)"
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="cpu", help="device both models run on (default: cpu)"
    )
    group.add_argument("--tolerance", type=float, help="largest relative error (default: 1e-4; bf16 5e-2)")
    group.add_argument(
        "--open-clamp",
        action="store_true",
        help="Nemotron-H: compare without transformers' lower bound on dt (time_step_min in config.json), as the "
        "published weights were trained",
    )
    converting = CommandParser(add_help=False)
    converting.add_argument("--out", type=Path, required=True, help="folder to create; must not exist or be empty")
    converting.add_argument("--name", help="name of the model (default: the name of --out)")
    converting.add_argument(
        "--dtype",
        choices=("keep", "fp32", "bf16"),
        default="keep",
        help="format the weights are stored in; A_log, D and dt_bias stay fp32 (default: as they are, bit for bit)",
    )
    converting.add_argument("--no-check", action="store_true", help="convert only; compare later with `check`")

    export = commands.add_parser(
        "export", parents=[converting, check_options], help="a checkpoint -> a directory that transformers loads"
    )
    export.add_argument("checkpoint", type=run_or_path, help="run (its newest checkpoint) or checkpoint folder")
    export.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: that of the run's prepared data)")
    export.add_argument("--max-positions", type=_positive, help="max_position_embeddings (default: data.row_tokens)")
    export.add_argument("--vocab", type=_positive, help="rows of the embedding to write, if ours was padded")
    export.add_argument(
        "--license", help="licence on the model card, e.g. apache-2.0 (default: that of an import, or unknown)"
    )
    export.add_argument(
        "--push", metavar="OWNER/NAME", help="also upload it to the Hugging Face hub, private if it is new"
    )
    export.add_argument(
        "--adapter",
        action="store_true",
        help="write the run's adapters (model.lora) as a directory for peft, without the weights that they adapt",
    )
    export.add_argument(
        "--quantize",
        metavar="FORMAT",
        help="quantise the linear layers: int8, int4-g32, int4-g128, fp8-block; with their inputs: int8-w8a8, fp8-w8a8",
    )
    export.add_argument(
        "--calibrate",
        metavar="ROWS",
        type=_positive,
        help="training rows to choose the codes with (GPTQ), e.g. 64; without it, weights are rounded to the nearest code",
    )
    export.add_argument(
        "--keep",
        metavar="NAME",
        nargs="+",
        help="linear layers to leave unquantised, by the last part of their names in the files, e.g. in_proj",
    )
    export.add_argument("--file-gb", type=float, default=5.0, help="largest weight file, in GB (default: 5)")

    importing = commands.add_parser(
        "import",
        parents=[converting, check_options],
        help="a directory -> a checkpoint and a recipe that starts from it",
    )
    importing.add_argument(
        "directory", type=Path, help="directory with config.json and *.safetensors, or OWNER/NAME of a model on the hub"
    )
    importing.add_argument(
        "--vocab-multiple",
        type=_positive,
        default=1,
        help="round the vocabulary up to a multiple of this, e.g. 8 for parallel.tensor=8 (default: 1)",
    )

    check = commands.add_parser("check", parents=[check_options], help="both models on real text, block by block")
    check.add_argument("checkpoint", type=run_or_path, help="run, checkpoint folder, or folder of an import")
    check.add_argument("directory", type=Path, help="directory in Hugging Face's format")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
