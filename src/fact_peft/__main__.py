"""``python -m fact_peft``: show, convert, merge and export adapters. ``--help`` lists the commands."""

import argparse
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .adapter.adapter import Adapter
from .adapter.files import find_folder
from .adapter.names import for_terminal
from .converters.conversion import convert_checkpoint
from .converters.source_formats import FORMATS
from .operations.export import export_onnx
from .operations.inspection import describe, draw_increments
from .sharing.classifier import load_image_classifier


def main() -> None:
    arguments = parser().parse_args()
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        line = " ".join(str(error).split())
        raise SystemExit(for_terminal(f"python -m fact_peft: {line or type(error).__name__}")) from error


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fact_peft", description="Show, convert, merge and export adapters."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("show", help="print what a saved adapter holds")
    command.add_argument("adapter", help="folder of the adapter, or its name on the Hub")
    command.add_argument("--map", type=Path, metavar="PNG", help="draw ||dW|| by block and matrix to this file")
    command.set_defaults(run=show)

    command = commands.add_parser("convert", help="convert a checkpoint of another implementation of FacT, exactly")
    command.add_argument("file", help="the checkpoint; pickles are read as tensors alone")
    command.add_argument("out", help="folder of the adapter to write")
    command.add_argument("--from", dest="source_format", required=True, choices=FORMATS, help="which implementation")
    command.add_argument("--scale", type=float, help="the factor s of the run, where the checkpoint does not store it")
    command.add_argument(
        "--leave-out", nargs="+", default=[], metavar="WORD", help="drop tensors with such a word in their names"
    )
    command.set_defaults(run=convert)

    for run, saved_as, out in (
        (merge, "one model of transformers or timm", "folder of the model to write"),
        (export, "one ONNX file", "the .onnx file to write"),
    ):
        command = commands.add_parser(run.__name__, help=f"save base model and adapter as {saved_as}")
        command.add_argument("adapter", help="folder of the adapter, or its name on the Hub")
        command.add_argument("out", type=Path, help=out)
        command.add_argument("--base-model", help="name or folder of the base model, if not the one the adapter names")
        command.set_defaults(run=run)
    return parser


def show(arguments: argparse.Namespace) -> None:
    folder = find_folder(arguments.adapter, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
    adapter = Adapter.read(folder)
    print(describe(adapter, folder))
    if arguments.map:
        draw_increments(adapter.increment_norms(), arguments.map)
        print(f"map         {arguments.map}")


def convert(arguments: argparse.Namespace) -> None:
    convert_checkpoint(arguments.file, arguments.out, arguments.source_format, arguments.scale, arguments.leave_out)
    print(describe(Adapter.read(arguments.out), Path(arguments.out)))


def merge(arguments: argparse.Namespace) -> None:
    model, image_processor = load_image_classifier(arguments.adapter, base_model=arguments.base_model)
    labels = model.active_peft_config.labels
    merged = model.merge_and_unload(safe_merge=True)
    if hasattr(merged, "save_pretrained"):
        merged.save_pretrained(arguments.out)
        image_processor.save_pretrained(arguments.out)
    else:
        from timm.models import save_for_hf  # not every user of the package has timm

        named, data_config = {"label_names": labels}, getattr(image_processor, "data_config", None)
        save_for_hf(merged, arguments.out, model_config=named, data_config=data_config, safe_serialization=True)
    print(f"merged model  {arguments.out}")


def export(arguments: argparse.Namespace) -> None:
    model, image_processor = load_image_classifier(arguments.adapter, base_model=arguments.base_model)
    export_onnx(model.merge_and_unload(safe_merge=True), image_processor, arguments.out)
    print(f"ONNX model  {arguments.out}")


if __name__ == "__main__":
    main()
