"""PEFT's own tests of custom models, with rows for FacT.

    python -m benchmarks.peft_suite CHECKOUT

CHECKOUT is a checkout of github.com/huggingface/peft. Its `tests` are copied, rows for FacT are added to the lists in
`test_custom_models.py`, and the tests of these rows and of the plain LoRA rows are run against the installed PEFT.
Printed is how many of each pass, and which tests fail for FacT only.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROWS = """
    ("Vanilla MLP 1 FacT", "MLP", FacTConfig, {"rank": 2, "scale": 1.0, "target_modules": "lin0"}),
    ("Vanilla MLP 2 FacT", "MLP", FacTConfig, {"rank": 2, "scale": 1.0, "target_modules": ["lin0"]}),
    ("Vanilla MLP 3 FacT", "MLP", FacTConfig, {"rank": 2, "scale": 1.0, "target_modules": ["lin1"]}),
    ("Vanilla MLP 4 FacT", "MLP", FacTConfig, {"rank": 2, "scale": 1.0, "target_modules": ["lin0", "lin1"]}),
    (
        "Vanilla MLP 5 FacT",
        "MLP",
        FacTConfig,
        {"rank": 2, "scale": 1.0, "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
    (
        "Vanilla MLP 6 FacT",
        "MLP",
        FacTConfig,
        {"rank": 2, "scale": 1.0, "target_modules": ["lin0"], "decomposition": "tk"},
    ),
    (
        "Vanilla MLP 7 FacT",
        "MLP",
        FacTConfig,
        {"rank": 2, "scale": 1.0, "target_modules": ["lin0"], "fact_dropout": 0.1},
    ),
"""
PAIRS = """
    (
        "FacT Same",
        "fact",
        FacTConfig,
        {"rank": 2, "scale": 1.0, "target_modules": ["lin0"], "init_weights": False},
        {"rank": 2, "scale": 1.0, "target_modules": ["lin0"], "init_weights": False},
    ),
    (
        "FacT Different",
        "fact",
        FacTConfig,
        {"rank": 2, "scale": 1.0, "target_modules": ["lin0"], "init_weights": False},
        {"rank": 2, "scale": 1.0, "target_modules": ["lin1"], "init_weights": False},
    ),
"""
SELECTED = "FacT or LoRA-MLP or [LoraConfig] or -LoraConfig]"
FACT, LORA = re.compile("FacT"), re.compile(r"LoRA-MLP|[-[]LoraConfig\]")


def with_rows(text: str) -> str:
    """The text of ``test_custom_models.py`` with rows for FacT."""
    text = text.replace("\nTEST_CASES = [", f"\nfrom fact_peft import FacTConfig\n\nTEST_CASES = [{ROWS}", 1)
    return text.replace(
        "\nMULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [", f"\nMULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [{PAIRS}", 1
    )


def run(checkout: Path, jobs: int) -> dict[str, str]:
    """The outcome of every test of a row of FacT or LoRA, by its name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(checkout / "tests", folder / "tests")
        (folder / "pytest.ini").write_text("[pytest]\n")  # theirs asks for plugins
        file = folder / "tests" / "test_custom_models.py"
        file.write_text(with_rows(file.read_text()))
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(file),
            "-q",
            "-k",
            SELECTED,
            "-n",
            str(jobs),
        ]
        subprocess.run(
            [*command, "-p", "no:cacheprovider", f"--junitxml={folder / 'report.xml'}"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
        )
        outcomes = {}
        for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcomes[case.attrib["name"]] = kinds.pop() if kinds else "passed"
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of github.com/huggingface/peft")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run tests (default: 1)")
    arguments = parser.parse_args()
    outcomes = run(arguments.checkout, arguments.jobs)
    for title, pattern in (("FacT", FACT), ("LoRA", LORA)):
        counts = Counter(outcome for name, outcome in outcomes.items() if pattern.search(name))
        print(f"{title}: {', '.join(f'{counts[kind]} {kind}' for kind in ('passed', 'skipped', 'failure', 'error'))}")
    failures = {
        title: Counter(
            name.partition("[")[0]
            for name, outcome in outcomes.items()
            if pattern.search(name) and outcome in ("failure", "error")
        )
        for title, pattern in (("FacT", FACT), ("LoRA", LORA))
    }
    print("Tests that fail for FacT:")
    for test, count in failures["FacT"].most_common():
        print(f"  {count} {test}{' (for LoRA too)' if test in failures['LoRA'] else ''}")


if __name__ == "__main__":
    main()
