"""Accuracy against trainable parameters, FacT beside other methods, each tuned with the same budget.

    python -m benchmarks.frontier --backbone facebook/dinov2-small --data FOLDER    # measures what is missing
    python -m benchmarks.frontier --output RESULTS --write PAGE                     # tables and plot of what there is
    python -m benchmarks.frontier ... --image_size 70 --precision bfloat16          # on a CPU
    python -m benchmarks.frontier ... --choose_on dtd10 rsscn7 yaleb-azimuth        # no search on the other tasks
    python -m benchmarks.frontier.toy --data FOLDER                                 # a small ViT on made tasks

A backbone is any model of the Hub, or folder, that AutoModelForImageClassification takes. FOLDER holds tasks, each as
NAME-train.parquet, NAME-val.parquet and NAME-test.parquet with the columns image ({"bytes": ...}) and label; what kind
a task is (natural, specialised, structured) is known of some, or said in FOLDER/kinds.json, {name: kind}.

Every method gets the same number of trials of its learning rate with the first seed, and what is best on the
validation images is run with the other seeds; the test images choose nothing. Without --choose_on every task is
searched. With it, the tasks named there are searched together and the others run at what came out.

Each run is a record in RESULTS/TASK.json; a run that is there is not repeated, so that a command that was interrupted
goes on, and processes can share RESULTS if each has tasks of its own. PAGE gets the tables between the lines
"<!-- begin: python -m benchmarks.frontier --output RESULTS -->" and "<!-- end: ... -->".
"""

import argparse

from tqdm.auto import tqdm

from benchmarks.frontier.command_line import frontier_parser, measurements_of, parse
from benchmarks.frontier.methods import METHODS
from benchmarks.frontier.plot import plot
from benchmarks.frontier.report import chosen, fixed, panels, read, report
from benchmarks.frontier.search import Protocol
from benchmarks.frontier.tasks import KINDS, kinds, task_names
from benchmarks.reporting.markdown import write_generated


def measure(args: argparse.Namespace) -> None:
    """Run what is missing of the tasks and methods of the command line."""
    protocol = Protocol(args.epochs, args.batch_size, args.trials, args.num_seeds, tuple(args.rates))
    tasks = args.tasks or task_names(args.data)
    num_searched = len(args.choose_on or tasks) * protocol.trials
    num_others = len(set(tasks) - set(args.choose_on)) * (protocol.num_seeds - (not args.choose_on))
    with tqdm(total=len(args.methods) * (num_searched + num_others), desc="runs", smoothing=0.1) as progress:
        measurements = measurements_of(args, protocol, progress)
        for name in args.methods:
            if args.choose_on:
                measurements.fixed(args.choose_on, tasks, name, METHODS[name])
            else:
                for task in tasks:
                    measurements.searched(task, name, METHODS[name])


def main() -> None:
    parser = frontier_parser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", help="(default: all in --data)")
    names = ", ".join(METHODS)
    add(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=f"(default: all) {names}"
    )
    add("--choose_on", nargs="+", default=[], metavar="TASK", help="no search but on these tasks, together")
    add("--trials", type=int, default=Protocol().trials, help="learning rates tried (default: %(default)s)")
    add("--rates", nargs="+", type=float, default=[], metavar="RATE", help="try these instead of searching")
    add("--num_seeds", type=int, default=Protocol().num_seeds, help="seeds of what was chosen (default: %(default)s)")
    args = parse(parser, "frontier")
    args.trials = len(args.rates) or args.trials
    if args.trials < 2:
        parser.error(f"--trials is {args.trials}, but what was run at one rate does not count as searched; ask for 2.")
    if args.data is not None:
        measure(args)
    runs = read(args.output)
    kind_of = KINDS if args.data is None else kinds(args.data)
    text = report(runs, kind_of, args.choose_on)
    print(text)
    without_search = fixed(runs, args.choose_on)
    shown = chosen(runs) if without_search.empty else without_search
    plot(panels(shown, kind_of), METHODS, args.output / "frontier.png")
    if args.write is not None:
        write_generated(args.write, f"python -m benchmarks.frontier --output {args.output}", text)


if __name__ == "__main__":
    main()
